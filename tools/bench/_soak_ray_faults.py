"""What the soak does to a run on a Ray cluster, besides what it does anywhere (_soak_faults.py)."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable

import psutil

from tests.helpers.ray_nodes import RAY
from tools.bench._soak_faults import (
    Kind,
    Times,
    all_killed,
    any_rank,
    killed_in_commit,
    parent_killed,
    rank_killed,
    rank_slow,
    rank_stopped,
    restarted,
    store_gone,
    store_hung,
    survived,
)
from tools.bench._soak_field import Failed
from tools.bench._soak_ray import RANKS, RayField


def _node_killed(run: RayField, draw: random.Random) -> Times:
    """A node with a rank; when that is noticed, another one is added."""
    node = run.node_of(any_rank(run, draw))
    return restarted(run, lambda: run.cluster.kill(node), "exit", good_again=run.cluster.add_node)


def _node_lost(run: RayField, draw: random.Random) -> Times:
    """A node with a rank; the others go on.  One that comes later is in the next attempt."""
    node = run.node_of(any_rank(run, draw))
    times = restarted(run, lambda: run.cluster.kill(node), "exit")
    fewer = run.events("resume")[-1]["world"]
    run.cluster.add_node()
    restarted(run, any_rank(run, draw).kill, "exit")
    again = run.events("resume")[-1]["world"]
    if (fewer, again) != (RANKS - 1, RANKS):
        raise Failed(f"{fewer} ranks went on, then {again}")
    return times


def _cluster_killed(run: RayField, draw: random.Random) -> Times:
    """Head and nodes; a new cluster is started and the same job submitted there."""
    begin, known = run.notes.sizes(), len(run.events("takeover"))
    for node in list(run.cluster.nodes):
        run.cluster.kill(node)
    run.cluster.start_head(0)
    for _ in range(RANKS):
        run.cluster.add_node()
    began = time.monotonic()
    run.submit()
    noticed = run.until("takeover", lambda: len(run.events("takeover")) > known)
    run.until("training goes on", lambda: run.trained_since(begin))
    return Times(noticed, time.monotonic() - began)


def _driver_killed(run: RayField, draw: random.Random) -> Times:
    """The job that watches; the same job again watches on."""
    def harm() -> float:
        run.one("cluster.ray_job").kill()
        time.sleep(5 * draw.random())
        began = time.monotonic()
        run.submit()
        run.until("the new job finds the supervisor",
                  lambda: "watching the supervisor" in run.said_by(run.jobs[-1]))
        return time.monotonic() - began

    return survived(run, harm)


def _adopted(run: RayField, victim: Callable[[], psutil.Process]) -> Times:
    """A kill after which the cluster brings a supervisor back, which goes on with the ranks."""
    def harm() -> float:
        known = len(run.events("takeover"))
        victim().kill()
        return run.until("takeover", lambda: len(run.events("takeover")) > known)

    times = survived(run, harm)
    return Times(times.noticed, (times.noticed or 0.0) + times.back)


def _supervisor_killed(run: RayField, draw: random.Random) -> Times:
    return _adopted(run, lambda: run.one("supervise"))


def _keeper_killed(run: RayField, draw: random.Random) -> Times:
    return _adopted(run, lambda: run.one("ray::Keeper"))


def _second_owner(run: RayField, draw: random.Random) -> Times:
    """A job with other settings, a supervisor of one's own, a plain training: all turned away."""
    def refused() -> float:
        began = time.monotonic()
        run.submit("optim.lr=2.0e-5")
        second = run.jobs.pop()
        run.jobs.insert(0, second)  # its name is used up; the last one is the job that watches
        run.until("the second job is turned away",
                  lambda: "is supervised on this cluster with other arguments"
                  in run.said_by(second))
        turned_away = time.monotonic() - began
        for words in (("cluster", "supervise", "--ray", "--", *run.arguments()),
                      ("neurojepa.pretrain", *run.arguments(), "run.launcher=local")):
            done = run.command("-m", *words)
            if done.returncode != 2 or str(run.one("supervise").pid) not in done.stderr:
                raise Failed(f"{words[0]} ended with {done.returncode}: {done.stderr[-300:]}")
        return turned_away

    return survived(run, refused)


def _stopped(run: RayField, draw: random.Random) -> Times:
    """``ray job stop``, and the same job again."""
    begin, known = run.notes.sizes(), len(run.events("stopped"))
    committed, began = run.committed(), time.monotonic()
    subprocess.run([RAY, "job", "stop", run.jobs[-1], "--no-wait"], env=run.environment(),
                   check=True, capture_output=True, timeout=100)
    run.until("it has stopped", lambda: len(run.events("stopped")) > known, 60)
    noticed = time.monotonic() - began
    if (last := run.events("stop")[-1])["step"] != run.committed() or run.committed() < committed:
        raise Failed(f"stopped at {last['step']}, committed: {run.committed()}")
    # Ray may kill the job before the ranks have stopped; then the keeper waits a minute for another
    run.until("nothing is left of it", lambda: not run.processes(), 90)
    began = time.monotonic()
    run.submit()
    run.until("training goes on", lambda: run.trained_since(begin))
    return Times(noticed, time.monotonic() - began)


RAY_KINDS = (
    Kind("a rank killed", "fixed", 4, rank_killed, 30),
    Kind("all ranks killed", "fixed", 1, all_killed, 30),
    Kind("killed while a checkpoint is written", "fixed", 2, killed_in_commit, 30),
    Kind("a rank's actor killed", "fixed", 2, parent_killed, 30),
    Kind(f"a rank stopped (SIGSTOP), hang after {RayField.hang_s} s", "fixed", 1, rank_stopped),
    Kind("a slow rank", "fixed", 1, rank_slow),
    Kind("a node killed, another one comes", "fixed", 3, _node_killed, 120),
    Kind("a node killed, the others go on", "elastic", 2, _node_lost, 120),
    Kind("the whole cluster killed, submitted to a new one", "fixed", 1, _cluster_killed, 120),
    Kind("the job killed, submitted again", "fixed", 2, _driver_killed),
    Kind("the supervisor killed", "fixed", 2, _supervisor_killed),
    Kind("the supervisor's actor killed", "fixed", 2, _keeper_killed),
    Kind("a second owner is turned away", "fixed", 1, _second_owner),
    Kind("ray job stop, submitted again", "fixed", 2, _stopped),
    Kind("the store gone for 20 to 40 s", "store", 2, store_gone),
    Kind(f"the store hangs for {RayField.hang_s + 10} to {RayField.hang_s + 20} s", "store", 1,
         store_hung),
)
