"""What a run tells about itself: metrics.jsonl, events.jsonl, trackers.

The loop hands over device scalars; they stay on the device until a flush (every log_every steps
and before each checkpoint), which sums them over ranks in one collective, reads them once and lets
rank 0 write.  metrics.jsonl has one row per step: a resumed run drops the rows past its
checkpoint.  An object store gets rows once a minute, before each checkpoint and with each event;
while it fails, training waits for it.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neurojepa.config import RootConfig
from neurojepa.feed.format import Grid
from neurojepa.model.flops import peak_flops, step_flops, tokens_per_volume
from neurojepa.storage import (
    Patience,
    append_rows,
    drop_rows,
    join,
    local_path,
)
from neurojepa.train.ownership import Ownership
from neurojepa.train.telemetry import Trackers, check_trackers
from neurojepa.train.world import World

ROWS_PUT_S = 60.0  # between puts of rows of metrics that nothing hurries


class Metrics:
    """Buffers the metrics of steps; rank 0 writes them.

    Parameters
    ----------
    config : RootConfig
    grid : Grid
        Of the feed, for the tokens and FLOPs of a volume.
    world : World
    resumed : int
        Steps already done; later rows of an earlier attempt are dropped.
    patience : Patience
        With a store that fails.
    owner : Ownership, optional
        Of the run directory; without it, everything may be written.

    Raises
    ------
    ConfigError
        run.trackers names a package that is not installed.
    """

    def __init__(self, config: RootConfig, grid: Grid, world: World, resumed: int,
                 patience: Patience, owner: Ownership | None = None) -> None:
        check_trackers(config.run.trackers)
        self.patience, self.owner = patience, owner or Ownership(config.run.dir)
        self.run_dir, self.world = config.run.dir, world
        self.global_batch = config.train.global_batch
        self.last_row: dict[str, Any] = {}
        self._work = _Work(config, grid, world)
        self._sums: dict[str, Tensor] = {}
        self._pending: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        self._flushed, self._waited = time.perf_counter(), 0.0
        self._unwritten: list[dict[str, Any]] = []
        self._written = -math.inf
        self._local = local_path(self.run_dir) is not None
        self._trackers: Trackers | None = None
        if world.rank == 0:
            self._keep_until(resumed)
            self._trackers = Trackers(config, resumed)

    def add(self, loss: Tensor, sums: dict[str, Tensor]) -> None:
        """Add a micro-batch's weighted sums (no device sync)."""
        for key, value in {"loss": loss.detach(), **sums}.items():
            value = value.detach().double()
            self._sums[key] = self._sums[key] + value if key in self._sums else value

    def end_step(self, step: int, known: dict[str, Any]) -> None:
        """Close the row of ``step`` with values alike on all ranks (device scalars wait)."""
        self._pending.append(({"step": step, **known}, self._sums))
        self._sums = {}

    def flush(self, waited_s: float, durable: bool = False) -> None:
        """Sum the pending rows over ranks and write them.  Collective.

        Parameters
        ----------
        waited_s : float
            Seconds the trainer has waited for data since the start.
        durable : bool
            They must be in the run directory on return.
        """
        if self._pending:
            rows = self._rows(waited_s)
            self.last_row = rows[-1]
            if self._trackers is not None:
                self._unwritten += rows
                self._trackers.log(rows)
                for problem in self._trackers.problems():
                    self.event("tracker", rows[-1]["step"], problem=problem)
        if durable or self._local or time.monotonic() - self._written > ROWS_PUT_S:
            self._write()

    def _rows(self, waited_s: float) -> list[dict[str, Any]]:
        keys = sorted(self._pending[0][1])
        table = self.world.sum_(torch.stack([torch.stack([sums[key] for key in keys])
                                             for _, sums in self._pending]))
        known, values = _read([known for known, _ in self._pending], table)
        now = time.perf_counter()
        seconds = (now - self._flushed) / len(values)
        rates = {**self._work.rates(self.global_batch / seconds), "step_s": seconds,
                 "data_wait": (waited_s - self._waited) / len(values) / seconds}
        rows = []
        for facts, row in zip(known, values, strict=True):
            means = _means(dict(zip(keys, row, strict=True)))
            rows.append({**facts, "loss": row[keys.index("loss")] / self.global_batch, **means,
                         **rates})
        self._pending, self._flushed, self._waited = [], now, waited_s
        return rows

    def _write(self) -> None:
        if self._unwritten:
            uri, rows = join(self.run_dir, "metrics.jsonl"), self._unwritten
            self.patience(lambda: self._guarded(lambda: append_rows(uri, rows)))
            self._unwritten, self._written = [], time.monotonic()

    def rewind(self, step: int) -> None:
        """Forget the steps after ``step``: they will be done again, otherwise."""
        self._pending, self._sums = [], {}
        if self.world.rank == 0:
            self._write()
            self._keep_until(step)

    def event(self, name: str, step: int, **facts: Any) -> None:
        """Append to events.jsonl (rank 0), after the rows that led to it."""
        if self.world.rank == 0:
            self._write()
            row = {"time": time.time(), "event": name, "step": step, **facts}
            uri = join(self.run_dir, "events.jsonl")
            self.patience(lambda: self.owner.append(uri, [row]))

    def close(self) -> None:
        if self._trackers is not None:
            self._trackers.close()

    def _keep_until(self, step: int) -> None:
        uri = join(self.run_dir, "metrics.jsonl")
        self.patience(lambda: self._guarded(
            lambda: drop_rows(uri, lambda row: row["step"] <= step)))

    def _guarded(self, write: Callable[[], None]) -> None:
        with self.owner.writing():
            write()


class _Work:
    """What volumes per second mean in tokens and in shares of the devices' peak."""

    def __init__(self, config: RootConfig, grid: Grid, world: World) -> None:
        self._cuda = world.device.type == "cuda"
        self._tokens = tokens_per_volume(config, grid)
        peak = peak_flops(torch.cuda.get_device_name(world.device)) if self._cuda else None
        self._share = None  # of all devices' peak that one volume per second takes
        if peak:
            self._share = step_flops(config, grid) / (peak * world.size)

    def rates(self, volumes_per_s: float) -> dict[str, Any]:
        peak = (torch.cuda.max_memory_allocated() if self._cuda
                else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
        return {"volumes_per_s": volumes_per_s, "tokens_per_s": volumes_per_s * self._tokens,
                "mfu": None if self._share is None else volumes_per_s * self._share,
                "memory_mib": peak / 2**20}


def _read(known: list[dict[str, Any]], table: Tensor
          ) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """Scalars and a table as numbers of the host, which waits for the device once."""
    scalars = [value.to(table) for row in known for value in row.values()
               if isinstance(value, Tensor)]
    numbers = iter(torch.cat([table.flatten(), *(value.view(1) for value in scalars)]).tolist())
    values = [[next(numbers) for _ in row] for row in table]
    return [{key: next(numbers) if isinstance(value, Tensor) else value
             for key, value in row.items()} for row in known], values


def _means(sums: dict[str, float]) -> dict[str, float]:
    """Weighted sums to means: "a/T1w" goes by "weight/T1w", all others by "weight"."""
    means = {}
    for key, value in sums.items():
        name, slash, group = key.partition("/")
        weight = sums["weight" + slash + group]
        if name != "weight" and key != "loss" and weight > 0:
            means[key] = value / weight
    return means
