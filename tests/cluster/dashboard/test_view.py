"""A run as the page sees it while it goes on: in an object store, with clocks that differ."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.dashboard import view as viewing
from cluster.dashboard.view import RunView
from neurojepa.storage import append_rows, drop_rows, join, write_bytes
from tests.helpers.runs import metrics_row, write_run
from tests.helpers.waiting import wait_until


def test_a_run_in_an_object_store_is_shown(s3, tmp_path: Path) -> None:
    local, uri = write_run(tmp_path / "run", steps=60), join(s3.uri, "shown")
    for path in local.rglob("*"):
        if path.is_file():
            write_bytes(join(uri, path.relative_to(local).as_posix()), path.read_bytes())
    view = RunView(uri)
    view.look()
    seen = view.overview()
    assert (seen["problem"], seen["state"], seen["rows"]) == ("", "running", 60)
    append_rows(join(uri, "metrics.jsonl"), [metrics_row(61)])
    view.look()
    assert view.series(61, 61, 10)["loss"][0][0] == 61
    skip = next(event for event in view.events()["events"] if event["event"] == "exit")
    around = view.around(skip["number"])
    assert around is not None and around["log"]["name"] == "attempt-1.log"


def test_a_rank_whose_clock_is_off_is_alive_at_the_second_look(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=60, now=time.time() - 3000)
    view = RunView(str(run))
    view.look()
    assert view.overview()["state"] == "stalled"
    for path in (run / "heartbeat").iterdir():  # a sign of life, by a clock 3,000 s behind
        row = json.loads(path.read_text())
        path.write_text(json.dumps({**row, "time": row["time"] + 3, "seen": row["seen"] + 3}))
    view.look()
    assert view.overview()["state"] == "running"
    assert all(rank["age_s"] < 10 for rank in view.overview()["ranks"])


def test_steps_that_a_resume_has_dropped_are_drawn_no_more(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=60)
    view = RunView(str(run))
    view.look()
    drop_rows(str(run / "metrics.jsonl"), lambda row: row["step"] <= 40)
    append_rows(str(run / "metrics.jsonl"), [{**metrics_row(41), "loss": 5.0}])
    view.look()
    assert view.overview()["rows"] == 41 and view.series(0, 99, 99)["loss"][-1][:2] == [41, 5.0]


def test_checkpoints_that_come_again_after_a_rollback_are_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=400)
    append_rows(str(run / "events.jsonl"), [
        {"time": time.time(), "event": "checkpoint", "step": step, "seconds": 9.0}
        for step in (100, 120, 140)])
    view = RunView(str(run))
    view.look()
    drawn = view.series(300, 400, 99)["checkpoint_s"]
    assert [point[0] for point in drawn] == [300, 320, 340, 360, 380]
    assert [point[1] for point in view.series(100, 110, 99)["checkpoint_s"]][-1] == 9.0


def test_it_reads_while_somebody_looks_and_rests_otherwise(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewing, "LOCAL_S", 0.01)
    monkeypatch.setattr(viewing, "IDLE_S", 0.1)
    looks: list[Any] = []
    view = RunView(str(tmp_path))
    monkeypatch.setattr(view, "look", lambda: looks.append(1))
    view.ask()
    view.ask()
    wait_until(lambda: view._thread is None or not view._thread.is_alive())
    read = len(looks)
    assert read >= 1
    view.ask()
    wait_until(lambda: len(looks) > read)


def test_a_run_that_cannot_be_read_is_told_and_read_again(tmp_path: Path) -> None:
    view = RunView(str(tmp_path / "run"))
    view.look()
    assert "no run here" in view.overview()["problem"]
    write_run(tmp_path / "run", steps=60)
    view.look()
    assert view.overview()["problem"] == "" and view.overview()["step"] == 60
