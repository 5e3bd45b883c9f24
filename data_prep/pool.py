"""Many tasks over Ray: a local one started and ended here, or a running cluster; or one by one.

The local Ray listens on loopback only, without dashboard or usage reports.  A task whose worker or
node is lost is repeated by Ray; then it is given up, alone.  The driver keeps twice as many tasks
in flight as the cluster has CPUs, whatever their number.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from neurojepa.errors import ClusterError, DataError

_RETRIES = 3
_REPORT_EVERY_S = 5.0


@dataclass(frozen=True)
class Task:
    """One call: its name, its argument, and how many scans it stands for."""

    name: str
    argument: Any
    num_scans: int


def run_tasks(function: Callable[[Any], int], tasks: Iterable[Task], *, num_scans: int,
              workers: int | None, ray_address: str | None, verb: str = "prepare"
              ) -> dict[str, str]:
    """Call ``function(task.argument)`` for every task; prints progress, rate and time left.

    Parameters
    ----------
    function
        Returns how many scans it had to give up.
    tasks
        Taken one by one as workers become free; ``num_scans`` is the sum over them.
    workers
        Tasks at once; by default as many as there are CPUs.  One at a time, and without a cluster,
        they are done in this process, and Ray need not be installed.
    verb
        What is done, in messages: the command to run again.

    Returns
    -------
    dict
        A message for every task whose worker or node kept dying.

    Raises
    ------
    DataError
        Raised by a task: a store failed, so the other tasks are not started.
    ClusterError
        Ray cannot be started or reached.
    """
    if workers == 1 and not (ray_address or os.environ.get("RAY_ADDRESS")):
        _run_here(function, tasks, _Progress(num_scans, verb))
        return {}
    lost: dict[str, str] = {}
    with _ray(workers, ray_address) as ray, _stopped_by_sigterm():
        remote = ray.remote(num_cpus=1, max_retries=_RETRIES)(function)
        running: dict[Any, Task] = {}
        progress = _Progress(num_scans, verb)
        waiting = iter(tasks)
        more = True
        while more or running:
            while more and len(running) < (workers or _in_flight(ray)):
                if (task := next(waiting, None)) is None:
                    more = False
                else:
                    running[remote.remote(task.argument)] = task
            for reference in ray.wait(list(running), num_returns=1, timeout=_REPORT_EVERY_S)[0]:
                task = running.pop(reference)
                try:
                    progress.given_up += ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, DataError):
                        raise DataError(str(error.cause)) from None
                    raise
                except ray.exceptions.RayError as error:
                    lost[task.name] = (f"{type(error).__name__}: the worker or its node died "
                                       f"{_RETRIES + 1} times; run {verb} again")
                    progress.given_up += task.num_scans
                progress.done += task.num_scans
            progress.report(last=not (more or running))
    return lost


def _run_here(function: Callable[[Any], int], tasks: Iterable[Task], progress: _Progress) -> None:
    with _stopped_by_sigterm():
        for task in tasks:
            progress.given_up += function(task.argument)
            progress.done += task.num_scans
            progress.report(last=False)
    progress.report(last=True)


def _in_flight(ray: Any) -> int:
    """Tasks that keep all CPUs busy, also those of nodes that joined meanwhile."""
    return 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))


class _Progress:
    """A line every few seconds: how many scans, how fast, how long still."""

    def __init__(self, total: int, verb: str) -> None:
        self.total, self.done, self.given_up = total, 0, 0
        self.begin = self.last = time.monotonic()
        print(f"{total} scans to {verb}", flush=True)

    def report(self, last: bool) -> None:
        now = time.monotonic()
        if now - self.last < _REPORT_EVERY_S and not last:
            return
        self.last = now
        per_minute = 60 * self.done / max(now - self.begin, 1e-3)
        left = f"{(self.total - self.done) / per_minute:.1f}" if self.done else "unknown"
        print(f"{self.done}/{self.total} scans, {per_minute:.1f} a minute, about {left} minutes "
              f"left, {self.given_up} given up", flush=True)


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """A SIGTERM ends the driver as Ctrl-C does: workers stop, and the next run goes on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _ray(workers: int | None, address: str | None) -> Iterator[Any]:
    """A connected Ray, left again at the end.  $RAY_ADDRESS, as in a Ray job, is a cluster too."""
    address = address or os.environ.get("RAY_ADDRESS")
    # unix sockets below it allow about 100 characters, so it is not put below $TMPDIR
    directory = tempfile.mkdtemp(prefix="nj-", dir="/tmp") if address is None else None
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    if directory:
        # Ray replaces 127.0.0.1 by the machine's own address unless it is told this
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    if address:
        _check_address(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        try:
            if directory:
                ray.init(address="local", num_cpus=workers or os.cpu_count(), num_gpus=0,
                         include_dashboard=False, _temp_dir=directory,
                         object_store_memory=200_000_000, **quiet)
            else:
                ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = f"reached at {address}" if address else "started"
            raise ClusterError(f"Ray cannot be {where} ({error}); check --ray-address and free "
                               "memory; a cluster with tokens needs RAY_AUTH_MODE=token") from error
        yield ray
    finally:
        ray.shutdown()
        if directory:
            shutil.rmtree(directory, ignore_errors=True)


def _check_address(address: str) -> None:
    """Fail at once where nothing listens; Ray itself tries for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return  # "auto": Ray looks the address up
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ClusterError(f"--ray-address {address}: no Ray answers there ({error}); start the "
                           "cluster or correct the address") from error
