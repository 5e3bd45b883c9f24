"""What the soak does to a run.  Each kind harms it, waits until that is noticed, makes good what an
operator or the world would make good, and waits until training goes on.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tools.bench._harm import fill, link
from tools.bench._soak_field import HANG_S, Failed, Field


@dataclass(frozen=True)
class Times:
    """Seconds; None where nothing has to be noticed."""

    noticed: float | None
    back: float  # from the harm, or from the end of an outage, to training


@dataclass(frozen=True)
class Kind:
    """``weight``: how often of some 60; ``limit_s``: a promised time to be back."""

    name: str
    mode: str
    weight: int
    do: Callable[[Field, random.Random], Times]
    limit_s: float | None = None


def _restarted(run: Field, harm: Callable[[], object], *signs: str,
               good_again: Callable[[], object] = lambda: None) -> Times:
    """Harm that ends the attempt: noticed by an event, back when a new one has made a step."""
    begin, known = run.notes.sizes(), len(run.events(*signs))
    harm()
    began = time.monotonic()
    noticed = run.until(f"an event {' or '.join(signs)}",
                        lambda: len(run.events(*signs)) > known)
    good_again()
    run.until("training goes on", lambda: run.trained_since(begin))
    return Times(noticed, time.monotonic() - began)


def _survived(run: Field, harm: Callable[[], object]) -> Times:
    """Harm that the attempt outlives: back with the next checkpoint."""
    starts = len(run.events("started"))
    harm()
    committed, began = run.committed(), time.monotonic()
    run.until("the next checkpoint", lambda: run.committed() > committed)
    if len(run.events("started")) != starts:
        raise Failed("the attempt was started again")
    return Times(None, time.monotonic() - began)


def _any_rank(run: Field, draw: random.Random) -> psutil.Process:
    ranks = run.ranks()
    if not ranks:
        raise Failed("no rank is alive")
    return ranks[draw.choice(sorted(ranks))]


def _other(run: Field, draw: random.Random) -> int:
    return draw.choice([at for at in range(len(run.hosts.addresses)) if at != run.at])


def _taking_part(run: Field, draw: random.Random) -> int:
    """A host of the attempt, but not the supervisor's own."""
    hosts = run.events("started")[-1]["hosts"]
    return draw.choice([at for at, address in enumerate(run.hosts.addresses)
                        if address in hosts and at != run.at])


# ---- ranks ---------------------------------------------------------------------------------------

def _rank_killed(run: Field, draw: random.Random) -> Times:
    return _restarted(run, _any_rank(run, draw).kill, "exit")


def _all_killed(run: Field, draw: random.Random) -> Times:
    return _restarted(run, lambda: [rank.kill() for rank in run.ranks().values()], "exit")


def _rank_stopped(run: Field, draw: random.Random) -> Times:
    victim, known = draw.choice(sorted(run.ranks())), len(run.events("hang"))
    times = _restarted(run, run.ranks()[victim].suspend, "hang")
    if run.events("hang")[known]["culprits"] != [victim]:
        raise Failed(f"rank {victim} was stopped, named: {run.events('hang')[known]['culprits']}")
    return times


def _rank_slow(run: Field, draw: random.Random) -> Times:
    victim, known = draw.choice(sorted(run.ranks())), len(run.events("straggler"))
    file = run.folder / "slow" / str(victim)
    file.parent.mkdir(exist_ok=True)
    file.touch()
    try:
        noticed = run.until("the slow rank is named", lambda: [
            row["rank"] for row in run.events("straggler")[known:]] == [victim])
    finally:
        file.unlink()
    return Times(noticed, _survived(run, lambda: None).back)


def _agent_killed(run: Field, draw: random.Random) -> Times:
    """The parent of a rank; its ranks die with it."""
    return _restarted(run, psutil.Process(_any_rank(run, draw).ppid()).kill, "exit")


def _connection_killed(run: Field, draw: random.Random) -> Times:
    """Between the supervisor and an agent, at either end: ssh, or the relay on the host."""
    relays = _relays(run)
    ends = [*relays.values(), *(child for child in psutil.Process(run.supervisor.pid).children()
                                if child.name() == "ssh")]
    starts = len(run.events("started"))
    draw.choice(ends).kill()
    connected = run.until("a new connection", lambda: _relays(run).keys() - relays.keys()
                          and len(_relays(run)) == len(relays))
    back = _survived(run, lambda: None).back
    if len(run.events("started")) != starts:
        raise Failed("the attempt was started again")
    return Times(connected, back)


def _relays(run: Field) -> dict[int, psutil.Process]:
    """By pid, what carries lines between the supervisor's ssh and the agent of a host."""
    agents, found = {rank.ppid() for rank in run.ranks().values()}, {}
    for process in run.processes():
        with suppress(psutil.NoSuchProcess):
            if process.pid not in agents and "cluster.agent" in process.cmdline():
                found[process.pid] = process
    return found


def _killed_in_commit(run: Field, draw: random.Random) -> Times:
    """All ranks, or rank 0, between the first file of a checkpoint and its commit."""
    folder = Path(run.run_dir.uri, "checkpoints")
    end = time.monotonic() + 60

    def harm() -> None:
        victims = list(run.ranks().values()) if draw.random() < 0.5 else [run.ranks()[0]]
        while True:
            if time.monotonic() > end:
                raise Failed("no checkpoint was being written for a minute")
            for path in folder.glob("step-*"):
                if not (path / "manifest.json").exists() and any(path.glob("*.safetensors*")):
                    for victim in victims:
                        victim.kill()
                    return
            time.sleep(0.001)

    return _restarted(run, harm, "exit")


