"""What the soak does to a run on three hosts, besides what it does anywhere (_soak_faults.py)."""

from __future__ import annotations

import random
import time
from contextlib import suppress

import psutil

from tools.bench._harm import link
from tools.bench._soak_faults import (
    Kind,
    Times,
    all_killed,
    any_rank,
    disk_full,
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
from tools.bench._soak_hosts import HostField


def _other(run: HostField, draw: random.Random) -> int:
    return draw.choice([at for at in range(len(run.hosts.addresses)) if at != run.at])


def _taking_part(run: HostField, draw: random.Random) -> int:
    """A host of the attempt, but not the supervisor's own."""
    hosts = run.events("started")[-1]["hosts"]
    return draw.choice([at for at, address in enumerate(run.hosts.addresses)
                        if address in hosts and at != run.at])


# ---- agents and clocks ---------------------------------------------------------------------------

def _connection_killed(run: HostField, draw: random.Random) -> Times:
    """Between the supervisor and an agent, at either end: ssh, or the relay on the host."""
    relays = _relays(run)
    ends = [*relays.values(), *(child for child in psutil.Process(run.supervisor.pid).children()
                                if child.name() == "ssh")]

    def killed() -> float:
        draw.choice(ends).kill()
        return run.until("a new connection", lambda: _relays(run).keys() - relays.keys()
                         and len(_relays(run)) == len(relays))

    return survived(run, killed)


def _relays(run: HostField) -> dict[int, psutil.Process]:
    """By pid, what carries lines between the supervisor's ssh and the agent of a host."""
    agents, found = {rank.ppid() for rank in run.ranks().values()}, {}
    for process in run.processes():
        with suppress(psutil.NoSuchProcess):
            if process.pid not in agents and "cluster.agent" in process.cmdline():
                found[process.pid] = process
    return found


def _clock_off(run: HostField, draw: random.Random) -> Times:
    """From the next start on one host's clock is five minutes ahead."""
    clocks = run.folder / "clocks"
    clocks.mkdir(exist_ok=True)
    file = clocks / draw.choice(run.hosts.addresses)
    file.touch()
    try:
        times = restarted(run, any_rank(run, draw).kill, "exit")
        hangs = len(run.events("hang"))
        committed = run.committed()
        run.until("the next checkpoint", lambda: run.committed() > committed)
        state = run.command("-m", "cluster", "status", run.run_dir.uri, "--json").stdout
        if '"state": "running"' not in state:
            raise Failed(f"a healthy run is shown otherwise: {state[:300]}")
        if len(run.events("hang")) > hangs:
            raise Failed("a clock that is off was taken for a hang")
    finally:
        file.unlink()
    return times


# ---- hosts ---------------------------------------------------------------------------------------

def _host_gone(run: HostField, draw: random.Random) -> Times:
    """Its link is cut: in ``elastic`` the rest go on, else all wait for it.  Then it is back."""
    number = _taking_part(run, draw)

    def up() -> None:
        link(run.hosts, number, "up")

    try:
        return restarted(run, lambda: link(run.hosts, number, "down"), "host_lost", "exit",
                          good_again=up if run.mode != "elastic" else lambda: None)
    finally:
        up()


def _link_flap(run: HostField, draw: random.Random) -> Times:
    number = _taking_part(run, draw)

    def flap() -> None:
        link(run.hosts, number, "down")
        time.sleep(2 + 2 * draw.random())
        link(run.hosts, number, "up")

    return survived(run, flap)


def _machine_dies(run: HostField, draw: random.Random) -> Times:
    """The supervisor's own host goes dark; the operator starts it on another one."""
    dark, begin, known = run.at, run.notes.sizes(), len(run.events("takeover"))
    here = run.hosts.addresses[dark]
    link(run.hosts, dark, "down")
    run.supervisor.kill()
    for process in run.processes():
        with suppress(psutil.Error):
            if process.environ().get("HOST_ADDRESS") == here:
                process.kill()
    began = time.monotonic()
    run.start(_other(run, draw))
    try:
        noticed = run.until("takeover", lambda: len(run.events("takeover")) > known)
        run.until("training goes on", lambda: run.trained_since(begin))
    finally:
        link(run.hosts, dark, "up")
    return Times(noticed, time.monotonic() - began)


# ---- owners --------------------------------------------------------------------------------------

def _supervisor_killed(run: HostField, draw: random.Random) -> Times:
    known = len(run.events("takeover"))
    run.supervisor.kill()
    began = time.monotonic()
    run.start(_other(run, draw))
    noticed = run.until("takeover", lambda: len(run.events("takeover")) > known)
    committed = run.committed()
    run.until("the next checkpoint", lambda: run.committed() > committed)
    return Times(noticed, time.monotonic() - began)


def _second_owner(run: HostField, draw: random.Random) -> Times:
    """The same command again on another host, and a plain training: both are turned away."""
    at, first = run.at, run.supervisor

    def refused() -> float:
        second = run.start(_other(run, draw))
        run.supervisors.pop()
        run.at = at
        try:
            turned_away = run.until("the second supervisor is turned away",
                                    lambda: second.poll() is not None, 90)
        finally:
            second.kill()
        if second.returncode != 2:
            raise Failed(f"the second supervisor ended with {second.returncode}, not 2")
        plain = run.command_on(_other(run, draw), "-m", "neurojepa.pretrain", "--config",
                               str(run.recipe), f"run.dir={run.run_dir.uri}", "run.launcher=local",
                               "train.global_batch=6")
        if plain.returncode != 2 or str(first.pid) not in plain.stderr:
            raise Failed(f"a plain training ended with {plain.returncode}: {plain.stderr[-300:]}")
        return turned_away

    return survived(run, refused)


def _stop_and_start(run: HostField, draw: random.Random) -> Times:
    begin = run.notes.sizes()
    began = time.monotonic()
    done = run.command_on(_other(run, draw), "-m", "cluster", "stop", run.run_dir.uri)
    if done.returncode:
        raise Failed(f"cluster stop: {done.stderr[-300:]}")
    run.until("the supervisor ends", lambda: run.supervisor.poll() is not None, 30)
    if run.supervisor.returncode != 75:
        raise Failed(f"the supervisor ended with {run.supervisor.returncode}, not 75")
    noticed = time.monotonic() - began
    if left := run.processes():
        raise Failed(f"left after a stop: {[process.pid for process in left]}")
    began = time.monotonic()
    run.start(draw.randrange(len(run.hosts.addresses)))
    run.until("training goes on", lambda: run.trained_since(begin))
    return Times(noticed, time.monotonic() - began)


HOST_KINDS = (
    Kind("a rank killed", "fixed", 8, rank_killed, 30),
    Kind("all ranks killed", "fixed", 3, all_killed, 30),
    Kind("killed while a checkpoint is written", "fixed", 6, killed_in_commit, 30),
    Kind(f"a rank stopped (SIGSTOP), hang after {HostField.hang_s} s", "fixed", 4, rank_stopped),
    Kind("a slow rank", "fixed", 3, rank_slow),
    Kind("an agent killed", "fixed", 2, parent_killed, 30),
    Kind("the connection to an agent killed", "fixed", 2, _connection_killed),
    Kind("a host's clock 300 s off, a rank killed", "fixed", 3, _clock_off, 30),
    Kind("a host gone, the others wait for it", "fixed", 2, _host_gone, 120),
    Kind("a link flaps for 2 to 4 s", "fixed", 4, _link_flap),
    Kind("the supervisor killed, started elsewhere", "fixed", 5, _supervisor_killed),
    Kind("a second owner is turned away", "fixed", 3, _second_owner),
    Kind("cluster stop, started again", "fixed", 5, _stop_and_start),
    Kind("the disk full", "fixed", 3, disk_full),
    Kind("a host gone, the others go on", "elastic", 4, _host_gone, 120),
    Kind("the supervisor's machine dies, started elsewhere", "elastic", 2, _machine_dies, 120),
    Kind("the store gone for 20 to 40 s", "store", 3, store_gone),
    Kind(f"the store hangs for {HostField.hang_s + 10} to {HostField.hang_s + 20} s", "store", 2,
         store_hung),
)
