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

KEPT = 16  # micro-steps: a median that a checkpoint or a pause does not move


class Pace:
    """Medians over the last micro-steps, in seconds; None before the first."""

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
        own = list(self._own)  # the heartbeat's thread asks, too
        return statistics.median(own) if own else None

    @property
    def data_s(self) -> float | None:
        data = list(self._data)
        return statistics.median(data) if data else None
