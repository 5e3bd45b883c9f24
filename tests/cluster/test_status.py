"""The status where clocks differ, ranks became fewer, a store is waited for; and its commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import __main__ as command
from cluster.attempt import Progress
from cluster.rundir import Heartbeat, RunDir
from cluster.status import read_status, render
from tests.helpers import ROOT

NOW = 10_000.0


def beat(run: Path, rank: int, **fields: Any) -> None:
    folder = run / "heartbeat"
    folder.mkdir(exist_ok=True)
    row = {"rank": rank, "host": f"host-{rank}", "pid": 7, "step": 40, "time": NOW, "seen": NOW,
           "state": "step", "attempt": "a", **fields}
    (folder / f"rank-{rank}.json").write_text(json.dumps(row))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "events.jsonl").write_text('{"time": 1000, "event": "start", "step": 0}\n')
    return tmp_path


@pytest.mark.parametrize("off", [-300.0, 300.0, -4000.0])
def test_a_clock_that_is_off_stalls_nothing(run: Path, off: float) -> None:
    beat(run, 0)
    beat(run, 1, time=NOW + off - 1, seen=NOW + off)

    def a_step(seconds: float) -> None:
        beat(run, 0, time=NOW + seconds, seen=NOW + seconds)
        beat(run, 1, time=NOW + off + seconds - 1, seen=NOW + off + seconds)

    status = read_status(RunDir(str(run)), now=NOW, sleep=a_step)
    assert status["state"] == "running"
    assert all(abs(rank["age_s"]) <= 10 or off > 0 for rank in status["ranks"])


def test_a_rank_that_gives_no_sign_or_makes_no_step_is_stalled(run: Path) -> None:
    beat(run, 0)
    beat(run, 1, time=NOW - 300, seen=NOW - 300)
    assert read_status(RunDir(str(run)), now=NOW, sleep=lambda _: beat(run, 0, seen=NOW + 6))[
        "state"] == "stalled"
    beat(run, 1, time=NOW - 100, seen=NOW)

    def still_there(seconds: float) -> None:
        beat(run, 1, time=NOW - 100, seen=NOW + seconds)

    status = read_status(RunDir(str(run)), now=NOW, sleep=still_there)
    assert status["state"] == "stalled" and status["ranks"][1]["age_s"] >= 106


def test_a_rank_of_an_earlier_larger_world_is_no_ghost(run: Path) -> None:
    for rank in range(3):
        beat(run, rank, attempt="old", time=NOW - 500, seen=NOW - 500)
    beat(run, 0, attempt="new")
    status = read_status(RunDir(str(run)), now=NOW)
    assert [rank["rank"] for rank in status["ranks"]] == [0] and status["state"] == "running"
    for rank in range(2):  # written by an earlier version, which names no attempt
        (run / "heartbeat" / f"rank-{rank}.json").write_text(json.dumps(
            {"rank": rank, "host": "a", "pid": 7, "step": 41, "time": NOW}))
    (run / "heartbeat" / "rank-2.json").unlink()
    assert len(RunDir(str(run)).heartbeats()) == 2


def test_a_store_that_is_waited_for_is_no_stall(run: Path) -> None:
    beat(run, 0, time=NOW - 200)
    beat(run, 1, time=NOW - 200, state="waiting for store", wait_left_s=100)
    status = read_status(RunDir(str(run)), now=NOW)
    assert status["state"] == "waiting" and "WAITING" in render(status)


def test_a_rank_that_waits_for_its_store_is_not_hung_until_it_says_so_no_more() -> None:
    def signs(seen: float, state: str) -> list[Heartbeat]:
        return [Heartbeat(0, "a", 1, 5, 100.0, seen, "step", "x"),
                Heartbeat(1, "b", 2, 5, 100.0, seen, state, "x")]

    progress = Progress(before=[])
    progress.update(signs(100.0, "step"))
    for state, silent in (("waiting for store", False), ("step", True)):
        progress.changed_at = time.monotonic() - 500
        assert not progress.update(signs(200.0 + silent, state))
        assert (progress.silent_s > 400) is silent
    progress.changed_at = time.monotonic() - 500  # the same sign again: its thread is gone, too
    progress.update(signs(300.0, "waiting for store"))
    progress.changed_at = time.monotonic() - 500
    progress.update(signs(300.0, "waiting for store"))
    assert progress.silent_s > 400


def test_a_run_that_commits_nothing_has_an_old_checkpoint_too(run: Path) -> None:
    assert read_status(RunDir(str(run)), now=NOW)["checkpoint_age_s"] == NOW - 1000
    with (run / "events.jsonl").open("a") as file:
        file.write('{"time": 4000, "event": "checkpoint", "step": 5}\n'
                   '{"time": 6000, "event": "resume", "step": 5}\n')
    assert read_status(RunDir(str(run)), now=NOW)["checkpoint_age_s"] == NOW - 4000


@pytest.mark.parametrize(("last", "status"), [("finish", 0), ("stopped", 75), ("give_up", 1)])
def test_watch_ends_when_the_run_has_ended(run: Path, capsys: pytest.CaptureFixture[str],
                                           last: str, status: int) -> None:
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), "event": last, "step": 3}) + "\n")
    assert command.main(["watch", str(run), "--every", "0.01"]) == status
    assert str(run) in capsys.readouterr().out


def test_watch_goes_on_between_two_attempts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter(["failed", "running", "failed", "failed"])
    monkeypatch.setattr("cluster.status.read_status", lambda *_, **__: {"state": next(states)})
    monkeypatch.setattr("cluster.status.render", lambda status: status["state"])
    assert command.main(["watch", str(run), "--every", "0"]) == 1
    assert next(states, None) is None


def test_whoever_reads_may_leave(run: Path) -> None:
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), "event": "finish", "step": 3}) + "\n")
    reader, writer = os.pipe()
    os.close(reader)
    shown = subprocess.run([sys.executable, "-m", "cluster", "status", str(run)], cwd=ROOT,
                           stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (shown.returncode, shown.stderr) == (141, "")


def test_many_ranks_are_folded_by_host(run: Path) -> None:
    for rank in range(24):
        beat(run, rank, host=f"node{rank // 8}", step=40 - (rank == 13), own_s=0.3 + (rank == 5))
    status = read_status(RunDir(str(run)), now=NOW)
    screen = render(status)
    assert "node1                8-15 (8)         39" in screen and "node2" in screen
    assert "slow: rank 5 on node0 needs 1.3 s, the others 0.3 s" in screen
    assert screen.count("node") == 4
    assert len(json.loads(json.dumps(status))["ranks"]) == 24


def test_goodput_and_lost_steps_are_on_the_screen(run: Path) -> None:
    with (run / "events.jsonl").open("a") as file:
        for row in ({"time": 1100, "event": "exit", "step": 100},
                    {"time": 1100, "event": "started", "step": None},
                    {"time": 1100, "event": "resume", "step": 60},
                    {"time": 1140, "event": "finish", "step": 100}):
            file.write(json.dumps(row) + "\n")
    status = read_status(RunDir(str(run)), now=NOW)
    assert (status["goodput"], status["lost_steps"]) == (pytest.approx(100 / 140), 40)
    assert "goodput: 71% (lost: 40 steps)" in render(status)
