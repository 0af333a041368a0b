"""`vchitect-fast autotune`: measure this machine, plan, write plan.json. Verbs do one part of it.

    (none)   probe this machine (or reuse --cluster where the file exists and is of this machine), plan, write --out
    probe    measure this machine and write --cluster
    plan     plan for the machines of --cluster, which need not be here
    explain  print the Plan of --plan, and with the cluster file why it is so
    verify   run a few real steps of --plan here, on all its ranks, and print predicted against measured
    report   the same as a page; scale: on more nodes; export: for other trainers (page.py, scale.py, export.py)

Parsing, files and printing; the numbers come from the other files of this folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from vchitect_fast.architecture import PRESETS, TransformerConfig, preset
from vchitect_fast.autotune import explain, export, page, scale
from vchitect_fast.autotune.calibrate import Calibration, calibrate
from vchitect_fast.autotune.ledger import Ledger, beside, drift
from vchitect_fast.autotune.report import compare, render, show
from vchitect_fast.autotune.search import ONE, SAFETY, plan_run
from vchitect_fast.cluster import Cluster, known
from vchitect_fast.errors import UserError, unknown_name
from vchitect_fast.machine import available_memory_bytes, this_device
from vchitect_fast.offload.policy import READINGS, from_selective_ratio
from vchitect_fast.plan import PARKABLE, Plan, Policy, check_place
from vchitect_fast.shapes import VideoShape

VERBS = ("probe", "plan", "explain", "verify", "report", "scale", "export")
TOO_ROUGH = 0.5  # of the mean error at sizes that were held out
EPILOG = f"""\
verbs: none = probe (unless --cluster exists) and plan; probe = measure, write --cluster; plan = from --cluster alone;
explain = print --plan and why; verify = run steps of --plan here, print predicted against measured; report = --plan as a page;
scale = what more nodes bring; export = --plan for other trainers.

clusters by name: {", ".join(known())}

