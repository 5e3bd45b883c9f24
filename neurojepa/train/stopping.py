"""When a run is asked to end early: by a signal, or because its time is nearly up.

Each rank looks for itself; the loop agrees on it at a step boundary, writes a checkpoint and leaves
with ``REQUEUE``, as batch systems expect.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

REQUEUE = 75  # EX_TEMPFAIL: stopped on request, run again to continue
MIN_MARGIN_S = 60.0


class StopRequest:
    """SIGTERM, SIGUSR1, run.time_limit_min, or the end of a Slurm job (SLURM_JOB_END_TIME).

    Parameters
    ----------
    time_limit_min : float
        From now; 0 for none.
    """

    def __init__(self, time_limit_min: float) -> None:
        self.checkpoint_s = 0.0  # how long the last checkpoint took; to be kept up to date
        self._signal = ""
        self._handlers = {number: signal.signal(number, self._on_signal)
                          for number in (signal.SIGTERM, signal.SIGUSR1)}
        self._end = time.time() + 60 * time_limit_min if time_limit_min else float("inf")
        job_end = os.environ.get("SLURM_JOB_END_TIME", "")
        if job_end.isdigit():
            self._end = min(self._end, float(job_end))

    @property
    def reason(self) -> str:
        """Why to stop now; empty where there is no reason."""
        margin = max(MIN_MARGIN_S, 3 * self.checkpoint_s)
        return self._signal or ("time limit" if time.time() > self._end - margin else "")

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = "signal"
