"""Measured speed as Records: one JSON line a measurement, with machine, commit and command."""
