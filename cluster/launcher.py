"""What the supervisor asks of whatever starts ranks: agents on hosts, Ray, Slurm.

    Supervisor (supervise.py)    decides: attempts, hangs, hosts to leave out, retries, giving up
      Launcher                   where ranks may run; starts an attempt, or finds one again
        World                    the ranks of one attempt: what they say, signals, their end

Launchers and worlds report and obey; they decide nothing.  None of their methods but ``start``,
``adopt``, ``end`` and ``states`` may take longer than a fraction of a second, because the
supervisor looks several times a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

from cluster.diagnosis import RankState
from cluster.rundir import Heartbeat


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run, as it is told to launchers and, in the lease, to other machines.

    Parameters
    ----------
    token
        All its processes have it as NEUROJEPA_ATTEMPT in their environment; rank 0 looks for it in
        the lease.  Letters and digits.
    number
        As in logs/attempt-K.log.
    fence
        The lease's fencing token.  Whoever was told a higher one obeys no lower one.
    hosts
        Where it runs; empty where the launcher chooses by itself.
    before
        Tokens of attempts that may still run on hosts that were away at their end; they are ended
        where this one starts.
    slots
        Ranks on each of the hosts, as they were when it was decided to start it.
    """

    token: str
    number: int
    fence: int = 0
    hosts: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    slots: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """What is known of an attempt at this moment.

    Parameters
    ----------
    size
        Its number of ranks.
    beats
        The last message of each rank that has sent one, by rank.
    statuses
        Exit statuses of the ranks that have ended, as a shell shows them (128 + N after signal N),
        in the order in which they ended, as far as that is known.
    lost
        Hosts that are gone, with whatever ran there.
    """

    size: int
    beats: list[Heartbeat]
    statuses: Mapping[int, int]
    lost: list[str]


class Printed:
    """Takes what ranks print; a full disk costs lines, not the run."""

    def __init__(self, log: IO[bytes]) -> None:
        self._log, self._full = log, False

    def write(self, line: bytes) -> None:
        try:
            self._log.write(line)
        except OSError as error:
            if not self._full:
                print(f"the log of the ranks cannot be written: {error}; lines are lost",
                      flush=True)
            self._full = True


class World(Protocol):
    """The ranks of one attempt."""

    attempt: Attempt

    def look(self) -> Seen:
        """What is known now, or was at the end.  A rank's exit is known within 3 seconds.

        Raises
        ------
        LeaseLost
            The ranks obey a later supervisor.
        """
        ...

    def signal(self, signum: int) -> None:
        """Signal every rank that can be reached: SIGTERM asks for a checkpoint and an end."""
        ...

    def states(self) -> list[RankState]:
        """Where the ranks stand, for the report of a hang."""
        ...

    def end(self) -> list[str]:
        """End all processes of the attempt that can be reached, and let go of it.

        Returns
        -------
        list of str
            Hosts that could not be reached.

        Raises
        ------
        ClusterError
            A process does not end on SIGKILL.
        """
        ...

    def leave(self) -> None:
        """Let go of it as it is: the run has another owner."""
        ...


class Launcher(Protocol):
    """Starts attempts of one run."""

    def fingerprint(self) -> str:
        """Of what it starts, without secrets: attempts of an equal one may be adopted."""
        ...

    def slots(self) -> dict[str, int]:
        """Ranks by host that it may start on, in order; empty where it chooses by itself.

        Raises
        ------
        ConfigError
            A mistake in the hostfile.
        """
        ...

    def problems(self, slots: dict[str, int], folder: str | None,
                 odd: Callable[[dict[str, dict[str, Any]]], None]) -> dict[str, str]:
        """What keeps hosts from taking part, in words, within 10 seconds.

        Parameters
        ----------
        slots
            Ranks by host.
        folder
            A local run directory, where there must be room.
        odd
            Told what the hosts that can take part have measured of themselves (checkup.py).
        """
        ...

    def lacks(self) -> str:
        """What is missing for a start now, in words; empty where nothing is.

        The supervisor asks again until nothing is, or its patience is over.
        """
        ...

    def close(self) -> None:
        """Nothing will be started any more: take back what was asked for."""
        ...

    def start(self, attempt: Attempt, log: IO[bytes]) -> World:
        """Start the ranks.

        Parameters
        ----------
        log
            What they print is written to it, unbuffered; may be handed to a process as its output.
        """
        ...

    def is_there(self, attempt: Attempt) -> bool:
        """Whether anything of an attempt, which another supervisor started, can be found."""
        ...

    def adopt(self, attempt: Attempt, log: IO[bytes]) -> World:
        """Go on with such an attempt, under the attempt's new ``fence``."""
        ...
