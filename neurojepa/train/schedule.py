"""What changes over a run, as pure functions of the attempted step.

A step that was skipped still advances the schedule, so nothing here depends on history and a
resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from neurojepa.config import OptimConfig, RootConfig


@dataclass(frozen=True)
class Rates:
    """The scheduled values of one step."""

    lr: float
    l1: float  # weight of the sparsity term
    ema: float  # momentum of the target encoder


def rates_at(step: int, config: RootConfig) -> Rates:
    """The rates of step ``step`` (counted from 0)."""
    sparse = config.objective.sparse
    warm = min(1.0, (step + 1) / sparse.l1_warmup_steps) if sparse.l1_warmup_steps else 1.0
    return Rates(learning_rate(step, config.train.steps, config.optim), sparse.l1 * warm,
                 config.optim.ema)


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """Linear warm-up to ``lr``, then half a cosine down to ``min_lr`` at the last step."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    rest = max(1, steps - 1 - optim.warmup_steps)
    progress = min(1.0, (step - optim.warmup_steps) / rest)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
