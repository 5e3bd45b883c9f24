"""One owner per run: two owners in every order of their requests, pauses and deaths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest

from neurojepa.errors import CheckpointError, DataError, LeaseHeld, LeaseLost
from neurojepa.storage import Patience, conditional, join, lease, owners, read_rows, write_bytes
from neurojepa.storage.lease import Keeper, follow, take
from neurojepa.storage.owners import ask_to_stop, facts, newest
from neurojepa.train import ownership
from neurojepa.train.checkpoint import committed_steps, latest_step, step_uri
from neurojepa.train.commit import Commits
from neurojepa.train.ownership import Ownership
from tests.helpers.turns import Turns, TurnStore
from tests.helpers.waiting import wait_until

STEPS = 6
RUN = "turns://bucket/run"
NOW = Patience(0)


class Witness:
    """Sees every change of the store and says what must never be."""

    def __init__(self, store: type[TurnStore]) -> None:
        self.store, self.latest, self.owner = store, (0, 0), 0
        self.history: Counter[str] = Counter()

    def begins(self, token: int) -> None:
        """From now on no earlier owner's write may have an effect."""
        self.owner = max(self.owner, token)

    def changed(self, key: str) -> None:
        if key.endswith(("/latest", "/events.jsonl")):
            last = self.store.objects[key].decode().splitlines()[-1]
            token = json.loads(last)["token"] if last[0] == "{" else int(last.split()[1])
            assert token >= self.owner, f"{key}: {token} writes when {self.owner} has begun"
        text = self.store.objects.get("bucket/run/latest", b"").decode().split()
        if not text:
            return
        step, token = int(text[0].removeprefix("step-").replace("none", "0")), int(text[2])
        assert token >= self.latest[1], f"latest: token {token} after {self.latest[1]}"
        assert step >= self.latest[0], f"latest: step {step} after {self.latest[0]}"
        if token > self.latest[1]:
            self.history["owners"] += 1
        self.latest = (step, token)
        if step:
            folder = f"bucket/run/checkpoints/step-{step}"
            manifest = self.store.objects.get(f"{folder}/manifest.json")
            assert manifest is not None, f"step {step} lost its manifest"
            for name in json.loads(manifest)["files"]:
                assert f"{folder}/{name}" in self.store.objects, f"step {step} lost {name}"


def owner_of_a_run(turns: Turns, witness: Witness) -> None:
    """What rank 0 does from its start to its end, under whatever befalls it."""
    while witness.latest[0] != STEPS:
        try:
            held = take(RUN, "training", NOW, clock=turns.clock, sleep=turns.sleep)
            try:
                train(held, witness)
            except CheckpointError:
                held.check()  # a newer owner has moved on while this one read
                raise
        except LeaseHeld:
            turns.sleep(20)
        except LeaseLost:
            witness.history["lost"] += 1


def train(held: lease.Lease, witness: Witness) -> None:
    owner = Ownership(RUN, held)
    owner.seal()
    witness.begins(held.token)
    commits = Commits(RUN, owner, keep_last=1, milestone_every=0)
    for step in range((latest_step(RUN) or 0) + 1, STEPS + 1):
        held.renew()
        name = f"rank-0-{held.id}.x"
        write_bytes(join(step_uri(RUN, step), name), b"state")
        commits.commit(step, {"step": step, "files": {name: {}}})
        assert witness.latest[0] >= step
        owner.append(join(RUN, "events.jsonl"), [{"step": step, "token": held.token,
                                                  "id": uuid.uuid4().hex}])
        witness.history["rows"] += 1
    held.release()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> type[TurnStore]:
    fsspec.register_implementation("turns", TurnStore, clobber=True)
    # each actor is a machine of its own
    for module in (lease, owners):
        monkeypatch.setattr(module, "pid_space", lambda: threading.current_thread().name)
    return TurnStore


