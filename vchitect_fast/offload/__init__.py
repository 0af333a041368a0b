"""Activation memory: what a block keeps, moves to host memory or recomputes (engine, order, groups; policy is pure)."""
