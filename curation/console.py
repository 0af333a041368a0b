"""What `curate` prints at its end: the funnel, what was quarantined, how fast it was, where things are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vchitect_fast.curation.outputs import Summary

SHOWN = 10  # quarantined items


def print_summary(folder: Path, summary: Summary, quarantine: Sequence[Mapping[str, Any]]) -> None:
    """A table on stdout and a few lines."""
    console = Console(highlight=False)
    # Names of files and folders are foreign text: no markup, no control characters.
    title = Text(_plain(f"{folder}: from {summary.num_videos} videos"))
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name, justify in (("", "left"), ("clips", "right"), ("hours", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_row("found", f"{summary.num_clips:,}", f"{summary.hours:.3f}")
    for stage, count in summary.dropped.items():
        table.add_row(f"dropped by {stage}", f"-{count:,}", "")
    table.add_row("[bold]kept[/]", f"[bold]{summary.num_kept:,}[/]", f"{summary.hours_kept:.3f}")
    console.print(table)
    if summary.num_copies:
        console.print(f"{summary.num_copies} files have the same bytes as another one and were read once")
    if quarantine:
        console.print(f"{len(quarantine)} in quarantine (--retry tries them again):")
        for row in quarantine[:SHOWN]:
            _line(console, f"  {row['clip'] or row['path']}  {row['stage']}: {row['reason']}")
        if len(quarantine) > SHOWN:
            _line(console, f"  ... {len(quarantine) - SHOWN} more in {folder / 'quarantine.parquet'}")
    if summary.scan_cpu_s:
        rate = summary.scanned_s / summary.scan_cpu_s
        console.print(
            f"decoded {summary.scanned_s:,.0f} video-s at {rate:,.1f} video-s a core-s; all in {summary.wall_s:.1f} s"
        )
    if summary.num_kept:
        _line(console, f"manifest {folder / 'manifest.parquet'}")
        _line(console, f"report   {folder / 'report.html'}")
    else:
        console.print(_nothing(summary), soft_wrap=True)


def _nothing(summary: Summary) -> str:
    if not summary.num_clips:
        return "no clip was found"
    most = Counter(summary.dropped).most_common(1)[0][0]
    return f"no clip stays; {most} dropped the most: try `vchitect-fast curate what-if`, or change its rule with --set"


def _line(console: Console, text: str) -> None:
    console.print(Text(_plain(text)), soft_wrap=True)


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
