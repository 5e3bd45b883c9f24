"""Self-contained HTML pages: text, tables and figures in one file that needs no network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #e3e7ec; --accent: #2b6cb0; --good: #2f855a;
        --bad: #c53030; }
* { box-sizing: border-box }
body { margin: 0; font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; color: var(--ink);
       background: #f6f8fa }
main { max-width: 1060px; margin: 0 auto; padding: 2.2rem 1.4rem 4rem }
h1 { font-size: 1.9rem; margin: 0 0 .3rem } h2 { font-size: 1.25rem; margin: 0 0 .6rem }
.lead { color: var(--soft); margin: 0 0 1.6rem }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; margin: 1.1rem 0;
          padding: 1.3rem 1.5rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem }
.tile { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem }
.tile b { display: block; font-size: 1.35rem } .tile span { color: var(--soft); font-size: .88rem }
.good { color: var(--good) } .bad { color: var(--bad) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600 }
img { max-width: 100%; height: auto; display: block; margin: .4rem auto }
figure { margin: .6rem 0 } figcaption, .note { color: var(--soft); font-size: .92rem }
"""


def page(title: str, lead: str, parts: Sequence[str]) -> str:
    """A whole document from rendered parts."""
    return (f"<!doctype html><html lang='en'><head><meta charset='utf-8'>"
            f"<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>"
            f"<h1>{html.escape(title)}</h1><p class='lead'>{html.escape(lead)}</p>"
            f"{''.join(parts)}</main></body></html>")


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def paragraph(text: str) -> str:
    return f"<p class='note'>{html.escape(text)}</p>"


def tiles(items: Sequence[tuple[str, str, str]]) -> str:
    """Headline figures: (value, label, '' | 'good' | 'bad')."""
    return "<div class='tiles'>" + "".join(
        f"<div class='tile'><b class='{tone}'>{html.escape(value)}</b>"
        f"<span>{html.escape(label)}</span></div>" for value, label, tone in items) + "</div>"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
                   for row in rows)
    return (f"<div class='scroll'><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>")


def figure(plot: Any, caption: str) -> str:
    """A matplotlib figure as an inline PNG; the figure is closed."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(plot)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (f"<figure><img alt='{html.escape(caption, quote=True)}' "
            f"src='data:image/png;base64,{data}'>"
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")
