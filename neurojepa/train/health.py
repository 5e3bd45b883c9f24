"""Steps that must not count: the engine skips them on all ranks, this keeps the score.

A gradient that is not finite on any rank makes DeepSpeed drop the step everywhere: weights,
moments, EMA and router bias stay as they were.  Each skip is counted and becomes an event; a run
that only skips is stopped, since it burns samples without learning.
"""

from __future__ import annotations

from dataclasses import dataclass

from neurojepa.errors import NeurojepaError

MAX_SKIPS_IN_A_ROW = 20


@dataclass
class Health:
    """Counts of skipped steps; part of the checkpoint."""

    skipped: int = 0
    in_a_row: int = 0

    def observe(self, step: int, applied: bool) -> None:
        """Note whether ``step`` changed the weights.

        Raises
        ------
        NeurojepaError
            ``MAX_SKIPS_IN_A_ROW`` steps in a row were skipped.
        """
        self.in_a_row = 0 if applied else self.in_a_row + 1
        self.skipped += not applied
        if self.in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise NeurojepaError(
                f"training stopped at step {step}: the gradient was not finite in "
                f"{self.in_a_row} steps in a row; lower optim.lr or look at the samples of these "
                "steps, then run again from an earlier checkpoint")
