"""Ranks that are slower than the others and so slow down all of them.

In a synchronous training every rank's step takes as long as the slowest rank's.  What differs is
the time a rank works before it waits for the others; it tells that in its heartbeat (``own_s``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.rundir import Heartbeat

RATIO, LEAST_S = 1.5, 0.02  # slower than the others by this factor, and by so many seconds
LASTING_S = 20.0  # and for so long: a checkpoint or another job's burst passes


@dataclass(frozen=True)
class Straggler:
    """A slow rank; ``others_s`` is the median of the other ranks' ``own_s``."""

    rank: int
    host: str
    own_s: float
    others_s: float
    data_s: float | None


def stragglers(beats: list[Heartbeat]) -> list[Straggler]:
    """The ranks that are slow at this moment."""
    known = [(beat, beat.own_s) for beat in beats if beat.own_s is not None]
    found = []
    for beat, own_s in known:
        others = [seconds for other, seconds in known if other.rank != beat.rank]
        median = statistics.median(others) if others else own_s
        if own_s > RATIO * median and own_s - median > LEAST_S:
            found.append(Straggler(beat.rank, beat.host, round(own_s, 4), round(median, 4),
                                   beat.data_s))
    return found


@dataclass
class Stragglers:
    """Names each rank of an attempt once, when it has been slow for a while."""

    clock: Callable[[], float] = time.monotonic
    _since: dict[int, float] = field(default_factory=dict)
    _named: set[int] = field(default_factory=set)

    def new(self, beats: list[Heartbeat]) -> list[Straggler]:
        """Those to be named now."""
        slow, now = {item.rank: item for item in stragglers(beats)}, self.clock()
        self._since = {rank: self._since.get(rank, now) for rank in slow}
        due = [item for rank, item in slow.items()
               if now - self._since[rank] >= LASTING_S and rank not in self._named]
        self._named |= {item.rank for item in due}
        return due
