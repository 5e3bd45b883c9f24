"""How tests start a training; one tiny run for every way to launch it, and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from cluster.rundir import RunDir
from neurojepa.config import RootConfig, dump_config
from tests.helpers import ROOT
from tests.helpers.feeds import tiny_config, write_feed

STEPS = 4


def write_recipe(folder: Path) -> Path:
    """A feed and a config of ``STEPS`` steps; launches set run.dir themselves."""
    feed = write_feed(str(folder / "feed"))
    recipe = folder / "recipe.yaml"
    recipe.write_text(dump_config(tiny_config(feed, folder / "run", steps=STEPS,
                                              checkpoint_every=2, log_every=1)))
    return recipe


@cache
def reference(session_folder: Path) -> Path:
    """The recipe, beside it ``local``: its run by two local ranks; made once per test session."""
    folder = session_folder / "launches"
    folder.mkdir()
    recipe = write_recipe(folder)
    done = subprocess.run(
        [sys.executable, "-m", "neurojepa.pretrain", "--config", str(recipe), "run.launcher=local",
         "run.ranks=2", f"run.dir={recipe.parent / 'local'}"], cwd=ROOT, capture_output=True,
        text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return recipe


def losses(run_dir: str | Path) -> list[float]:
    rows = RunDir(str(run_dir)).rows("metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


def check_finished(run_dir: Path, run_cli, ranks: int = 2) -> None:
    """The run directory is whole, and the status command reads it."""
    assert {"config.yaml", "metrics.jsonl", "events.jsonl", "heartbeat", "checkpoints",
            "latest"} <= {path.name for path in run_dir.iterdir()}
    done = run_cli("-m", "cluster", "status", str(run_dir), "--json")
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert (status["state"], status["step"], status["last_checkpoint"]) == \
        ("finished", STEPS, STEPS)
    assert [rank["rank"] for rank in status["ranks"]] == list(range(ranks))
    assert status["loss"] == losses(run_dir)[-1]


def write_config(config: RootConfig, folder: Path) -> str:
    """Write ``folder/recipe.yaml``; returns its path."""
    path = folder / "recipe.yaml"
    path.write_text(dump_config(config))
    return str(path)


def start_pretrain(*arguments: str) -> subprocess.Popen[str]:
    """The pretrain command in a process of its own, with pipes to what it says."""
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    return subprocess.Popen(
        [sys.executable, "-m", "neurojepa.pretrain", *arguments], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**environment, "OMP_NUM_THREADS": "1"})