def _clock_off(run: Field, draw: random.Random) -> Times:
    """From the next start on one host's clock is five minutes ahead."""
    clocks = run.folder / "clocks"
    clocks.mkdir(exist_ok=True)
    file = clocks / draw.choice(run.hosts.addresses)
    file.touch()
    try:
        times = _restarted(run, _any_rank(run, draw).kill, "exit")
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

def _host_gone(run: Field, draw: random.Random) -> Times:
    """Its link is cut: in ``elastic`` the rest go on, else all wait for it.  Then it is back."""
    number = _taking_part(run, draw)

    def up() -> None:
        link(run.hosts, number, "up")

    try:
        return _restarted(run, lambda: link(run.hosts, number, "down"), "host_lost", "exit",
                          good_again=up if run.mode != "elastic" else lambda: None)
    finally:
        up()


def _link_flap(run: Field, draw: random.Random) -> Times:
    number = _taking_part(run, draw)

    def flap() -> None:
        link(run.hosts, number, "down")
        time.sleep(2 + 2 * draw.random())
        link(run.hosts, number, "up")

    return _survived(run, flap)


def _machine_dies(run: Field, draw: random.Random) -> Times:
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

def _supervisor_killed(run: Field, draw: random.Random) -> Times:
    known = len(run.events("takeover"))
    run.supervisor.kill()
    began = time.monotonic()
    run.start(_other(run, draw))
    noticed = run.until("takeover", lambda: len(run.events("takeover")) > known)
    committed = run.committed()
    run.until("the next checkpoint", lambda: run.committed() > committed)
    return Times(noticed, time.monotonic() - began)


def _second_owner(run: Field, draw: random.Random) -> Times:
    """The same command again on another host, and a plain training: both are turned away."""
    at, first, turned_away = run.at, run.supervisor, 0.0

    def refused() -> None:
        nonlocal turned_away
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
        plain = run.command("-m", "neurojepa.pretrain", "--config", str(run.recipe),
                            f"run.dir={run.run_dir.uri}", "run.launcher=local",
                            "train.global_batch=6", at=_other(run, draw))
        if plain.returncode != 2 or str(first.pid) not in plain.stderr:
            raise Failed(f"a plain training ended with {plain.returncode}: {plain.stderr[-300:]}")

    back = _survived(run, refused).back
    return Times(turned_away, back)


def _stop_and_start(run: Field, draw: random.Random) -> Times:
    begin = run.notes.sizes()
    began = time.monotonic()
    done = run.command("-m", "cluster", "stop", run.run_dir.uri, at=_other(run, draw))
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


# ---- disks and stores ----------------------------------------------------------------------------

def _disk_full(run: Field, draw: random.Random) -> Times:
    filler, begin, said = Path(run.run_dir.uri).parent / "filler", time.monotonic(), run.screen()

    def told() -> bool:
        return any(words in run.screen()[len(said):]
                   for words in ("waiting for it", "cannot write", "No space left"))

    fill(filler)
    try:
        noticed = run.until("it is said", told, 90)
        time.sleep(3)
    finally:
        filler.unlink()
    committed, begin = run.committed(), time.monotonic()
    run.until("the next checkpoint", lambda: run.committed() > committed)
    return Times(noticed, time.monotonic() - begin)


def _store(run: Field, harm: Callable[[], None], mend: Callable[[], None],
           seconds: float) -> Times:
    starts = len(run.events("started"))
    harm()
    try:
        time.sleep(seconds)
    finally:
        mend()
    began, committed = time.monotonic(), run.committed()
    run.until("the next checkpoint", lambda: run.committed() > committed)
    if run.events("hang") or len(run.events("started")) != starts:
        raise Failed("an outage of the store ended the attempt")
    return Times(None, time.monotonic() - began)


def _store_gone(run: Field, draw: random.Random) -> Times:
    return _store(run, run.close_store, run.open_store, 20 + 20 * draw.random())


def _store_hung(run: Field, draw: random.Random) -> Times:
    weed = next(item for item in psutil.Process().children()
                if item.name() == "weed" and item.status() != psutil.STATUS_ZOMBIE)
    return _store(run, weed.suspend, weed.resume, HANG_S + 10 + 10 * draw.random())


KINDS = (
    Kind("a rank killed", "fixed", 8, _rank_killed, 30),
    Kind("all ranks killed", "fixed", 3, _all_killed, 30),
    Kind("killed while a checkpoint is written", "fixed", 6, _killed_in_commit, 30),
    Kind(f"a rank stopped (SIGSTOP), hang after {HANG_S} s", "fixed", 4, _rank_stopped),
    Kind("a slow rank", "fixed", 3, _rank_slow),
    Kind("an agent killed", "fixed", 2, _agent_killed, 30),
    Kind("the connection to an agent killed", "fixed", 2, _connection_killed),
    Kind("a host's clock 300 s off, a rank killed", "fixed", 3, _clock_off, 30),
    Kind("a host gone, the others wait for it", "fixed", 2, _host_gone, 120),
    Kind("a link flaps for 2 to 4 s", "fixed", 4, _link_flap),
    Kind("the supervisor killed, started elsewhere", "fixed", 5, _supervisor_killed),
    Kind("a second owner is turned away", "fixed", 3, _second_owner),
    Kind("cluster stop, started again", "fixed", 5, _stop_and_start),
    Kind("the disk full", "fixed", 3, _disk_full),
    Kind("a host gone, the others go on", "elastic", 4, _host_gone, 120),
    Kind("the supervisor's machine dies, started elsewhere", "elastic", 2, _machine_dies, 120),
    Kind("the store gone for 20 to 40 s", "store", 3, _store_gone),
    Kind(f"the store hangs for {HANG_S + 10} to {HANG_S + 20} s", "store", 2, _store_hung),
)
