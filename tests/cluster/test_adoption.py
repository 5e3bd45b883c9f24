"""Who may end or overtake whose ranks, when supervisors follow one another."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.processes import TOKEN
from cluster.rundir import RunDir
from cluster.supervise import Supervisor
from cluster.world import World
from neurojepa.errors import LeaseLost
from neurojepa.storage import Patience, lease, owners
from neurojepa.storage.lease import follow, take
from neurojepa.storage.owners import newest
from tests.helpers.toy_launch import ToyLaunch


class EndsAtOnce(ToyLaunch):
    def command(self) -> list[str]:
        return ["true"]


@pytest.fixture
def rank() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the attempt a1."""
    process = subprocess.Popen(["sleep", "300"], env={**os.environ, TOKEN: "a1", "RANK": "0"})
    yield process
    process.kill()
    process.wait()


def test_the_attempt_after_an_adopted_one_fences_what_may_be_left_of_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = str(tmp_path / "run")
    take(run_dir, "supervisor", Patience(0)).renew(attempt="a1")
    left = follow(run_dir, "a1")  # on a host that nobody reaches
    for module in (lease, owners):
        monkeypatch.setattr(module, "pid_space", lambda: "another-machine/1")
    supervisor = Supervisor(EndsAtOnce([]), RunDir(run_dir))
    supervisor._lease = take(run_dir, "supervisor", Patience(0), adopt=lambda *_: True,
                             clock=itertools.count(0, 50).__next__)
    supervisor._world = World("a1", 1, [])
    left.check()
    supervisor._attempt(tmp_path)
    left.check()
    supervisor._attempt(tmp_path)
    with pytest.raises(LeaseLost, match="taken over by the supervisor"):
        left.check()


def test_a_supervisor_that_learns_by_a_write_that_it_lost_ends_no_rank(
        tmp_path: Path, rank: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = RunDir(str(tmp_path))
    supervisor = Supervisor(ToyLaunch([]), run_dir)
    supervisor._lease = take(run_dir.uri, "supervisor", Patience(0))
    supervisor._world = world = World("a1", 1, [])
    monkeypatch.setattr(world, "gone_hosts", lambda: ["b"])
    later = {**vars(newest(run_dir.uri)), "token": 2, "id": "other"}
    (tmp_path / "lease" / "00000002.json").write_text(json.dumps(later))
    with pytest.raises(LeaseLost):
        supervisor._attempt(tmp_path)
    assert rank.poll() is None and run_dir.events() == []


def test_ranks_of_another_launch_are_not_ended_before_the_run_is_ours(
        tmp_path: Path, rank: subprocess.Popen[bytes]) -> None:
    supervisor = Supervisor(ToyLaunch([]), RunDir(str(tmp_path)))
    last = take(supervisor.run_dir.uri, "supervisor", Patience(0)).owner
    assert not supervisor._adopt(last, {"attempt": "a1", "number": 1, "launch": "other"})
    assert rank.poll() is None and supervisor._left is not None
