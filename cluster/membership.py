"""Which hosts of a hostfile take part in the next attempt."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from neurojepa.errors import ClusterError


class TooFewHosts(ClusterError):
    """Fewer hosts can take part than are needed."""


@dataclass
class Membership:
    """Excludes hosts that have a problem, and takes them in again when they have none.

    Parameters
    ----------
    slots
        Ranks by host, in the hostfile's order.
    min_hosts, max_hosts
        How many have to, and at most may, take part; the rest are spares.
    look
        Given the slots, the problem of each host that has one.
    event
        Told of each change: "host_excluded" or "host_back", the host and why.
    """

    slots: dict[str, int]
    min_hosts: int
    max_hosts: int
    look: Callable[[dict[str, int]], dict[str, str]]
    event: Callable[[str, str, str], None]
    excluded: dict[str, str] = field(default_factory=dict)

    def choose(self) -> frozenset[str]:
        """The hosts to leave out of the next attempt.

        Raises
        ------
        TooFewHosts
            Names each host that cannot take part, and why.
        """
        found = self.look(self.slots)
        for host in self.slots:
            if host in found and host not in self.excluded:
                self.event("host_excluded", host, found[host])
            elif host in self.excluded and host not in found:
                self.event("host_back", host, self.excluded[host])
        self.excluded = found
        good = [host for host in self.slots if host not in found]
        if len(good) < self.min_hosts:
            listed = "; ".join(f"{host} {problem}" for host, problem in found.items())
            raise TooFewHosts(f"{len(good)} of {len(self.slots)} hosts can take part, "
                              f"{self.min_hosts} are needed: {listed}")
        return frozenset(self.slots) - frozenset(good[:self.max_hosts])

    def wait(self, seconds: float, pause: Callable[[], bool]) -> list[str]:
        """The hosts that take part in the next attempt; waits until there are enough.

        Parameters
        ----------
        pause
            Waits a moment; False where nobody needs hosts any more.

        Raises
        ------
        TooFewHosts
            After ``seconds`` there still are.
        """
        end, said = time.monotonic() + seconds, False
        while True:
            try:
                without = self.choose()
                return [host for host in self.slots if host not in without]
            except TooFewHosts as error:
                if time.monotonic() >= end:
                    raise
                if not said:
                    print(f"waiting for hosts: {error}", flush=True)
                said = True
            if not pause():
                return []
