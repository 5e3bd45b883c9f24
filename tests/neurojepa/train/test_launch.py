"""Ranks as processes of this machine: they train, stop together, and fail together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from cluster.rundir import RunDir
from neurojepa import ports
from neurojepa.train import launch
from tests.helpers import ROOT
from tests.helpers.launches import check_finished, losses, reference
from tests.helpers.waiting import wait_until


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference(tmp_path_factory.getbasetemp())


@pytest.mark.slow(20)
def test_two_local_ranks_train_as_one_does(recipe: Path, run_cli) -> None:
    alone, local = recipe.parent / "alone", recipe.parent / "local"
    done = run_cli("-m", "neurojepa.pretrain", "--config", str(recipe), f"run.dir={alone}")
    assert done.returncode == 0, done.stderr
    assert losses(local) == pytest.approx(losses(alone), abs=1e-5)
    check_finished(local, run_cli)
    again = run_cli("-m", "neurojepa.pretrain", "--config", str(recipe), "run.launcher=local",
                    "run.ranks=2", f"run.dir={local}")
    assert again.returncode == 0 and "already finished" in again.stdout


@pytest.mark.slow(8)
def test_sigterm_commits_everywhere_and_exits_75(recipe: Path) -> None:
    run_dir = RunDir(str(recipe.parent / "stopped"))
    process = subprocess.Popen(
        [sys.executable, "-m", "neurojepa.pretrain", "--config", str(recipe), "train.steps=5000",
         "run.launcher=local", "run.ranks=2", f"run.dir={run_dir.uri}"], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: process.poll() is not None or
                   any(beat.step >= 2 for beat in run_dir.heartbeats()))
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75
    finally:
        process.kill()
        process.wait()
    last = run_dir.events()[-1]
    assert last["event"] == "stop" and run_dir.committed_step() == last["step"]
    for beat in run_dir.heartbeats():
        assert not Path(f"/proc/{beat.pid}").exists()


def test_a_failing_rank_ends_the_others(tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 fails, rank 0 would sleep for minutes and ignores SIGTERM."""
    monkeypatch.setattr(launch, "GRACE_S", 0.5)
    script = ("import os, signal, sys, time, pathlib\n"
              f"pid = pathlib.Path({str(tmp_path / 'pid')!r})\n"
              "if os.environ['RANK'] == '1':\n"
              "    while not pid.exists(): time.sleep(0.01)\n"
              "    sys.exit(7)\n"
              "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
              "pid.write_text(str(os.getpid()))\n"
              "time.sleep(300)\n")
    assert launch._local(2, [sys.executable, "-c", script]) == 7
    assert time.time() - (tmp_path / "pid").stat().st_mtime < 200
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_a_killed_rank_gives_the_status_of_a_shell() -> None:
    script = "import os; os.kill(os.getpid(), 9)"
    assert launch._local(1, [sys.executable, "-c", script]) == 128 + 9


@pytest.mark.slow(12)
def test_bad_input_is_one_clear_line(recipe: Path, run_cli) -> None:
    done = run_cli("-m", "neurojepa.pretrain", "--config", str(recipe), "run.launcher=slurm")
    assert done.returncode == 2 and "run.launcher = 'slurm'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_rank_does_not_begin_when_its_launcher_has_gone() -> None:
    for launcher, status in ((os.getpid(), 0), (os.getppid(), 1)):
        begun = subprocess.run([sys.executable, "-c", ""],
                               preexec_fn=partial(launch._die_with, launcher))
        assert begun.returncode == status


def test_a_killed_launcher_takes_its_ranks_along(tmp_path: Path) -> None:
    rank = (f"import os, time; open(r'{tmp_path}/' + os.environ['RANK'], 'w').write("
            "str(os.getpid())); time.sleep(120)")
    launcher = subprocess.Popen(
        [sys.executable, "-c", "import sys; from neurojepa.train.launch import _local; "
         f"_local(2, [sys.executable, '-c', {rank!r}])"], cwd=ROOT)
    files = [tmp_path / "0", tmp_path / "1"]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    launcher.kill()
    assert launcher.wait() == -signal.SIGKILL  # it had not left them by itself
    ranks = [Path("/proc", file.read_text()) for file in files]
    wait_until(lambda: not any(rank.exists() for rank in ranks))


def test_a_free_port_is_none_that_clients_are_given() -> None:
    found = [ports.free_port(twin=10000) for _ in range(4)]
    first, _ = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    if int(first) < 32768:
        pytest.skip(f"this machine lends ports from {first} on to clients")
    for port in found:
        for each in (port, port + 10000):
            assert each < int(first)
            with socket.create_server(("127.0.0.1", each)):
                assert not ports._is_free(each)
