"""Which rank the others wait for, and which one slows them down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cluster import diagnosis
from cluster.diagnosis import RankState, culprits, groups, here, report, stack_of
from cluster.processes import TOKEN
from cluster.rundir import Heartbeat
from cluster.stragglers import LASTING_S, Stragglers, stragglers
from neurojepa.train import pace
from neurojepa.train.pace import Pace
from tests.helpers.waiting import wait_until

GATHER = ["wait (/torch/distributed.py:9)", "any (/x/neurojepa/train/world.py:40)"]
READ = ["read (/usr/ssl.py:3)", "image (/x/neurojepa/feed/loader.py:80)"]


def state(rank: int, stack: list[str], status: str = "sleeping") -> RankState:
    return RankState(rank, 100 + rank, status, stack)


def beats(*steps: int, **fields: object) -> list[Heartbeat]:
    return [Heartbeat(rank, f"h{rank}", 100 + rank, step, 5.0, 5.0, **fields)  # type: ignore[arg-type]
            for rank, step in enumerate(steps)]


@pytest.mark.parametrize(("states", "signs", "silent", "guilty", "why"), [
    ([state(0, GATHER), state(1, GATHER, "stopped")], beats(5, 5), {0: 1, 1: 60}, [1],
     "stopped or dead"),
    ([], beats(5, 5, 5), {0: 1.0, 1: 1.0, 2: 40.0}, [2], "no sign of life"),
    ([], beats(5, 5), {0: 40.0, 1: 40.0}, [], "same place"),  # the store of the signs is away
    ([state(0, GATHER), state(1, GATHER)], beats(6, 5), {0: 1, 1: 1}, [1], "a step behind"),
    ([state(0, GATHER), state(1, READ), state(2, GATHER)], beats(5, 5, 5), {}, [1],
     "stands elsewhere: image (/x/neurojepa/feed/loader.py:80)"),
    ([state(0, GATHER), state(1, READ)], beats(5, 5), {}, [], "same place"),  # which of the two?
    ([state(0, GATHER), state(1, GATHER)], beats(5, 5), {}, [], "same place")])
def test_the_rank_that_the_others_wait_for_is_named(
        states: list[RankState], signs: list[Heartbeat], silent: dict[int, float],
        guilty: list[int], why: str) -> None:
    found, reason = culprits(states, signs, silent)
    assert found == guilty and why in reason


def test_a_rank_that_says_why_it_waits_is_the_one() -> None:
    signs = [*beats(5, 5), Heartbeat(2, "h2", 102, 5, 5.0, 5.0, "waiting for store")]
    assert culprits([], signs, {}) == ([2], "waits for its store")


def test_ranks_at_one_place_share_a_stack_in_the_report() -> None:
    states = [state(rank, READ if rank == 5 else GATHER) for rank in range(8)]
    assert groups(states)[0] == ("image (/x/neurojepa/feed/loader.py:80)", [5])
    text = report(states, *culprits(states, beats(*[5] * 8), {}))
    assert text.startswith("rank 5: stands elsewhere: image")
    assert text.count("    wait (") == 1 and "ranks 0, 1, 2, 3, 4, 6, 7 (sleeping), at any" in text


def test_stacks_are_read_from_running_and_from_stopped_processes(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "SPY_S", 60.0)
    script = tmp_path / "work.py"
    script.write_text("import time\ndef deep():\n    print(flush=True)\n    time.sleep(60)\n"
                      "deep()\n")
    rank = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE,
                            env={**os.environ, TOKEN: "cc33", "RANK": "4"})
    try:
        assert rank.stdout and rank.stdout.readline()
        (found,) = here("cc33")
        assert (found.rank, found.pid) == (4, rank.pid)
        if found.stack[0].startswith("no stack:"):
            pytest.skip(f"py-spy may not read processes here ({found.stack[0]})")
        assert found.stack[0].startswith(f"deep ({script}:") and found.where == found.stack[0]
        rank.send_signal(signal.SIGSTOP)
        wait_until(lambda: here("cc33")[0].state == "stopped")
        assert here("cc33")[0].stack[0].startswith("deep (")
    finally:
        rank.kill()
        rank.wait()
    assert stack_of(rank.pid)[0].startswith("no stack:")


def test_without_py_spy_the_rest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis.shutil, "which", lambda *_, **__: None)
    assert stack_of(os.getpid()) == ["py-spy is not installed here"]


# ---- slow ranks ----------------------------------------------------------------------------------

def paces(*own_s: float | None) -> list[Heartbeat]:
    return [Heartbeat(rank, f"h{rank}", 1, 5, 5.0, own_s=seconds, data_s=0.01)
            for rank, seconds in enumerate(own_s)]


@pytest.mark.parametrize(("own_s", "slow"), [
    ((0.3, 0.3, 0.6, 0.3), [2]), ((0.3, 0.62), [1]), ((0.3, 0.4, 0.3), []),
    ((0.001, 0.01), []),  # a few milliseconds are no matter
    ((0.3,), []), ((None, 0.3, 0.9), [2]), ((None, None), []),
    ((0.3, 0.3, 0.6, 0.7, 0.3, 0.3), [2, 3])])
def test_a_rank_slowed_by_half_is_slow(own_s: tuple[float | None, ...], slow: list[int]) -> None:
    assert [item.rank for item in stragglers(paces(*own_s))] == slow


def test_it_is_named_once_and_only_when_it_lasts() -> None:
    now = [0.0]
    watch, named = Stragglers(clock=lambda: now[0]), []
    for now[0], slow_s in [(0, 0.3), (5, 0.9), (15, 0.3), (20, 0.9), (30, 0.9), (39, 0.9),
                           (20 + LASTING_S, 0.9), (45, 0.9), (50, 0.3), (80, 0.9), (200, 0.9)]:
        named += [(now[0], item.rank, item.host, item.others_s)
                  for item in watch.new(paces(0.3, slow_s, 0.3))]
    assert named == [(40, 1, "h1", 0.3)]


def test_a_rank_tells_the_time_until_it_waits_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    told = Pace(torch.device("cpu"))
    assert told.own_s is None and told.data_s is None
    for data_s, forward_s in [(0.1, 0.2)] * 9 + [(9.0, 9.0)]:  # a pause is no habit
        told.begin()
        now[0] += data_s
        told.fetched()
        now[0] += forward_s
        told.forwarded()
        now[0] += 5.0  # backward: together with the others
    assert told.own_s == pytest.approx(0.3) and told.data_s == pytest.approx(0.1)
    for index in range(32):  # held up in every third step
        told.begin()
        told.fetched()
        now[0] += 0.3 + 0.6 * (index % 3 == 0)
        told.forwarded()
    assert 0.42 < told.own_s < 0.5
