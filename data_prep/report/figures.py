"""The report's pictures: slices of a volume as JPEG, distributions as inline SVG."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from data_prep.rows import Status
from neurojepa.feed.format import MaskCode
from neurojepa.report import BLUE, ORANGE, WINE

COLOURS = {Status.ACCEPTED: BLUE, Status.FLAGGED: ORANGE, Status.REJECTED: WINE}
OUTLINE = (86, 180, 233)  # sky blue of Okabe and Ito
UNSEEN = (38, 52, 84)  # dark blue: what was not scanned
MAX_DOTS = 200  # of a row of a distribution
_GAP = 6


@dataclass(frozen=True)
class Line:
    """One row of a distribution: a cohort's scans of a modality."""

    name: str
    values: np.ndarray  # [n]
    flagged: np.ndarray  # bool [n]
    flag_at: tuple[float, ...] = ()
    reject_at: tuple[float, ...] = ()


def slices(image: np.ndarray, mask: np.ndarray) -> bytes:
    """Sagittal, coronal and axial slices through the brain's centre, its outline drawn; JPEG.

    Anterior is on the right of the first; in the other two the person's right is on the viewer's
    right, marked R.  What was not scanned is dark blue.
    """
    from PIL import Image, ImageDraw

    brain = mask == MaskCode.BRAIN
    centre = [int(at) for at in ndimage.center_of_mass(brain)]
    top = max(float(np.percentile(image[brain], 99.5)), 1e-6)
    panels = [_panel(image.take(at, axis), mask.take(at, axis), top)
              for axis, at in enumerate(centre)]
    height = max(panel.shape[0] for panel in panels)
    width = sum(panel.shape[1] for panel in panels) + _GAP * (len(panels) - 1)
    canvas, left, rights = np.zeros((height, width, 3), np.uint8), 0, []
    for panel in panels:
        upper = (height - panel.shape[0]) // 2
        canvas[upper:upper + panel.shape[0], left:left + panel.shape[1]] = panel
        left += panel.shape[1] + _GAP
        rights.append(left - _GAP)
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for right in rights[1:]:
        draw.text((right - 14, height // 2 - 8), "R", fill=(255, 255, 255), font_size=16)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=86, subsampling=0)
    return buffer.getvalue()


def _panel(image: np.ndarray, mask: np.ndarray, top: float) -> np.ndarray:
    """uint8 [rows, columns, 3]: the second axis of the slice points up."""
    grey = (255 * np.clip(image / top, 0, 1)).astype(np.uint8)
    colour = np.repeat(grey[..., None], 3, axis=2)
    colour[mask == MaskCode.NOT_SCANNED] = UNSEEN
    brain = mask == MaskCode.BRAIN
    colour[brain & ~ndimage.binary_erosion(brain)] = OUTLINE
    return colour.swapaxes(0, 1)[::-1]


def distribution(title: str, unit: str, lines: Sequence[Line]) -> str:
    """Rows of dots with quartile boxes on one axis, thresholds as upright lines; SVG.

    Accepted scans are blue dots, flagged ones orange diamonds; the flag threshold is a broken
    line, the reject threshold a full one.
    """
    values = np.concatenate([line.values for line in lines])
    low, high = _range(values, [at for line in lines for at in (*line.flag_at, *line.reject_at)])
    width, left, right, row, top = 340.0, 8.0, 8.0, 40.0, 6.0
    bottom = top + row * len(lines)

    def x(value: float) -> float:
        return left + (width - left - right) * (min(max(value, low), high) - low) / (high - low)

    parts = [f"<svg viewBox='0 0 {width:g} {bottom + 22:g}' role='img' "
             f"aria-label='{html.escape(title, quote=True)}'>"]
    for tick in _ticks(low, high):
        parts.append(f"<line x1='{x(tick):.1f}' x2='{x(tick):.1f}' y1='{top:g}' y2='{bottom:g}' "
                     "stroke='#e6eaef'/>")
        anchor = "start" if x(tick) < 20 else "end" if x(tick) > width - 20 else "middle"
        parts.append(f"<text x='{x(tick):.1f}' y='{bottom + 14:g}' text-anchor='{anchor}'>"
                     f"{tick:g}</text>")
    for number, line in enumerate(lines):
        # A limit far from all values would squeeze them; it is left out.
        seen = replace(line, flag_at=tuple(at for at in line.flag_at if low <= at <= high),
                       reject_at=tuple(at for at in line.reject_at if low <= at <= high))
        parts.append(_row(seen, top + row * number, row, x, width - right))
    unit = f" ({html.escape(unit)})" if unit else ""
    return (f"<figure><figcaption><b>{html.escape(title)}</b>{unit}</figcaption>"
            + "".join(parts) + "</svg></figure>")


def _row(line: Line, y: float, height: float, x: Callable[[float], float],
         right: float) -> str:
    middle = y + height * 0.68
    parts = [f"<text class='name' x='8' y='{y + 12:g}'>{html.escape(line.name)}</text>",
             f"<text x='{right:g}' y='{y + 12:g}' text-anchor='end'>n = {line.values.size:,}"
             "</text>"]
    for places, dash in ((line.flag_at, " stroke-dasharray='4 3'"), (line.reject_at, "")):
        parts += [f"<line x1='{x(at):.1f}' x2='{x(at):.1f}' y1='{y + 16:.1f}' y2='{y + height:.1f}'"
                  f" stroke='{WINE}' stroke-width='1.5'{dash}/>" for at in places]
    q1, median, q3 = np.percentile(line.values, (25, 50, 75))
    parts.append(f"<rect x='{x(q1):.1f}' y='{middle - 6:.1f}' width='{max(x(q3) - x(q1), 1):.1f}' "
                 "height='12' rx='3' fill='#d5e3ee'/>")
    shown = np.unique(np.linspace(0, line.values.size - 1, MAX_DOTS).round().astype(int)
                      ) if line.values.size > MAX_DOTS else np.arange(line.values.size)
    order = np.argsort(line.values, kind="stable")[shown]
    for place, index in enumerate(order.tolist()):
        at, drop = x(float(line.values[index])), (place * 7 % 9 - 4) * 0.9
        if line.flagged[index]:
            parts.append(f"<path d='M{at:.1f} {middle + drop - 4:.1f}l4 4-4 4-4-4z' "
                         f"fill='{COLOURS[Status.FLAGGED]}' stroke='#8a5f00' stroke-width='.6'/>")
        else:
            parts.append(f"<circle cx='{at:.1f}' cy='{middle + drop:.1f}' r='2.4' "
                         f"fill='{COLOURS[Status.ACCEPTED]}' fill-opacity='.65'/>")
    parts.append(f"<line x1='{x(median):.1f}' x2='{x(median):.1f}' y1='{middle - 8:.1f}' "
                 f"y2='{middle + 8:.1f}' stroke='#1b2430' stroke-width='1.6'/>")
    return "".join(parts)


def ages(by_split: Mapping[str, Sequence[float]]) -> str:
    """Histograms of age in steps of five years, one row for each split, on one axis; SVG."""
    known = [age for values in by_split.values() for age in values]
    low, high = 5 * int(min(known) // 5), 5 * int(max(known) // 5 + 1)
    edges = np.arange(low, high + 1, 5)
    width, left, row = 480.0, 44.0, 48.0
    step = (width - left - 12) / (len(edges) - 1)
    bottom = row * len(by_split)
    parts = [f"<svg viewBox='0 0 {width:g} {bottom + 24:g}' role='img' aria-label='age by split' "
             "style='max-width:560px'>"]
    for number, (split, values) in enumerate(by_split.items()):
        counts, _ = np.histogram(values, edges)
        base = row * (number + 1)
        parts.append(f"<text class='name' x='0' y='{base - 8:g}'>{html.escape(split)}</text>")
        parts.append(f"<line x1='{left:g}' x2='{width - 12:g}' y1='{base:g}' y2='{base:g}' "
                     "stroke='#c3cbd5'/>")
        for place, count in enumerate(counts.tolist()):
            tall = (row - 10) * count / max(int(counts.max()), 1)
            parts.append(f"<rect x='{left + step * place + 1:.1f}' y='{base - tall:.1f}' "
                         f"width='{step - 2:.1f}' height='{tall:.1f}' "
                         f"fill='{COLOURS[Status.ACCEPTED]}'/>")
    every = max(1, len(edges) // 10)
    parts += [f"<text x='{left + step * place:.1f}' y='{bottom + 16:g}' text-anchor='middle'>{edge}"
              "</text>" for place, edge in enumerate(edges.tolist()) if place % every == 0]
    return "<figure>" + "".join(parts) + "</svg></figure>"


def _range(values: np.ndarray, limits: Sequence[float]) -> tuple[float, float]:
    """The axis: all values up to the 1st and 99th percentile, and limits that lie near."""
    ends = (1, 99) if values.size > 200 else (0, 100)
    low, high = (float(value) for value in np.percentile(values, ends))
    reach = max(high - low, 1e-3 * max(abs(low), abs(high)), 1e-6)
    near = [at for at in limits if low - reach <= at <= high + reach]
    low, high = min([low, *near]), max([high, *near])
    margin = 0.04 * (high - low or abs(high) or 1.0)
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 4
    unit = 10 ** np.floor(np.log10(rough))
    step = unit * min((1, 2, 5, 10), key=lambda m: abs(m * unit - rough))
    first = np.ceil(low / step) * step
    return [float(f"{tick:.10g}") + 0.0 for tick in np.arange(first, high, step)]
