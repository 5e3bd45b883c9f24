"""report: an archive's quality on one HTML page that needs no network.

Counts by cohort, modality and status; why scans were flagged or rejected; the distribution of the
main figures; and three slices with the brain mask's outline of scans spread over the archive,
flagged ones apart.  Scans go by their content id: no names, no source paths.
"""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data_prep.store import Row, check_reachable, open_archive, read_volume, slot
from neurojepa.feed.format import write_bytes

_SHOWN = 12  # scans in a montage
_FIGURES = (("brain_ml_native", "brain volume (ml)"), ("mask_dice_template", "Dice with template"),
            ("qc_snr", "signal to noise"))
_STYLE = """
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #f6f8fa }
main { max-width: 1060px; margin: 0 auto; padding: 2rem 1.4rem 4rem }
section { background: #fff; border: 1px solid #e3e7ec; border-radius: 10px; margin: 1.1rem 0;
          padding: 1.2rem 1.5rem; overflow-x: auto }
h1 { margin: 0 } h2 { font-size: 1.2rem; margin: 0 0 .6rem } p { color: #5b6675; margin: .3rem 0 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid #e3e7ec }
th { color: #5b6675 } img { max-width: 100%; display: block; margin: .4rem auto }
"""


def report(archive_uri: str, out: str) -> None:
    """Write the page of an archive.

    Raises
    ------
    DataError
        The archive is unfinished or damaged, or ``out`` cannot be written.
    """
    check_reachable(archive_uri)
    check_reachable(out)
    rows = open_archive(archive_uri).rows
    counts = Counter(row["status"] for row in rows)
    kinds = Counter((row["cohort"], row["modality"], row["status"]) for row in rows)
    reasons = Counter((row["status"], part.split(":")[0]) for row in rows if row["reason"]
                      for part in row["reason"].split(";"))
    sections = [
        ("By cohort and modality", _table(
            ("cohort", "modality", "accepted", "flagged", "rejected"),
            [(*kind, *(kinds[*kind, status] for status in ("accepted", "flagged", "rejected")))
             for kind in sorted({(cohort, modality) for cohort, modality, _ in kinds})])),
        ("Reasons", _table(("status", "reason", "scans"),
                           [(*key, count) for key, count in sorted(reasons.items())])),
        ("Figures", _image(_histograms(rows))),
    ]
    for status in ("accepted", "flagged"):
        chosen = _spread([row for row in rows if row["status"] == status])
        if chosen:
            sections.append((f"{status.capitalize()}: {len(chosen)} of {counts[status]}",
                             _image(_montage(archive_uri, chosen))))
    sections.append(("Rejected", _table(
        ("cohort", "modality", "reason"),
        [(row["cohort"], row["modality"], row["reason"].split(":")[0]) for row in rows
         if row["status"] == "rejected"])))
    lead = (f"{len(rows)} scans of {len({row['participant'] for row in rows})} people: "
            + ", ".join(f"{counts[status]} {status}" for status in
                        ("accepted", "flagged", "rejected")))
    write_bytes(out, _page("Archive quality", lead, sections).encode())
    print(f"{out}: {lead}")


def _page(title: str, lead: str, sections: Iterable[tuple[str, str]]) -> str:
    body = "".join(f"<section><h2>{html.escape(name)}</h2>{content}</section>"
                   for name, content in sections)
    return (f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
            f"<style>{_STYLE}</style></head><body><main><h1>{title}</h1>"
            f"<p>{html.escape(lead)}</p>{body}</main></body></html>")


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
                   for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _image(figure: Any) -> str:
    """A matplotlib figure as an embedded PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return f"<img src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def _spread(rows: list[Row]) -> list[Row]:
    """At most ``_SHOWN`` rows, evenly spread over cohorts and people as sorted."""
    places = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _SHOWN)).round().astype(int))
    return [rows[place] for place in places] if rows else []


def _histograms(rows: list[Row]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6))
    for axes, (name, title) in zip(figure.subplots(1, len(_FIGURES)), _FIGURES, strict=True):
        for status, colour in (("accepted", "#2b6cb0"), ("flagged", "#dd6b20")):
            values = [row[name] for row in rows
                      if row["status"] == status and row.get(name) is not None]
            if values:
                axes.hist(values, bins=20, color=colour, alpha=0.7, label=status)
        axes.set_xlabel(title)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("scans")
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.axes[0].legend(frameon=False)
    return figure


def _montage(uri: str, rows: list[Row]) -> Any:
    """Sagittal, coronal and axial middle slices of each scan, right on the viewer's right."""
    from matplotlib.figure import Figure

    columns = 2
    height = -(-len(rows) // columns)
    figure = Figure(figsize=(11, 2.1 * height), facecolor="white")
    grid = figure.subplots(height, columns * 3, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for number, row in enumerate(rows):
        arrays = read_volume(uri, slot(row["participant"], row["scan_id"]))
        image, brain = arrays["image"], arrays["mask"] == 1
        for axis in range(3):
            axes = grid[number // columns, number % columns * 3 + axis]
            middle = image.shape[axis] // 2
            axes.imshow(image.take(middle, axis).T, cmap="gray", origin="lower", vmin=0)
            axes.contour(brain.take(middle, axis).T, levels=[0.5], colors="#38a169",
                         linewidths=0.7)
        first = grid[number // columns, number % columns * 3]
        first.set_zorder(1)  # its title runs over the neighbours
        note = f"  {row['reason']}" if row["reason"] else ""
        first.set_title(f"{row['cohort']} {row['modality']} {row['scan_id'][:8]}{note}",
                        fontsize=8, loc="left")
    return figure
