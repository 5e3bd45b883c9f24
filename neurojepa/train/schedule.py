"""What changes over a run, as pure functions of the attempted step.

A step that was skipped still advances the schedule, so nothing here depends on history and a
resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from neurojepa.config import OptimConfig, RootConfig


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The scheduled values of one step."""

    lr: float
    l1: float  # weight of the sparsity term
    ema: float  # momentum of the target encoder


def rates_at(step: int, config: RootConfig) -> Rates:
    """The rates of step ``step`` (counted from 0)."""
    sparse = config.objective.sparse
    warm = min(1.0, (step + 1) / sparse.l1_warmup_steps) if sparse.l1_warmup_steps else 1.0
    return Rates(lr=learning_rate(step, steps=config.train.steps, optim=config.optim),
                 l1=sparse.l1 * warm, ema=config.optim.ema)


def learning_rate(step: int, *, steps: int, optim: OptimConfig) -> float:
    """Linear warm-up to ``lr``, half a cosine down to ``min_lr`` or none, and a linear cooldown.

    The cooldown is decided late: a run of constant rate that is extended, or given a cooldown,
    before its last ``cooldown_steps`` has had the rates that it would have had from the start.
    (Warm-up, stable, decay: Hu et al. 2024; Haegele et al. 2024.)
    """
    if step < optim.warmup_steps:
        rate = optim.lr * (step + 1) / optim.warmup_steps
    elif optim.schedule == "constant":
        rate = optim.lr
    else:
        rest = max(1, steps - 1 - optim.warmup_steps)
        progress = min(1.0, (step - optim.warmup_steps) / rest)
        rate = _between(optim, 0.5 * (1 + math.cos(math.pi * progress)))
    if step >= steps - optim.cooldown_steps:
        rate = min(rate, _between(optim, (steps - 1 - step) / optim.cooldown_steps))
    return rate


def _between(optim: OptimConfig, share: float) -> float:
    return optim.min_lr + (optim.lr - optim.min_lr) * share
