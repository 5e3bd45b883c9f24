"""Where a run's telemetry goes besides its directory, and what it runs on.

``Trackers`` hands rows of metrics to TensorBoard and, where ``run.trackers`` names them, to MLflow
and W&B.  Those two talk to servers, so they work in a thread of their own: a server that is slow,
gone or refuses never holds up training; what went wrong is told once.  Both are configured by
their own variables (MLFLOW_TRACKING_URI, WANDB_MODE, WANDB_API_KEY ...); MLflow writes into the
run directory where none is set.

``write_environment`` stores what a reader needs to judge a run: versions, devices, fingerprints.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from neurojepa.config import RootConfig, dump_config
from neurojepa.errors import ConfigError
from neurojepa.storage import join, local_path, write_bytes
from neurojepa.train.world import World

SOFTWARE = ("neurojepa", "torch", "deepspeed", "numpy", "safetensors", "fsspec", "s3fs", "pyarrow")
QUEUED_FLUSHES = 1000  # that wait for a slow server before some are left out
CLOSE_S = 20.0  # for the servers to take what is left


def write_environment(config: RootConfig, world: World,
                      fingerprints: Mapping[str, str]) -> None:
    """Write environment.json: software, code, devices by host, fingerprints.  Collective.

    Parameters
    ----------
    fingerprints
        Of the feed, of the order of its samples and of the regions of its grid.
    """
    device = (torch.cuda.get_device_name(world.device) if world.device.type == "cuda"
              else platform.machine())

    def write(ranks: list[tuple[str, str]]) -> None:
        facts = {
            "time": time.time(), "python": platform.python_version(),
            "system": platform.platform(),
            "software": {name: _version(name) for name in SOFTWARE}, "commit": _commit(),
            "cuda": torch.version.cuda, "ranks": [{"host": host, "device": name}
                                                  for host, name in ranks],
            "world": world.size, "zero": config.train.zero, "dtype": config.train.dtype,
            **fingerprints,
            "config_sha256": hashlib.sha256(dump_config(config).encode()).hexdigest()}
        write_bytes(join(config.run.dir, "environment.json"),
                    json.dumps(facts, indent=1).encode())

    world.settle((socket.gethostname(), device), write)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this package lies in, "+" where files differ; None elsewhere."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        done = [subprocess.run([*git, *command], capture_output=True, text=True, timeout=10,
                               check=True).stdout.strip()
                for command in (("rev-parse", "HEAD"),
                                ("status", "--porcelain", "-uno", "--", "."))]
    except (OSError, subprocess.SubprocessError):
        return None
    return done[0] + ("+" if done[1] else "")


# ---- trackers ------------------------------------------------------------------------------------

Flush = list[tuple[int, dict[str, float]]]  # step and values of some rows


class Tracker(Protocol):
    """A service that keeps metrics; opened, used and closed in one thread."""

    def log(self, flush: Flush) -> None: ...

    def close(self) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is missing, before anything starts.

    Raises
    ------
    ConfigError
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"run.trackers names {name}, which is not installed; run: pip "
                              f"install {name}, or leave it out")


class Trackers:
    """Sends rows of metrics to TensorBoard and to the trackers of the config.

    Parameters
    ----------
    resumed : int
        Steps already done; TensorBoard's later ones are dropped.
    """

    def __init__(self, config: RootConfig, resumed: int) -> None:
        self._board: Any = None
        if (path := local_path(config.run.dir)) is not None:
            # event files are appended to, which stores cannot do
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(join(path, "tensorboard"), purge_step=resumed + 1)
        self._services = [_Service(name, partial(OPEN[name], config))
                          for name in config.run.trackers]

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Take rows with ``step`` and numbers; never waits for a server."""
        flush = [(row["step"], _numbers(row)) for row in rows]
        for step, values in flush if self._board is not None else []:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._board is not None:
            self._board.flush()
        for service in self._services:
            service.put(flush)

    def problems(self) -> list[str]:
        """What has gone wrong since the last call, once for each service."""
        return [problem for service in self._services if (problem := service.take_problem())]

    def close(self) -> None:
        """Let what is queued go out, for a while."""
        if self._board is not None:
            self._board.close()
        for service in self._services:
            service.close()


class _Service:
    """One tracker behind a queue, in a thread that does not keep the process alive."""

    def __init__(self, name: str, open_: Callable[[], Tracker]) -> None:
        self.name, self._open = name, open_
        self._queue: queue.Queue[Flush | None] = queue.Queue(QUEUED_FLUSHES)
        self._problem, self._told = "", False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, flush: Flush) -> None:
        try:
            self._queue.put_nowait(flush)
        except queue.Full:
            self._problem = self._problem or "is too slow; some rows are left out"

    def take_problem(self) -> str:
        if not self._problem or self._told:
            return ""
        self._told = True
        return f"{self.name}: {self._problem}"

    def close(self) -> None:
        try:
            self._queue.put(None, timeout=CLOSE_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_S)

    def _work(self) -> None:
        tracker: Tracker | None = None
        try:
            tracker = self._open()
            while (flush := self._queue.get()) is not None:
                tracker.log(flush)
        except Exception as error:  # whatever a client raises must not end the training
            self._problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            while self._queue.get() is not None:
                pass
        finally:
            if tracker is not None:
                tracker.close()


class MLflow:
    """A run of experiment ``neurojepa``; the same one when training continues."""

    def __init__(self, config: RootConfig) -> None:
        from mlflow.tracking import MlflowClient

        path = local_path(config.run.dir)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (
            f"sqlite:///{os.path.abspath(path)}/mlflow.db" if path is not None else None)
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name("neurojepa")
        experiment = found.experiment_id if found else self._client.create_experiment("neurojepa")
        tag = _run_id(config)
        runs = self._client.search_runs([experiment], f"tags.run = '{tag}'", max_results=1)
        self._run = runs[0].info.run_id if runs else self._client.create_run(
            experiment, tags={"run": tag}, run_name=_run_name(config)).info.run_id
        if runs and runs[0].data.params:
            return
        from mlflow.entities import Param

        facts = [Param(key, str(value))
                 for key, value in _flat(config.model_dump(mode="json")).items()]
        for first in range(0, len(facts), 100):  # as many as the protocol takes at once
            self._client.log_batch(self._run, params=facts[first:first + 100])

    def log(self, flush: Flush) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step)
                   for step, values in flush for name, value in values.items()]
        for first in range(0, len(metrics), 1000):
            self._client.log_batch(self._run, metrics[first:first + 1000])

    def close(self) -> None:
        self._client.set_terminated(self._run)


class WandB:
    """A run of project ``neurojepa``; the same one when training continues."""

    def __init__(self, config: RootConfig) -> None:
        import wandb

        self._run = wandb.init(project="neurojepa", id=_run_id(config), name=_run_name(config),
                               resume="allow", dir=local_path(config.run.dir),
                               config=config.model_dump(mode="json"))

    def log(self, flush: Flush) -> None:
        for step, values in flush:
            self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


OPEN: dict[str, Callable[[RootConfig], Tracker]] = {"mlflow": MLflow, "wandb": WandB}


def _run_id(config: RootConfig) -> str:
    return hashlib.sha256(config.run.dir.rstrip("/").encode()).hexdigest()[:16]


def _run_name(config: RootConfig) -> str:
    return config.run.dir.rstrip("/").rsplit("/", 1)[-1]


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else
                    {prefix + key: value})
    return flat
