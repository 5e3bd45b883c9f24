"""Start the ranks of a run: as processes of this machine, or as Ray actors.

``launch`` is called by the entry point when no launcher has set RANK yet and ``run.launcher`` is
``local`` or ``ray``.  Every rank then runs the same entry point with the same arguments and with
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment, just as ``deepspeed``
or ``torchrun`` would start it; so there is one training code and three ways to start it.

A rank that fails ends the others: nobody waits in a collective for a rank that is gone.  A local
launcher that is killed takes its ranks along, so the next start finds the run directory its own.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from neurojepa.config import RootConfig
from neurojepa.errors import ClusterError, ConfigError, NeurojepaError
from neurojepa.ports import free_port

GRACE_S = 5.0  # the peers of a dead rank notice by themselves in well under a second
POLL_S = 0.1
READY_S = 60.0  # for Ray to find room for all ranks
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def launch(config: RootConfig, module: str, argv: list[str]) -> int:
    """Run ``run.ranks`` ranks of the training to their end.

    Parameters
    ----------
    config
        The resolved configuration; ``run.launcher`` and ``run.ranks`` are read.
    module
        The entry point, whose ``main(argv)`` returns a status.
    argv
        Its arguments, handed to every rank unchanged.

    Returns
    -------
    int
        0, or the status of the first rank that failed (128 + N if signal N ended it).

    Raises
    ------
    ClusterError
        Ray is not reachable, has no room for the ranks, or lost one.
    ConfigError
        A relative path, under Ray.
    """
    if config.run.launcher == "local":
        return _local(config.run.ranks, [sys.executable, "-u", "-m", module, *argv])
    if config.run.launcher == "ray":
        for key, value in (("run.dir", config.run.dir), ("data.feed", config.data.feed)):
            if "://" not in value and not os.path.isabs(value):
                raise ConfigError(f"{key} = {value!r}: Ray starts ranks in folders of its own, "
                                  "where a relative path leads elsewhere; give an absolute path "
                                  "or a URI")
        return _ray(config.run.ranks, module, argv)
    raise ConfigError(f"run.launcher={config.run.launcher}: starts no ranks; use local or ray")


# ---- processes of this machine -------------------------------------------------------------------

def _local(num_ranks: int, command: list[str]) -> int:
    common = {**os.environ, "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port())}
    ranks: list[subprocess.Popen[bytes]] = []
    with _forwarded_signals(ranks):
        try:
            for rank in range(num_ranks):
                # own session: Ctrl-C reaches a rank once, through us
                ranks.append(subprocess.Popen(
                    command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    start_new_session=True, preexec_fn=partial(_die_with, os.getpid())))
            status = _wait_for_first_failure(ranks)
            if status:
                _wait_all(ranks, GRACE_S)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()
    return status


def _die_with(launcher: int) -> None:
    """In the child, before it becomes a rank: SIGKILL when the launcher is gone."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # gone already
            os._exit(1)


def _wait_for_first_failure(ranks: list[subprocess.Popen[bytes]]) -> int:
    """The first status that is not 0 (a shell's number), or 0 when all have ended well."""
    while True:
        statuses = [process.poll() for process in ranks]
        failed = [status for status in statuses if status]
        if failed:
            return 128 - failed[0] if failed[0] < 0 else failed[0]
        if all(status == 0 for status in statuses):
            return 0
        time.sleep(POLL_S)


def _wait_all(ranks: list[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.poll() is None for process in ranks):
        time.sleep(POLL_S)


@contextmanager
def _forwarded_signals(ranks: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Hand SIGTERM and SIGINT on to the ranks, who agree on a step and stop there."""
    def forward(signum: int, _frame: object) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signum)

    before = {number: signal.signal(number, forward)
              for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- Ray actors ----------------------------------------------------------------------------------

class _Rank:
    """One rank inside a Ray worker process."""

    def address(self) -> tuple[str, int]:
        """Where rank 0 listens."""
        import ray

        return ray.util.get_node_ip_address(), free_port()

    def train(self, environment: dict[str, str], module: str,
              argv: list[str]) -> tuple[int, str]:
        """Run the entry point; its status, and the message of an error a user can act on."""
        os.environ.update(environment)
        try:
            return importlib.import_module(module).main(argv) or 0, ""
        except NeurojepaError as error:
            return 2, str(error)


def _ray(num_ranks: int, module: str, argv: list[str]) -> int:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    address = os.environ.get("RAY_ADDRESS", "local")
    try:
        ray.init(address=address, log_to_driver=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"RAY_ADDRESS={address}: cannot connect to Ray ({error}); start it with "
                           "ray start --head, or unset RAY_ADDRESS") from error
    try:
        cuda = ray.cluster_resources().get("GPU", 0) > 0
        need = {"CPU": 1.0} | ({"GPU": 1.0} if cuda else {})
        group = placement_group([need] * num_ranks)
        try:
            if not group.wait(READY_S):
                raise ClusterError(
                    f"Ray has no room for run.ranks={num_ranks} with {need} each (free: "
                    f"{_free(ray.available_resources())}); add nodes or lower run.ranks")
            actor = ray.remote(num_cpus=1, num_gpus=int(cuda), max_restarts=0)(_Rank)
            actors = [actor.options(scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=index)).remote() for index in range(num_ranks)]
            return _train_actors(ray, actors, module, argv)
        finally:
            remove_placement_group(group)  # ends the actors that are left, too
    finally:
        ray.shutdown()


def _train_actors(ray: Any, actors: list[Any], module: str, argv: list[str]) -> int:
    """Train in all actors; the first one that fails ends the others."""
    rank = 0
    try:
        host, port = ray.get(actors[0].address.remote())
        # LOCAL_RANK 0: Ray shows each actor only its own device
        common = {"WORLD_SIZE": str(len(actors)), "LOCAL_RANK": "0", "MASTER_ADDR": host,
                  "MASTER_PORT": str(port)}
        running = {actor.train.remote({**common, "RANK": str(rank)}, module, argv): rank
                   for rank, actor in enumerate(actors)}
        pending = list(running)
        while pending:
            (done,), pending = ray.wait(pending, num_returns=1)
            rank = running[done]
            status: int
            status, message = ray.get(done)
            if message:
                raise ClusterError(f"rank {rank} of {len(actors)} failed: {message}")
            if status:
                if pending:  # the others may be committing the same stop
                    ray.wait(pending, num_returns=len(pending), timeout=GRACE_S)
                return status
    except ray.exceptions.RayError as error:
        raise ClusterError(f"rank {rank} of {len(actors)} was lost: {_last_line(error)}; run the "
                           "same command again to continue from the last checkpoint") from error
    finally:
        for actor in actors:
            ray.kill(actor)
    return 0


def _free(resources: dict[str, float]) -> dict[str, float]:
    return {name: resources.get(name, 0.0) for name in ("CPU", "GPU")}


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
