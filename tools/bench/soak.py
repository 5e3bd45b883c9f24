"""soak: random faults, drawn by a seed, done to supervised runs on three hosts; nobody helps.

Hosts are network namespaces with sshd on this machine (needs root, iproute2 and openssh), or with
``--on ray`` the nodes of a real Ray on loopback.  The store is a real S3 server, the disk a small
tmpfs.  Training is the tests' tiny recipe, and what harms it is listed in _soak_host_faults.py and
_soak_ray_faults.py.  A round is a few faults, done to a run of its own.  At the end of a round:

    no process of it is left
    ``latest`` never went back, and every checkpoint it named could be read      (_soak_eye.py)
    metrics.jsonl has every step once, and its samples are those of an undisturbed run
    loss, gradient norm and weights are bit-equal to that run's while all hosts take part, and
    losses stay within 2e-3 where some have been missing

Rounds are kept below --work/ON-CODE, where CODE is a hash of the code that runs in them: run it
again with the same seed to continue; changed code begins anew.  The undisturbed run and the tables
are made when all faults are done.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from neurojepa.config import dump_config
from neurojepa.errors import ConfigError, NeurojepaError
from neurojepa.storage import read_rows
from tests.helpers.feeds import tiny_config, write_feed
from tools.bench._soak_eye import Eye
from tools.bench._soak_faults import Kind
from tools.bench._soak_field import Failed, Field, clear
from tools.bench._soak_host_faults import HOST_KINDS
from tools.bench._soak_hosts import clear_hosts, on_hosts
from tools.bench._soak_ray import on_ray
from tools.bench._soak_ray_faults import RAY_KINDS
from tools.bench.common import code_hash, machine, print_table

# of a fault that fails: what the run does not, or what can no longer be done to it
HARMED = (Failed, NeurojepaError, OSError, subprocess.SubprocessError, psutil.Error, LookupError,
          AssertionError)


@dataclass(frozen=True)
class Ground:
    """Where rounds take place, and what is done there.

    Parameters
    ----------
    field
        Given a folder, a mode and a maker of recipes (_soak_field.py), a run and its eye.
    clear
        Takes down what a soak that was killed has left in a folder.
    a_round
        Faults; where the field takes long to lay out, more.
    """

    kinds: tuple[Kind, ...]
    field: Callable[[Path, str, Callable[[Path, str, str], Path]],
                    AbstractContextManager[tuple[Field, Eye]]]
    clear: Callable[[Path], None]
    a_round: int


GROUNDS = {"hosts": Ground(HOST_KINDS, on_hosts, clear_hosts, 4),
           "ray": Ground(RAY_KINDS, on_ray, clear, 6)}
CLOSE = 2e-3  # of losses at another world size: gates can flip (see recovery.py)


def run(quick: bool, official: str | None, faults: int | None = None, seed: int = 1,
        work: str = "build/bench-soak", minutes: float = math.inf,
        on: str = "hosts") -> dict[str, Any]:
    """The plan, or what is left of it; ``minutes`` after the start no new round begins."""
    if os.geteuid() != 0:
        raise ConfigError("soak: makes network namespaces and mounts a tmpfs; run it as root")
    if faults is None:
        faults = 4 if quick else 60
    if faults < 1:
        raise ConfigError(f"--faults {faults}: give how many, 1 or more")
    began = time.monotonic()
    ground = GROUNDS[on]
    code = code_hash("neurojepa/**/*.py", "cluster/**/*.py", "tools/bench/_soak_*.py",
                     "tools/bench/_harm.py", "tools/bench/victim.py")
    folder = Path(work).resolve() / f"{on}-{code}"
    folder.mkdir(parents=True, exist_ok=True)
    # left by a soak that was killed, of whatever code
    for place in folder.parent.glob(f"{on}-*/round"):
        ground.clear(place)
    if not (folder / "feed/feed.json").exists():
        write_feed(str(folder / "feed"))
    kept = folder / f"faults-{seed}-{faults}.jsonl"  # another number is another plan
    print(machine(), flush=True)
    todo = plan(ground.kinds, faults, seed)
    done = {row["number"] for row in read_rows(str(kept))} if kept.exists() else set()
    if not done:
        print(f"plan of seed {seed}: " + "; ".join(f"{number} {kind.name}"
                                                   for number, kind in todo), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # so that all is taken down
    while left := [item for item in todo if item[0] not in done]:
        if time.monotonic() - began >= 60 * minutes:
            print(f"{len(left)} faults are left for the next time", flush=True)
            return {"faults": len(done), "planned": faults}
        mode = left[0][1].mode
        rows = _round(ground, folder, mode, [item for item in left if item[1].mode == mode]
                      [:ground.a_round], seed)
        with kept.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        done |= {row["number"] for row in rows}
    return _report(ground, folder, read_rows(str(kept)) if kept.exists() else [], faults)


def plan(kinds: tuple[Kind, ...], faults: int, seed: int) -> list[tuple[int, Kind]]:
    """So many faults in random order: each kind once if there is room, then by its weight."""
    draw = random.Random(seed)
    drawn = draw.sample(kinds, min(faults, len(kinds)))
    rest = [kind for kind in kinds for _ in range(kind.weight - 1)]
    draw.shuffle(rest)
    while len(drawn) < faults:
        drawn.append(rest.pop() if rest else draw.choice(kinds))
    draw.shuffle(drawn)
    return list(enumerate(drawn))


# ---- a round -------------------------------------------------------------------------------------

def _round(ground: Ground, folder: Path, mode: str, faults: list[tuple[int, Kind]],
           seed: int) -> list[dict[str, Any]]:
    """Do some faults to a new run; one that fails ends the round, the rest wait for the next."""
    number = 1 + max((int(path.stem[6:]) for path in folder.glob("round-*.json")), default=-1)
    place = _cleared(ground, folder)
    rows: list[dict[str, Any]] = []
    with ground.field(place, mode, _recipe) as (field, eye):
        try:
            field.start()
            field.until("the first checkpoint", field.committed)
        except HARMED as error:
            rows.append({"number": faults[0][0], "failed": f"at its start: {error}"})
            faults = []
        for fault, kind in faults:
            rows.append({"number": fault, **_fault(field, kind, random.Random(f"{seed}-{fault}"))})
            print(json.dumps(rows[-1]), flush=True)
            if "failed" in rows[-1]:
                break
        wrong = _end(field, eye)
        failed = any("failed" in row for row in rows) or bool(wrong)
        _keep(field, eye, folder / f"round-{number}.json", mode, wrong, failed)
    for row in rows:
        row["round"] = number
    print(f"round {number} ({mode}): {len(rows)} faults, "
          + ("; ".join(wrong) if wrong else "nothing left over, nothing lost"), flush=True)
    return rows


def _cleared(ground: Ground, folder: Path) -> Path:
    """Where rounds take place, empty."""
    place = folder / "round"
    ground.clear(place)
    shutil.rmtree(place, ignore_errors=True)
    return place


def _fault(field: Field, kind: Kind, draw: random.Random) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": kind.name}
    try:
        time.sleep(1 + 3 * draw.random())  # at no special moment
        times = kind.do(field, draw)
        field.until("nothing of an earlier attempt is left",
                    lambda: len(field.tokens()) == 1, 60)
        return row | {"noticed_s": times.noticed and round(times.noticed, 1),
                      "back_s": round(times.back, 1)}
    except HARMED as error:
        return row | {"failed": f"{type(error).__name__}: {error}"}


def _end(field: Field, eye: Eye) -> list[str]:
    """Stop the run as an operator does; what is wrong with what it leaves."""
    wrong = []
    try:
        done = field.command("-m", "cluster", "stop", field.run_dir.uri)
        if done.returncode:
            wrong.append(f"cluster stop: {done.stderr.strip()[-300:]}")
        field.until("no process is left", lambda: not field.processes(), 120)
    except (Failed, NeurojepaError, subprocess.TimeoutExpired) as error:
        left = [f"{process.pid} {process.name()}" for process in field.processes()]
        wrong.append(f"at the end: {error} {left}")
    eye.close()
    eye.look()
    steps = [row["step"] for row in field.run_dir.rows("metrics.jsonl")]
    if steps != list(range(1, len(steps) + 1)):
        wrong.append("metrics.jsonl does not have every step once, in order")
    return wrong + eye.wrong


def _keep(field: Field, eye: Eye, path: Path, mode: str, wrong: list[str], failed: bool) -> None:
    """What the comparison needs; after a failure, all that there is."""
    begins = [(row["step"] or 0, row["world"]) for row in field.events("start", "resume")]
    path.write_text(json.dumps({
        "mode": mode, "wrong": wrong, "states": eye.states, "read": eye.read, "begins": begins,
        "rows": [(row["step"], row["loss"], row["grad_norm"])
                 for row in field.run_dir.rows("metrics.jsonl")],
        "samples": {position: sorted(scans) for position, scans in field.notes.samples().items()}}))
    if failed and field.run_dir.local_path:
        with suppress(shutil.Error):  # what is being removed
            shutil.copytree(field.run_dir.local_path, path.with_suffix(""), dirs_exist_ok=True,
                            ignore=shutil.ignore_patterns("checkpoints"))
    if failed:
        path.with_suffix(".screen").write_text(field.screen())


def _recipe(folder: Path, feed: str, run_dir: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(dump_config(tiny_config(feed, run_dir, steps=10**6)))
    return path


# ---- the undisturbed run -------------------------------------------------------------------------

def _undisturbed(ground: Ground, folder: Path, steps: int) -> dict[str, Any]:
    """What a round without faults comes to, on the same hosts; made again if it is too short."""
    kept = folder / "plain.json"
    if not kept.exists() or len(json.loads(kept.read_text())["rows"]) < steps:
        place = _cleared(ground, folder)
        with ground.field(place, "fixed", _recipe) as (field, eye):
            (place / "hurry").touch()
            field.start()
            field.until(f"step {steps} of the undisturbed run",
                        lambda: len(field.run_dir.rows("metrics.jsonl")) >= steps,
                        limit_s=120 + 2 * steps)
            wrong = _end(field, eye)
            _keep(field, eye, kept, "fixed", wrong, bool(wrong))
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def compare(found: dict[str, Any], plain: dict[str, Any], ranks: int = 3) -> dict[str, Any]:
    """What differs between a round and the undisturbed run.

    Steps before the first begin with other ranks have to be bit-equal, as have their weights; after
    it losses have to be close.  Samples have to be the same throughout.
    """
    other = min([step for step, world in found["begins"] if world != ranks], default=10**9)
    pairs = list(zip(found["rows"], plain["rows"], strict=False))
    wrong = [f"step {mine[0]}: {mine[1:]} instead of {theirs[1:]}" for mine, theirs in pairs
             if mine[0] <= other and mine != theirs][:1]
    # np.max keeps a NaN, which max would pass over
    apart = float(np.max([abs(mine[1] - theirs[1]) for mine, theirs in pairs if mine[0] > other],
                         initial=0.0))
    states = {step: state for step, state in found["states"].items()
              if int(step) <= other and step in plain["states"]}
    wrong += [f"weights of step {step} differ" for step, state in states.items()
              if state != plain["states"][step]][:1]
    if not apart <= CLOSE:
        wrong.append(f"losses {apart:.2g} apart at another world size")
    moved = [position for position, scans in found["samples"].items()
             if scans != plain["samples"].get(position, scans)]
    if moved:
        wrong.append(f"{len(moved)} positions had other samples, first {min(moved, key=int)}")
    return {"wrong": wrong, "apart": apart, "states": len(states),
            "steps": len(found["rows"]), "samples": len(found["samples"])}


# ---- report --------------------------------------------------------------------------------------

def _report(ground: Ground, folder: Path, faults: list[dict[str, Any]],
            planned: int) -> dict[str, Any]:
    rounds = [{"round": int(path.stem[6:]), **json.loads(path.read_text())} for path in
              sorted(folder.glob("round-*.json"), key=lambda path: int(path.stem[6:]))]
    longest = max((len(found["rows"]) for found in rounds), default=0)
    plain = _undisturbed(ground, folder, longest) if rounds else {}
    compared = [compare(found, plain) for found in rounds]
    print_table(("kind", "times", "failed", "noticed: median s", "worst", "back: median s",
                 "worst", "goal s"), [_line(kind, faults) for kind in ground.kinds
                                      if any(row.get("kind") == kind.name for row in faults)])
    print_table(("round", "hosts and disk", "steps", "weights equal", "checkpoints read",
                 "sample positions", "wrong"),
                [(found["round"], found["mode"], result["steps"], result["states"], found["read"],
                  result["samples"], "; ".join(found["wrong"] + result["wrong"]) or "nothing")
                 for found, result in zip(rounds, compared, strict=True)])
    for row in faults:
        if "failed" in row:
            print(f"fault {row['number']}, {row.get('kind', '')}: {row['failed']} (round "
                  f"{row['round']})", flush=True)
    wrong = sum(bool(found["wrong"] or result["wrong"])
                for found, result in zip(rounds, compared, strict=True))
    return {"faults": len(faults), "planned": planned,
            "failed": sum("failed" in row for row in faults), "rounds": len(rounds),
            "rounds_wrong": wrong, "late": [row["kind"] for row in faults if _late(ground, row)],
            "losses_apart": max((result["apart"] for result in compared), default=0.0)}


def _line(kind: Kind, faults: list[dict[str, Any]]) -> tuple[Any, ...]:
    rows = [row for row in faults if row.get("kind") == kind.name]
    noticed = [row["noticed_s"] for row in rows if row.get("noticed_s") is not None]
    back = [row["back_s"] for row in rows if "back_s" in row]
    return (kind.name, len(rows), sum("failed" in row for row in rows),
            *(f(values) if values else None for values in (noticed, back)
              for f in (statistics.median, max)), kind.limit_s)


def _late(ground: Ground, row: dict[str, Any]) -> bool:
    limit_s = next((kind.limit_s for kind in ground.kinds if kind.name == row.get("kind")), None)
    return limit_s is not None and row.get("back_s", 0.0) > limit_s
