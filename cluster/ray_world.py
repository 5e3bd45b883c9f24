"""The ranks of one attempt on a Ray cluster: a thread asks their actors (ray_rank.py) in turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from contextlib import suppress
from typing import IO, Any

from cluster.diagnosis import RankState
from cluster.launcher import Attempt, Printed, Seen
from cluster.rundir import Heartbeat
from neurojepa.errors import ClusterError, LeaseLost

LOOK_S = 0.3
GONE_S = 20.0  # a flap of the network is shorter
END_S = 30.0
KILLED = 137  # what a rank dies of when its actor does


class RayWorld:
    """See launcher.World.

    Parameters
    ----------
    actors
        By rank; of an adopted world, those that are left.
    places
        What they say of where they are, by rank.
    """

    def __init__(self, attempt: Attempt, actors: dict[int, Any],
                 places: dict[int, dict[str, Any]], size: int, log: IO[bytes]) -> None:
        self.attempt, self.size = attempt, size
        self._actors, self._log = actors, Printed(log)
        self._groups: set[str] = {place["group"] for place in places.values()}
        self._hosts = places
        self._rows: dict[int, dict[str, Any]] = {}
        # rank -> status and when it ended, by our clock; that of an adopted world's dead: before
        self._ends = {rank: (KILLED, 0.0) for rank in range(size) if rank not in actors}
        self._asked: dict[Any, int] = {}  # answers that have not come yet, and of which rank
        self._heard_at = dict.fromkeys(actors, time.monotonic())
        self._lost: list[str] = []
        self._refused = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ray-ranks", daemon=True)
        self._thread.start()

    def look(self) -> Seen:
        if self._refused:
            raise LeaseLost(f"{self.attempt.number}: {self._refused}")
        beats = [Heartbeat.of(row["message"]) for row in list(self._rows.values())
                 if row.get("message")]
        ends = sorted(self._ends.items(), key=lambda item: item[1][1])
        return Seen(self.size, sorted(beats, key=lambda beat: beat.rank),
                    {rank: status for rank, (status, _) in ends}, list(self._lost))

    def signal(self, signum: int) -> None:
        for actor in self._actors.values():
            actor.signal.remote(self.attempt.fence, signum)

    def states(self) -> list[RankState]:
        import ray

        found = []
        for answer in _come([actor.state.remote() for actor in self._actors.values()], END_S):
            with suppress(ray.exceptions.RayError):  # that rank is gone, which is said elsewhere
                if (row := ray.get(answer)) is not None:
                    found.append(RankState(**row))
        return found

    def end(self) -> list[str]:
        import ray
        from ray.util.placement_group import PlacementGroup

        self.leave()
        asked = {actor.end.remote(self.attempt.fence): rank
                 for rank, actor in self._actors.items()}
        left: list[int] = []
        for answer in _come(asked, END_S):
            rank = asked.pop(answer)
            try:
                left += ray.get(answer)
                self._heard_at[rank] = time.monotonic()
            except ray.exceptions.RayError as error:  # it ended with its actor
                self._died(rank, error)
        for rank in asked.values():
            self._died(rank, "its node does not answer")
        self._hear(wait_s=0.0)
        self._ask()
        self._hear(wait_s=1.0)  # what they printed last
        for actor in self._actors.values():
            ray.kill(actor)
        for group in self._groups:
            ray.util.remove_placement_group(PlacementGroup(
                ray.PlacementGroupID.from_hex(group)))
        if left:
            raise ClusterError(f"processes {left} of the attempt do not end on SIGKILL; check the "
                               "machine's devices and storage")
        return []  # an actor that its cluster has lost ends by itself

    def leave(self) -> None:
        self._ended.set()
        self._thread.join(END_S)

    # ---- in a thread -----------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._ended.wait(LOOK_S):
            self._ask()
            self._hear(wait_s=LOOK_S)

    def _ask(self) -> None:
        """Ask the ranks that have not ended; one that still owes an answer is not asked again."""
        owing = set(self._asked.values())
        self._asked |= {actor.look.remote(self.attempt.fence): rank
                        for rank, actor in self._actors.items()
                        if rank not in self._ends and rank not in owing}

    def _hear(self, wait_s: float) -> None:
        """Take in the answers that come within a moment."""
        import ray

        answers = [(answer, self._asked.pop(answer)) for answer in _come(self._asked, wait_s)]
        silent = list(self._asked.values())
        for answer, rank in answers:
            try:
                self._take(rank, ray.get(answer))
            except ray.exceptions.ActorDiedError as error:
                self._died(rank, error)
            except ray.exceptions.RayError:  # not reached just now
                silent.append(rank)
        for rank in silent:
            if time.monotonic() - self._heard_at[rank] > GONE_S:
                self._died(rank, "its node does not answer")

    def _take(self, rank: int, row: dict[str, Any]) -> None:
        self._heard_at[rank] = now = time.monotonic()
        if "refused" in row:
            self._refused = row["refused"]
            return
        for line in row.get("printed", ()):
            self._log.write(f"[rank {rank}] {line}\n".encode())
        if "rank" in row:
            self._rows[rank] = row
            self.size = row["size"]
            if row["status"] is not None:
                self._ends.setdefault(rank, (row["status"], now - row["ended_s"]))

    def _died(self, rank: int, why: object) -> None:
        """Its actor is gone, since the time when it was heard last: its peers failed after that."""
        import ray

        if rank in self._ends:
            return
        place = self._hosts.get(rank, {})
        host = f"{place.get('host')} ({place.get('address')})"
        self._log.write(f"[rank {rank}] its actor on {host} is gone: {first_line(why)}\n".encode())
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if place and place["node"] not in alive and host not in self._lost:
            self._lost.append(host)
        self._ends[rank] = KILLED, self._heard_at[rank]


def _come(asked: Collection[Any], wait_s: float) -> list[Any]:
    """The answers that come within a while, as references."""
    import ray

    if not asked:  # where no rank could be started there may be no Ray
        return []
    return list(ray.wait(list(asked), num_returns=len(asked), timeout=wait_s)[0])


def first_line(error: object) -> str:
    """What an error says, without the stacks of other processes."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
