"""What the ranks of an attempt say: the step of the slowest one, and since when it stands."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass, field

from cluster.rundir import Heartbeat

WAITING = "waiting for store"
STARTING = ("starting", "compiling")  # no step yet
SLOW = (*STARTING, "checkpoint", "evaluation")  # what may take longer than a step


@dataclass
class Progress:
    """Where the slowest rank is and since when, by our own clock: only changes are compared."""

    last_step: int | None = None  # the step after which the training has no more to do
    step: int | None = None
    beats: list[Heartbeat] = field(default_factory=list)
    changed_at: float = field(default_factory=time.monotonic)
    step_times_s: deque[float] = field(default_factory=lambda: deque(maxlen=101))
    _slowest: Heartbeat | None = None
    _stepping: int = 0
    _signs: dict[int, tuple[Heartbeat, float]] = field(default_factory=dict)

    def update(self, beats: list[Heartbeat]) -> bool:
        """Take in the last message of each rank; True if the slowest rank advanced."""
        now = time.monotonic()
        news = [beat for beat in beats
                if beat.rank not in self._signs or self._signs[beat.rank][0] != beat]
        self._signs |= {beat.rank: (beat, now) for beat in news}
        if any(beat.state == WAITING for beat in news):
            # alive, and has told why it stands; it gives up by itself after data.retry_s
            self.changed_at = now
        self.beats = beats
        stepping = [beat for beat in beats if beat.state not in STARTING]
        if not stepping:
            return False
        slowest = min(stepping, key=lambda beat: beat.step)
        advanced = len(stepping) > self._stepping or slowest.step != self.step
        previous = self._slowest
        if previous and previous.rank == slowest.rank and slowest.step > previous.step:
            self.step_times_s.append((slowest.time - previous.time)
                                     / (slowest.step - previous.step))
        if previous is None or slowest.step != previous.step:
            self._slowest = slowest
        self.step, self._stepping = slowest.step, len(stepping)
        if advanced:
            self.changed_at = now
        return advanced

    def limit_s(self, hang_s: float, start_s: float) -> float:
        """How long no step is normal: longer before the first step, after the last one, and while
        a rank writes a checkpoint or evaluates."""
        if self.step is None or (self.last_step is not None and self.step >= self.last_step) \
                or any(beat.state in SLOW for beat in self.beats):
            return max(start_s, hang_s)
        median = statistics.median(self.step_times_s) if self.step_times_s else 0.0
        return max(hang_s, 10 * median)

    def ranks_silent_s(self) -> dict[int, float]:
        """Seconds since the last sign of life of each rank, by our clock."""
        now = time.monotonic()
        return {rank: now - seen for rank, (_, seen) in self._signs.items()}

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self.changed_at
