"""Where a figure of a run is going: the means of the last rows, and bars to show them in a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

LEAST_ROWS, POINTS = 8, 24
BARS = "▁▂▃▄▅▆▇█"


def trend(values: Sequence[float | None]) -> dict[str, Any] | None:
    """What a series of values says of itself; None where it is too short to say anything.

    ``points`` are means of equally many values, oldest first; ``change`` is that of the last
    quarter's mean against the first quarter's, as a share of it; ``rows`` is how many were used.
    """
    known = [float(value) for value in values
             if isinstance(value, int | float) and math.isfinite(value)]
    if len(known) < LEAST_ROWS:
        return None
    count = min(POINTS, len(known))
    edges = [len(known) * index // count for index in range(count + 1)]
    quarter = len(known) // 4
    before, after = _mean(known[:quarter]), _mean(known[-quarter:])
    return {"points": [_mean(known[start:end])
                       for start, end in pairwise(edges)],
            "change": (after - before) / abs(before) if before else None, "rows": len(known)}


def bars(points: Sequence[float]) -> str:
    """A bar for each point, from the least to the greatest."""
    low, high = min(points), max(points)
    if high == low:
        return BARS[0] * len(points)
    return "".join(BARS[round((point - low) / (high - low) * (len(BARS) - 1))] for point in points)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
