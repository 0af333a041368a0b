"""Measures a machine, predicts time and memory of a Workload on it, and writes the Plan that training obeys."""
