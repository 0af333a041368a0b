"""Classes of kernels by names as libraries write them."""

from __future__ import annotations

import pytest
from made_up_trace import KERNELS

from vchitect_fast.profiling.facts import ATTENTION, COLLECTIVE, ELEMENTWISE, GEMM, OTHER
from vchitect_fast.profiling.kernel_class import class_of, kernel_class


@pytest.mark.parametrize(
    ("expected", "names"),
    [
        (GEMM, ["ampere_sgemm_128x64_tn", "nvjet_hsh_128x256_64x4_2x1_v_bz_TNT", "cutlass::Kernel2<cutlass_80_tensorop_s16816gemm_bf16>",
                "aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::convolution", "mkldnn::_linear_pointwise"]),
        (ATTENTION, ["void flash::flash_fwd_kernel<cutlass::bfloat16_t>", "fmha_cutlassF_bf16_aligned_64x128_rf_sm80",
                     "cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "aten::_scaled_dot_product_flash_attention_for_cpu",
                     "vchitect_fast::temporal_forward"]),
        (ELEMENTWISE, ["void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "aten::mul", "aten::tanh", "aten::native_layer_norm",
                       "triton_poi_fused_add_mul_3", "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "aten::_fused_adamw_",
                       "void cublasLt::splitKreduce_kernel<32, 16>", "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float>"]),
        (COLLECTIVE, ["ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "gloo:all_to_all", "c10d::allreduce_", "record_param_comms",
                      "_c10d_functional::all_gather_into_tensor"]),
        (OTHER, ["fbgemm::permute_2D_sparse_data", "aten::view", "aten::t", "aten::empty_like", "AddmmBackward0", "autograd::engine::evaluate_function: MmBackward0", "_kernel", ""]),
    ],
)  # fmt: skip
def test_a_name_has_its_class(expected: str, names: list[str]) -> None:
    assert {name: kernel_class(name) for name in names} == dict.fromkeys(names, expected)


def test_the_made_up_kernels_have_the_classes_of_their_ops() -> None:
    for op, kernel, _, _ in KERNELS:
        assert kernel_class(op) == kernel_class(kernel) != OTHER


def test_a_kernel_without_a_mark_takes_the_class_of_its_op() -> None:
    assert class_of("_forward_kernel", "vchitect_fast::spatial_forward") == ATTENTION
    assert class_of("_forward_kernel", "vchitect_fast::bias_gelu_forward") == ELEMENTWISE
    assert class_of("_kernel", "vchitect_fast::gated_weight") == GEMM
    assert class_of("ampere_sgemm", "vchitect_fast::spatial_forward") == GEMM
    assert class_of("_forward_kernel", "") == OTHER
