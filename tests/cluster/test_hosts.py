"""``deepspeed --hostfile`` over two hosts (network namespaces with sshd), supervised or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.processes import TOKEN, members
from cluster.rundir import RunDir
from tests.helpers import ROOT
from tests.helpers.hosts import Hosts, skip_without_tools, two_hosts
from tests.helpers.launches import check_finished, losses, reference
from tests.helpers.waiting import wait_until

pytestmark = [pytest.mark.slow(20), pytest.mark.cluster]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    skip_without_tools()
    with two_hosts(tmp_path_factory.mktemp("hosts")) as running:
        yield running


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference(tmp_path_factory.getbasetemp())


def test_the_deepspeed_command_of_the_readme(hosts: Hosts, recipe: Path, run_cli,
                                             tmp_path: Path) -> None:
    own = tmp_path / "deepspeed_env"
    own.write_text("DS_ACCELERATOR=cpu\nGLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n")
    run_dir = recipe.parent / "hosts"
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    done = subprocess.run(
        hosts.on_first(deepspeed, "--hostfile", str(hosts.hostfile), "--no_ssh_check",
                       "--master_addr", hosts.addresses[0], "--module", "neurojepa.pretrain",
                       "--config", str(recipe), f"run.dir={run_dir}"),
        cwd=ROOT, env={**hosts.environment(), "DS_ENV_FILE": str(own)}, timeout=300,
        capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    check_finished(run_dir, run_cli)
    assert losses(run_dir) == pytest.approx(losses(recipe.parent / "local"), abs=1e-5)


def test_supervised_over_hosts_a_killed_rank_is_restarted(hosts: Hosts, recipe: Path) -> None:
    run_dir = RunDir(str(recipe.parent / "supervised"))
    supervisor = subprocess.Popen(
        hosts.on_first(sys.executable, "-m", "cluster", "supervise", "--hostfile",
                       str(hosts.hostfile), "--", "--config", str(recipe), "train.steps=60",
                       "train.checkpoint_every=5", f"run.dir={run_dir.uri}"),
        cwd=ROOT, env=hosts.environment(), stdout=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: supervisor.poll() is not None or
                   (len(run_dir.heartbeats()) == 2 and run_dir.committed_step()))
        assert supervisor.poll() is None
        pid = run_dir.heartbeats()[1].pid
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        token = next(item for item in variables if item.startswith(TOKEN)).partition("=")[2]
        os.kill(pid, signal.SIGKILL)
        output, _ = supervisor.communicate(timeout=300)
        assert supervisor.returncode == 0, output
    finally:
        if supervisor.poll() is None:
            supervisor.send_signal(signal.SIGTERM)
            supervisor.communicate(timeout=120)
    events = run_dir.events()
    (restart,) = (row for row in events if row["event"] == "restart")
    (resume,) = (row for row in events if row["event"] == "resume")
    assert resume["step"] == restart["step"] >= 5
    assert events[-1]["event"] == "finished" and members(token) == []
