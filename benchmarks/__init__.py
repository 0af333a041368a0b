"""Measured speed as Records: one JSON line a measurement, with machine, commit and command.

`vchitect-fast bench` runs the suite, `vchitect-fast bench compare A B` holds two files against each other.
"""
