"""When another attempt is worth while: retry budget, room on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster import journal, supervise
from cluster.launcher import Seen
from cluster.outcome import Budget, Outcome, status_of
from cluster.room import LEAST_ROOM, Room, room
from cluster.rundir import RunDir
from cluster.supervise import Supervisor
from neurojepa.errors import DataError
from tests.helpers.toy_launch import toy_launcher


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_quick_failures_do_not_use_up_a_budget_of_time() -> None:
    clock = Clock()
    budget = Budget(max_restarts=3, retry_s=600, clock=clock)
    tried = 0
    while not budget.spent:
        budget.failed(progressed=False)
        clock.now += 1 + budget.pause_s  # an attempt that fails after a second
        tried += 1
    assert 10 < tried < 20 and clock.now >= 600


def test_slow_failures_are_tried_as_often_as_was_asked() -> None:
    clock = Clock()
    budget = Budget(max_restarts=3, retry_s=600, clock=clock)
    for _ in range(3):
        clock.now += 3600
        budget.failed(progressed=False)
        assert not budget.spent
    clock.now += 3600
    budget.failed(progressed=False)
    assert budget.spent and budget.failures == 4


def test_a_new_checkpoint_opens_the_budget_again() -> None:
    clock = Clock()
    budget = Budget(max_restarts=1, retry_s=100, clock=clock)
    budget.failed(progressed=False)
    clock.now = 200
    budget.failed(progressed=False)
    assert budget.spent
    budget.failed(progressed=True)
    assert not budget.spent and (budget.failures, budget.pause_s) == (1, 1.0)
    for _ in range(99):
        budget.failed(progressed=False)
    assert budget.pause_s == 60.0


@pytest.mark.parametrize(("hung", "fatal", "says"), [
    (False, None, r"run: gave up after 4 failure\(s\) in a row at step 7 \(status 3; last "
                  r"checkpoint: step 6\); see logs/ there\. ToyError: broken"),
    (True, None, r"at step 7 \(hung; "),
    (False, "collapse", r"ended with the event collapse at step 7, to which a restart would")])
def test_why_it_gave_up_is_one_line(hung: bool, fatal: str | None, says: str) -> None:
    outcome = Outcome(3, 7, [], ["first", "ToyError: broken", "last"], hung, fatal)
    message = outcome.give_up_message("run", 4, 6)
    assert "\n" not in message
    with pytest.raises(ValueError, match=says):
        raise ValueError(message)


def test_the_room_a_checkpoint_needs_is_that_of_the_last_one(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path / "not" / "there" / "yet"))
    before = room(run_dir)
    assert before is not None and before.free > 0 and before.need == LEAST_ROOM
    folder = tmp_path / "not" / "there" / "yet"
    (folder / "checkpoints" / "step-5").mkdir(parents=True)
    (folder / "latest").write_text("step-5")
    (folder / "checkpoints" / "step-5" / "manifest.json").write_text(
        json.dumps({"files": {"a": {"size": 1 << 40}, "b": {"size": 1 << 40}}}))
    found = room(run_dir)
    assert found is not None and found.need > 2 << 40 and not found.enough
    assert room(RunDir("memory://run")) is None


def test_a_full_disk_is_said_once_and_waited_for(tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([Room("/run", 3 << 20, 9 << 20)] * 3 + [Room("/run", 9 << 20, 9 << 20)])
    monkeypatch.setattr(supervise, "room", lambda _: next(looks))
    supervisor, run_dir = Supervisor(toy_launcher([]), RunDir(str(tmp_path))), RunDir(str(tmp_path))
    waited: list[float] = []
    monkeypatch.setattr(supervisor, "_wait", waited.append)
    supervisor._wait_for_room()
    (row,) = run_dir.events()
    assert (row["event"], row["free_mib"], row["need_mib"]) == ("disk_full", 3, 9)
    assert len(waited) == 3


def test_an_event_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = [True, True]

    def append(uri: str, rows: list[object]) -> None:
        if full:
            full.pop()
            raise DataError("full") from OSError(28, "No space left on device")
        written.extend(rows)

    written: list[object] = []
    monkeypatch.setattr(journal, "append_rows", append)
    monkeypatch.setattr(journal, "ROOM_S", 0.0)
    Supervisor(toy_launcher([]), RunDir(str(tmp_path)))._journal.event("exit", 3)
    assert len(written) == 1 and not full


@pytest.mark.parametrize(("size", "statuses", "expected"), [
    (2, {0: 0, 1: 0}, (0, None)), (3, {1: 0, 2: 137, 0: 1}, (137, 2)), (2, {1: 0}, (1, None)),
    (0, {}, (1, None))])
def test_an_attempt_has_the_status_of_the_rank_that_failed_first(
        size: int, statuses: dict[int, int], expected: tuple[int, int | None]) -> None:
    assert status_of(Seen(size, [], statuses, [])) == expected
