"""The HTML of our pages: style, frame, escaping, tables, bars, lanes. It knows nothing of traces or Plans.

A page is one file: no script, no network (its content policy forbids both), readable from 400 pixels of width on, in light
and dark. Every text from outside goes through `text`, which leaves it no markup, no control and no direction characters.
Colours are names of the style below or numbers of ours, never a text from outside.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --line: #e1e5ec; --ink: #1c2330; --soft: #5b667c;
  --mark: #d9480f; --tint: #eef3fb; --code: #1c2330; --code-ink: #e8ecf3; }
@media (prefers-color-scheme: dark) { :root { --page: #12161d; --card: #1a202a; --line: #2e3643; --ink: #e4e8ef;
  --soft: #9ba6ba; --mark: #ff922b; --tint: #202937; --code: #0c0f14; --code-ink: #d5dbe6; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0; overflow-wrap: anywhere; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem clamp(.8rem, 3vw, 1.5rem) 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.8rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; } p { margin: .4rem 0 .8rem; max-width: 50rem; }
p.lead { font-size: 1.05rem; color: var(--soft); } small, .soft { color: var(--soft); } small { font-size: .85rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1.3rem 0; }
.card, figure, .scroll, .lanes, ol.findings li { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: .7rem 1rem; } .card b { display: block; font-size: 1.4rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .88rem; }
ol.findings { list-style: none; padding: 0; margin: .6rem 0; display: grid; gap: .6rem; }
ol.findings li { padding: .7rem 1rem; display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: .1rem 1rem; }
ol.findings b { font-variant-numeric: tabular-nums; white-space: nowrap; color: var(--mark); } ol.findings p { margin: 0; max-width: none; }
ol.findings p.remedy { grid-column: 1 / -1; color: var(--soft); }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { padding: .35rem .8rem; text-align: right; vertical-align: top; font-variant-numeric: tabular-nums; border-top: 1px solid var(--line); white-space: nowrap; }
tr:first-child > th { border-top: 0; } th { color: var(--soft); font-weight: 600; font-size: .85rem; }
th.text, td.text { text-align: left; } td.text { white-space: normal; }
td.text > div { width: max-content; max-width: min(24rem, 42vw); }
.named { display: flex; gap: .45rem; } .named i { margin-top: .42rem; } .named i, .key i { flex: none; display: inline-block; width: .7rem; height: .7rem; border-radius: 3px; }
.key i { margin-right: .45rem; }
td .track { display: block; width: 5rem; height: .6rem; margin-top: .35rem; border-radius: 3px; background: var(--page); overflow: hidden; }
td .track i { display: block; height: 100%; }
.lanes { padding: .6rem .8rem .5rem; margin: .6rem 0 1rem; overflow: hidden; }
.lanes h4 { font-size: .85rem; font-weight: 600; color: var(--soft); margin: .55rem 0 .15rem; }
.lane { position: relative; height: 1.15rem; margin: 1px 0; background: var(--page); border-radius: 3px; overflow: hidden; }
.lane i { position: absolute; top: 0; bottom: 0; font: normal 11px/1.15rem system-ui, sans-serif; color: #fff; white-space: nowrap; overflow: hidden;
  text-indent: .25rem; box-shadow: inset -1px 0 0 var(--card); }
.lane i.fine { box-shadow: none; }
.ticks { position: relative; height: 1.2rem; font-size: .78rem; color: var(--soft); font-variant-numeric: tabular-nums; display: flex; justify-content: space-between; }
.keys { margin: .3rem 0 .2rem; font-size: .85rem; color: var(--soft); display: flex; flex-wrap: wrap; gap: .1rem 1rem; }
.key { white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(27rem, 100%), 1fr)); gap: .8rem; margin: .6rem 0 1rem; }
figure { margin: 0; padding: .7rem .8rem; min-width: 0; } figcaption { font-size: .9rem; line-height: 1.4; margin-bottom: .3rem; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; } svg text { fill: var(--soft); }
svg .axis { stroke: var(--line); fill: none; } svg .roof { stroke: var(--mark); stroke-width: 1.6; fill: none; } svg text.roof { stroke: none; fill: var(--mark); }
svg .mark { stroke: var(--ink); stroke-dasharray: 3 3; } svg circle { stroke: var(--card); stroke-width: .8; fill-opacity: .85; }
pre { background: var(--code); color: var(--code-ink); padding: .9rem 1.1rem; border-radius: 10px; overflow-x: auto; font-size: .88rem; }
@media print { main { max-width: none; } figure, .card, tr { break-inside: avoid; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MAX_TEXT = 300  # characters: names of C++ kernels reach thousands


@dataclass(frozen=True)
class Bar:
    """A stretch of a lane, as shares of its width; `colour` is 0xRRGGBB."""

    start: float
    end: float
    colour: int
    label: str  # shown where it fits, and as a tooltip; plain text


def page(title: str, body: Iterable[str]) -> str:
    """A whole document; `title` is plain text, `body` is HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def text(value: object) -> str:
    """Plain text as HTML: at most MAX_TEXT characters, what is no printable character replaced."""
    plain = str(value)
    plain = plain if len(plain) <= MAX_TEXT else plain[: MAX_TEXT - 3] + "..."
    return html.escape("".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in plain), quote=True)


