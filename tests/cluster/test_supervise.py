"""The supervisor against ranks that die, hang, refuse or are asked to stop; and the status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import s3fs
import yaml

from cluster import __main__ as command
from cluster.outcome import Outcome
from cluster.processes import TOKEN, members, same_process
from cluster.progress import Progress
from cluster.rundir import Heartbeat, RunDir, run_of_arguments
from cluster.screen import render
from cluster.status import read_status
from cluster.stop import stop
from cluster.supervise import Supervisor
from cluster.world import AgentWorld
from neurojepa.errors import ClusterError, ConfigError, DataError, LeaseLost
from neurojepa.storage import Patience, append_rows, lease, owners, read_rows, write_bytes
from tests.helpers import ROOT
from tests.helpers.proxy import Proxy
from tests.helpers.toy_launch import toy_launcher
from tests.helpers.waiting import wait_until


@pytest.fixture
def toy(tmp_path: Path) -> Callable[..., tuple[Supervisor, RunDir]]:
    def make(*options: str, steps: int = 8, **settings: float) -> tuple[Supervisor, RunDir]:
        config = tmp_path / "toy.yaml"
        config.write_text(yaml.safe_dump({"run": {"dir": str(tmp_path / "run")},
                                          "train": {"steps": steps}}))
        run_dir = RunDir(str(tmp_path / "run"))
        launcher = toy_launcher(["--config", str(config), *options])
        return Supervisor(launcher, run_dir, **settings), run_dir  # type: ignore[arg-type]

    return make


def names(run_dir: RunDir) -> list[str]:
    return [row["event"] for row in run_dir.events()]


def in_background(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def test_a_quiet_run_is_started_once_and_finishes(toy) -> None:
    supervisor, run_dir = toy("toy.step_s=0.02")
    assert supervisor.run() == 0
    assert names(run_dir) == ["started", "start", "finish", "exit", "finished"]
    status = read_status(run_dir)
    assert (status["state"], status["step"], status["restarts"]) == ("finished", 8, 0)
    assert "FINISHED" in render(status)


def test_gives_up_and_names_the_step(toy) -> None:
    supervisor, run_dir = toy("toy.crash=2", "toy.step_s=0.02", max_restarts=1)
    with pytest.raises(ClusterError, match=r"gave up after 2 failure.s. in a row at step 1 "
                                           r".*status 3.*no checkpoint yet.*ToyError: rank"):
        supervisor.run()
    events = run_dir.events()
    assert [row["event"] for row in events].count("restart") == 1
    assert (events[-1]["event"], events[-1]["step"], events[-1]["failures"]) == ("give_up", 1, 2)
    exits = [row for row in events if row["event"] == "exit"]
    assert exits[0]["status"] == 3 and any("ToyError" in line for line in exits[0]["log"])
    assert {rank["rank"] for rank in exits[0]["ranks"]} == {0, 1}
    assert run_dir.names("logs") == ["attempt-1.log", "attempt-2.log", "incident-1.md",
                                     "incident-2.md"]
    assert "] ToyError: rank " in exits[1]["cause"]
    assert exits[1]["cause"].encode() in (run_dir.read(exits[1]["report"]) or b"")
    assert read_status(run_dir)["state"] == "failed"


def test_a_run_that_diverged_is_not_started_again(toy) -> None:
    supervisor, run_dir = toy("toy.diverge=5", "toy.step_s=0.02")
    with pytest.raises(ClusterError, match=r"ended with the event diverged at step 4.*"
                                           r"last checkpoint: step 4"):
        supervisor.run()
    assert names(run_dir) == ["started", "start", "diverged", "exit", "give_up"]
    assert run_dir.events()[-1]["after"] == "diverged"
    assert toy("toy.step_s=0.02")[0].run() == 0  # by hand, with another recipe, it may go on


def test_failures_count_from_the_last_new_checkpoint(toy) -> None:
    supervisor, run_dir = toy("toy.crash=5", "toy.step_s=0.02", max_restarts=1)
    with pytest.raises(ClusterError, match="last checkpoint: step 4"):
        supervisor.run()
    # attempt 1 commits steps 2 and 4; attempts 2 (its failure is the second in a row) fails at 5
    assert [row["failures"] for row in run_dir.events() if row["event"] == "restart"] == [1]


def test_a_start_that_refuses_its_input_is_not_repeated(toy) -> None:
    supervisor, run_dir = toy("toy.refuse=1")
    with pytest.raises(ClusterError, match=r"gave up .* at its start .*no such feed"):
        supervisor.run()
    assert names(run_dir) == ["started", "exit", "give_up"]


def test_processes_that_survive_a_kill_end_the_supervision_with_an_event(
        toy, monkeypatch: pytest.MonkeyPatch) -> None:
    end = AgentWorld.end

    def end_in_vain(self: AgentWorld) -> list[str]:
        end(self)
        raise ClusterError("processes [7] of the attempt do not end on SIGKILL")

    monkeypatch.setattr(AgentWorld, "end", end_in_vain)
    supervisor, run_dir = toy("toy.crash=2", "toy.step_s=0.02")
    with pytest.raises(ClusterError, match="do not end on SIGKILL"):
        supervisor.run()
    last = run_dir.events()[-1]
    assert (last["event"], last["why"]) == (
        "give_up", "processes [7] of the attempt do not end on SIGKILL")
    assert read_status(run_dir)["state"] == "failed"


@pytest.mark.slow(10)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_found_ended_and_restarted(toy, rank: int) -> None:
    supervisor, run_dir = toy("toy.step_s=0.3", steps=10, hang_s=6.0)
    frozen: list[int] = []

    def freeze() -> None:
        wait_until(lambda: any(b.rank == rank and b.step >= 2 for b in run_dir.heartbeats()))
        frozen.append(run_dir.heartbeats()[rank].pid)
        os.kill(frozen[0], signal.SIGSTOP)

    thread = in_background(freeze)
    assert supervisor.run() == 0
    thread.join()
    hang = next(row for row in run_dir.events() if row["event"] == "hang")
    assert {item["rank"]: item["state"] for item in hang["ranks"]}[rank] == "stopped"
    assert names(run_dir).count("restart") == 1 and names(run_dir)[-1] == "finished"
    assert not same_process(frozen[0], time.time())


def test_a_store_that_fails_is_waited_for(
        s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(f"{s3.uri}/supervised/latest", b"step-7")
    proxy = Proxy(None)  # resets every connection
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    s3fs.S3FileSystem.clear_instance_cache()
    run_dir = RunDir(f"{s3.uri}/supervised")
    supervisor = Supervisor(toy_launcher([]), run_dir, store_s=120)
    answers: list[int | None] = []
    asking = in_background(lambda: answers.append(supervisor._patience(run_dir.committed_step)))
    asking.join(1)
    assert asking.is_alive()
    proxy.target = s3.endpoint
    asking.join(120)
    assert answers == [7]
    proxy.target = None
    s3fs.S3FileSystem.clear_instance_cache()
    lost = Supervisor(toy_launcher([]), RunDir(f"{s3.uri}/supervised"), store_s=1)
    with pytest.raises(DataError, match=r"supervised/latest: cannot be read"):
        lost._patience(lost.run_dir.committed_step)
    proxy.close()
    s3fs.S3FileSystem.clear_instance_cache()


def test_asked_to_stop_it_lets_the_ranks_stop_and_passes_their_status(toy) -> None:
    supervisor, run_dir = toy("toy.step_s=0.1", steps=2000)

    def ask() -> None:
        wait_until(lambda: len(run_dir.heartbeats()) == 2)
        os.kill(os.getpid(), signal.SIGTERM)

    in_background(ask)
    assert supervisor.run() == 75
    assert names(run_dir)[-1] == "stopped" and "stop" in names(run_dir)
    assert read_status(run_dir)["state"] == "stopped"


@pytest.fixture
def orphans(toy, tmp_path: Path) -> Callable[..., tuple[Supervisor, RunDir, str]]:
    """A supervisor whose predecessor was killed while its ranks trained; and their token."""
    def make(*options: str) -> tuple[Supervisor, RunDir, str]:
        words = ("toy.step_s=0.05", "toy.hold=12")
        supervisor, run_dir = toy(*words, steps=16)
        first = subprocess.Popen([sys.executable, "-m", "tests.helpers.toy_launch",
                                  str(tmp_path / "toy.yaml"), *words], cwd=ROOT)
        wait_until(lambda: run_dir.committed_step() and len(run_dir.heartbeats()) == 2)
        first.kill()
        first.wait()
        (token,) = {dict(psutil.Process(beat.pid).environ())[TOKEN]
                    for beat in run_dir.heartbeats()}
        return supervisor, run_dir, token

    return make


@pytest.mark.slow(5)
def test_a_new_supervisor_goes_on_with_the_ranks_of_one_that_was_killed(orphans) -> None:
    supervisor, run_dir, token = orphans()
    in_background(lambda: [wait_until(lambda: "takeover" in names(run_dir)),
                           (Path(run_dir.uri) / "go").touch()])
    assert supervisor.run() == 0
    assert names(run_dir) == ["started", "start", "takeover", "finish", "exit", "finished"]
    takeover, end = run_dir.events()[2], run_dir.events()[4]
    assert takeover["adopted"] and "supervisor on" in takeover["from"]
    assert (end["status"], end["attempt"]) == (0, 1) and members(token) == []


@pytest.mark.slow(6)
def test_ranks_that_were_started_otherwise_are_ended_first(orphans) -> None:
    supervisor, run_dir, token = orphans()
    supervisor.launcher.arguments += ["toy.step_s=0.01", "toy.hold=0"]
    seen: list[int] = []
    attempt = supervisor._run_attempt
    supervisor._run_attempt = lambda scratch: [  # type: ignore[method-assign,assignment]
        seen.append(len(members(token))), attempt(scratch)][1]
    assert supervisor.run() == 0
    assert seen == [0]
    assert names(run_dir) == ["started", "start", "takeover", "started", "resume", "finish",
                              "exit", "finished"]
    assert not run_dir.events()[2]["adopted"]


def test_a_supervisor_that_lost_its_lease_writes_and_ends_nothing(
        toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    supervisor, run_dir = toy("toy.step_s=0.1", steps=2000)

    def overtake() -> None:
        wait_until(lambda: run_dir.committed_step())
        mine = owners.newest(run_dir.uri)
        later = {**vars(mine), "token": 2, "id": "other", "adopts": mine.id}
        (Path(run_dir.uri) / "lease" / "00000002.json").write_text(json.dumps(later))

    in_background(overtake)
    with pytest.raises(LeaseLost, match="was taken over by the supervisor"):
        supervisor.run()
    assert names(run_dir) == ["started", "start"]
    left = supervisor._attempt
    assert left is not None and len(members(left.token)) == 2
    # its agent has no supervisor now, and obeys the next owner
    supervisor.launcher.adopt(replace(left, fence=2), (tmp_path / "log").open("ab", 0)).end()
    assert members(left.token) == []


@pytest.mark.parametrize("now", [False, True])
def test_a_run_is_stopped_from_anywhere(toy, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str], now: bool) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    supervisor, run_dir = toy("toy.step_s=0.1", steps=2000)
    with pytest.raises(ClusterError, match="nobody has owned a run here"):
        stop(run_dir, now, 5)
    answers: list[int] = []

    def ask() -> None:
        wait_until(lambda: len(run_dir.heartbeats()) == 2)
        answers.append(stop(run_dir, now, 120, sleep=lambda _: time.sleep(0.05)))

    asking = in_background(ask)
    assert supervisor.run() == 75
    asking.join(120)
    assert answers == [0] and "stopped; last checkpoint" in capsys.readouterr().out
    assert names(run_dir)[-1] == "stopped" and ("stop" in names(run_dir)) is not now
    assert stop(run_dir, now, 5) == 0


def test_a_stop_goes_with_its_owner_and_not_on_to_the_next_one(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, calls = RunDir(str(tmp_path)), []
    first = lease.take(run_dir.uri, "supervisor", Patience(0))

    def sleep(_: float) -> None:
        calls.append(first.stop_asked())
        if len(calls) == 1:
            first.advance()  # it begins its next attempt before it has looked
        elif len(calls) == 2:
            first.release()
            monkeypatch.setattr(lease, "process_start", lambda pid: 4711)  # another process
            calls.append(lease.take(run_dir.uri, "supervisor", Patience(0)))

    assert stop(run_dir, now=False, wait_s=30, sleep=sleep) == 0
    assert calls[:2] == ["stop", "stop"]
    assert calls[2].stop_asked() == ""
    assert "has ended; the supervisor" in capsys.readouterr().out


@pytest.mark.parametrize(("said", "status", "ended"), [
    ("stop", 75, 75), ("finish", 0, 0), ("finish", 137, 0), ("start", 137, None),
    ("stop", 137, None), ("start", 75, 75)])
def test_what_the_training_said_counts_beside_its_status(toy, said: str, status: int,
                                                         ended: int | None) -> None:
    supervisor, run_dir = toy()
    supervisor._journal.event("started", None)
    append_rows(f"{run_dir.uri}/events.jsonl", [{"time": 1, "event": said, "step": 3}])
    assert supervisor._ended(Outcome(status, 3, [], [], hung=False, fatal=None)) == ended


@pytest.mark.slow(4)
def test_a_rank_killed_by_pid_is_restarted_and_nothing_survives(toy) -> None:
    supervisor, run_dir = toy("toy.step_s=0.05", "toy.hold=8", steps=12)
    bystander = subprocess.Popen(["sleep", "300"])
    tokens: list[str] = []
    killed: list[float] = []

    def kill() -> None:
        wait_until(lambda: [b for b in run_dir.heartbeats() if b.rank == 1 and b.step >= 4])
        pid = run_dir.heartbeats()[1].pid
        tokens.append(dict(psutil.Process(pid).environ())[TOKEN])
        killed.append(time.time())
        os.kill(pid, signal.SIGKILL)
        (Path(run_dir.uri) / "go").touch()

    thread = in_background(kill)
    try:
        assert supervisor.run() == 0
        thread.join()
        first, last = (row for row in run_dir.events() if row["event"] == "exit")
        assert (first["status"], first["first"], last["status"], last["first"]) == (137, 1, 0, None)
        assert first["time"] - killed[0] < 60
        assert names(run_dir).count("restart") == 1 and names(run_dir)[-1] == "finished"
        assert members(tokens[0]) == [] and bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.slow(8)
def test_a_rank_that_waits_for_a_store_is_not_hung(toy) -> None:
    supervisor, run_dir = toy("toy.step_s=0.05", "toy.wait=4", "toy.wait_s=6", hang_s=3.0)
    assert supervisor.run() == 0
    assert "hang" not in names(run_dir)


def test_a_second_supervisor_is_refused(toy, tmp_path: Path) -> None:
    supervisor, run_dir = toy()
    beat = {"rank": 0, "host": os.uname().nodename, "pid": os.getpid(), "step": 1,
            "time": time.time()}
    (tmp_path / "run" / "heartbeat").mkdir(parents=True)
    (tmp_path / "run" / "heartbeat" / "rank-0.json").write_text(json.dumps(beat))
    with pytest.raises(ClusterError, match=f"by process {os.getpid()} already"):
        supervisor.run()
    assert names(run_dir) == []  # it is not ours to give up


def test_a_reused_pid_is_another_process() -> None:
    assert same_process(os.getpid(), time.time())
    assert not same_process(os.getpid(), time.time() - 86_400)


def test_hang_limit_follows_the_median_step() -> None:
    progress = Progress(last_step=20)
    assert not progress.update([Heartbeat(0, "a", 2, 0, 90.0, state="starting")])
    assert progress.limit_s(60, 600) == 600
    for step in range(1, 12):
        progress.update([Heartbeat(0, "a", 2, step, 100.0 + 9 * step)])
    assert progress.step == 11 and progress.limit_s(60, 600) == pytest.approx(90)
    assert not progress.update([Heartbeat(0, "a", 2, 11, 500.0)])
    for state in ("checkpoint", "evaluation"):
        progress.update([Heartbeat(0, "a", 2, 11, 500.0, state=state)])
        assert progress.limit_s(60, 600) == 600
    progress.update([Heartbeat(0, "a", 2, 20, 600.0)])
    assert progress.limit_s(60, 600) == 600  # the last checkpoint may take its time


def test_waiting_for_a_store_counts_as_life_while_it_is_said_anew() -> None:
    progress = Progress()
    progress.update([Heartbeat(0, "a", 2, 7, 100.0)])
    for seen in (101.0, 103.0):
        progress.changed_at -= 1000
        waiting = Heartbeat(0, "a", 2, 7, 100.0, seen, "waiting for store")
        progress.update([waiting])
        assert progress.silent_s < 60
    progress.changed_at -= 1000
    progress.update([waiting])  # nothing new: it is stopped
    assert progress.silent_s > 900


def test_run_dir_of_the_arguments(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("run: {dir: a, ranks: 2}\ntrain: {steps: 5}\n")
    run_dir, settings = run_of_arguments(["--config", str(config), "run.dir=b", "train.steps=7"])
    assert (run_dir.uri, settings["run.ranks"], settings["train.steps"]) == ("b", 2, 7)
    with pytest.raises(ConfigError, match=r"run\.dir is required"):
        run_of_arguments([f"--config={config}", "run.dir="])
    for ranks in ("0", "-1"):
        with pytest.raises(ConfigError, match=f"--ranks = {ranks}: expected a whole number, 1 or"):
            command.main(["supervise", "--ranks", ranks, "--", "--config", str(config)])
    with pytest.raises(ConfigError, match="cannot read the config"):
        run_of_arguments(["--config", "nowhere.yaml"])


def test_supervise_refuses_in_one_line(run_cli, tmp_path: Path) -> None:
    for words in (["--hostfile", "nowhere", "--", "--config", "c"], ["--"], []):
        done = run_cli("-m", "cluster", "supervise", *words)
        assert done.returncode == 2 and done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("words", "says"), [
    (["supervise", "--min-hosts", "0"], "--min-hosts: 0 is not at least 1"),
    (["supervise", "--max-hosts", "two"], "--max-hosts: invalid count value: 'two'"),
    (["supervise", "--hang-seconds", "nan"], "--hang-seconds: nan is no time of 0 seconds"),
    (["watch", "run", "--every", "-1"], "--every: -1 is no time of 0 seconds"),
    (["supervise", "--retry-minutes", "-5"], "--retry-minutes: -5 is no time of 0 seconds"),
    (["stop", "run", "--wait", "nan"], "--wait: nan is no time of 0 seconds"),
    (["dashboard", "run", "--port", "65536"], "--port: 65536 is no port"),
    (["export", "run", "--port", "-5"], "--port: -5 is no port")])
def test_numbers_that_cannot_be_meant_are_refused(words: list[str], says: str,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(words)
    assert caught.value.code == 2 and says in capsys.readouterr().err


def test_status_states(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path))
    with pytest.raises(ClusterError, match="no run here"):
        read_status(run_dir)
    (tmp_path / "config.yaml").write_text("train: {steps: 100}\n")
    (tmp_path / "events.jsonl").write_text('{"time": 1000, "event": "start", "step": 0}\n{"cut')
    assert read_status(run_dir, now=1010)["state"] == "running"
    assert read_status(run_dir, now=9999)["state"] == "stalled"
    row = {"step": 40, "loss": 0.5, "volumes_per_s": 4.0, "step_s": 2.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "heartbeat").mkdir()
    for rank, beat in enumerate([1100.0, 1180.0]):
        beat_row = {"rank": rank, "host": "a", "pid": 7, "step": 40, "time": beat}
        (tmp_path / "heartbeat" / f"rank-{rank}.json").write_text(json.dumps(beat_row))
    status = read_status(run_dir, now=1150)
    assert (status["state"], status["eta_s"], status["loss"]) == ("running", 120.0, 0.5)
    assert [rank["age_s"] for rank in status["ranks"]] == [50.0, -30.0]
    assert read_status(run_dir, now=1190)["state"] == "stalled"  # rank 0 is silent
    Supervisor(toy_launcher([]), run_dir)._journal.event("give_up", 40)
    # of the cut line before it nothing is left: training, too, reads the file
    assert [row["event"] for row in read_rows(f"{tmp_path}/events.jsonl")] == ["start", "give_up"]
    assert read_status(run_dir, now=1190)["state"] == "failed"
    (tmp_path / "latest").write_text("garbage")
    with pytest.raises(ClusterError, match="holds 'garbage'"):
        read_status(run_dir)


def test_status_of_a_run_in_an_object_store(s3) -> None:
    run_dir = RunDir(f"{s3.uri}/run-{os.getpid()}")
    with pytest.raises(ClusterError, match="no run here"):
        read_status(run_dir)
    supervisor = Supervisor(toy_launcher([]), run_dir)
    supervisor._journal.event("started", None)
    supervisor._journal.event("exit", 3, status=1)
    write_bytes(f"{run_dir.uri}/latest", b"step-2")
    status = read_status(run_dir)
    assert (status["state"], status["last_checkpoint"]) == ("failed", 2)
    assert [row["event"] for row in status["events"]] == ["started", "exit"]
