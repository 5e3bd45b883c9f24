"""``ray job submit -- python -m neurojepa.pretrain ... run.launcher=ray`` on a real Ray."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.rundir import RunDir
from tests.helpers import ROOT
from tests.helpers.launches import check_finished, losses, reference
from tests.helpers.ray_nodes import RAY, Cluster, cluster
from tests.helpers.waiting import wait_until

pytestmark = [pytest.mark.cluster]


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Cluster]:
    """A head node without room for ranks, and two nodes for one each."""
    with cluster(num_cpus=0) as made:
        made.add_node()
        made.add_node()
        yield made


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference(tmp_path_factory.getbasetemp())


def submit(environment: dict[str, str], *arguments: str,
           options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Submit and wait; a young cluster has no agent to take jobs yet, so that is tried again."""
    command = [RAY, "job", "submit", *options, "--", sys.executable, "-m", "neurojepa.pretrain",
               *arguments]
    end = time.monotonic() + 60
    while True:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True,
                              timeout=300)
        if "No available agent" not in done.stderr or time.monotonic() > end:
            return done
        time.sleep(1)


def node_of(made: Cluster, rank: int) -> subprocess.Popen[bytes]:
    """The node that a rank is on."""
    (found,) = {node for node in made.nodes
                for process in psutil.Process(node.pid).children(recursive=True)
                if "neurojepa.pretrain" in process.cmdline()
                and process.environ().get("RANK") == str(rank)}
    return found


@pytest.mark.slow(25)
def test_a_ray_job_trains_as_local_ranks_do(ray_cluster: Cluster, recipe: Path, run_cli) -> None:
    run_dir = recipe.parent / "ray"
    done = submit(ray_cluster.environment, "--config", str(recipe), "run.launcher=ray",
                  "run.ranks=2", f"run.dir={run_dir}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    check_finished(run_dir, run_cli)
    assert losses(run_dir) == pytest.approx(losses(recipe.parent / "local"), abs=1e-5)


@pytest.mark.slow(60)
def test_a_run_survives_its_nodes_and_its_job(ray_cluster: Cluster, recipe: Path) -> None:
    """A node is lost, room comes back, the job is killed, and submitted again, and stopped."""
    folder = recipe.parent / "faults"
    run, environment = RunDir(str(folder)), ray_cluster.environment

    def told(event: str) -> list[dict[str, Any]]:
        return [row for row in run.events() if row["event"] == event]

    def start(name: str) -> None:
        done = submit(environment, "--config", str(recipe), "run.launcher=ray", "run.ranks=2",
                      f"run.dir={folder}", "train.steps=10000", "train.checkpoint_every=5",
                      options=("--no-wait", "--submission-id", name))
        assert done.returncode == 0, done.stderr

    start("first")
    wait_until(lambda: run.committed_step() is not None)
    ray_cluster.kill(node_of(ray_cluster, 1))  # the peers of rank 1 notice before Ray does
    wait_until(lambda: told("no_room"))
    assert "no room for run.ranks=2" in told("no_room")[0]["lacks"]
    (lost,) = told("exit")
    assert (lost["status"], lost["first"]) == (137, 1)
    assert [row["restarts"] for row in told("restart")] == [1]
    ray_cluster.add_node()  # as an autoscaler would
    wait_until(lambda: told("resume"))
    assert told("resume")[0]["step"] == told("restart")[0]["step"]

    (job,) = [process for process in psutil.process_iter(["cmdline"])
              if "cluster.ray_job" in (process.info["cmdline"] or ())
              and f"run.dir={folder}" in process.info["cmdline"]]
    job.kill()
    committed = run.committed_step()
    wait_until(lambda: run.committed_step() != committed)  # nobody needs the job
    start("second")
    said = Path(ray_cluster.folder) / "session_latest/logs/job-driver-second.log"
    wait_until(lambda: said.exists() and "watching the supervisor" in said.read_text())
    subprocess.run([RAY, "job", "stop", "second", "--no-wait"], env=environment, check=True,
                   capture_output=True)
    wait_until(lambda: told("stopped"))
    (stop,) = told("stop")
    assert run.committed_step() == stop["step"] > (committed or 0)
    assert len(told("started")) == 2
    steps = [row["step"] for row in run.rows("metrics.jsonl")]
    assert steps == list(range(1, stop["step"] + 1))
