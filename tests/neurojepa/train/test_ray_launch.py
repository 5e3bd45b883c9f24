"""``ray job submit -- python -m neurojepa.pretrain ... run.launcher=ray`` on a real local Ray."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from neurojepa.ports import free_port
from tests.helpers import ROOT
from tests.helpers.launches import check_finished, losses, reference

RAY = str(Path(sys.executable).parent / "ray")
# Ray binds the machine's own address unless told that loopback is enough.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[dict[str, str]]:
    """A head node with two CPUs; yields the environment of its clients."""
    folder = tempfile.mkdtemp(prefix="ry")  # short: Ray puts unix sockets below it
    port, dashboard = free_port(), free_port()
    # a token of its own: Ray would otherwise enforce or ignore the user's, head and client apart
    environment = {**os.environ, **LOOPBACK, "RAY_AUTH_MODE": "token",
                   "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}
    environment.pop("RAY_ADDRESS", None)
    # --block: the node's processes stay below this one, so they can be ended by pid
    head = subprocess.Popen(
        [RAY, "start", "--head", "--block", "--port", str(port), "--num-cpus", "2",
         "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard),
         "--dashboard-agent-listen-port", str(free_port()),  # 52365 may be another Ray's
         "--object-store-memory", "200000000", "--temp-dir", folder], cwd=ROOT, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(dashboard, head)
        yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
               "gcs": f"127.0.0.1:{port}"}
    finally:
        family = [*psutil.Process(head.pid).children(recursive=True)]
        head.terminate()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        head.kill()
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(port: int, head: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end and head.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.3)
    raise AssertionError("Ray did not start")


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
              "run_command(lambda: launch._ray(5, []))\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                          env={**ray_cluster, "RAY_ADDRESS": ray_cluster["gcs"]}, timeout=90)
    assert done.returncode == 2
    assert "no room for run.ranks=5" in done.stderr and "'CPU': 2.0" in done.stderr