def foreign(value: object) -> str:
    """A text from a trace, isolated from the direction of what stands around it."""
    return f"<bdi>{text(value)}</bdi>"


def cards(facts: dict[str, str]) -> str:
    """Big numbers: value by label."""
    inner = "".join(f'<div class="card"><b>{text(v)}</b><span>{text(k)}</span></div>' for k, v in facts.items())
    return f'<div class="cards">{inner}</div>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """A table that scrolls when it is too wide. Heads are plain text, cells are HTML; columns in `words` align left."""
    kind = ["text" if k in words else "" for k in range(len(heads))]
    head = "".join(f'<th class="{kind[k]}">{text(name)}</th>' for k, name in enumerate(heads))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="text"><div>{cell}</div></td>' if kind[k] else f"<td>{cell}</td>" for k, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def named(colour: int, content: str) -> str:
    """A square of the colour, then the HTML."""
    return f'<span class="named"><i style="background:#{colour:06x}"></i><span>{content}</span></span>'


def track(share: float, colour: int) -> str:
    """A bar in a cell."""
    return f'<span class="track"><i style="width:{100 * min(1.0, share):.1f}%;background:#{colour:06x}"></i></span>'


def lane(bars: Iterable[Bar]) -> str:
    """One row of a timeline; a bar below a thousandth of the width is drawn that wide, without its text."""
    parts = []
    for bar in bars:
        width = max(0.001, bar.end - bar.start)
        inner, kind = (text(bar.label), "") if width > 0.03 else ("", ' class="fine"')
        parts.append(
            f'<i{kind} style="left:{100 * bar.start:.3f}%;width:{100 * width:.3f}%;background:#{bar.colour:06x}" '
            f'title="{text(bar.label)}">{inner}</i>'
        )
    return f'<div class="lane">{"".join(parts)}</div>'


def lanes(groups: Iterable[tuple[str, Iterable[Iterable[Bar]]]], ticks: Sequence[str], keys: dict[str, int]) -> str:
    """A timeline: groups of rows under a heading, the axis, and the key of colours; plain texts."""
    body = "".join(f"<h4>{text(name)}</h4>{''.join(map(lane, rows))}" for name, rows in groups)
    axis = "".join(f"<span>{text(tick)}</span>" for tick in ticks)
    return f'<div class="lanes">{body}<div class="ticks">{axis}</div>{legend(keys)}</div>'


def legend(keys: dict[str, int]) -> str:
    """Names with their colours."""
    inner = "".join(
        f'<span class="key"><i style="background:#{c:06x}"></i>{text(name)}</span>' for name, c in keys.items()
    )
    return f'<div class="keys">{inner}</div>'


def figure(caption: str, content: str) -> str:
    """A picture with its caption, both HTML."""
    return f"<figure><figcaption>{caption}</figcaption>{content}</figure>"
