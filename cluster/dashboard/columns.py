"""Figures of many steps, of which a page gets no more points than it can show."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np


class Columns:
    """Some numbers of each row, 8 bytes each; NaN where a row has none."""

    def __init__(self, names: Sequence[str]) -> None:
        self.last: dict[str, Any] = {}
        self._steps = array("q")
        self._columns = {name: array("d") for name in names}

    def add(self, row: dict[str, Any]) -> None:
        self.last = row
        self._steps.append(int(row.get("step") or 0))
        for name, column in self._columns.items():
            value = row.get(name)
            column.append(value if isinstance(value, int | float) else np.nan)

    def cut(self, count: int) -> None:
        del self._steps[count:]
        for column in self._columns.values():
            del column[count:]

    def __len__(self) -> int:
        return len(self._steps)

    def last_values(self, name: str, count: int) -> list[float]:
        return list(self._columns[name][-count:])

    def points(self, first: int, last: int, most: int) -> dict[str, list[list[float | None]]]:
        """Of each column, at most ``most`` points [step, mean, least, greatest] of some steps.

        Buckets of equally many rows; a bucket of NaN has no point.
        """
        steps = np.array(self._steps)  # a copy: an array that is looked at cannot grow
        begin, end = np.searchsorted(steps, [first, last + 1])
        if begin >= end:
            return {name: [] for name in self._columns}
        starts = np.unique(np.linspace(begin, end, min(most, end - begin), endpoint=False,
                                       dtype=np.int64)) - begin
        middle = steps[begin + (starts + np.append(starts[1:], end - begin) - 1) // 2]
        return {name: _buckets(np.array(column)[begin:end], starts, middle)
                for name, column in self._columns.items()}


def _buckets(values: np.ndarray, starts: np.ndarray,
             steps: np.ndarray) -> list[list[float | None]]:
    known = np.isfinite(values)
    counts = np.add.reduceat(known, starts, dtype=np.int64)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts)
    least = np.fmin.reduceat(np.where(known, values, np.nan), starts)
    greatest = np.fmax.reduceat(np.where(known, values, np.nan), starts)
    return [[int(step), float(total / count), float(low), float(high)] for step, total, count, low,
            high in zip(steps, sums, counts, least, greatest, strict=True) if count]
