"""Which rank holds which part of each parameter, in a few numbers per parameter.

Under ZeRO 3 each of n ranks holds a part of each parameter: 614,400 parts at 1,024 ranks and 600
parameters.  Parts follow each other in the order of ranks, and all but the last are equally
long, so a parameter is written as runs of [first rank, ranks, elements of each], which begin at
element 0 and leave no gap.  Under ZeRO 1 and 2 most parameters lie in one rank whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from neurojepa.errors import CheckpointError

Layout = dict[str, dict[str, Any]]  # parameter -> {"shape": [...], "runs": [[rank, count, length]]}
Part = tuple[int, int, int]  # start, length, rank


def layout_of(shapes: Mapping[str, Sequence[int]], parts: Mapping[str, Iterable[Part]]) -> Layout:
    """The layout of parameters from the parts that all ranks hold.

    Raises
    ------
    CheckpointError
        Parts overlap, leave a gap, or are not the whole parameter.
    """
    return {name: {"shape": list(shape),
                   "runs": _runs(name, math.prod(shape), sorted(parts.get(name, ())))}
            for name, shape in shapes.items()}


def _runs(name: str, size: int, parts: list[Part]) -> list[list[int]]:
    runs: list[list[int]] = []
    end = 0
    for start, length, rank in parts:
        if start != end:
            raise CheckpointError(f"{name}: the parts that ranks hold have a gap or overlap at "
                                  f"element {min(start, end)} of {size}")
        end += length
        if runs and rank == runs[-1][0] + runs[-1][1] and length == runs[-1][2]:
            runs[-1][1] += 1
        else:
            runs.append([rank, 1, length])
    if end != size:
        raise CheckpointError(f"{name}: the ranks hold {end} of its {size} elements")
    return runs


def overlapping(layout: Layout, name: str, low: int, high: int) -> Iterator[Part]:
    """The parts that hold elements [low, high) of a parameter, in ascending order."""
    begin = 0
    for rank, count, length in layout.get(name, {"runs": ()})["runs"]:
        end = begin + count * length
        if begin < high and low < end:
            first = max(0, (low - begin) // length)
            for number in range(first, min(count, -(-(high - begin) // length))):
                yield begin + number * length, length, rank + number
        begin = end
