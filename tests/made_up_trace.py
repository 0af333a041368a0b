"""Chrome traces made by hand for the tests of profiling: few events with known answers, or as many as are asked for.

`event` writes one as torch.profiler does; `write_big` a trace of any size that looks like training on a GPU: ops with
shapes, launches, kernels, copies, memory, spans of steps and branches.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CPU, GPU = 100, 0  # process of the CPU's threads, number of the device
BASE_US = 4_709_837_563_714.181  # torch counts from a fixed moment: large numbers, three decimals


def event(cat: str, name: str, start: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    """One event at `start` microseconds; `tid` is the stream of what runs on a device."""
    on_device = cat in ("kernel", "gpu_memcpy", "gpu_memset")
    if on_device:
        args = {"device": GPU, "stream": tid, **args}
    pid = GPU if on_device else CPU
    return {
        "ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": round(BASE_US + start, 3), "dur": dur,
        "args": {key.replace("_", " ") if key.startswith("External") else key: value for key, value in args.items()},
    }  # fmt: skip


def op(name: str, start: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    """An operator on a CPU thread."""
    return event("cpu_op", name, start, dur, tid, **args)


def span(name: str, start: float, dur: float, tid: int = 1) -> dict[str, Any]:
    """A named range of the program."""
    return event("user_annotation", name, start, dur, tid)


def launched(
    number: int, at: float, name: str, start: float, dur: float, stream: int = 7, cat: str = "kernel", tid: int = 1,
    **args: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """The call at `at`, 2 us long, and what it launched."""
    call = "cudaLaunchKernel" if cat == "kernel" else "cudaMemcpyAsync"
    return [
        event("cuda_runtime", call, at, 2, tid, correlation=number),
        event(cat, name, start, dur, stream, correlation=number, **args),
    ]


def document(events: list[dict[str, Any]], **header: Any) -> dict[str, Any]:
    """What a trace file holds."""
    return {"schemaVersion": 1, "displayTimeUnit": "ms", **header, "traceEvents": events}


def write(path: Path, events: list[dict[str, Any]], **header: Any) -> Path:
    """Write them; returns the path."""
    path.write_text(json.dumps(document(events, **header)))
    return path


KERNELS = (  # op, kernel, dims, share of time
    ("aten::addmm", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas",
     [[1536], [35200, 1536], [1536, 1536]], 900.0),
    ("aten::_scaled_dot_product_flash_attention", "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, cutlass::bfloat16_t>>(pytorch_flash::Flash_fwd_params)",
     [[8, 24, 1733, 64], [8, 24, 1733, 64], [8, 24, 1733, 64]], 400.0),
    ("aten::mul", "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<c10::BFloat16, c10::BFloat16, c10::BFloat16, at::native::binary_internal::MulFunctor<float>>>(int, at::detail::Array<char*, 3>)",
     [[35200, 1536], [35200, 1536]], 60.0),
    ("aten::native_layer_norm", "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>(int, float, c10::BFloat16 const*)",
     [[35200, 1536], [], [1536], [1536], []], 50.0),
)  # fmt: skip


def block(number: int, step_at: float, ids: int) -> tuple[list[dict[str, Any]], float, int]:
    """Events of one branch of a block, the time where they end, the next free id."""
    events, at, device_at = [], step_at, step_at + 15
    for name, kernel, dims, dur in KERNELS:
        args = {
            "External_id": ids, "Record function id": 0, "Sequence number": ids, "Fwd thread id": 0,
            "Concrete Inputs": [""] * len(dims), "Input type": ["c10::BFloat16"] * len(dims), "Input Dims": dims,
            "Input Strides": [[d[-1], 1] if len(d) > 1 else [1] * len(d) for d in dims], "Ev Idx": ids,
        }  # fmt: skip
        events.append(op(name, at, 14, **args))
        events.append(op("aten::empty", at + 1, 3, **(args | {"External_id": ids + 1})))
        call, run = launched(ids, at + 6, kernel, device_at, dur, External_id=ids, grid=[264, 1, 1], block=[384, 1, 1])
        run["args"] |= {"registers per thread": 168, "shared memory": 213_016, "warps per SM": 24.0}
        run["args"] |= {"est. achieved occupancy %": 0, "queued": 0, "context": 1}
        events += [call, run]
        events.append({
            "ph": "i", "cat": "cpu_instant_event", "s": "t", "name": "[memory]", "pid": CPU, "tid": 1,
            "ts": round(BASE_US + at + 3, 3),
            "args": {"Total Reserved": 2**34, "Total Allocated": 2**33 + ids, "Bytes": 4096 * (1 if ids % 4 else -1),
                     "Device Id": 0, "Device Type": 1, "Addr": 139_000_000_000 + ids, "Ev Idx": ids},
        })  # fmt: skip
        at, device_at, ids = at + 16, device_at + dur, ids + 2
    at = device_at
    branch = ("spatial", "temporal", "cross")[number % 3]
    return [span(f"forward/{branch}", step_at, at - step_at), *events], at, ids


def write_big(path: Path, num_bytes: int, blocks_a_step: int = 200, *, on_gpu: bool = True) -> int:
    """Write a trace of at least `num_bytes`, laid out over lines as torch does; returns the number of its events.

    Without a GPU it has no launches and nothing that was launched.
    """
    num_events, at, ids, step = 0, 0.0, 1, 0
    with path.open("w") as file:
        file.write('{\n"schemaVersion": 1,\n"distributedInfo": {"backend": "nccl", "rank": 3, "world_size": 8},\n')
        file.write('"traceEvents": [\n')
        while file.tell() < num_bytes:
            begin, events = at, []
            for number in range(blocks_a_step):
                more, at, ids = block(number, at, ids)
                events += more
            copy = launched(
                ids, begin, "Memcpy DtoH (Device -> Pinned)", begin + 50, 9000.0, 20, "gpu_memcpy", bytes=2**29
            )
            events = [span(f"step/{step}", begin, at - begin), *events, *copy]
            if not on_gpu:
                events = [one for one in events if one["cat"] in ("user_annotation", "cpu_op", "cpu_instant_event")]
            file.write("".join(json.dumps(one, indent=1) + ",\n" for one in events))
            num_events, ids, step = num_events + len(events), ids + 1, step + 1
        file.write(
            '{"ph": "M", "name": "process_name", "pid": 100, "tid": 0, "args": {"name": "python"}}\n],\n"traceName": "big"}\n'
        )
    return num_events
