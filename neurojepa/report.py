"""Self-contained HTML pages: text, tables and pictures in one file, for screen and paper.

No script and no network.  Colours are told apart by every kind of colour vision, and in grey.

    page(title, lead, [tiles(...), section(title, paragraph(...), table(...), figure(...))])
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any, Literal

BLUE, ORANGE, WINE = "#0072b2", "#e69f00", "#7a1f3d"  # two of Okabe and Ito, and a dark red
GREY = "#a0aab8"
Tone = Literal["", "good", "doubtful", "bad"]  # blue, orange, wine
_STYLE = """
:root { --ink: #1b2430; --soft: #566274; --line: #dfe4ea; --card: #fff; --page: #f5f7f9;
        --accent: #0072b2; --good: #0072b2; --doubtful: #e69f00; --bad: #7a1f3d }
* { box-sizing: border-box }
body { margin: 0; font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
       color: var(--ink); background: var(--page) }
main { max-width: 1180px; margin: 0 auto; padding: 2rem clamp(.8rem, 3vw, 2rem) 4rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 } h2 { font-size: 1.25rem; margin: 0 0 .5rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem }
p { margin: .3rem 0 .7rem; max-width: 72ch } .soft, .lead { color: var(--soft) }
.lead { overflow-wrap: anywhere }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
          margin: 1.1rem 0; padding: 1.2rem clamp(.8rem, 2.5vw, 1.5rem) }
.tiles { display: grid; gap: .7rem; margin: 1.2rem 0;
         grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)) }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
        border-top: 4px solid var(--line); padding: .6rem .9rem }
.tile b { display: block; font-size: 1.55rem; line-height: 1.3; font-variant-numeric: tabular-nums }
.tile span { color: var(--soft); font-size: .88rem }
.tile.good { border-top-color: var(--good) } .tile.bad { border-top-color: var(--bad) }
.tile.doubtful { border-top-color: var(--doubtful) }
.scroll { overflow-x: auto } .scroll + p { margin-top: .8rem }
table { border-collapse: collapse; width: 100%; font-size: .94rem;
        font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line);
         vertical-align: middle }
th { color: var(--soft); font-weight: 600; white-space: nowrap } td.n, th.n { text-align: right }
td.bar { width: 30%; min-width: 7rem; padding-right: 0 }
.stack { display: flex; height: .8rem; border-radius: 3px; overflow: hidden; background: #eef1f4 }
.stack i { display: block; border-right: 1px solid #fff }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; color: var(--soft); font-size: .88rem;
       margin: .3rem 0 .7rem }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: 3px;
         margin-right: .4rem; vertical-align: -.08rem }
.grid { display: grid; gap: 1rem;
        grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }
figure { margin: .6rem 0; break-inside: avoid } .grid figure { margin: 0 }
figure img, figure svg { max-width: 100%; height: auto; display: block; border-radius: 6px }
.grid img, figure svg { width: 100% }
figcaption { font-size: .88rem; color: var(--soft); margin: .25rem 0; overflow-wrap: anywhere }
figcaption b { color: var(--ink); font-weight: 600 }
svg text { font: 11px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #566274 }
svg text.name { fill: #1b2430 }
@media (max-width: 40rem) {
  main { padding: 1.2rem .5rem 3rem } section { padding: 1rem .6rem }
  table { font-size: .77rem } th, td { padding-right: .45rem }
  table.wide .bar { display: none } th { white-space: normal }
}
@media print {
  body { background: #fff; font-size: 10.5pt } main { max-width: none; padding: 0 }
  section { border: 0; border-top: 1px solid #999; border-radius: 0; padding: .6rem 0 }
  th { white-space: normal } .scroll { overflow: visible }
  tr, .tile { break-inside: avoid } h2 { break-after: avoid }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact }
  .grid { grid-template-columns: repeat(2, 1fr) }
}
"""


def page(title: str, lead: str, parts: Iterable[str]) -> str:
    """A whole document from rendered parts."""
    return (f"<!doctype html><html lang='en'><head><meta charset='utf-8'>"
            f"<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>"
            f"<h1>{html.escape(title)}</h1><p class='lead'>{html.escape(lead)}</p>"
            f"{''.join(parts)}</main></body></html>")


def section(title: str, *parts: str) -> str:
    """A card of rendered parts under a heading."""
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def heading(text: str) -> str:
    return f"<h3>{html.escape(text)}</h3>"


def paragraph(text: str) -> str:
    return f"<p class='soft'>{html.escape(text)}</p>"


def tiles(items: Sequence[tuple[str, str, Tone]]) -> str:
    """Headline numbers: (value, label, tone)."""
    return "<div class='tiles'>" + "".join(
        f"<div class='tile {tone}'><b>{html.escape(value)}</b><span>{html.escape(label)}</span>"
        "</div>" for value, label, tone in items) + "</div>"


class Markup(str):
    """A cell that is HTML already."""


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table that scrolls sideways where it must; numbers are set right, Markup is put in as is.
    """
    if not rows:
        return "<p class='soft'>None.</p>"

    def kind(cell: Any) -> str:
        return ("bar" if isinstance(cell, Markup) else "n" if isinstance(cell, int | float) else "")

    def show(cell: Any) -> str:
        if isinstance(cell, Markup):
            return cell
        return html.escape(f"{cell:,}" if isinstance(cell, int) else str(cell))

    head = "".join(f"<th class='{kind(cell)}'>{html.escape(name)}</th>"
                   for name, cell in zip(header, rows[0], strict=True))
    body = "".join("<tr>" + "".join(f"<td class='{kind(cell)}'>{show(cell)}</td>" for cell in row)
                   + "</tr>" for row in rows)
    wide = " class='wide'" if len(header) > 4 else ""
    return (f"<div class='scroll'><table{wide}><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>")


def stack(counts: Sequence[tuple[int, str]], total: int) -> Markup:
    """A bar of (count, colour) pieces, as long as their share of ``total``."""
    pieces = "".join(f"<i style='width:{100 * count / max(total, 1):.2f}%;background:{colour}'></i>"
                     for count, colour in counts if count)
    return Markup(f"<div class='stack' role='img'>{pieces}</div>")


def key(entries: Iterable[tuple[str, str]]) -> str:
    """What the colours mean: (label, colour)."""
    return "<div class='key'>" + "".join(
        f"<span><i style='background:{colour}'></i>{html.escape(label)}</span>"
        for label, colour in entries) + "</div>"


def picture(data: bytes, alt: str, caption: str, kind: str = "jpeg") -> str:
    """An image with its caption, which is HTML."""
    source = base64.b64encode(data).decode()
    return (f"<figure><img alt='{html.escape(alt, quote=True)}' "
            f"src='data:image/{kind};base64,{source}'><figcaption>{caption}</figcaption></figure>")


def figure(plot: Any, caption: str) -> str:
    """A matplotlib figure as an inline PNG; the figure is closed."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(plot)
    return picture(buffer.getvalue(), caption, html.escape(caption), "png")


def grid(figures: Iterable[str]) -> str:
    """Pictures side by side, as many as the page is wide."""
    return f"<div class='grid'>{''.join(figures)}</div>"
