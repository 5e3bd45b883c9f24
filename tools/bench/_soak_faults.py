"""What the soak does to a run, wherever it is.  Each kind harms it, waits until that is noticed,
makes good what an operator or the world would make good, and waits until training goes on.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tools.bench._harm import fill
from tools.bench._soak_field import Failed, Field


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
    do: Callable[[Any, random.Random], Times]  # to the field that it is for
    limit_s: float | None = None


def restarted(run: Field, harm: Callable[[], object], *signs: str,
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


def survived(run: Field, harm: Callable[[], float | None]) -> Times:
    """Harm that the attempt outlives: back with the next checkpoint.

    ``harm`` returns the seconds until it was noticed, where it has to be.
    """
    starts = len(run.events("started"))
    noticed = harm()
    committed, began = run.committed(), time.monotonic()
    run.until("the next checkpoint", lambda: run.committed() > committed)
    if len(run.events("started")) != starts:
        raise Failed("the attempt was started again")
    return Times(noticed, time.monotonic() - began)


def any_rank(run: Field, draw: random.Random) -> psutil.Process:
    ranks = run.ranks()
    if not ranks:
        raise Failed("no rank is alive")
    return ranks[draw.choice(sorted(ranks))]


# ---- ranks ---------------------------------------------------------------------------------------

def rank_killed(run: Field, draw: random.Random) -> Times:
    return restarted(run, any_rank(run, draw).kill, "exit")


def all_killed(run: Field, draw: random.Random) -> Times:
    return restarted(run, lambda: [rank.kill() for rank in run.ranks().values()], "exit")


def rank_stopped(run: Field, draw: random.Random) -> Times:
    victim, known = draw.choice(sorted(run.ranks())), len(run.events("hang"))
    times = restarted(run, run.ranks()[victim].suspend, "hang")
    if run.events("hang")[known]["culprits"] != [victim]:
        raise Failed(f"rank {victim} was stopped, named: {run.events('hang')[known]['culprits']}")
    return times


def rank_slow(run: Field, draw: random.Random) -> Times:
    victim, known = draw.choice(sorted(run.ranks())), len(run.events("straggler"))
    file = run.folder / "slow" / str(victim)
    file.parent.mkdir(exist_ok=True)

    def slow() -> float:
        file.touch()
        try:
            return run.until("the slow rank is named", lambda: [
                row["rank"] for row in run.events("straggler")[known:]] == [victim])
        finally:
            file.unlink()

    return survived(run, slow)


def killed_in_commit(run: Field, draw: random.Random) -> Times:
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

    return restarted(run, harm, "exit")


def parent_killed(run: Field, draw: random.Random) -> Times:
    """The agent or the actor of a rank, which dies with it."""
    return restarted(run, psutil.Process(any_rank(run, draw).ppid()).kill, "exit")


# ---- disks and stores ----------------------------------------------------------------------------

def disk_full(run: Field, draw: random.Random) -> Times:
    filler, said = Path(run.run_dir.uri).parent / "filler", run.screen()

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


def store_gone(run: Field, draw: random.Random) -> Times:
    return _store(run, run.close_store, run.open_store, 20 + 20 * draw.random())


def store_hung(run: Field, draw: random.Random) -> Times:
    weed = next(item for item in psutil.Process().children()
                if item.name() == "weed" and item.status() != psutil.STATUS_ZOMBIE)
    return _store(run, weed.suspend, weed.resume, run.hang_s + 10 + 10 * draw.random())
