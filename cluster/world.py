"""The ranks of one attempt under agents (agent.py): one here, or one on each host of a hostfile."""

from __future__ import annotations

import time
from typing import IO, Any

from cluster.diagnosis import RankState, diagnose
from cluster.launcher import Attempt, Seen
from cluster.link import Link
from cluster.ranks import END_S
from cluster.rundir import Heartbeat
from neurojepa.errors import ClusterError, LeaseLost

KILLED = 137  # what ranks die of when their agent does
AWAY_S = 10.0  # for a host that does not answer any more


class AgentWorld:
    """See launcher.World.

    Parameters
    ----------
    orders
        By host, what its agent is to start; None to attach to agents that are there.
    """

    def __init__(self, attempt: Attempt, size: int, orders: dict[str, dict[str, Any]] | None,
                 log: IO[bytes]) -> None:
        self.attempt, self.size = attempt, size
        common = {"token": attempt.token, "fence": attempt.fence}
        self._links = [
            Link(host, attempt, {"do": "start", **common, "host": host, **orders[host]} if orders
                 else {"do": "attach", **common, "host": host}, log)
            for host in (orders or attempt.hosts or [""])]
        self._statuses: dict[int, int] = {}

    def look(self) -> Seen:
        known = [pair for link in self._links for pair in list(link.ranks.values())]
        for row, _ in sorted(known, key=lambda pair: pair[1]):
            if row["status"] is not None:
                self._statuses.setdefault(row["rank"], row["status"])
        size = max(self.size, *(link.size for link in self._links))
        for link in self._links:
            if link.refused:
                raise LeaseLost(f"{link.host or 'this machine'}: {link.refused}")
        if any(link.absent is not None for link in self._links):
            size = max(size, 1)
            elsewhere = {rank for link in self._links if link.absent is None
                         for rank in list(link.ranks)}
            for rank in set(range(size)) - elsewhere:
                self._statuses.setdefault(rank, KILLED)
        beats = [Heartbeat.of(row["message"]) for row, _ in known if row["message"]]
        return Seen(size, sorted(beats, key=lambda beat: beat.rank), dict(self._statuses),
                    [link.host for link in self._links if link.gone])

    def signal(self, signum: int) -> None:
        for link in self._links:
            link.signal(signum)

    def states(self) -> list[RankState]:
        return diagnose(self.attempt.token, self.attempt.hosts)

    def end(self) -> list[str]:
        for link in self._links:
            link.end()
        end = time.monotonic() + END_S + AWAY_S
        while any(self._awaited(link, end) for link in self._links):
            time.sleep(0.02)
        silent = [link.host for link in self._links if link.left is None]
        left = [pid for link in self._links for pid in link.left or []]
        self.leave()
        if silent:
            print(f"cannot reach by ssh: {', '.join(silent)}", flush=True)
        if left:
            raise ClusterError(f"processes {left} of the attempt do not end on SIGKILL; check the "
                               "machine's devices and storage")
        return silent

    @staticmethod
    def _awaited(link: Link, end: float) -> bool:
        return link.left is None and link.is_alive() and \
            time.monotonic() < (end - END_S if link.gone else end)

    def leave(self) -> None:
        for link in self._links:
            link.close()
        for link in self._links:
            link.join(AWAY_S)
