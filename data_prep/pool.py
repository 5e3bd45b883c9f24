"""Many tasks over Ray: a local one started and ended here, or a running cluster.

The local Ray listens on loopback only, without dashboard or usage reports.  Each worker keeps to
one thread of arithmetic, so ``workers`` is the number of cores used.  A worker that dies is
replaced and its task repeated twice; then the task is given up, alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from neurojepa.errors import ClusterError, DataError

_RETRIES = 2
_REPORT_EVERY_S = 5.0
_ONE_THREAD = {name: "1" for name in (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")}


@dataclass(frozen=True)
class Failure:
    """A task's own account of why it has no result."""

    message: str


def run_tasks(function: Callable[..., Failure | None], arguments: dict[str, tuple[Any, ...]],
              workers: int, ray_address: str | None, unit: str) -> dict[str, str]:
    """Call ``function`` once per entry of ``arguments``; prints progress, rate and time left.

    Returns
    -------
    dict
        A message for every task that returned a Failure or whose worker kept dying.

    Raises
    ------
    DataError
        Raised by a task: a store failed, so the other tasks are not started.
    ClusterError
        Ray cannot be started or reached.
    """
    if not arguments:
        return {}
    failed: dict[str, str] = {}
    with _ray(workers, ray_address) as ray:
        remote = ray.remote(num_cpus=1, max_retries=_RETRIES)(function)
        waiting = list(arguments.items())[::-1]
        running: dict[Any, str] = {}
        progress = _Progress(len(arguments), unit)
        while waiting or running:
            while waiting and len(running) < 2 * workers:
                name, values = waiting.pop()
                running[remote.remote(*values)] = name
            for reference in ray.wait(list(running), num_returns=1, timeout=_REPORT_EVERY_S)[0]:
                name = running.pop(reference)
                try:
                    outcome = ray.get(reference)
                    if outcome is not None:
                        failed[name] = outcome.message
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, DataError):
                        raise DataError(str(error.cause)) from None
                    raise
                except ray.exceptions.RayError as error:
                    failed[name] = (f"{type(error).__name__}: the worker died {_RETRIES + 1} times "
                                    "(killed, or out of memory)")
                progress.finished(len(failed))
    return failed


class _Progress:
    """A line every few seconds: how many, how fast, how long still."""

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit, self.done = total, unit, 0
        self.begin = self.last = time.monotonic()
        print(f"{total} {unit} to prepare", flush=True)

    def finished(self, num_failed: int) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.last < _REPORT_EVERY_S and self.done < self.total:
            return
        self.last = now
        per_minute = 60 * self.done / max(now - self.begin, 1e-3)
        left = (self.total - self.done) / per_minute
        print(f"{self.done}/{self.total} {self.unit}, {per_minute:.1f} a minute, about "
              f"{left:.1f} minutes left" + (f", {num_failed} failed" if num_failed else ""),
              flush=True)


@contextlib.contextmanager
def _ray(workers: int, address: str | None) -> Iterator[Any]:
    """A connected Ray, left again at the end."""
    # unix sockets below it allow about 100 characters, so it is not put below $TMPDIR
    directory = tempfile.mkdtemp(prefix="nj-", dir="/tmp") if address is None else None
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    if directory:
        # Ray replaces 127.0.0.1 by the machine's own address unless it is told this
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.update(_ONE_THREAD)  # inherited by the workers
    import ray

    if address:
        _check_address(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        try:
            if directory:
                ray.init(address="local", num_cpus=workers, num_gpus=0, include_dashboard=False,
                         _temp_dir=directory, object_store_memory=200_000_000, **quiet)
            else:
                ray.init(address=address, runtime_env={"env_vars": _ONE_THREAD}, **quiet)
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
