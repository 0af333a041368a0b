"""The class of a kernel or an op, from its name: GEMM, attention, elementwise or reduction, collective, other.

Names are what compilers and libraries choose, so this is a table of marks, read from the top: the first mark found decides.
An op of ours is known by its name; a kernel that no mark knows takes the class of the op that launched it. Copies and
memory sets are known by their kind of event, not here. A convolution is a GEMM. Guesses nothing: without a mark, other.
"""

from __future__ import annotations

from functools import cache

from vchitect_fast.profiling.facts import ATTENTION, COLLECTIVE, ELEMENTWISE, GEMM, OTHER

# In lower case. Attention stands before GEMM because its kernels name CUTLASS, GEMM before elementwise because of epilogues.
MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (COLLECTIVE, ("nccl", "rccl", "gloo:", "mpi:", "ucc:", "c10d::", "c10d_functional::", "record_param_comms", "collective/", "allreduce",
                  "all_reduce", "allgather", "all_gather", "reducescatter", "reduce_scatter", "alltoall", "all_to_all")),
    (OTHER, ("autograd::", "backward0", "backward1", "::accumulategrad")),  # nodes: what they run has names of its own
    (ATTENTION, ("flash", "fmha", "attention", "attn", "sdpa", "vchitect_fast::spatial", "vchitect_fast::temporal",
                 "vchitect_fast::cross")),
    (ELEMENTWISE, ("splitkreduce", "batch_norm", "bn_fw", "bn_bw", "multi_tensor", "foreach", "fused_adam", "vchitect_fast::adaln", "vchitect_fast::bias_gelu",
                   "vchitect_fast::branch_sum", "vchitect_fast::gated_residual", "triton_poi", "triton_red", "triton_per")),
    (GEMM, ("gemm", "cublas", "nvjet", "cutlass", "xmma", "cudnn", "convol", "conv1d", "conv2d", "conv3d", "matmul", "addmm", "addmv", "::mm", "::bmm",
            "baddbmm", "scaled_mm", "linear", "einsum", "s16816", "s1688", "vchitect_fast::gated_weight", "triton_mm",
            "triton_tem")),
    (OTHER, ("aten::view", "aten::empty", "aten::t", "aten::as_strided", "aten::reshape", "aten::slice", "aten::select",
             "aten::expand", "aten::unsqueeze", "aten::squeeze", "aten::permute", "aten::detach", "aten::alias",
             "aten::result_type", "aten::item", "aten::split", "aten::chunk", "aten::narrow", "aten::unbind")),
    (ELEMENTWISE, ("aten::", "elementwise", "reduce", "norm", "softmax", "gelu", "copy", "fill", "cat", "index", "scatter",
                   "gather", "embedding", "distribution", "dropout", "memset", "scan", "sort", "adam", "lerp")),
)  # fmt: skip
# Names that only look like one above: aten::t is a view, aten::tanh is not.
WHOLE = {"aten::t", "aten::select", "aten::slice", "aten::item", "aten::split", "aten::chunk", "aten::squeeze"}


@cache
def kernel_class(name: str) -> str:
    """The class that the marks give, OTHER without one."""
    lower = name.lower().replace("fbgemm", "")  # a library, of which most ops are no products
    for found, marks in MARKS:
        if any(mark == lower if mark in WHOLE else mark in lower for mark in marks):
            return found
    return OTHER


def class_of(kernel: str, op: str) -> str:
    """The class of a kernel that `op` launched ("" where not known): its own name's, else the op's."""
    found = kernel_class(kernel)
    return kernel_class(op) if found == OTHER and op else found
