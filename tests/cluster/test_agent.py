"""The agent of a host: what it tells, whom it obeys, and that nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest

from cluster.agent import _end_earlier
from cluster.agents import AgentLauncher
from cluster.board import Board
from cluster.launcher import Attempt, Seen
from cluster.link import Link, ask
from cluster.outcome import status_of
from cluster.processes import TOKEN, members
from cluster.rundir import Heartbeat, RunDir
from cluster.ssh import module_on
from cluster.world import AgentWorld
from neurojepa.errors import ClusterError, LeaseLost
from neurojepa.messages import private_folder
from tests.helpers import ROOT
from tests.helpers.waiting import wait_until

# prints, and tells its agent a step; then does what the word says
RANK = """
import os, signal, subprocess, sys, time
from neurojepa.messages import AGENT, Messages
rank, word = int(os.environ["RANK"]), sys.argv[1]
if word == "asked":
    signal.signal(signal.SIGTERM, lambda *_: (print("asked", flush=True), sys.exit(75)))
print("rank", rank, "says", os.environ.get("MY_SECRET_KEY"), flush=True)
Messages(os.environ[AGENT]).send({"rank": rank, "host": "h", "pid": os.getpid(), "step": 5,
                                  "time": time.time(), "seen": time.time()})
if word == "leave":  # a helper in a session of its own
    subprocess.Popen(["sleep", "300"], start_new_session=True)
while not (rank == 1 or word == "all") or word in ("stay", "asked"):
    time.sleep(0.05)
