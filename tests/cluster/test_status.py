"""The status where clocks differ, ranks became fewer, a store is waited for; and its commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cluster import __main__ as command
from cluster.left import Left
from cluster.progress import Progress
from cluster.rundir import Heartbeat, RunDir
from cluster.screen import render
from cluster.status import read_status
from cluster.trend import trend
from neurojepa.errors import ClusterError, ConfigError
from neurojepa.storage.owners import pid_space
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

    progress = Progress()
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
    monkeypatch.setattr("cluster.screen.render", lambda status, _: status["state"])
    assert command.main(["watch", str(run), "--every", "0"]) == 1
    assert next(states, None) is None


def test_watch_ends_when_a_run_was_killed_without_a_word(
        run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A training without a supervisor, killed together with its owner."""
    beat(run, 0, time=time.time() - 900, seen=time.time() - 900)
    (run / "lease").mkdir()
    ended = subprocess.Popen(["true"])
    ended.wait()
    owner = {"token": 1, "id": "x", "kind": "training", "host": "a", "pid": ended.pid,
             "pid_space": pid_space(), "process": 5, "time": time.time() - 900}
    (run / "lease/00000001.json").write_text(json.dumps({**owner, "adopts": None}))
    (run / "lease/00000001.alive.json").write_text('{"state": "held", "beat": 7}')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.status.AGAIN_S", 0.01)
        assert command.main(["watch", str(run), "--every", "0.01"]) == 1
    assert "STALLED" in (said := capsys.readouterr().out) and "was killed" in said


def test_an_owner_elsewhere_is_dead_when_it_says_nothing_for_as_long_as_a_claim_lasts(
        run: Path) -> None:
    now = [0.0]
    left = Left(str(run), clock=lambda: now[0])
    assert left.look() == "it has no owner"
    (run / "lease").mkdir()
    owner = {"token": 3, "id": "x", "kind": "supervisor", "host": "b", "pid": 1, "adopts": None,
             "pid_space": "another machine", "process": 5, "time": 1.0}
    (run / "lease/00000003.json").write_text(json.dumps(owner))
    for number, state in ((1, "held"), (2, "held"), (2, "held")):
        (run / "lease/00000003.alive.json").write_text(json.dumps({"state": state, "beat": number}))
        assert left.look() == ""
        now[0] += 30
    assert "supervisor on b" in left.look() and "gives no sign of life" in left.look()
    (run / "lease/00000003.alive.json").write_text('{"state": "released", "beat": 2}')
    assert left.look().endswith("has ended")


@pytest.mark.parametrize(("terminal", "settings", "coloured"), [
    (True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False),
    (True, {"NO_COLOR": ""}, True), (True, {"TERM": "dumb"}, False)])
def test_colours_are_for_terminals(run: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool,
                                   settings: dict[str, str], coloured: bool) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm", **settings}.items():
        monkeypatch.setenv(name, value)
    with (run / "events.jsonl").open("a") as file:
        for name in ("skip", "give_up"):
            file.write(json.dumps({"time": time.time(), "event": name, "step": 3}) + "\n")
    shown, writer = os.openpty() if terminal else os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    assert command.main(["status", str(run)]) == 0
    sys.stdout.close()
    text = ""
    with suppress(OSError):  # how a terminal ends
        while found := os.read(shown, 1 << 16).decode():
            text += found
    os.close(shown)
    assert ("\x1b[31m" in text, "\x1b[33m" in text) == (coloured, coloured)
    assert "FAILED" in text


def test_trends_of_loss_and_rate_are_on_the_screen(run: Path) -> None:
    rows = [{"step": step, "loss": 3.0 - step / 100, "volumes_per_s": 8.0, "step_s": 1.0}
            for step in range(1, 201)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status = read_status(RunDir(str(run)), now=NOW)
    assert status["trend"]["loss"]["change"] == pytest.approx((1.245 - 2.745) / 2.745, abs=1e-3)
    screen = render(status)
    assert "loss       ██▇▇" in screen and "▂▁▁   -54.6% over 200 steps" in screen
    assert "+0.0% over 200 steps" in screen
    (run / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert read_status(RunDir(str(run)), now=NOW)["trend"] == {"loss": None, "volumes_per_s": None}


@pytest.mark.parametrize(("values", "points", "change"), [
    ([1.0] * 8, [1.0] * 8, 0.0), ([None] * 40, None, None), ([1.0] * 7, None, None),
    ([0.0] * 8 + [2.0] * 8, [0.0] * 8 + [2.0] * 8, None),
    ([float("nan"), None, *range(8)], list(range(8)), 12.0)])
def test_a_trend_needs_rows(values: list[float | None], points: list[float] | None,
                            change: float | None) -> None:
    found = trend(values)
    assert (found and found["points"]) == points
    assert (found and found["change"]) == change


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


@pytest.mark.parametrize("text", ["train: [1", "- a list", "just words"])
def test_a_config_that_somebody_has_spoilt_is_named(run: Path, text: str) -> None:
    (run / "config.yaml").write_text(text)
    with pytest.raises(ClusterError, match=r"/config\.yaml: no YAML mapping .* put back what"):
        command.main(["status", str(run)])


@pytest.mark.parametrize(("override", "why"), [
    ("run.ranks=[1", "override 'run.ranks=\\[1': the value is not valid YAML"),
    ("run.ranks=many", "run.ranks = 'many': expected a whole number"),
    ("run.ranks=-1", "run.ranks = -1: expected")])
def test_an_override_that_says_nothing_starts_nothing(tmp_path: Path, override: str,
                                                      why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        command.main(["supervise", "--", "--config", "demo", "data.feed=x",
                      f"run.dir={tmp_path / 'run'}", override])
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_step_shows_no_empty_table(run: Path) -> None:
    screen = render(read_status(RunDir(str(run)), now=NOW))
    assert "None" not in screen and "no rank has given a sign of life yet" in screen


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


@pytest.mark.parametrize(("state", "expected"), [
    ("step", "stalled"), ("compiling", "running"), ("checkpoint", "running"),
    ("evaluation", "running"), ("starting", "running")])
def test_what_takes_longer_than_a_step_is_not_stalled(tmp_path: Path, state: str,
                                                      expected: str) -> None:
    (tmp_path / "events.jsonl").write_text('{"time": 1000, "event": "start", "step": 0}\n')
    (tmp_path / "heartbeat").mkdir()
    rows = [vars(Heartbeat(rank, "a", 7, 4, 1001.0, 1200.0, state if rank else "step", "t"))
            for rank in range(2)]
    (tmp_path / "heartbeat" / "ranks.json").write_text(json.dumps({"ranks": rows}))
    assert read_status(RunDir(str(tmp_path)), now=1200)["state"] == expected
