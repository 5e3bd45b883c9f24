"""SIGKILL of a rank at four instants under the deepspeed launcher; the run ends bit-equal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neurojepa.config import dump_config
from neurojepa.ports import free_port
from neurojepa.storage import read_rows
from neurojepa.train.checkpoint import committed_steps, open_checkpoint
from tests.helpers import ROOT
from tests.helpers.feeds import tiny_config, write_feed

pytestmark = [pytest.mark.slow(60), pytest.mark.cluster]

STEPS = 22  # so many after the last kill that even a busy machine kills before the end


def launch(recipe: Path, run: Path) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    with open(run.parent / f"{run.name}.log", "ab") as log:
        return subprocess.Popen(
            [str(Path(sys.executable).parent / "deepspeed"), "-q", "--num_gpus", "2",
             "--master_port", str(free_port()), "--module",
             "neurojepa.pretrain", "--config", str(recipe), f"run.dir={run}"],
            cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
            env={**environment, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                 "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"})


def finish(process: subprocess.Popen[bytes], timeout: float = 300) -> int:
    """Wait for a launcher; whatever remains of its session is killed."""
    try:
        return process.wait(timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def heart(run: Path, rank: int) -> dict[str, Any]:
    path = run / "heartbeat" / f"rank-{rank}.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {"step": -1, "time": 0.0}


def kill_when(due: Callable[[], bool], run: Path, rank: int,
              process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a rank of this launch as soon as ``due``; the launcher must then fail."""
    started = time.time()
    while not (due() and heart(run, rank)["time"] > started):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.time() - started < 300
        time.sleep(0.0005)
    os.kill(heart(run, rank)["pid"], signal.SIGKILL)
    assert finish(process) != 0


def test_four_kills_leave_no_trace(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    config = tiny_config(write_feed(str(tmp_path / "feed")), tmp_path / "run", steps=STEPS,
                         checkpoint_every=3, keep_last=2, dtype="bf16")
    recipe.write_text(dump_config(config))
    straight, run = tmp_path / "straight", tmp_path / "run"
    assert finish(launch(recipe, straight)) == 0

    def writing(step: int) -> Callable[[], bool]:  # files are there, the manifest may not be
        return lambda: any((run / "checkpoints" / f"step-{step}").glob("*"))

    kills: list[tuple[int, Callable[[], bool]]] = [
        (1, lambda: heart(run, 1)["step"] >= 1),  # before the first checkpoint
        (0, writing(6)),  # inside a checkpoint: rank 0
        (1, lambda: heart(run, 0)["step"] >= 8),  # between checkpoints
        (1, writing(12)),  # inside a checkpoint: rank 1
    ]
    for rank, due in kills:
        kill_when(due, run, rank, launch(recipe, run))
        steps = committed_steps(str(run))
        for step in steps:  # whatever is committed is whole
            open_checkpoint(str(run), step).state_sha256()
    assert finish(launch(recipe, run)) == 0, (tmp_path / "run.log").read_text()[-3000:]

    ends = []
    for folder in (straight, run):
        rows = read_rows(str(folder / "metrics.jsonl"))
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        last = read_rows(str(folder / "events.jsonl"))[-1]
        assert last["event"] == "finish"
        ends.append(([(row["loss"], row["grad_norm"]) for row in rows], last["state_sha256"]))
    assert ends[0] == ends[1]
    events = [row["event"] for row in read_rows(str(run / "events.jsonl"))]
    assert events.count("start") + events.count("resume") == len(kills) + 1
    assert events.count("resume") >= 3