def play(store: type[TurnStore], seed: int) -> Witness:
    """Two owners from two hosts; whoever is killed is started again on a third."""
    store.turns, store.objects = Turns(seed), {}
    witness = Witness(store)
    store.changed = witness.changed  # type: ignore[method-assign]
    hosts = iter(f"host-{number}" for number in range(99))

    def start() -> None:
        store.turns.start(next(hosts), lambda: owner_of_a_run(store.turns, witness))

    start()
    start()
    store.turns.run(on_kill=start, most_kills=3)
    assert witness.latest[0] == STEPS
    rows = [json.loads(line) for line in store.objects["bucket/run/events.jsonl"].splitlines()]
    tokens = [row["token"] for row in rows]
    assert tokens == sorted(tokens)
    assert sum("id" in row for row in rows) >= witness.history["rows"]  # a killed one's may be more
    witness.history["kills"] = store.turns.kills
    return witness


@pytest.mark.slow(8)
def test_a_hundred_interleavings_have_one_writer_and_lose_no_checkpoint(
        store: type[TurnStore]) -> None:
    total: Counter[str] = Counter()
    for seed in range(100):
        total += play(store, seed).history
    # they would show nothing if nobody were ever overtaken
    assert total["lost"] > 20 and total["kills"] > 50 and total["owners"] > 150


