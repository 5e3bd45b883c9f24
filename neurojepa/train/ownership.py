"""Who may write into the run directory: rank 0 of the world that holds its lease.

A supervisor takes the lease and its ranks write under it; without one, rank 0 takes it itself,
however the ranks were started.  The other ranks write only files of their own,
which count for nothing until rank 0 commits them.  A world that lost the lease, or that an operator
asked to stop, learns it here and agrees on it at a step boundary.

In an object store ``latest`` has a second line, the fencing token of its writer.  A new owner
writes it anew before it reads anything, so a write of the old owner that comes too late finds
another version than it read, and fails.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from neurojepa.config import RootConfig
from neurojepa.errors import LeaseLost, NeurojepaError
from neurojepa.storage import Patience, append_rows, join, local_path, write_bytes
from neurojepa.storage.lease import ATTEMPT, Keeper, Lease, follow, take
from neurojepa.train.checkpoint import latest_step
from neurojepa.train.stopping import REQUEUE
from neurojepa.train.world import World

LEAVE_S = 15.0  # a stop "now" waits so long for the end of the step


class Ownership:
    """This rank's part in it.  Without a lease (other ranks; tools) everything is allowed.

    Attributes
    ----------
    lost : LeaseLost or None
        Why this world has to end without writing.
    stop : str
        "stop" or "now" where an operator asked for it.
    """

    def __init__(self, run_dir: str, lease: Lease | None = None, holds: bool = False) -> None:
        self.run_dir = run_dir
        self.lost: LeaseLost | None = None
        self.stop = ""
        self._lease, self._holds = lease, holds
        self._keeper: Keeper | None = None
        self._leave: threading.Timer | None = None

    def keep(self) -> None:
        """From now on renew the lease, if this process took it, and watch it."""
        if self._lease:
            self._keeper = Keeper(self._lease, dict if self._holds else None, self._on_lost,
                                  self._on_stop)

    @property
    def token(self) -> int:
        """The fencing token; 0 without a lease."""
        return self._lease.token if self._lease else 0

    def writing(self) -> AbstractContextManager[None]:
        """Around a write of rank 0; raises LeaseLost where it is no more allowed."""
        return self._lease.writing() if self._lease else nullcontext()

    def check(self) -> None:
        """Raise LeaseLost if another owner has taken over."""
        if self._lease:
            self._lease.check()

    def replace(self, uri: str, data: bytes, token_of: Any) -> None:
        """Replace an object; see ``Lease.replace``."""
        if self._lease:
            self._lease.replace(uri, data, token_of)
        else:
            write_bytes(uri, data)

    def point_to(self, name: str) -> None:
        """Make ``latest`` name a checkpoint, or none."""
        text = name if self._lease is None or local_path(self.run_dir) is not None else \
            f"{name}\ntoken {self.token}\n"
        self.replace(join(self.run_dir, "latest"), text.encode(), _token_of_latest)

    def seal(self) -> None:
        """Take ``latest`` over from an owner before; what that one still writes has no effect."""
        if self._lease is not None and local_path(self.run_dir) is None:
            step = latest_step(self.run_dir)
            self.point_to("none" if step is None else f"step-{step}")

    def append(self, uri: str, rows: list[dict[str, Any]]) -> None:
        """Append rows; see ``Lease.append``."""
        if self._lease:
            self._lease.append(uri, rows)
        else:
            append_rows(uri, rows)

    def close(self) -> None:
        """Give the lease back, if this process took it; the last thing a world does."""
        if self._keeper:
            self._keeper.close()
        if self._lease and self._holds and self.lost is None:
            self._lease.release()
        if self._leave:  # the process may live on
            self._leave.cancel()

    def _on_lost(self, error: LeaseLost) -> None:
        self.lost = error

    def _on_stop(self, how: str) -> None:
        self.stop = how
        if how == "now":  # a step that never ends would not come to its boundary
            self._leave = threading.Timer(LEAVE_S, os._exit, (REQUEUE,))
            self._leave.daemon = True
            self._leave.start()


@contextmanager
def owned(config: RootConfig, world: World) -> Iterator[Ownership]:
    """Own the run directory while the world trains.  Collective.

    Raises
    ------
    LeaseHeld
        It has a live owner.
    LeaseLost
        The supervisor that started this world has lost it.
    """
    ownership = Ownership(config.run.dir)

    def take(_: Any) -> None:
        nonlocal ownership
        ownership = _take(config)

    world.settle(None, take)
    try:
        yield ownership
    finally:
        ownership.close()


def _take(config: RootConfig) -> Ownership:
    patience, run_dir = Patience(config.data.retry_s), config.run.dir
    attempt = os.environ.get(ATTEMPT)
    lease = patience(lambda: follow(run_dir, attempt)) if attempt else \
        take(run_dir, "training", patience)
    ownership = Ownership(run_dir, lease, holds=not attempt)
    ownership.keep()
    try:
        patience(ownership.seal)
    except NeurojepaError:
        ownership.close()
        raise
    return ownership


def _token_of_latest(data: bytes) -> int:
    words = data.decode(errors="replace").split()
    return int(words[2]) if len(words) == 3 and words[2].isdigit() else 0
