"""What a run tells about itself: metrics.jsonl, events.jsonl, heartbeat/, TensorBoard.

The loop hands over device scalars; they stay on the device until a flush (every log_every steps
and before each checkpoint), which sums them over ranks in one collective, reads them once and lets
rank 0 write.  metrics.jsonl has one row per step: a resumed run drops the rows past its
checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from typing import Any

import torch
from torch import Tensor

from neurojepa.feed.format import is_local, join, open_store, write_bytes
from neurojepa.train.rows import append_rows, read_rows, write_rows
from neurojepa.train.world import World

HEARTBEAT_PUT_S = 5.0  # shortest time between heartbeats to an object store


class Metrics:
    """Buffers the metrics of steps; rank 0 writes them.

    Parameters
    ----------
    run_dir : str
        Run directory, local or URI.
    world : World
    global_batch : int
        Samples per step, for rates and the loss.
    resumed : int
        Steps already done; later rows of an earlier attempt are dropped.
    """

    def __init__(self, run_dir: str, world: World, global_batch: int, resumed: int) -> None:
        self.run_dir, self.world, self.global_batch = run_dir, world, global_batch
        self.last_row: dict[str, Any] = {}
        self._sums: dict[str, Tensor] = {}
        self._pending: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        self._flushed, self._waited = time.perf_counter(), 0.0
        self._board: Any = None
        if world.rank == 0:
            self._keep_until(resumed)
            if is_local(open_store(run_dir)[0]):  # event files are appended to; stores cannot
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(join(open_store(run_dir)[1], "tensorboard"),
                                            purge_step=resumed + 1)

    def add(self, loss: Tensor, sums: dict[str, Tensor]) -> None:
        """Add a micro-batch's weighted sums (no device sync)."""
        for key, value in {"loss": loss.detach(), **sums}.items():
            value = value.detach().double()
            self._sums[key] = self._sums[key] + value if key in self._sums else value

    def end_step(self, step: int, host: dict[str, Any]) -> None:
        """Close the row of ``step`` with values known on the host."""
        self._pending.append(({"step": step, **host}, self._sums))
        self._sums = {}

    def flush(self, waited_s: float) -> None:
        """Sum the pending rows over ranks and write them.  Collective.

        Parameters
        ----------
        waited_s : float
            Seconds the trainer has waited for data since the start.
        """
        if not self._pending:
            return
        keys = sorted(self._pending[0][1])
        table = torch.stack([torch.stack([sums[key] for key in keys])
                             for _, sums in self._pending])
        values = self.world.sum_(table).tolist()
        now = time.perf_counter()
        seconds = (now - self._flushed) / len(values)
        rates = {"volumes_per_s": self.global_batch / seconds, "step_s": seconds,
                 "data_wait": (waited_s - self._waited) / len(values) / seconds}
        rows = []
        for (host, _), row in zip(self._pending, values, strict=True):
            means = _means(dict(zip(keys, row, strict=True)))
            rows.append({**host, "loss": row[keys.index("loss")] / self.global_batch, **means,
                         **rates})
        self._pending, self._flushed, self._waited = [], now, waited_s
        self.last_row = rows[-1]
        if self.world.rank == 0:
            append_rows(join(self.run_dir, "metrics.jsonl"), rows)
            self._to_board(rows)

    def rewind(self, step: int) -> None:
        """Forget the steps after ``step``: they will be done again, otherwise."""
        self._pending, self._sums = [], {}
        if self.world.rank == 0:
            self._keep_until(step)

    def event(self, name: str, step: int, **facts: Any) -> None:
        """Append to events.jsonl (rank 0)."""
        if self.world.rank == 0:
            append_rows(join(self.run_dir, "events.jsonl"),
                        [{"time": time.time(), "event": name, "step": step, **facts}])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _to_board(self, rows: list[dict[str, Any]]) -> None:
        if self._board is not None:
            for row in rows:
                for key, value in row.items():
                    if key != "step" and isinstance(value, int | float):
                        self._board.add_scalar(key, value, row["step"])
            self._board.flush()

    def _keep_until(self, step: int) -> None:
        uri = join(self.run_dir, "metrics.jsonl")
        rows = [row for row in read_rows(uri) if row["step"] <= step]
        write_rows(uri, rows)


class Heartbeat:
    """heartbeat/rank-R.json: this rank's latest step; whoever watches sees a hang."""

    def __init__(self, run_dir: str, rank: int) -> None:
        self._uri = join(run_dir, "heartbeat", f"rank-{rank}.json")
        self._local = is_local(open_store(run_dir)[0])
        self._facts = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._written = -math.inf

    def beat(self, step: int) -> None:
        """Rewrite the file; object stores are spared more than one write in a few seconds."""
        now = time.monotonic()
        if not self._local and now - self._written < HEARTBEAT_PUT_S:
            return
        data = json.dumps({**self._facts, "step": step, "time": time.time()}).encode()
        if self._local and self._written > 0:
            path = open_store(self._uri)[1]
            with open(path + ".new", "wb") as file:  # no fsync: it only has to be seen, not kept
                file.write(data)
            os.replace(path + ".new", path)
        else:
            write_bytes(self._uri, data)
        self._written = now


def _means(sums: dict[str, float]) -> dict[str, float]:
    """Weighted sums to means: "a/T1w" goes by "weight/T1w", all others by "weight"."""
    means = {}
    for key, value in sums.items():
        name, slash, group = key.partition("/")
        weight = sums["weight" + slash + group]
        if name != "weight" and key != "loss" and weight > 0:
            means[key] = value / weight
    return means
