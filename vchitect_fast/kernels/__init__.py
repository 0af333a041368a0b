"""The ops of a block: one a file, forward and backward, each beside its definition in reference.py.

A function here runs what its `impl` names: "triton" (one CUDA device, or the interpreter) or "reference" (plain torch, any
device). An explicit choice never falls back. The model's default path is plain torch until a kernel has been measured.
"""
