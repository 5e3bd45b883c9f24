"""Who may end or overtake whose ranks, when supervisors follow one another."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

from cluster.diagnosis import RankState
from cluster.launcher import Attempt, Seen
from cluster.rundir import RunDir
from cluster.supervise import Supervisor
from neurojepa.errors import LeaseLost
from neurojepa.storage import Patience, lease, owners
from neurojepa.storage.lease import follow, take
from neurojepa.storage.owners import newest


@dataclass
class Ranks:
    """Launcher and world in one: its ranks are over at once, or their host is lost."""

    lost: list[str] = field(default_factory=list)
    did: list[str] = field(default_factory=list)
    attempt: Attempt = field(default_factory=lambda: Attempt("", 0))

    def fingerprint(self) -> str:
        return "same"

    def slots(self) -> dict[str, int]:
        return {}

    def problems(self, folder: str | None, odd: object) -> dict[str, str]:
        return {}

    def is_there(self, attempt: Attempt) -> bool:
        return True

    def start(self, attempt: Attempt, log: IO[bytes]) -> Ranks:
        self.attempt = attempt
        self.did.append(f"start under {attempt.fence}")
        return self

    def adopt(self, attempt: Attempt, log: IO[bytes]) -> Ranks:
        self.attempt = attempt
        self.did.append(f"adopt {attempt.token} under {attempt.fence}")
        return self

    def look(self) -> Seen:
        return Seen(1, [], {} if self.lost else {0: 0}, self.lost)

    def states(self) -> list[RankState]:
        return []

    def signal(self, signum: int) -> None:
        self.did.append(f"signal {signum}")

    def end(self) -> list[str]:
        self.did.append("end")
        return list(self.lost)

    def leave(self) -> None:
        self.did.append("leave")


def test_the_attempt_after_an_adopted_one_fences_what_may_be_left_of_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = str(tmp_path / "run")
    take(run_dir, "supervisor", Patience(0)).renew(attempt="a1")
    left = follow(run_dir, "a1")  # on a host that nobody reaches
    for module in (lease, owners):
        monkeypatch.setattr(module, "pid_space", lambda: "another-machine/1")
    launcher = Ranks()
    supervisor = Supervisor(launcher, RunDir(run_dir))
    supervisor._lease = take(run_dir, "supervisor", Patience(0), adopt=lambda *_: True,
                             clock=itertools.count(0, 50).__next__)
    supervisor._attempt = Attempt("a1", 1, 2)
    left.check()
    supervisor._run_attempt(tmp_path)
    left.check()
    supervisor._run_attempt(tmp_path)
    with pytest.raises(LeaseLost, match="taken over by the supervisor"):
        left.check()
    assert launcher.did == ["adopt a1 under 2", "end", "start under 3", "end"]


def test_a_supervisor_that_learns_by_a_write_that_it_lost_ends_no_rank(tmp_path: Path) -> None:
    run_dir, launcher = RunDir(str(tmp_path)), Ranks(lost=["b"])
    supervisor = Supervisor(launcher, run_dir)
    supervisor._lease = supervisor._journal.lease = take(run_dir.uri, "supervisor", Patience(0))
    supervisor._attempt = Attempt("a1", 1)
    later = {**vars(newest(run_dir.uri)), "token": 2, "id": "other"}
    (tmp_path / "lease" / "00000002.json").write_text(json.dumps(later))
    with pytest.raises(LeaseLost):
        supervisor._run_attempt(tmp_path)
    assert launcher.did == ["adopt a1 under 0", "leave"] and run_dir.events() == []


def test_what_a_host_that_was_away_may_still_run_is_told_to_later_attempts(tmp_path: Path) -> None:
    run_dir, before, tokens = RunDir(str(tmp_path)), [], []
    for lost in (["b"], [], []):  # each by a supervisor of its own
        supervisor = Supervisor(launcher := Ranks(lost), run_dir)
        supervisor._lease = supervisor._journal.lease = take(run_dir.uri, "supervisor", Patience(0))
        supervisor._run_attempt(tmp_path)
        supervisor._lease.release()
        before.append(launcher.attempt.before)
        tokens.append(launcher.attempt.token)
    assert before == [[], tokens[:1], tokens[:1]]
    assert [row["away"] for row in run_dir.events() if row["event"] == "exit"] == [["b"], [], []]


def test_ranks_on_hosts_that_are_no_longer_listed_are_ended_where_they_can_be(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = Supervisor(launcher := Ranks(), RunDir(str(tmp_path)))
    last = take(supervisor.run_dir.uri, "supervisor", Patience(0)).owner
    said = {"attempt": "a1", "number": 1, "launch": "same", "hosts": ["a", "b"]}
    monkeypatch.setattr(launcher, "slots", lambda: {"b": 1, "c": 1})
    assert not supervisor._adopt(last, said)
    assert supervisor._attempt is None
    assert supervisor._left == Attempt("a1", 1, last.token + 1, ["b"])
    monkeypatch.setattr(launcher, "slots", lambda: {"a": 1, "b": 1, "c": 1})
    assert supervisor._adopt(last, said)


@pytest.mark.parametrize(("launch", "adopted"), [("same", True), ("other", False)])
def test_ranks_of_another_launch_are_not_ended_before_the_run_is_ours(
        tmp_path: Path, launch: str, adopted: bool) -> None:
    supervisor = Supervisor(launcher := Ranks(), RunDir(str(tmp_path)))
    last = take(supervisor.run_dir.uri, "supervisor", Patience(0)).owner
    said = {"attempt": "a1", "number": 1, "launch": launch}
    assert supervisor._adopt(last, said) is adopted and launcher.did == []
    kept = supervisor._attempt if adopted else supervisor._left
    assert kept == Attempt("a1", 1, last.token + 1)
    assert not supervisor._adopt(last, {**said, "attempt": "a; rm -r x"})
