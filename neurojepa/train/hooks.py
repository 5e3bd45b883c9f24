"""What looks on while a run trains, and the moments at which the loop tells it.

A hook changes nothing of the training: a run is bit-equal with and without.  It takes the moments
that it needs and leaves the others as they are.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neurojepa.train.loop import Run


class Hook:
    """The moments of a step, in order; each gets the run as it stands."""

    def after_attempt(self, run: Run) -> None:
        """A step was made, or dropped.  On each rank by itself: nothing here waits for others."""

    def after_step(self, run: Run) -> None:
        """The run goes on from this step.  Collective: every rank comes here."""

    def after_flush(self, run: Run) -> None:
        """The rows up to this step are written.  On each rank by itself."""

    def close(self) -> None:
        """The run is over."""


class Progress(Hook):
    """A line on rank 0's screen with every flush."""

    def after_flush(self, run: Run) -> None:
        row, steps, (began, first) = run.metrics.last_row, run.config.train.steps, run.began
        left_s = int((time.perf_counter() - began) / (run.step - first) * (steps - run.step))
        run.say(f"step {run.step}/{steps}  loss {row['loss']:.5f}  "
                f"grad {row['grad_norm']:.3f}  lr {row['lr']:.2e}  "
                f"{row['volumes_per_s']:.1f} volumes/s  data wait {row['data_wait']:.0%}  "
                f"ETA {left_s // 60}:{left_s % 60:02d}")
