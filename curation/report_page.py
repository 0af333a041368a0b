"""The HTML of curation's pages: style, frame, tables, bars. It knows nothing of clips or stages.

A page is one file: no script, no network (its content policy forbids both), pictures as data URLs, readable from 400 pixels
of width on, in light and dark. Every text from outside goes through `text`, which leaves it no markup, no control and no
direction characters.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from vchitect_fast.curation.dataset import printable

SET_COLOURS = 6  # sets that `compare` can tell apart; --s0 to --s5 below

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --line: #e1e5ec; --ink: #1c2330; --soft: #5b667c;
  --keep: #1971c2; --drop: #d9480f; --tint: #fff0e6; --code: #1c2330; --code-ink: #e8ecf3;
  --s0: #1971c2; --s1: #d9480f; --s2: #2b8a3e; --s3: #862e9c; --s4: #8d6708; --s5: #0b7285; }
@media (prefers-color-scheme: dark) { :root { --page: #12161d; --card: #1a202a; --line: #2e3643; --ink: #e4e8ef;
  --soft: #9ba6ba; --keep: #4dabf7; --drop: #ff922b; --tint: #33261a; --code: #0c0f14; --code-ink: #d5dbe6;
  --s0: #4dabf7; --s1: #ff922b; --s2: #69db7c; --s3: #da77f2; --s4: #ffd43b; --s5: #3bc9db; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0; overflow-wrap: anywhere; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem clamp(.8rem, 3vw, 1.5rem) 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.8rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; } p { margin: .4rem 0 .8rem; max-width: 50rem; }
p.lead { font-size: 1.05rem; color: var(--soft); } small, .soft { color: var(--soft); } small { font-size: .85rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1.3rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem 1rem; }
.card b { display: block; font-size: 1.4rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; background: var(--card); margin: .6rem 0 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { padding: .4rem .8rem; text-align: right; vertical-align: top; font-variant-numeric: tabular-nums; border-top: 1px solid var(--line); }
tr:first-child > th { border-top: 0; } th { color: var(--soft); font-weight: 600; font-size: .85rem; white-space: nowrap; }
td { white-space: nowrap; } th.text, td.text { text-align: left; } td.text { white-space: normal; } td.text { min-width: 8rem; } td.wide { min-width: 15rem; }
.bars { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .3rem 1rem .8rem; margin: .6rem 0 1rem; }
.bar { padding: .6rem 0 0; } .bar > div:first-child { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; }
.bar b { font-weight: 600; } .bar > div span { font-variant-numeric: tabular-nums; color: var(--soft); }
.track { display: flex; height: .8rem; margin: .2rem 0; border-radius: 4px; overflow: hidden; background: var(--page); }
.track i { display: block; background: var(--keep); } .track i.drop { background: var(--drop); }
.badge { display: inline-block; white-space: nowrap; font-size: .75rem; font-weight: 600; color: var(--drop); border: 1px solid var(--drop); border-radius: 99px; padding: 0 .5rem; }
.bar > div .badge { color: var(--drop); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20.5rem, 100%), 1fr)); gap: .8rem; margin: .6rem 0 1rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem .8rem; min-width: 0; }
figcaption { font-size: .88rem; line-height: 1.4; margin-bottom: .3rem; } figcaption b { font-weight: 600; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; } svg text { fill: var(--soft); }
svg .axis { stroke: var(--line); } svg .keep { fill: var(--keep); } svg .drop { fill: var(--drop); } svg .side { fill: var(--tint); }
svg .cut { stroke: var(--drop); stroke-width: 1.5; stroke-dasharray: 4 3; } svg text.cut-text { fill: var(--drop); stroke: none; }
svg .step { fill: none; stroke-width: 1.8; stroke-linejoin: round; } svg .middle { stroke-width: 1.2; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(27rem, 100%), 1fr)); gap: .8rem; margin: .6rem 0 1rem; }
.strip { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 3px; margin-bottom: .5rem; }
@media (max-width: 34rem) { .strip { grid-template-columns: repeat(3, minmax(0, 1fr)); } }
.strip img { width: 100%; max-height: 9rem; object-fit: contain; display: block; border-radius: 3px; background: var(--page); }
.clips p { margin: .1rem 0; font-size: .88rem; line-height: 1.4; } .clips p.caption { max-height: 8.4em; overflow-y: auto; }
.why { color: var(--drop); } .gone { color: var(--soft); font-style: italic; }
pre { background: var(--code); color: var(--code-ink); padding: .9rem 1.1rem; border-radius: 10px; overflow-x: auto; font-size: .88rem; line-height: 1.5; }
code { font-size: .9em; } details summary { cursor: pointer; color: var(--soft); margin: .4rem 0; }
.key { display: inline-flex; align-items: baseline; gap: .35rem; margin-right: 1rem; } .key i { align-self: center; width: 1.1rem; flex: none; height: .28rem; border-radius: 2px; }
.key i.keep { background: var(--keep); } .key i.drop { background: var(--drop); }
@media print { main { max-width: none; } figure, .card, tr { break-inside: avoid; } }
""" + "".join(
    f"svg .s{k} {{ stroke: var(--s{k}); }} i.s{k} {{ background: var(--s{k}); }}\n" for k in range(SET_COLOURS)
)

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, body: Iterable[str]) -> str:
    """A whole document; `title` is plain text, `body` is HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def text(value: object) -> str:
    """Plain text as HTML, set apart from the direction of what stands around it."""
    return html.escape(printable(str(value)), quote=True)


def foreign(value: object) -> str:
    """Text that may run right to left (captions, file names), isolated from its surroundings."""
    return f"<bdi>{text(value)}</bdi>"


def cards(facts: dict[str, str]) -> str:
    """Big numbers: value by label."""
    inner = "".join(f'<div class="card"><b>{text(v)}</b><span>{text(k)}</span></div>' for k, v in facts.items())
    return f'<div class="cards">{inner}</div>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,), wide: int = -1) -> str:
    """A table that scrolls when it is too wide. Heads are plain text, cells are HTML; columns in `words` align left."""
    kind = [("text" if k in words else "") + (" wide" if k == wide else "") for k in range(len(heads))]
    head = "".join(f'<th class="{kind[k]}">{text(name)}</th>' for k, name in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind[k]}">{cell}</td>' for k, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def bar(name: str, figures: str, keep: float, drop: float = 0.0, below: str = "") -> str:
    """A line of a bar chart: shares `keep` and `drop` of the full width; `name` and `below` are HTML, `figures` plain text."""
    return (
        f'<div class="bar"><div>{name}<span>{text(figures)}</span></div>'
        f'<div class="track"><i style="width:{100 * keep:.2f}%"></i><i class="drop" style="width:{100 * drop:.2f}%"></i></div>'
        f"{below}</div>"
    )


def figure(caption: str, content: str) -> str:
    """A picture with its caption, both HTML."""
    return f"<figure><figcaption>{caption}</figcaption>{content}</figure>"