sys.exit(7 if word == "fail" else 0)
"""


def orders(attempt: Attempt, word: str, count: int = 2) -> dict[str, dict[str, object]]:
    return {"": {"command": [sys.executable, "-c", RANK, word],
                 "environment": {TOKEN: attempt.token, "MY_SECRET_KEY": "hidden"},
                 "ranks": [{"RANK": str(rank), "WORLD_SIZE": str(count)}
                           for rank in range(count)]}}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.link.ASK_S", 120.0)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[IO[bytes]]:
    with (tmp_path / "log").open("ab", buffering=0) as file:
        yield file


@pytest.fixture
def start(log: IO[bytes]) -> Iterator[Callable[[str], AgentWorld]]:
    worlds: list[AgentWorld] = []

    def make(word: str) -> AgentWorld:
        attempt = Attempt(uuid.uuid4().hex, 1, 1)
        worlds.append(AgentWorld(attempt, 2, orders(attempt, word), log))
        return worlds[-1]

    yield make
    for world in worlds:
        world.leave()
        AgentWorld(Attempt(world.attempt.token, 1, 99), 0, None, log).end()
        assert members(world.attempt.token) == []


def seen_by(world: AgentWorld, condition: Callable[[Seen], object]) -> Seen:
    wait_until(lambda: condition(world.look()))
    return world.look()


@pytest.mark.parametrize(("word", "status", "first"), [("fail", 7, 1), ("all", 0, None)])
def test_exits_messages_and_output_are_told(start, tmp_path: Path, word: str, status: int,
                                            first: int | None) -> None:
    world = start(word)
    seen = seen_by(world, lambda seen: len(seen.beats) == 2 and
                   len(seen.statuses) == (1 if word == "fail" else 2))
    assert status_of(seen) == (status, first)
    assert [(beat.rank, beat.step) for beat in seen.beats] == [(0, 5), (1, 5)] and seen.size == 2
    world.end()
    printed = (tmp_path / "log").read_text().splitlines()
    assert sorted(printed) == ["[rank 0] rank 0 says hidden", "[rank 1] rank 1 says hidden"]
    if word == "fail":
        assert world.look().statuses == {1: 7, 0: 137}


def test_no_command_line_has_a_secret_and_nobody_else_reaches_the_socket(start) -> None:
    world = start("stay")
    seen_by(world, lambda seen: len(seen.beats) == 2)
    ours = psutil.Process().children(recursive=True) + members(world.attempt.token)
    lines = [" ".join(process.cmdline()) for process in ours]
    assert len(lines) >= 3 and not any("hidden" in line or world.attempt.token in line
                                       for line in lines)
    assert private_folder().stat().st_mode & 0o077 == 0
    agent = psutil.Process(members(world.attempt.token)[0].ppid())
    assert agent.cmdline()[1:] == ["-m", "cluster.agent"]
    assert not [one for one in agent.net_connections("inet") if one.status == "LISTEN"]


def test_helpers_of_ranks_that_have_ended_are_ended_too(start) -> None:
    world = start("leave")
    seen_by(world, lambda seen: 1 in seen.statuses)
    wait_until(lambda: len(members(world.attempt.token)) == 3)  # rank 0 and two helpers
    world.end()
    assert members(world.attempt.token) == []


def test_the_next_owner_reaches_the_agent_and_the_last_one_no_more(
        start, log: IO[bytes], tmp_path: Path) -> None:
    world = start("stay")
    pids = [beat.pid for beat in seen_by(world, lambda seen: len(seen.beats) == 2).beats]
    assert ask([""], world.attempt) and not ask([""], Attempt("unknown", 1))
    later = AgentWorld(Attempt(world.attempt.token, 1, 2), 0, None, log)
    seen = seen_by(later, lambda seen: len(seen.beats) == 2)
    assert [beat.pid for beat in seen.beats] == pids and seen.size == 2
    with pytest.raises(LeaseLost, match="fencing token 2"):
        seen_by(world, lambda _: False)
    world.signal(signal.SIGKILL)  # has no effect
    time.sleep(0.2)
    assert not later.look().statuses
    later.signal(signal.SIGKILL)
    seen_by(later, lambda seen: len(seen.statuses) == 2)
    world.leave()
    later.end()


def test_what_is_left_of_an_attempt_is_ended_when_its_host_is_back(
        start, log: IO[bytes]) -> None:
    world = start("stay")
    seen_by(world, lambda seen: len(seen.beats) == 2)
    world.leave()  # its host is away
    attempt = Attempt(uuid.uuid4().hex, 2, 2)
    order = {"": orders(attempt, "stay")[""] | {"before": [world.attempt.token, "unknown"]}}
    later = AgentWorld(attempt, 2, order, log)
    seen_by(later, lambda seen: len(seen.beats) == 2)
    assert members(world.attempt.token) == [] and len(members(attempt.token)) == 2
    later.end()


@pytest.mark.parametrize(("newlines", "kept"), [(0, 1), (50_000, 10_485)])
def test_a_last_line_without_an_end_is_kept_and_empty_lines_take_room(
        tmp_path: Path, newlines: int, kept: int) -> None:
    program = (
        "import socket, sys; from cluster import serving; from cluster.ranks import Ranks\n"
        "text = f'print(end=chr(10) * {sys.argv[2]} + chr(97))'\n"
        "ranks = Ranks([sys.executable, '-c', text], {}, "
        "[{'RANK': '0', 'WORLD_SIZE': '1'}], sys.argv[1] + '/messages')\n"
        "while ranks.running: ranks.reap()\n"
        "listener = socket.socket(socket.AF_UNIX)\n"
        "listener.bind(sys.argv[1] + '/control'); listener.listen()\n"
        "agent = serving.Agent(ranks, listener, 1); agent._read_out()\n"
        "print(len(agent._printed), agent._printed[-1])")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path), str(newlines)], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{kept} (0, 'a')\n", done.stderr


def test_what_an_agent_that_was_killed_left_is_ended_though_nobody_takes_note(
        log: IO[bytes]) -> None:
    token = uuid.uuid4().hex
    left = subprocess.Popen(["sleep", "300"], env={**os.environ, TOKEN: token})
    AgentWorld(Attempt(token, 1), 0, None, log).end()
    assert members(token) == []
    assert psutil.Process(left.pid).status() == psutil.STATUS_ZOMBIE
    assert left.wait() == -signal.SIGKILL


def test_an_earlier_agent_that_is_stopped_does_not_keep_the_next_one_from_starting(
        start, log: IO[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    world = start("stay")
    seen_by(world, lambda seen: len(seen.beats) == 2)
    agent = members(world.attempt.token)[0].ppid()
    os.kill(agent, signal.SIGSTOP)
    try:
        monkeypatch.setattr("cluster.agent.END_S", -4.0)  # it is asked for a second
        _end_earlier(world.attempt.token, "", 2)
        wait_until(lambda: members(world.attempt.token) == [])  # killed, and not waited for
    finally:
        os.kill(agent, signal.SIGCONT)
    world.leave()


def test_an_agent_that_is_asked_to_stop_asks_its_ranks(start, tmp_path: Path) -> None:
    world = start("asked")
    seen_by(world, lambda seen: len(seen.beats) == 2)
    os.kill(members(world.attempt.token)[0].ppid(), signal.SIGTERM)
    assert status_of(seen_by(world, lambda seen: len(seen.statuses) == 2))[0] == 75
    world.end()


def test_what_was_printed_while_nobody_listened_is_told_to_the_next(
        start, log: IO[bytes], tmp_path: Path) -> None:
    world = start("asked")
    seen = seen_by(world, lambda seen: len(seen.beats) == 2)
    world.leave()
    for beat in seen.beats:
        os.kill(beat.pid, signal.SIGTERM)
    wait_until(lambda: not members(world.attempt.token))
    later = AgentWorld(Attempt(world.attempt.token, 1, 2), 0, None, log)
    assert status_of(seen_by(later, lambda seen: len(seen.statuses) == 2))[0] == 75
    later.end()
    assert (tmp_path / "log").read_text().count("asked") == 2


def test_ranks_die_with_their_agent_and_that_is_told(start) -> None:
    world = start("stay")
    seen_by(world, lambda seen: len(seen.beats) == 2)
    os.kill(members(world.attempt.token)[0].ppid(), signal.SIGKILL)
    assert seen_by(world, lambda seen: len(seen.statuses) == 2).statuses == {0: 137, 1: 137}
    wait_until(lambda: not members(world.attempt.token))
    world.end()


def test_an_agent_that_cannot_start_its_ranks_says_why(log: IO[bytes], tmp_path: Path) -> None:
    attempt = Attempt(uuid.uuid4().hex, 1, 1)
    order = orders(attempt, "stay")
    order[""]["command"] = ["/no/such/python"]
    world = AgentWorld(attempt, 2, order, log)
    assert seen_by(world, lambda seen: len(seen.statuses) == 2).statuses == {0: 137, 1: 137}
    assert "/no/such/python" in (tmp_path / "log").read_text()
    world.end()


@pytest.mark.parametrize(("word", "orphan_s", "statuses"), [
    ("asked", 0.5, "75 75"), ("stay", 0.5, "143 143"), ("all", 600.0, "0 0")])
def test_without_a_supervisor_ranks_are_asked_to_stop_and_an_agent_without_ranks_leaves(
        tmp_path: Path, word: str, orphan_s: float, statuses: str) -> None:
    program = (
        "import socket, sys; from cluster import serving; from cluster.ranks import Ranks\n"
        "import time; serving.ALONE_S = 0.2; serving.ENDED_S = 0.5\n"
        "listener = socket.socket(socket.AF_UNIX)\n"
        "listener.bind(sys.argv[1] + '/control'); listener.listen()\n"
        "ranks = Ranks([sys.executable, '-c', sys.argv[2], sys.argv[3]], {}, "
        "[{'RANK': str(r), 'WORLD_SIZE': '2'} for r in range(2)], sys.argv[1] + '/messages')\n"
        "while sum(item.message is not None for item in ranks.ranks.values()) < 2:\n"
        "    ranks.hear(); time.sleep(0.01)\n"  # from now on they can be asked
        "serving.Agent(ranks, listener, 1, float(sys.argv[4])).run()\n"
        "import os; assert os.path.exists(ranks.messages.path + '.alone')\n"
        "print(*[row['status'] for row in ranks.rows()])")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path), RANK, word, str(orphan_s)],
                          cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == statuses


def test_a_host_is_gone_when_it_stays_away_and_not_when_it_flaps(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: IO[bytes]) -> None:
    """An ssh that reaches this machine, or nothing while the file "down" is there."""
    (tmp_path / "ssh").write_text(
        f'#!/bin/bash\n[ -e {tmp_path}/down ] && exit 255\nexec /bin/sh -c "${{@: -1}}"\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    attempt = Attempt(uuid.uuid4().hex, 1, 1, ["far"])
    order = {"do": "start", "token": attempt.token, "fence": 1, "host": "far",
             **orders(attempt, "stay")[""]}
    (tmp_path / "down").touch()  # at first, so that nobody hears of the start
    link = Link("far", attempt, order, log)
    wait_until(lambda: link._lost_at is not None)
    (tmp_path / "down").unlink()
    wait_until(lambda: len(link.ranks) == 2)
    for gone_s in (300.0, 0.3):
        link._gone_s = gone_s
        (tmp_path / "down").touch()
        assert link._relay is not None
        link._relay.kill()  # the connection breaks
        wait_until(lambda: link._lost_at is not None)
        time.sleep(0.5)
        assert link.gone is (gone_s < 0.5)
        (tmp_path / "down").unlink()
        wait_until(lambda: link._relay is not None and link._lost_at is None)
        assert not link.gone
    link.end()
    wait_until(lambda: link.left == [])
    link.close()
    assert members(attempt.token) == []


def test_a_line_that_is_cut_or_not_the_agents_does_not_end_the_connection(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: IO[bytes]) -> None:
    (tmp_path / "ssh").write_text(
        f'#!/bin/bash\necho "welcome to far"; echo "{{quota 90%}}"\n'
        f'[ -e {tmp_path}/cut ] && rm {tmp_path}/cut && printf \'{{"size": 2, "ra\' && exit 255\n'
        'exec /bin/sh -c "${@: -1}"\n')
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    attempt = Attempt(uuid.uuid4().hex, 1, 1, ["far"])
    link = Link("far", attempt, {"do": "start", "token": attempt.token, "fence": 1, "host": "far",
                                 **orders(attempt, "stay")[""]}, log)
    wait_until(lambda: len(link.ranks) == 2)
    assert ask(["far"], attempt)
    (tmp_path / "cut").touch()
    assert link._relay is not None
    link._relay.kill()
    wait_until(lambda: not (tmp_path / "cut").exists())
    link.end()
    wait_until(lambda: link.left == [])
    link.close()
    assert "welcome to far" in (tmp_path / "log").read_text()


def test_what_runs_on_a_host_is_quoted_and_ssh_is_told_all_that_it_may(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-F mine")
    command = module_on("node1", "cluster.agent", ["a b; rm -r x"])
    assert command[:3] == ["ssh", "-F", "mine"] and command[-2] == "node1"
    assert command[-1].endswith("-m cluster.agent 'a b; rm -r x'")
    assert {"BatchMode=yes", "ForwardAgent=no", "ClearAllForwardings=yes", "ConnectTimeout=5",
            "ServerAliveInterval=4"} <= set(command)
    assert module_on("", "cluster.agent") == [sys.executable, "-m", "cluster.agent"]


def test_a_start_that_comes_twice_starts_one_agent(log: IO[bytes]) -> None:
    attempt = Attempt(uuid.uuid4().hex, 1, 1)
    order = {"do": "start", "token": attempt.token, "fence": 1, "host": "",
             **orders(attempt, "stay")[""]}
    first, second = Link("", attempt, order, log), Link("", attempt, order, log)
    wait_until(lambda: len(first.ranks) == len(second.ranks) == 2)
    assert len(members(attempt.token)) == 2 and first.absent is second.absent is None
    first.close()
    second.end()
    wait_until(lambda: second.left == [])
    second.close()


def test_a_file_in_place_of_the_folder_is_refused_in_one_line(
        monkeypatch: pytest.MonkeyPatch) -> None:
    uid = 2 * 10**6 + os.getpid()
    monkeypatch.setattr(os, "getuid", lambda: uid)
    path = Path(f"/tmp/neurojepa-{uid}")
    path.touch()
    try:
        with pytest.raises(ClusterError, match="or it is no folder; remove it"):
            private_folder()
    finally:
        path.unlink()


def test_a_folder_that_is_somebody_elses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    uid = 10**6 + os.getpid()
    monkeypatch.setattr(os, "getuid", lambda: uid)
    try:
        with pytest.raises(ClusterError, match=f"/tmp/neurojepa-{uid}: others can enter it"):
            private_folder()
    finally:
        os.rmdir(f"/tmp/neurojepa-{uid}")


def test_the_fingerprint_tells_launches_apart_and_shows_nothing() -> None:
    one, other = AgentLauncher(["a.key=hidden"], 2), AgentLauncher(["a.key=hidden"], 3)
    assert one.fingerprint() == AgentLauncher(["a.key=hidden"], 2).fingerprint()
    assert one.fingerprint() != other.fingerprint() and "hidden" not in one.fingerprint()


def test_outside_readers_find_one_file_dated_by_the_owners_clock(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path))
    board = Board(run_dir)
    beats = [Heartbeat(rank, "a", 5, 7, 100.0 + 300 * rank, 104.0 + 300 * rank)
             for rank in range(3)]  # clocks differ
    board.show(beats, "t1")
    time.sleep(0.05)
    board.show([*beats[:2], Heartbeat(2, "a", 5, 8, 800.0, 800.5)], "t1")
    board.close()
    assert run_dir.names("heartbeat") == ["ranks.json"]
    told = run_dir.heartbeats()
    assert [(beat.rank, beat.step, beat.attempt) for beat in told] == [
        (0, 7, "t1"), (1, 7, "t1"), (2, 8, "t1")]
    assert [round(beat.quiet_s, 3) for beat in told] == [4.0, 4.0, 0.5]
    assert told[0].seen == told[1].seen < told[2].seen <= time.time()
    # what a later training without a supervisor writes counts more
    row = {"rank": 0, "host": "a", "pid": 1, "step": 9, "time": time.time() + 1}
    (tmp_path / "heartbeat" / "rank-0.json").write_text(json.dumps(row))
    assert [beat.step for beat in run_dir.heartbeats()] == [9]
