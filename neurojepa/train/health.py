"""Whether a run is well; whatever is decided here is decided alike on all ranks.

    Guard    on the device: a loss or gradient norm that is not finite, or far above those of the
             last steps, becomes an infinite norm, which makes the engine drop the step everywhere
    Health   on the host, from what all ranks know: many drops -> roll back; many rollbacks, or
             targets that no longer differ from each other (collapse) -> stop

A dropped step leaves weights, moments, EMA and router bias alone and shifts neither schedules nor
the order of samples.  A rollback shifts the order: see ``feed.order.first_position``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neurojepa.config import HealthConfig
from neurojepa.errors import DataError, NeurojepaError
from neurojepa.train.world import World

WINDOW, ARMED = 128, 32  # applied steps that are remembered, and needed to call one a spike
MAD_TO_STD = 1.4826  # of a normal distribution
MIN_EXCESS = (0.25, 1.0)  # of the median: no loss or norm nearer to it than this is a spike
RECENT_STEPS = 20  # in which max_skips steps may be dropped
ALWAYS_BORNE = 3  # damaged samples
MAX_FLAGS = 4  # that travel with the loss of a step
DIGIT = 2 ** 13  # more than there are ranks; MAX_FLAGS of them are exact in float64
LOW_FLUSHES = 3  # in a row with collapsed targets before the run stops


class Guard:
    """Limits for a step's loss and gradient norm, kept and compared on the device.

    The limit is median + deviations * 1.4826 * MAD of the last ``WINDOW`` applied steps: both are
    blind to the spikes themselves.  Its tensors belong into the checkpoint.

    Parameters
    ----------
    deviations : float
        0 leaves only the test for finite values.
    world : World
    """

    def __init__(self, deviations: float, world: World) -> None:
        self._deviations, self._world = deviations, world
        self._window = torch.full((2, WINDOW), torch.inf, dtype=torch.float64, device=world.device)
        self._applied = torch.zeros((), dtype=torch.int64, device=world.device)
        self._slots = torch.arange(WINDOW, device=world.device)
        self._excess = torch.tensor(MIN_EXCESS, dtype=torch.float64, device=world.device)
        self._sum = self._window.new_zeros(())
        self._values = self._limits = self._window[:, 0]
        pinned = world.device.type == "cuda"
        self._flags, self._agreed = (torch.zeros(1, dtype=torch.float64, pin_memory=pinned)
                                     for _ in range(2))
        self._arrived = torch.cuda.Event() if pinned else None

    def tensors(self) -> dict[str, Tensor]:
        """The window, to be saved and, in place, restored."""
        return {"health.window": self._window, "health.applied": self._applied}

    def forget(self) -> None:
        """Empty the window: what comes is not comparable with what was."""
        self._window.fill_(torch.inf)
        self._applied.zero_()

    def add(self, loss: Tensor) -> None:
        """Add a micro-step's loss, scaled so that the mean over ranks and micro-steps counts."""
        self._sum = self._sum + loss.detach().double()

    def end_step(self, micro_steps: int, flags: Sequence[bool] = ()) -> None:
        """Agree on the loss of the whole step, and on each flag.  Collective, one message.

        Flags are counted in the digits of one number: gloo sends a second number beside the first
        for a tenth of what a message of its own would cost.  Nothing here waits for the device.
        """
        # by NumPy: torch would wait for the device
        self._flags.numpy()[0] = sum(DIGIT ** i for i, flag in enumerate(flags) if flag)
        carried = torch.cat([self._sum[None],
                             self._flags.to(self._sum.device, non_blocking=True)])
        self._world.sum_(carried)
        self._agreed.copy_(carried[1:], non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
        loss = carried[0] / (self._world.size * micro_steps)
        self._sum = torch.zeros_like(self._sum)
        self._values = torch.stack([loss, torch.full_like(loss, torch.inf)])
        self._limits = self._current_limits()

    def agreed(self) -> list[bool]:
        """For each of ``MAX_FLAGS`` of the last ``end_step``: true on all ranks if true on one."""
        if self._arrived is not None:
            self._arrived.synchronize()  # long past: the engine has read the norm since
        votes = int(self._agreed.numpy()[0])
        return [votes // DIGIT ** i % DIGIT > 0 for i in range(MAX_FLAGS)]

    def judge(self, norm: Tensor) -> Tensor:
        """The gradient norm as it is, or inf where the step must not count."""
        self._values = torch.stack([self._values[0], norm.to(self._excess)])
        good = (self._values.isfinite() & (self._values <= self._limits)).all()
        here = self._slots == self._applied % WINDOW
        self._window.copy_(torch.where(here & good, self._values[:, None], self._window))
        self._applied += good
        return torch.where(good.to(norm.device), norm, torch.inf)  # offloaded, it is on the host

    def why(self) -> dict[str, Any]:
        """Why the last step was dropped, with its values and limits (waits for the device)."""
        (loss, norm), (max_loss, max_norm) = torch.stack([self._values, self._limits]).tolist()
        compared = (("loss", loss, max_loss), ("gradient", norm, max_norm))
        reasons = [f"{name} {'spike' if math.isfinite(value) else 'not finite'}"
                   for name, value, limit in compared
                   if not (math.isfinite(value) and value <= limit)]
        return {"reason": ", ".join(reasons), "loss": loss, "loss_limit": max_loss,
                "grad_norm": norm, "grad_norm_limit": max_norm}

    def _current_limits(self) -> Tensor:
        """float64 [2], inf where there is no limit (yet)."""
        if not self._deviations:
            return torch.full_like(self._values, torch.inf)
        median = self._median(self._window)
        spread = MAD_TO_STD * self._median((self._window - median[:, None]).abs())
        limits = median + torch.maximum(self._deviations * spread, self._excess * median.abs())
        return torch.where(self._applied >= ARMED, limits, torch.inf)

    def _median(self, values: Tensor) -> Tensor:
        """Over the filled part of a window; what is not filled is inf and sorts last."""
        middle = (self._applied.clamp(1, WINDOW) - 1) // 2
        return values.sort(dim=1).values.index_select(1, middle.view(1))[:, 0]


class Health:
    """Counts of dropped steps, and when to go back or stop; ``record`` is in the checkpoint.

    Parameters
    ----------
    config : HealthConfig
    record : dict, optional
        As an earlier ``record`` gave it.
    """

    def __init__(self, config: HealthConfig, record: Mapping[str, Any] | None = None) -> None:
        self._config = config
        self.skipped: int = record["skipped"] if record else 0
        self._recent: list[int] = list(record["recent"]) if record else []
        self._rollbacks = 0  # from the checkpoint the run stands on
        self._low, self._seen = 0, 0

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        return {"skipped": self.skipped, "recent": self._recent}

    def must_go_back(self, step: int, applied: bool) -> bool:
        """Note whether ``step`` changed the weights; true where too many of late did not."""
        self._recent = [s for s in self._recent if s > step - RECENT_STEPS]
        if not applied:
            self.skipped += 1
            self._recent.append(step)
        return len(self._recent) > self._config.max_skips

    def go_back(self, record: Mapping[str, Any] | None) -> str | None:
        """Take up the record of the checkpoint gone back to; says why that is impossible."""
        if record is None:
            return "before the first checkpoint"
        if self._rollbacks >= self._config.max_rollbacks:
            return f"again after {self._rollbacks} rollbacks to the same checkpoint"
        # what was dropped before counts no more: the samples ahead are others
        self.skipped, self._recent = record["skipped"], []
        self._rollbacks += 1
        return None

    def progressed(self) -> None:
        """A new checkpoint stands: rollbacks are counted from here."""
        self._rollbacks = 0

    def collapse(self, row: Mapping[str, Any]) -> dict[str, float] | None:
        """The figures of a flush's last row, once they were too low in several in a row."""
        if row["step"] == self._seen:
            return None
        self._seen = row["step"]
        limits = {"target_std": self._config.min_target_std,
                  "effective_rank": self._config.min_effective_rank}
        figures = {name: row[name] for name in limits if name in row}
        low = any(value < limits[name] for name, value in figures.items())
        self._low = self._low + 1 if low else 0
        return figures if self._low >= LOW_FLUSHES else None


class Damage:
    """Damaged samples that were replaced, on any rank, and when they are too many.

    Parameters
    ----------
    max_share : float
        Of the samples read since this process started; ``ALWAYS_BORNE`` may always be damaged.
    """

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._scans: set[str] = set()

    def new(self, reports: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The reports of scans that were not known yet."""
        fresh = {report["scan_id"]: report for report in reversed(list(reports))
                 if report["scan_id"] not in self._scans}
        self._scans |= fresh.keys()
        return [fresh[scan_id] for scan_id in sorted(fresh)]

    def check(self, samples_read: int) -> None:
        """Raise DataError where too many were damaged."""
        if len(self._scans) > max(ALWAYS_BORNE, self._max_share * samples_read):
            raise DataError(
                f"{len(self._scans)} of {samples_read} samples read were damaged, more than "
                f"data.max_damaged_share = {self._max_share}; see the damaged events, then run: "
                "python -m data_prep verify FEED")


def diverged(step: int, why: str, config: HealthConfig) -> NeurojepaError:
    """The error that ends a run that cannot go on."""
    return NeurojepaError(
        f"training diverged: more than {config.max_skips} of {RECENT_STEPS} steps up to step "
        f"{step} were dropped, {why}; see the skip events for losses and gradient norms; start "
        "again with a lower optim.lr or longer optim.warmup_steps in another run.dir")


def collapsed(step: int, figures: Mapping[str, float]) -> NeurojepaError:
    """The error that ends a run whose targets have become alike."""
    listed = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    return NeurojepaError(
        f"the representation collapsed: {listed} at step {step}, {LOW_FLUSHES} readings in a row; "
        "look at target_std, effective_rank and loss in metrics.jsonl; start again with a lower "
        "optim.lr, optim.ema nearer to 1 or a smaller objective.sparse.l1, or set "
        "train.health.min_target_std and min_effective_rank lower")
