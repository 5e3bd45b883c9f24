"""Start attempts on a Ray cluster: a placement group with room for all ranks, an actor for each.

Group and actors are detached, so ranks outlive a supervisor; the next one finds them by name.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from cluster.agents import EXPORTED
from cluster.diagnosis import RankState
from cluster.launcher import Attempt, Seen
from cluster.processes import TOKEN
from cluster.ray_rank import RankActor
from cluster.rundir import Heartbeat
from neurojepa.errors import ClusterError, ConfigError, LeaseLost

NAMESPACE = "neurojepa"
ROOM_S = 1.0  # of a look for room; the group stays in the queue, where the autoscaler sees it
LOOK_S = 0.3
GONE_S = 20.0  # a flap of the network is shorter
END_S = 30.0
KILLED = 137  # what a rank dies of when its actor does


@dataclass
class RayLauncher:
    """See launcher.Launcher.

    Parameters
    ----------
    arguments
        What follows ``python -m <module>``: ``--config C [a.b=v ...]``.
    ranks
        How many; each takes a CPU, and a GPU where the cluster has or can have one.
    """

    arguments: list[str]
    ranks: int
    run: str
    module: str = "neurojepa.pretrain"
    _group: Any = field(default=None, init=False, repr=False)

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def slots(self) -> dict[str, int]:
        return {}

    def problems(self, folder: str | None, odd: Callable[[dict[str, dict[str, Any]]], None]
                 ) -> dict[str, str]:
        return {}

    def start(self, attempt: Attempt, log: IO[bytes]) -> RayWorld:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        need, group = needs(), self._group
        assert group is not None  # ``lacks`` has made it
        try:
            kind: Any = ray.remote(num_cpus=need["CPU"],
                                   num_gpus=need.get("GPU", 0))(RankActor)
            actors = [kind.options(
                name=f"{attempt.token}-{rank}", lifetime="detached", max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank)).remote()
                for rank in range(self.ranks)]
            places = dict(enumerate(ray.get([actor.where.remote() for actor in actors],
                                            timeout=END_S)))
            environment = exported() | {
                TOKEN: attempt.token, "WORLD_SIZE": str(self.ranks), "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": places[0]["address"],
                "MASTER_PORT": str(places[0]["port"])}
            command = [sys.executable, "-u", "-m", self.module, *self.arguments]
            ray.get([actor.start.remote(attempt.fence, command, {**environment, "RANK": str(rank)})
                     for rank, actor in enumerate(actors)], timeout=END_S)
        except ray.exceptions.RayError as error:  # a node was lost meanwhile: it has failed
            log.write(f"the ranks could not be started: {_first_line(error)}\n".encode())
            self.close()
            return RayWorld(attempt, {}, {}, self.ranks, log)
        self._group = None  # the world's from now on
        return RayWorld(attempt, dict(enumerate(actors)), places, self.ranks, log)

    def lacks(self) -> str:
        import ray
        from ray.util.placement_group import get_placement_group, placement_group

        need = needs()
        if self._group is None:
            name = f"neurojepa-{run_key(self.run)}"
            with suppress(ValueError):  # none is there, as it should be
                ray.util.remove_placement_group(get_placement_group(name))
            self._group = placement_group([need] * self.ranks, name=name, lifetime="detached")
        if self._group.wait(ROOM_S):
            return ""
        return (f"Ray has no room for run.ranks={self.ranks} with {_words(need)} each (free: "
                f"{_words(ray.available_resources())} of {_words(ray.cluster_resources())}); add "
                "nodes or lower run.ranks")

    def close(self) -> None:
        """Take back a group that waits for room."""
        import ray

        if self._group is not None:
            ray.util.remove_placement_group(self._group)
            self._group = None

    def is_there(self, attempt: Attempt) -> bool:
        return bool(_actors(attempt))

    def adopt(self, attempt: Attempt, log: IO[bytes]) -> RayWorld:
        import ray

        actors = _actors(attempt)
        places = {}
        for rank, actor in actors.items():
            with suppress(ray.exceptions.RayError):  # it is lost, or will be looked at again
                places[rank] = ray.get(actor.where.remote(), timeout=ROOM_S)
        return RayWorld(attempt, actors, places, self.ranks, log)


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
        self._actors, self._log = actors, log
        self._groups: set[str] = {place["group"] for place in places.values()}
        self._hosts = places
        self._rows: dict[int, dict[str, Any]] = {}
        self._statuses = {rank: KILLED for rank in range(size) if rank not in actors}
        self._silent_since: dict[int, float] = {}
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
        return Seen(self.size, sorted(beats, key=lambda beat: beat.rank), dict(self._statuses),
                    list(self._lost))

    def signal(self, signum: int) -> None:
        for actor in self._actors.values():
            actor.signal.remote(self.attempt.fence, signum)

    def states(self) -> list[RankState]:
        import ray

        asked = [actor.state.remote() for actor in self._actors.values()]
        ready, _ = ray.wait(asked, num_returns=len(asked), timeout=END_S)
        found = []
        for answer in ready:
            with suppress(ray.exceptions.RayError):  # that rank is gone, which is said elsewhere
                if (row := ray.get(answer)) is not None:
                    found.append(RankState(**row))
        return found

    def end(self) -> None:
        import ray
        from ray.util.placement_group import PlacementGroup

        asked = [actor.end.remote(self.attempt.fence) for actor in self._actors.values()]
        left: list[int] = []
        for answer in asked:
            with suppress(ray.exceptions.RayError):  # it ended with its actor
                left += ray.get(answer, timeout=END_S)
        self._collect(wait_s=1.0)  # what they printed last
        self.leave()
        for actor in self._actors.values():
            ray.kill(actor)
        for group in self._groups:
            ray.util.remove_placement_group(PlacementGroup(
                ray.PlacementGroupID.from_hex(group)))
        if left:
            raise ClusterError(f"processes {left} of the attempt do not end on SIGKILL; check the "
                               "machine's devices and storage")

    def leave(self) -> None:
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(END_S)

    # ---- in a thread -----------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._ended.wait(LOOK_S):
            self._collect(wait_s=2.0)

    def _collect(self, wait_s: float) -> None:
        """Ask all actors and take in what comes within a moment."""
        import ray

        asked = {actor.look.remote(self.attempt.fence): rank
                 for rank, actor in self._actors.items() if self._open(rank)}
        if not asked:
            return
        ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=wait_s)
        for answer in ready:
            try:
                self._take(asked[answer], ray.get(answer))
            except ray.exceptions.ActorDiedError as error:
                self._died(asked[answer], error)
            except ray.exceptions.RayError:  # not reached just now
                late.append(answer)
        for answer in late:
            rank = asked[answer]
            since = self._silent_since.setdefault(rank, time.monotonic())
            if time.monotonic() - since > GONE_S:
                self._died(rank, "its node does not answer")

    def _open(self, rank: int) -> bool:
        return self._statuses.get(rank) is None

    def _take(self, rank: int, row: dict[str, Any]) -> None:
        self._silent_since.pop(rank, None)
        if "refused" in row:
            self._refused = row["refused"]
            return
        for line in row.get("printed", ()):
            self._log.write(f"[rank {rank}] {line}\n".encode())
        if "rank" in row:
            self._rows[rank] = row
            self.size = row["size"]
            if row["status"] is not None:
                self._statuses.setdefault(rank, row["status"])

    def _died(self, rank: int, why: object) -> None:
        import ray

        self._statuses.setdefault(rank, KILLED)
        place = self._hosts.get(rank, {})
        self._log.write(f"[rank {rank}] its actor on {place.get('host')} ({place.get('address')}) "
                        f"is gone: {_first_line(why)}\n".encode())
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        host = f"{place.get('host')} ({place.get('address')})"
        if place and place["node"] not in alive and host not in self._lost:
            self._lost.append(host)


def connect() -> None:
    """Join the cluster of RAY_ADDRESS, which a job has.

    Raises
    ------
    ClusterError
        There is none, or it does not answer.
    """
    import ray

    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        raise ClusterError("run.launcher = ray: RAY_ADDRESS is not set; submit this command with "
                           "ray job submit --, set RAY_ADDRESS, or use run.launcher=local on one "
                           "machine")
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"RAY_ADDRESS={address}: cannot connect to Ray ({error}); start it with "
                           "ray start --head, or correct RAY_ADDRESS") from error


def check_paths(settings: dict[str, Any]) -> None:
    """Refuse relative paths.

    Raises
    ------
    ConfigError
        One would lead elsewhere on the nodes.
    """
    for key in ("run.dir", "data.feed"):
        value = str(settings.get(key, ""))
        if value and "://" not in value and not os.path.isabs(value):
            raise ConfigError(f"{key} = {value!r}: Ray starts ranks in folders of its own, where a "
                              "relative path leads elsewhere; give an absolute path or a URI")


def needs() -> dict[str, float]:
    """What one rank takes: a GPU too, where the cluster has any or its autoscaler can add some."""
    import ray
    from ray._private.state import state  # the public API tells no limits of the autoscaler

    now, most = ray.cluster_resources(), state.get_max_resources_from_cluster_config() or {}
    return {"CPU": 1.0} | ({"GPU": 1.0} if now.get("GPU", 0) or most.get("GPU", 0) else {})


def run_key(run: str) -> str:
    """What names of one run on the cluster have in common."""
    return hashlib.sha256(run.encode()).hexdigest()[:16]


def _actors(attempt: Attempt) -> dict[int, Any]:
    """The ranks of an attempt that are alive, by rank."""
    import ray

    names = [name for name in ray.util.list_named_actors()
             if name.startswith(f"{attempt.token}-")]
    found = {}
    for name in names:
        with suppress(ValueError):  # it died just now
            found[int(name.rpartition("-")[2])] = ray.get_actor(name)
    return dict(sorted(found.items()))


def exported() -> dict[str, str]:
    """Variables of this process that others on the cluster need, too."""
    return {name: value for name, value in os.environ.items() if name.startswith(EXPORTED)}


def _words(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU")
                     if name == "CPU" or resources.get(name))


def _first_line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
