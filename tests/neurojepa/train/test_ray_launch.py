"""``ray job submit -- python -m neurojepa.pretrain ... run.launcher=ray`` on a real local Ray."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.launches import check_finished, losses, reference
from tests.helpers.ray_nodes import RAY, cluster

pytestmark = [pytest.mark.slow(15), pytest.mark.cluster]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[dict[str, str]]:
    """A head node with two CPUs; yields the environment of its clients."""
    with cluster(num_cpus=2) as made:
        yield {**made.environment, "gcs": made.address}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference(tmp_path_factory.getbasetemp())


def submit(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Submit and wait; a young cluster has no agent to take jobs yet, so that is tried again."""
    command = [RAY, "job", "submit", "--", sys.executable, "-m", "neurojepa.pretrain", *arguments]
    end = time.monotonic() + 60
    while True:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True,
                              timeout=150)
        if "No available agent" not in done.stderr or time.monotonic() > end:
            return done
        time.sleep(1)


def test_a_ray_job_trains_as_local_ranks_do(ray_cluster, recipe: Path, run_cli) -> None:
    run_dir = recipe.parent / "ray"
    done = submit(ray_cluster, "--config", str(recipe), "run.launcher=ray", "run.ranks=2",
                  f"run.dir={run_dir}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    check_finished(run_dir, run_cli)
    assert losses(run_dir) == pytest.approx(losses(recipe.parent / "local"), abs=1e-5)


def test_a_failing_rank_is_one_clear_line(ray_cluster, recipe: Path, run_cli) -> None:
    done = run_cli("-m", "neurojepa.pretrain", "--config", str(recipe), "run.launcher=ray",
                   "run.ranks=2", "data.feed=/nowhere", f"run.dir={recipe.parent / 'bad'}",
                   env={**ray_cluster, "RAY_ADDRESS": ray_cluster["gcs"]})
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: rank ") and "/nowhere" in line


def test_no_room_says_what_is_free(ray_cluster, recipe: Path) -> None:
    script = ("import neurojepa.train.launch as launch\n"
              "from neurojepa.errors import run_command\n"
              "launch.READY_S = 2\n"
              "run_command(lambda: launch._ray(5, 'neurojepa.pretrain', []))\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                          env={**ray_cluster, "RAY_ADDRESS": ray_cluster["gcs"]}, timeout=90)
    assert done.returncode == 2
    assert "no room for run.ranks=5" in done.stderr and "'CPU': 2.0" in done.stderr