example: vchitect-fast autotune --model vchitect-tiny --shapes 8x96x64 8x176x96 --text-tokens 16
example: vchitect-fast autotune plan --cluster 8xh100 --num-nodes 8 --shapes 32x512x384 40x768x432 --batch 64
example: vchitect-fast autotune verify --model vchitect-tiny --plan plan.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vchitect-fast autotune`."""
    _add_asked(parser)
    _add_policies(parser.add_argument_group("the blocks, where they are not to be searched"))
    verify = parser.add_argument_group("verify, and what it measured")
    verify.add_argument(
        "--ledger", metavar="FILE", help="verify: where predictions and measurements go (default: beside --plan)"
    )
    verify.add_argument(
        "--calibrate",
        metavar="LEDGER",
        help="plan: sharpen the predictions by what verify measured (default: not calibrated)",
    )
    scale.add_arguments(parser.add_argument_group("scale"))
    export.add_arguments(parser.add_argument_group("export"))


def _add_asked(parser: argparse.ArgumentParser) -> None:
    """What is to be planned, on what, and where the files are."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "verb", nargs="?", choices=VERBS, metavar="VERB", help=f"{', '.join(VERBS)}; default: probe and plan"
    )
    parser.add_argument(
        "--model",
        default="vchitect-2b",
        help=f"{', '.join(PRESETS)}, or a folder with config.json (default: %(default)s)",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="FxWxH",
        help="frames x width x height in pixels, rounded to multiples of 16; needed to plan",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        help="samples an optimizer step, of each shape, all ranks together (default: %(default)s)",
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="ranks by axis, dp_replicate, dp_shard and sp, for example dp_shard=2,sp=4: 8 ranks, sequence parallel by 4; "
        "given, not searched (default: the best of all devices of --cluster)",
    )
    parser.add_argument(
        "--num-nodes", type=int, metavar="N", help="nodes of the cluster that the run gets (default: as --cluster says)"
    )
    parser.add_argument(
        "--encode", action="store_true", help="the codec encodes inside the step (default: latents are cached)"
    )
    parser.add_argument(
        "--park",
        nargs="+",
        choices=PARKABLE,
        default=(),
        help="states that lie in host memory between their uses: AdamW's moments, the average (default: none)",
    )
    parser.add_argument(
        "--text-tokens",
        type=int,
        default=333,
        help="tokens of the run's text encoder: 333 = SD3's encoders, 16 = the embedded hash encoder (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of activations and matmuls; auto = the faster (default: %(default)s)",
    )
    parser.add_argument("--out", default="plan.json", help="where the Plan goes (default: %(default)s)")
    parser.add_argument("--plan", default="plan.json", help="Plan to explain or verify (default: %(default)s)")
    parser.add_argument(
        "--cluster",
        help="measurements of a machine (JSON), a cluster that a person wrote (YAML), or a name, see below; read where it "
        "exists (default: cluster.json beside --out, measured anew)",
    )
    parser.add_argument(
        "--manifest",
        help="clips, as `train` takes them: the probe reads and decodes some of them (default: disk and decoding not measured)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def _add_policies(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--selective-ratio",
        type=float,
        metavar="R",
        help="fraction of blocks, evenly spread, instead of a search; LiteGen's field, see --ratio-means",
    )
    group.add_argument(
        "--ratio-means",
        choices=READINGS,
        default="kept",
        help="blocks that --selective-ratio counts: kept = NOT recomputed (LiteGen's code), recomputed = those that are "
        "(the table of its paper) (default: %(default)s)",
    )
    group.add_argument(
        "--offload-inputs",
        action="store_true",
        help="with --selective-ratio: the inputs of recomputed blocks go to host memory between forward and backward",
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0; UserError for what the user can mend."""
    others = {"explain": explain.run, "report": page.run, "scale": scale.run, "export": export.run}
    if args.verb in others:
        return others[args.verb](args)
    actions = {None: _probe_and_plan, "probe": _probe, "plan": _plan, "verify": _verify}
    actions[args.verb](args)
    return 0


def load_config(model: str) -> TransformerConfig:
    """Sizes of a preset, or of a folder's config.json (also in its `transformer` subfolder)."""
    if not Path(model).is_dir():
        return preset(model)
    for path in (Path(model, "config.json"), Path(model, "transformer", "config.json")):
        if path.exists():
            try:
                values = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise UserError(f"{path} is not JSON ({error}); copy the checkpoint's own config.json again.") from None
            if not isinstance(values, dict):
                raise UserError(
                    f"{path} must hold a JSON object, got {type(values).__name__}; copy the checkpoint's own config.json again."
                )
            return TransformerConfig.from_dict(values)
    raise UserError(
        f"expected config.json in {model}, found none; give a checkpoint folder or a preset ({', '.join(PRESETS)})."
    )


def _probe_and_plan(args: argparse.Namespace) -> None:
    config, shapes = load_config(args.model), _shapes(args)  # before the measurement: a typo should not cost it
    reused = args.cluster and Path(args.cluster).exists()
    cluster = Cluster.load(args.cluster) if reused else None
    if cluster is not None:
        _check_here(cluster, args.cluster)
    else:
        check_place(args.out)
        cluster = _measure(args.cluster or str(Path(args.out).with_name("cluster.json")), args.json, args.manifest)
        if cluster is None:
            return
    limit = cluster.device.memory_bytes
    if cluster.device.kind == "cpu":  # other programs hold part of main memory
        limit = min(limit, available_memory_bytes())
    _write_plan(args, config, shapes, cluster, int(SAFETY * limit))


def _probe(args: argparse.Namespace) -> None:
    cluster = _measure(args.cluster or "cluster.json", args.json, args.manifest)
    if args.json and cluster is not None:
        print(json.dumps(cluster.to_json()))


def _plan(args: argparse.Namespace) -> None:
    config, shapes = load_config(args.model), _shapes(args)
    _write_plan(args, config, shapes, Cluster.load(args.cluster or "cluster.json"), None)


def _verify(args: argparse.Namespace) -> None:
    plan, config = Plan.load(args.plan), load_config(args.model)
    plan.check(model=config.fingerprint(), device=this_device())

    from vchitect_fast.autotune.verify import is_first_rank, verify

    first, ledger = is_first_rank(), Ledger(args.ledger or beside(args.plan))
    if first:
        _say("running a few steps of each shape", args.json)
    measured = verify(plan, config, ledger=ledger)
    if not first:
        return
    moved = drift(ledger.pairs())
    for sentence in (*ledger.damaged, *moved):
        _say(sentence, args.json)
    if args.json:
        rows = {
            entry.shape: [asdict(item) for item in entry.predicted.against(measured[entry.shape])]
            for entry in plan.entries
        }
        print(json.dumps(rows))
        return
    show(compare(plan, measured))
    print(f"both are in {ledger.path}")


def _policy(args: argparse.Namespace, num_blocks: int) -> tuple[Policy, ...] | None:
    if args.selective_ratio is None:
        if args.offload_inputs:
            raise UserError("--offload-inputs needs --selective-ratio; give the fraction of blocks too.")
        return None
    return from_selective_ratio(args.selective_ratio, num_blocks, args.ratio_means, offload_inputs=args.offload_inputs)


def _mesh(text: str | None) -> dict[str, int] | None:
    if text is None:
        return None
    mesh = dict(ONE)
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in mesh:
            raise unknown_name("mesh axis", axis, mesh)
        if not size.isdecimal() or int(size) < 1:
            raise UserError(
                f"--mesh {axis} must be a whole number from 1 up, got {size!r}; for example --mesh dp_shard=2,sp=4."
            )
        mesh[axis] = int(size)
    return mesh


def _shapes(args: argparse.Namespace) -> list[VideoShape]:
    if not args.shapes:
        raise UserError("which shapes to plan for is missing; give them as --shapes 32x512x384 or several.")
    shapes = []
    for text in args.shapes:
        shape, note = VideoShape.parse(text)
        if note:
            _say(note, args.json)
        shapes.append(shape)
    return shapes


def _measure(path: str, quiet: bool, manifest: str | None) -> Cluster | None:
    """None on every rank but the first, which alone goes on."""
    from vchitect_fast.autotune.probe import is_first, probe

    cluster = probe(progress=not quiet, manifest=manifest)
    if not is_first():
        return None
    cluster.save(path)
    device = cluster.device
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in device.matmul_flops.items())
    copied = (device.memory_bytes_per_s or 0.0) / 1e9
    _say(
        f"measured {device.name}: matmul {rates}; memory {copied:.1f} GB/s, {device.memory_bytes / 2**30:.1f} GiB; wrote {path}",
        quiet,
    )
    if (error := device.fit_error or 0.0) > TOO_ROUGH:
        _say(
            f"sizes held out of the fit are off by {error:.0%}: the machine was busy, or its speed varies; no prediction is better "
            "than that. Measure again with `autotune probe` when it is quiet.",
            quiet,
        )
    return cluster


def _check_here(cluster: Cluster, path: str) -> None:
    here = this_device()
    if cluster.device.fingerprint() != here.fingerprint():
        there = cluster.device
        raise UserError(
            f"{path} was measured on {there.name} ({there.num_threads} threads, {there.memory_bytes / 2**30:.1f} GiB), this is "
            f"{here.name} ({here.num_threads} threads, {here.memory_bytes / 2**30:.1f} GiB); leave out --cluster to measure, or use `autotune plan`."
        )


def _write_plan(
    args: argparse.Namespace,
    config: TransformerConfig,
    shapes: list[VideoShape],
    cluster: Cluster,
    limit_bytes: int | None,
) -> None:
    if args.num_nodes is not None:
        cluster = replace(cluster, num_nodes=args.num_nodes)
    calibration = _calibration(args.calibrate) if args.calibrate else None
    plan = plan_run(
        config,
        shapes,
        cluster,
        batch=args.batch,
        num_text_tokens=args.text_tokens,
        dtype=args.dtype,
        limit_bytes=limit_bytes,
        policy=_policy(args, config.num_layers),
        mesh=_mesh(args.mesh),
        encode=args.encode,
        parked=tuple(args.park),
        calibration=calibration,
    )
    plan.save(args.out)
    _show(plan, args.json)
    _say(f"wrote {args.out}", args.json)


def _calibration(ledger: str) -> Calibration:
    pairs = Ledger(ledger).pairs()
    last = f", the last on {max(pair.found.time for pair in pairs)[:10]}" if pairs else ""
    return calibrate(pairs, Path(ledger).name + last)


def _show(plan: Plan, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"hash": plan.digest(), **asdict(plan)}))
        return
    show(render(plan))


def _say(text: str, quiet: bool) -> None:
    """A line for a person; on standard error when standard output holds JSON."""
    print(text, file=sys.stderr if quiet else sys.stdout)
