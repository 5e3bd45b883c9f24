"""How long a rank works by itself in a micro-step, before it waits for the others.

That is fetching the batch, views and the forward pass; the backward pass adds up gradients among
ranks, so it ends on all of them together.  Under ZeRO 3 the forward pass gathers weights and waits
as well; there only the wait for data tells ranks apart.
"""

from __future__ import annotations

import statistics
import time
from collections import deque

import torch

KEPT = 32  # micro-steps


class Pace:
    """Means over the last micro-steps, in seconds, the longest left out; None before the first.

    Not medians: a rank that is held up in every third step slows down all others as well.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._data: deque[float] = deque(maxlen=KEPT)
        self._own: deque[float] = deque(maxlen=KEPT)
        self._began = self._fetched = 0.0
        self._start: torch.cuda.Event | None = None
        self._open: deque[tuple[float, torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=KEPT)

    def begin(self) -> None:
        """The micro-step begins: it asks for its batch."""
        self._began = time.perf_counter()

    def fetched(self) -> None:
        """The batch is there."""
        self._fetched = time.perf_counter()
        self._data.append(self._fetched - self._began)
        if self._cuda:
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()

    def forwarded(self) -> None:
        """The forward pass is made; on a GPU, it is queued."""
        if self._start is None:
            self._own.append(time.perf_counter() - self._began)
            return
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        self._open.append((self._data[-1], self._start, end))
        while self._open and self._open[0][2].query():  # never waits for the device
            data, start, end = self._open.popleft()
            self._own.append(data + start.elapsed_time(end) / 1000)

    @property
    def own_s(self) -> float | None:
        return _mean(list(self._own))  # the heartbeat's thread asks, too

    @property
    def data_s(self) -> float | None:
        return _mean(list(self._data))


def _mean(seconds: list[float]) -> float | None:
    kept = sorted(seconds)[:max(1, len(seconds) - 1 - len(seconds) // 16)]  # a pause is no habit
    return statistics.fmean(kept) if kept else None
