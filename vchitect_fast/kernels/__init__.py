"""The ops of a block: one a file, forward and backward, each defined in reference.py and named in ops.py.

`from vchitect_fast.kernels import ops`, then ops.<name>(..., impl="triton") on CUDA tensors (or under the interpreter), or
impl="reference" (plain torch) on any device. An explicit choice never falls back; a module cannot share a function's name,
so the functions live in ops.py. The model's default path is plain torch until a kernel has been measured.
"""
