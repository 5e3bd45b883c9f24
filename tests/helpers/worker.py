"""One rank of a test: trains configs one after the other in one process (start-up is slow).

    python -m tests.helpers.worker JOBS.json   with RANK, ... in the environment, or alone

JOBS is a list of {"config": path} with, if wanted,

    "poison": [step or steps, rank]   the samples of these steps, NaN on one rank
    "spike": [steps, rank, factor]    one rank's loss is so many times as large
    "collapse": step                  from here on the target gives the same for all tokens
    "starve": true                    the first expert gets no tokens
    "deaden": true                    half of the atoms of a gated code are dead from the start
    "die": ["Class.method", n]        in its n-th call; then the job is started again
    "kill": ["Class.method", n]       SIGKILL in its n-th call
    "expect": text                    the job fails with this in its message
    "resave": dir                     instead of training, load the checkpoint and save it there
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from neurojepa.config import RootConfig, dump_config, load_config
from neurojepa.errors import NeurojepaError, run_command
from neurojepa.ports import free_port
from tests.helpers import ROOT


def run_ranks(jobs: list[dict[str, Any]], folder: Path, ranks: int = 1,
              timeout: float = 500) -> list[subprocess.CompletedProcess[str]]:
    """Run jobs in ``ranks`` worker processes; returns what each printed and its status."""
    return run_module("tests.helpers.worker", [str(_write_jobs(jobs, folder))], ranks, timeout)


def run_module(module: str, arguments: list[str], ranks: int,
               timeout: float = 500) -> list[subprocess.CompletedProcess[str]]:
    """Run a module in ``ranks`` processes with a launcher's environment."""
    base = {key: value for key, value in os.environ.items() if key != "RANK"}
    base |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)})
        for rank in range(ranks)]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
    return [subprocess.CompletedProcess(process.args, process.returncode, output)
            for process, output in zip(processes, outputs, strict=True)]


def job(config: RootConfig, folder: Path, **extra: Any) -> dict[str, Any]:
    """A job of ``run_ranks``; the config is written below ``folder``."""
    path = folder / f"{Path(config.run.dir).name}.yaml"
    path.write_text(dump_config(config))
    return {"config": str(path), **extra}


def _write_jobs(jobs: list[dict[str, Any]], folder: Path) -> Path:
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    return path


def main() -> int:
    from neurojepa.train import loop

    for each in json.loads(Path(sys.argv[1]).read_text()):
        config = load_config(each["config"])
        with contextlib.ExitStack() as faults:
            for name, fault in FAULTS.items():
                if name in each:
                    faults.enter_context(fault(loop, config, each[name]))
            if "resave" in each:
                _resave(config, each["resave"])
                continue
            try:
                loop.train(config)
            except _Death:
                loop.train(config)
            except NeurojepaError as error:
                if each.get("expect", "no failure") not in str(error):
                    raise
                print(f"as expected: {error}")
            else:
                assert "expect" not in each
    return 0


class _Death(BaseException):
    """Passes through everything, as a kill would."""


def _starved(loop: Any, config: RootConfig, _: bool) -> Any:
    from neurojepa.model.moe import moe_layers

    build_model = loop.build_model

    def build(*arguments: Any) -> Any:
        model = build_model(*arguments)
        for layer in moe_layers(model):
            layer.bias[0] = -100
        return model

    return mock.patch.object(loop, "build_model", build)


def _deadened(loop: Any, config: RootConfig, _: bool) -> Any:
    build_model = loop.build_model
    return mock.patch.object(loop, "build_model", lambda *given: deaden(build_model(*given)))


def deaden(model: Any) -> Any:
    """The model, with every second atom of its gated code out of reach and known to be dead."""
    with torch.no_grad():
        model.code.gate_bias[::2] = -0.1
        model.code.usage[::2] = 0
    return model


def _poisoned(loop: Any, config: RootConfig, fault: tuple[int | list[int], int]) -> Any:
    (steps, rank), make_views = fault, loop.make_views
    steps = [steps] if isinstance(steps, int) else steps

    def views(batch: Any, *arguments: Any) -> Any:
        made = make_views(batch, *arguments)
        if (int(batch.position[0]) // config.train.global_batch in steps
                and os.environ["RANK"] == str(rank)):
            made.tokens_BNP.fill_(float("nan"))
        return made

    return mock.patch.object(loop, "make_views", views)


def _spiking(loop: Any, config: RootConfig, fault: tuple[list[int], int, float]) -> Any:
    (steps, rank, factor), forward = fault, loop.Engine.forward
    at = [0]  # the step of the views made last

    def scaled(self: Any, views: Any, l1: Any) -> Any:
        loss, sums = forward(self, views, l1)
        hit = at[0] in steps and os.environ["RANK"] == str(rank)
        return loss * (factor if hit else 1.0), sums

    make_views = loop.make_views

    def views(batch: Any, *arguments: Any) -> Any:
        at[0] = int(batch.position[0]) // config.train.global_batch
        return make_views(batch, *arguments)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(loop.Engine, "forward", scaled))
    stack.enter_context(mock.patch.object(loop, "make_views", views))
    return stack


def _collapsing(loop: Any, config: RootConfig, step: int) -> Any:
    update, steps = loop.Engine.update_ema, itertools.count(1)

    def updated(self: Any, momentum: float) -> None:
        if next(steps) >= step:
            for ema in self._ema.values():
                ema.zero_()
            momentum = 1.0
        update(self, momentum)

    return mock.patch.object(loop.Engine, "update_ema", updated)


def _raise_death() -> None:
    raise _Death


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dying(end: Callable[[], None], loop: Any, config: RootConfig, fault: tuple[str, int]) -> Any:
    where, fatal = fault
    owner, method = where.split(".")
    original, calls = getattr(getattr(loop, owner), method), itertools.count(1)

    def called(self: Any, *arguments: Any) -> Any:
        if next(calls) == fatal:
            end()
        return original(self, *arguments)

    return mock.patch.object(getattr(loop, owner), method, called)


FAULTS = {"starve": _starved, "deaden": _deadened, "poison": _poisoned, "spike": _spiking,
          "collapse": _collapsing, "die": partial(_dying, _raise_death),
          "kill": partial(_dying, _die)}


def _resave(config: RootConfig, folder: str) -> None:
    """Load a run's checkpoint into an engine and write it again from there."""
    from neurojepa.train import checkpoint
    from neurojepa.train.loop import Run
    from neurojepa.train.ownership import Ownership
    from neurojepa.train.saver import Saver
    from neurojepa.train.world import start_world

    run = Run(config, start_world())
    old = checkpoint.open_checkpoint(config.run.dir, run.step).manifest
    saver = Saver(Ownership(folder), run.engine, run.world, keep_last=1, milestone_every=0,
                  patience=run.patience)
    saver.start(run.step, {key: old[key] for key in ("config", "feed", "order", "regions", "health",
                                                   "skipped_windows")})
    saver.finish()
    saver.close()
    run.close()


if __name__ == "__main__":
    run_command(main, teardown=False)
