"""What ranks tell each other on the host, by way of the store at which they met.

Each rank has one connection for it, whatever the number of ranks; the store in rank 0's process (or
in torchrun's agent) has one of each.  An exchange costs the store a few messages of each rank, so
it is for what is rare: a start, a checkpoint, a stop.  What has to be agreed in every step rides on
a sum that the device makes anyway; see ``health.Guard``.

A rank that is gone is not noticed here but by its launcher, which ends the others.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

import neurojepa.errors
from neurojepa.errors import ClusterError, NeurojepaError

T = TypeVar("T")
OWN_FILES = 512  # that rank 0 has open for all else
SHOWN = 8  # ranks that an error names


class Control:
    """The exchanges of one rank; all ranks make the same ones in the same order.

    Parameters
    ----------
    store : dist.Store
        Shared by all ranks; this rank's own connection.
    timeout : timedelta
        A peer that is silent this long is lost.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._round = 0
        self._timeout = timeout
        store.set_timeout(timeout)

    def settle(self, item: Any, verdict: Callable[[list[Any]], T]) -> T:
        """What rank 0 makes of everyone's item, in rank order, on every rank.  Collective.

        Parameters
        ----------
        item
            JSON can hold it; tuples arrive as lists.
        verdict : callable
            Called on rank 0 alone; JSON can hold what it returns.

        Raises
        ------
        NeurojepaError
            What ``verdict`` raised, on every rank; of a class that is not in neurojepa.errors,
            the nearest one there.
        ClusterError
            Ranks were silent for too long.
        """
        self._round += 1
        if self._rank == 0:
            return self._lead(item, verdict)
        self._store.set(self._key(self._rank), json.dumps(item).encode())
        self._store.delete_key(self._key(self._rank, self._round - 1))
        try:
            answer = json.loads(self._store.get(self._key("all")))
        except dist.DistStoreError as error:
            raise ClusterError(f"rank 0 said nothing for {self._timeout}; its log says "
                               "why") from error
        if "error" in answer:
            self.leave()
            raise getattr(neurojepa.errors, answer["error"])(answer["says"])
        return answer["says"]  # type: ignore[no-any-return]

    def leave(self) -> None:
        """The last exchange before a process may end: rank 0 waits until all are through."""
        if self._rank:
            self._store.set(self._key(self._rank, f"{self._round}-left"), b"")
        else:
            self._all_of(f"{self._round}-left")

    def _lead(self, item: Any, verdict: Callable[[list[Any]], T]) -> T:
        items = [item, *map(json.loads, self._all_of(self._round))]
        self._store.delete_key(self._key("all", self._round - 1))  # everyone has read it
        try:
            result = verdict(items)
        except NeurojepaError as error:
            # by the nearest class that every rank knows
            name = next(kind.__name__ for kind in type(error).__mro__
                        if kind.__module__ == neurojepa.errors.__name__)
            says = {"error": name, "says": str(error)}
            self._store.set(self._key("all"), json.dumps(says).encode())
            self.leave()
            raise
        self._store.set(self._key("all"), json.dumps({"says": result}).encode())
        return result

    def _all_of(self, each: int | str) -> list[bytes]:
        keys = [self._key(rank, each) for rank in range(1, self._size)]
        try:
            found: list[bytes] = self._store.multi_get(keys)
        except dist.DistStoreError as error:
            silent = [key.split("/")[-1] for key in keys if not self._store.check([key])]
            more = f" and {len(silent) - SHOWN} more" if len(silent) > SHOWN else ""
            raise ClusterError(f"ranks {', '.join(silent[:SHOWN])}{more} said nothing for "
                               f"{self._timeout}; their logs say why") from error
        return found

    def _key(self, who: int | str, each: int | str | None = None) -> str:
        return f"{self._round if each is None else each}/{who}"


def allow_connections(ranks: int) -> None:
    """Let rank 0 hold two connections of each rank: one of torch's, and ours.

    Raises
    ------
    ClusterError
        The system does not allow so many open files.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * ranks + OWN_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ClusterError(f"{ranks} ranks need {needed} open files in rank 0's process, its limit "
                           f"is {hard}; raise it on its host (ulimit -Hn, LimitNOFILE)")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
