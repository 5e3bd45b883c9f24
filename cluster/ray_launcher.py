"""Start attempts on a Ray cluster: a placement group with room for all ranks, an actor for each.

Group and actors are detached, so ranks outlive a supervisor; the next one finds them by name.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from cluster.agents import EXPORTED
from cluster.launcher import Attempt
from cluster.processes import TOKEN
from cluster.ray_rank import RankActor
from cluster.ray_world import RayWorld, first_line
from neurojepa.errors import ClusterError, ConfigError

NAMESPACE = "neurojepa"
FEWER_S = 20.0  # for an autoscaler, or a node that comes back
ROOM_S = 1.0  # of a look for room; the group stays in the queue, where the autoscaler sees it
START_S = 30.0


@dataclass
class RayLauncher:
    """See launcher.Launcher.

    Parameters
    ----------
    arguments
        What follows ``python -m <module>``: ``--config C [a.b=v ...]``.
    ranks
        How many; each takes a CPU, and a GPU where the cluster has or can have one.
    min_ranks
        So many are enough while the cluster has had no room for all of them for ``FEWER_S``; 0 for
        all.
    """

    arguments: list[str]
    ranks: int
    run: str
    min_ranks: int = 0
    module: str = "neurojepa.pretrain"
    _group: Any = field(default=None, init=False, repr=False)
    _lacks_since: float | None = field(default=None, init=False, repr=False)

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def slots(self) -> dict[str, int]:
        return {}

    def problems(self, slots: dict[str, int], folder: str | None,
                 odd: Callable[[dict[str, dict[str, Any]]], None]) -> dict[str, str]:
        return {}

    def start(self, attempt: Attempt, log: IO[bytes]) -> RayWorld:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        need, group = needs(), self._group
        assert group is not None  # ``lacks`` has made it
        size = group.bundle_count
        try:
            kind: Any = ray.remote(num_cpus=need["CPU"],
                                   num_gpus=need.get("GPU", 0))(RankActor)
            actors = [kind.options(
                name=f"{attempt.token}-{rank}", lifetime="detached", max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank)).remote()
                for rank in range(size)]
            places = dict(enumerate(ray.get([actor.where.remote() for actor in actors],
                                            timeout=START_S)))
            environment = exported() | {
                TOKEN: attempt.token, "WORLD_SIZE": str(size), "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": places[0]["address"],
                "MASTER_PORT": str(places[0]["port"])}
            command = [sys.executable, "-u", "-m", self.module, *self.arguments]
            ray.get([actor.start.remote(attempt.fence, command, {**environment, "RANK": str(rank)})
                     for rank, actor in enumerate(actors)], timeout=START_S)
        except ray.exceptions.RayError as error:  # a node was lost meanwhile: it has failed
            cause = getattr(error, "cause", error)  # of what failed in an actor
            log.write(f"the ranks could not be started: {first_line(cause)}\n".encode())
            self.close()
            return RayWorld(attempt, {}, {}, size, log)
        self._group, self._lacks_since = None, None  # the world's from now on
        return RayWorld(attempt, dict(enumerate(actors)), places, size, log)

    def lacks(self) -> str:
        import ray
        from ray.util.placement_group import get_placement_group

        need = needs()
        if self._group is None:
            with suppress(ValueError):  # none is there, as it should be
                ray.util.remove_placement_group(get_placement_group(self._name))
            self._ask_for(self.ranks, need)
        if self._group.wait(ROOM_S):
            return ""
        self._lacks_since = self._lacks_since or time.monotonic()
        if self.min_ranks and time.monotonic() - self._lacks_since > FEWER_S and self._fewer(need):
            return ""
        return (f"Ray has no room for run.ranks={self.ranks} with {_words(need)} each (free: "
                f"{_words(ray.available_resources())} of {_words(ray.cluster_resources())}); add "
                "nodes or lower run.ranks")

    def _fewer(self, need: dict[str, float]) -> bool:
        """Ask for as many ranks as there is room for; for all again, if those are too few."""
        import ray

        free = ray.available_resources()
        fit = min(int(free.get(name, 0) / amount) for name, amount in need.items())
        # fewer still where a node that was lost is counted yet, or has a GPU and no CPU to spare
        for size in range(min(fit, self.ranks - 1), self.min_ranks - 1, -1):
            self._ask_for(size, need)
            if self._group.wait(ROOM_S):
                return True
        self._ask_for(self.ranks, need)
        return False

    def _ask_for(self, size: int, need: dict[str, float]) -> None:
        from ray.util.placement_group import placement_group

        since = self._lacks_since
        self.close()
        self._lacks_since = since
        self._group = placement_group([need] * size, name=self._name, lifetime="detached")

    @property
    def _name(self) -> str:
        return f"neurojepa-{run_key(self.run)}"

    def close(self) -> None:
        """Take back a group that waits for room."""
        import ray

        if self._group is not None:
            ray.util.remove_placement_group(self._group)
            self._group = None
        self._lacks_since = None

    def is_there(self, attempt: Attempt) -> bool:
        return bool(_actors(attempt))

    def adopt(self, attempt: Attempt, log: IO[bytes]) -> RayWorld:
        import ray

        actors = _actors(attempt)
        places = {}
        for rank, actor in actors.items():
            with suppress(ray.exceptions.RayError):  # it is lost, or will be looked at again
                places[rank] = ray.get(actor.where.remote(), timeout=ROOM_S)
        size = max((place["size"] for place in places.values()), default=self.ranks)
        return RayWorld(attempt, actors, places, size, log)


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