@pytest.mark.parametrize("fault", ["check", "seal", "condition"])
def test_the_interleavings_catch_an_owner_that_takes_no_care(
        store: type[TurnStore], monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    if fault == "check":  # writes without looking, and whatever is there
        monkeypatch.setattr(lease.Lease, "check", lambda self: None)
        monkeypatch.setattr(Ownership, "replace", lambda self, uri, data, _: write_bytes(uri, data))
    elif fault == "seal":
        monkeypatch.setattr(Ownership, "seal", lambda self: None)
    else:  # between look and write anything may have happened
        monkeypatch.setattr(lease, "write_if", lambda uri, data, _: not write_bytes(uri, data))
    with pytest.raises((AssertionError, CheckpointError)):
        for seed in range(100):
            play(store, seed)


# ---- the lease itself ----------------------------------------------------------------------------

@pytest.fixture(params=["local", "memory", "s3"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3').uri}/{uuid.uuid4().hex}"
    return str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def elsewhere(monkeypatch: pytest.MonkeyPatch, machine: int = 1) -> None:
    """From now on we are another machine."""
    for module in (lease, owners):
        monkeypatch.setattr(module, "pid_space", lambda: f"another-machine/{machine}")


def no_sleep(seconds: float) -> None:
    """Instead of waiting: the clock below moves by itself."""


def never(seconds: float) -> None:
    raise AssertionError(f"waits {seconds} s")


class Clock:
    """A second passes with each look at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_a_live_owner_is_named_and_a_lease_given_back_can_be_taken(
        run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = take(run_dir, "training", NOW)
    with pytest.raises(LeaseHeld, match=rf"belongs to the training on \S+ \(process {os.getpid()}, "
                                        r"since .*cluster stop"):
        take(run_dir, "supervisor", NOW)
    first.renew(attempt="a1")
    assert facts(run_dir, first.owner)["attempt"] == "a1"
    first.release()
    second = take(run_dir, "supervisor", NOW)
    assert second.token == first.token + 1 and second.owner.adopts is None
    with pytest.raises(LeaseLost, match="taken over by the supervisor"):
        first.check()
    with pytest.raises(LeaseLost), first.writing():
        raise AssertionError("written all the same")
    for write in (lambda: first.append(join(run_dir, "events.jsonl"), [{"a": 1}]),
                  lambda: first.replace(join(run_dir, "x"), b"1", lambda data: 0)):
        with pytest.raises(LeaseLost):
            write()
    second.append(join(run_dir, "events.jsonl"), [{"a": 2}])
    second.append(join(run_dir, "events.jsonl"), [{"a": 3}])
    assert read_rows(join(run_dir, "events.jsonl")) == [{"a": 2}, {"a": 3}]


def test_an_owner_elsewhere_is_dead_when_it_is_silent_by_our_clock(
        run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = take(run_dir, "training", NOW)
    elsewhere(monkeypatch)

    def renewing(seconds: float) -> None:
        first.renew()

    with pytest.raises(LeaseHeld):
        take(run_dir, "training", NOW, clock=Clock(), sleep=renewing)
    clock = Clock()
    assert take(run_dir, "training", NOW, clock=clock, sleep=no_sleep).token == 2
    assert clock.now >= lease.TTL_S
    (row,) = read_rows(join(run_dir, "events.jsonl"))
    assert (row["event"], row["token"], row["adopted"]) == ("takeover", 2, False)


def test_an_owner_whose_process_has_ended_here_is_followed_at_once(tmp_path: Path) -> None:
    code = ("from neurojepa.storage import Patience\nfrom neurojepa.storage.lease import take\n"
            f"take({str(tmp_path)!r}, 'training', Patience(0))")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert newest(str(tmp_path)).process_ended  # type: ignore[union-attr]
    assert take(str(tmp_path), "training", NOW, sleep=never).token == 2


@pytest.mark.parametrize("where", ["local", "memory"])
def test_of_many_at_once_one_gets_it(tmp_path: Path, where: str) -> None:
    run_dir = str(tmp_path) if where == "local" else f"memory://{uuid.uuid4().hex}"
    gate = threading.Barrier(8)

    def claim(_: int) -> int:
        gate.wait()
        try:
            return take(run_dir, "training", NOW).token
        except LeaseHeld:
            return 0

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(claim, range(8))) == [0] * 7 + [1]


def test_ranks_go_on_under_the_supervisor_that_adopts_them(
        run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = take(run_dir, "supervisor", NOW)
    with pytest.raises(LeaseLost, match="not to the supervisor that started this process"):
        follow(run_dir, "a1")
    first.renew(attempt="a1")
    rank = follow(run_dir, "a1")
    elsewhere(monkeypatch)
    second = take(run_dir, "supervisor", NOW, adopt=lambda owner, said: said["attempt"] == "a1",
                  clock=Clock(), sleep=no_sleep)
    rank.check()
    assert (rank.token, rank.id) == (second.token, second.id)
    with pytest.raises(LeaseLost):  # the supervisor itself has lost it
        first.check()
    elsewhere(monkeypatch, 2)
    third = take(run_dir, "supervisor", NOW, adopt=lambda *_: False, clock=Clock(), sleep=no_sleep)
    with pytest.raises(LeaseLost):
        rank.check()
    assert [row["adopted"] for row in read_rows(join(run_dir, "events.jsonl"))] == [True, False]
    third.release()


def test_each_attempt_of_a_supervisor_fences_what_the_last_one_left(run_dir: str) -> None:
    owner = take(run_dir, "supervisor", NOW)
    owner.renew(attempt="a1")
    left = follow(run_dir, "a1")  # on a host that could not be reached
    owner.advance()
    owner.renew(attempt="a2")
    owner.check()
    assert owner.token == 2 and owner.owner.pid == os.getpid()
    with pytest.raises(LeaseLost):
        left.check()
    with pytest.raises(LeaseLost):
        follow(run_dir, "a1")
    assert follow(run_dir, "a2").token == 2
    owner.advance()
    assert newest(run_dir) == owner.owner and owner.token == 3
    owner.release()
    take(run_dir, "training", NOW)
    with pytest.raises(LeaseLost):
        owner.advance()


def test_a_keeper_renews_and_tells_of_a_stop_and_of_the_loss(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    held, told = take(str(tmp_path), "training", NOW), []
    keeper = Keeper(held, lambda: {"attempt": "a1"}, told.append, told.append)

    wait_until(lambda: facts(str(tmp_path), held.owner)["beat"] > 3)
    assert facts(str(tmp_path), held.owner)["attempt"] == "a1"
    ask_to_stop(str(tmp_path), held.owner, now=False)
    wait_until(lambda: told == ["stop"])
    ask_to_stop(str(tmp_path), held.owner, now=True)
    wait_until(lambda: told == ["stop", "now"])
    elsewhere(monkeypatch)

    def taken() -> lease.Lease | None:
        with suppress(LeaseHeld):  # it was renewed between two looks
            return take(str(tmp_path), "training", NOW, clock=iter(range(0, 999, 50)).__next__,
                        sleep=no_sleep)
        return None

    wait_until(taken)
    wait_until(lambda: len(told) == 3)
    assert isinstance(told[2], LeaseLost) and not keeper.is_alive()


def test_a_lock_that_is_never_given_back_is_named(tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditional, "LOCK_S", 0.05)
    with conditional.locked(str(tmp_path)), pytest.raises(
            DataError, match=rf"has held {tmp_path}/lock for 0 s; is it stopped"), \
            conditional.locked(str(tmp_path)):
        raise AssertionError("two turns at once")


def test_a_disk_without_links_and_locks_serves(tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(conditional.os, "link", refuse)
    monkeypatch.setattr(conditional.fcntl, "flock", refuse)
    held = take(str(tmp_path), "training", NOW)
    with pytest.raises(LeaseHeld):
        take(str(tmp_path), "training", NOW)
    assert not conditional.create(str(tmp_path / "lease" / "00000001.json"), b"other")
    held.append(str(tmp_path / "events.jsonl"), [{"a": 1}])
    assert read_rows(str(tmp_path / "events.jsonl")) == [{"a": 1}]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_damaged_claim_is_named(tmp_path: Path) -> None:
    take(str(tmp_path), "training", NOW)
    (tmp_path / "lease" / "00000001.json").write_text("{")
    with pytest.raises(DataError, match=r"00000001\.json: is no claim .* delete the folder lease/"):
        take(str(tmp_path), "training", NOW)


def test_older_run_directories_open_and_keep_what_they_had(tmp_path: Path) -> None:
    run_dir = str(tmp_path)
    for step in (10, 20, 30):  # the operator went back to 20
        write_bytes(join(step_uri(run_dir, step), "manifest.json"), b'{"files": {}}')
    write_bytes(join(run_dir, "latest"), b"step-20")
    owner = Ownership(run_dir, take(run_dir, "training", NOW))
    owner.seal()
    assert latest_step(run_dir) == 20
    write_bytes(join(step_uri(run_dir, 25), "a.x"), b"state")
    Commits(run_dir, owner, keep_last=2, milestone_every=0).commit(25, {"files": {"a.x": {}}})
    assert (tmp_path / "latest").read_text() == "step-25"
    assert committed_steps(run_dir) == [20, 25]
    owner.close()


def test_a_lease_that_was_given_back_stays_so_and_a_store_that_fails_then_is_no_error(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
        ) -> None:
    held = take(str(tmp_path), "training", NOW)
    held.release()
    held.renew()  # a keeper that was late
    assert facts(str(tmp_path), held.owner)["state"] == "released"

    def fails(*_: object) -> None:
        raise DataError("the store is away")

    monkeypatch.setattr(lease, "write_bytes", fails)
    Ownership(str(tmp_path), held, holds=True).close()
    assert "was not given back (the store is away)" in capsys.readouterr().err


def test_a_stop_at_once_ends_no_process_that_lives_on_after_its_run(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(ownership, "LEAVE_S", 30.0)
    monkeypatch.setattr(ownership.os, "_exit", left.append)
    owner = Ownership(str(tmp_path))
    owner._on_stop("now")
    leave = owner._leave
    owner.close()
    leave.join()
    assert left == []
    monkeypatch.setattr(ownership, "LEAVE_S", 0.1)
    owner = Ownership(str(tmp_path))
    owner._on_stop("now")  # of a step that never ends
    owner._leave.join()
    assert left == [ownership.REQUEUE]
