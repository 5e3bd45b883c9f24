"""recovery: kills at random instants, each continued to the end and compared with a run that was
never disturbed, bit for bit: losses, gradient norms, state hash, sample ids.  Samples are
augmented, read ahead and, half of them, paired with another modality of their session.

A chain is one run that is killed several times, by SIGKILL of a rank, of all ranks or of the
launcher: at instants drawn by a seed, or inside a piece of code (see victim.py); two chains have
samples that make the run go back, and are killed in there.  Elastic cases
are killed once or twice and go on with other ranks or another ZeRO stage; their losses over 50
steps must agree within 1e-5, or within 2e-3 where gates can flip (bf16, experts, sparse code).

Results are kept below runs/bench-recovery-CODE, where CODE is a hash of the package: run it again
to continue.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tools.bench.common import ROOT, code_hash, machine, print_table
from tools.bench.victim import EVENTS, noted

STEPS, ELASTIC_STEPS, TIMEOUT_S = 40, 60, 240.0
POISON = list(range(17, 25))  # steps; the run goes back after six of them
SETUPS = ((1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16"), (1, "bf16"), (2, "fp32"))
# A rounding can open a gate of the sparse code that stands at zero, or send a token that stands
# between two experts to the other: then a gradient jumps.  SMOOTH has neither.
TOLERANCE = {("fp32", False): 1e-5, ("fp32", True): 2e-3, ("bf16", True): 2e-3}
# Where roundings differ they may not decide whether a step counts, nor be blown up by gradients
# that grow tenfold, as they do on these few scans after 40 steps at the usual rate.
SMOOTH = ("model.moe=false", "objective.sparse.code=identity", "objective.sparse.dense_loss=l2")
CALM = ("train.health.spike_deviations=0", "optim.lr=1.0e-4")
ELASTIC = (  # with gates or without; ranks and ZeRO stage of each leg
    ("2 -> 1 ranks", "fp32", False, ((2, 2), (1, 2))),
    ("1 -> 2 ranks", "fp32", False, ((1, 2), (2, 2))),
    ("2 -> 3 ranks", "fp32", False, ((2, 2), (3, 2))),
    ("ZeRO 1 -> 3 -> 2", "fp32", False, ((2, 1), (2, 3), (2, 2))),
    ("2 -> 3 ranks", "fp32", True, ((2, 2), (3, 2))),
    ("ZeRO 1 -> 3 -> 2", "fp32", True, ((2, 1), (2, 3), (2, 2))),
    ("2 -> 1 ranks", "bf16", True, ((2, 2), (1, 2))),
    ("ZeRO 1 -> 3 -> 2", "bf16", True, ((2, 1), (2, 3), (2, 2))))
ONLY_RANK_0 = ("manifest", "latest", "remove", "row")
LARGEST = {"views": 30, "step": 60, "ema": 12, "snapshot": 3, "write": 12, "manifest": 3,
           "latest": 3, "remove": 2, "row": 4, "load": 1}
PARTS = ("noticed", "launcher", "imports", "world", "engine", "load", "step")


@dataclass
class Attempt:
    """What one start of a run came to.  Times are seconds since 1970."""

    killed: float | None = None
    ended: float = 0.0
    status: int | None = None
    marks: dict[int, dict[str, float]] = field(default_factory=dict)  # by rank
    samples: dict[int, str] = field(default_factory=dict)  # position -> scan


def run(quick: bool, official: str | None) -> dict[str, Any]:
    """The matrix, or four kills of it; returns equal_runs and kill_to_step_s."""
    print(machine(), flush=True)
    code = code_hash("neurojepa/**/*.py")
    bench = Bench(Path("runs") / f"bench-recovery-{code}{'-quick' if quick else ''}")
    chains = list(_chains(quick))
    elastic = ELASTIC[:1] if quick else ELASTIC
    bench.left = sum(len(kills) + 1 for _, kills in chains) + sum(
        len(legs) for *_, legs in elastic) + len({setup for setup, _ in chains})
    results = [bench.once(f"chain {number}", lambda setup=setup, kills=kills, number=number:
                          bench.chain(number, setup, kills))
               for number, (setup, kills) in enumerate(chains)]
    stretched = [bench.once(f"elastic {number}", lambda number=number, case=case:
                            bench.elastic(number, *case)) for number, case in enumerate(elastic)]
    return _report(results, stretched)


class Bench:
    """Runs below one folder; ``left`` is the number of starts still to come."""

    def __init__(self, folder: Path) -> None:
        from tests.helpers.feeds import write_feed

        self.folder, self.left = folder.resolve(), 0
        self._began, self._done = time.monotonic(), 0
        self._results = self.folder / "results.jsonl"
        if not (self.folder / "feed/feed.json").exists():
            write_feed(str(self.folder / "feed"), per_session=2)

    def once(self, name: str, work: Any) -> dict[str, Any]:
        """The stored result of this name, or that of ``work``, stored."""
        if self._results.exists():
            for line in self._results.read_text().splitlines():
                if (row := json.loads(line))["name"] == name:
                    self.left -= row["starts"]
                    return row
        before = self._done
        row = {"name": name, **work(), "starts": self._done - before}
        with open(self._results, "a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def chain(self, number: int, setup: tuple[int, str],
              kills: list[dict[str, Any]]) -> dict[str, Any]:
        """Kill and continue one run; whether its end equals the undisturbed one."""
        zero, dtype = setup
        poison = POISON if kills[0] in IN_ROLLBACK else []
        plain = self._undisturbed(zero, dtype, STEPS, poison=poison)
        run_dir, attempts = self.folder / f"chain-{number}", []
        shutil.rmtree(run_dir, ignore_errors=True)
        for kill in kills:
            attempts.append(self._start(run_dir, 2, zero, dtype, STEPS, kill, poison=poison))
            if attempts[-1].killed is None:
                break
        if attempts[-1].killed is not None:
            attempts.append(self._start(run_dir, 2, zero, dtype, STEPS, None, poison=poison))
        equal = self._end(run_dir, attempts) == plain
        self._say(f"chain {number}: zero {zero} {dtype}, "
                  f"{sum(a.killed is not None for a in attempts)} kills, "
                  + ("equal" if equal else f"DIFFERS; see {run_dir}"))
        if equal:
            shutil.rmtree(run_dir)
        return {"zero": zero, "dtype": dtype, "equal": equal,
                "kills": [kill["what"] for kill, attempt in zip(kills, attempts, strict=False)
                          if attempt.killed is not None],
                "restarts": [parts for a, b in itertools.pairwise(attempts)
                             if (parts := _restart(a, b))]}

    def elastic(self, number: int, name: str, dtype: str, gated: bool,
                legs: tuple[tuple[int, int], ...]) -> dict[str, Any]:
        """Kill a run and go on at another size; how far its losses are from one that did not."""
        plain = self._undisturbed(legs[0][1], dtype, ELASTIC_STEPS, legs[0][0], gated)
        run_dir, attempts = self.folder / f"elastic-{number}", []
        shutil.rmtree(run_dir, ignore_errors=True)
        for leg, (ranks, zero) in enumerate(legs):
            last = leg == len(legs) - 1
            # late enough that the next leg takes up a checkpoint of this one
            kill = None if last else _event("ema", 0, 9 if leg == 0 else 15)
            attempts.append(self._start(run_dir, ranks, zero, dtype, ELASTIC_STEPS, kill,
                                        gated))
        rows, _, samples = self._end(run_dir, attempts)
        whole = len(rows) == len(plain[0]) == ELASTIC_STEPS
        apart = (max(abs(a[1] - b[1]) for a, b in zip(rows, plain[0], strict=True)) if whole
                 else None)
        close = apart is not None and apart <= TOLERANCE[dtype, gated] and samples == plain[2]
        kind = f"{dtype} {'gated' if gated else 'smooth'}"
        self._say(f"{name}, {kind}: " + (f"losses within {apart:.2g}" if close else
                  f"losses {apart} apart, or other samples; see {run_dir}"))
        if close:
            shutil.rmtree(run_dir)
        return {"case": name, "dtype": dtype, "gated": gated, "apart": apart, "close": close,
                "same_samples": samples == plain[2]}

    def _undisturbed(self, zero: int, dtype: str, steps: int, ranks: int = 2,
                     gated: bool = True, poison: Sequence[int] = ()) -> Any:
        """The end of an undisturbed run, made once."""
        run_dir = self.folder / (f"plain-{zero}-{dtype}-{steps}-{ranks}"
                                 f"{'' if gated else '-smooth'}{'-poison' if poison else ''}")
        kept = run_dir.with_suffix(".json")
        if not kept.exists():
            shutil.rmtree(run_dir, ignore_errors=True)
            attempt = self._start(run_dir, ranks, zero, dtype, steps, None, gated, poison)
            kept.write_text(json.dumps(self._end(run_dir, [attempt])))
        rows, state, samples = json.loads(kept.read_text())
        return rows, state, samples

    def _end(self, run_dir: Path, attempts: list[Attempt]) -> tuple[Any, str | None, Any]:
        """Rows, hash of the final state, samples by position (as JSON has them)."""
        from neurojepa.storage import read_rows

        rows = [[row["step"], row["loss"], row["grad_norm"]]
                for row in read_rows(str(run_dir / "metrics.jsonl"))]
        events = read_rows(str(run_dir / "events.jsonl"))
        state = events[-1].get("state_sha256") if events else None
        samples: dict[str, Any] = {}
        for attempt in attempts:
            for position, scan in attempt.samples.items():
                if samples.setdefault(str(position), scan) != scan:
                    samples[str(position)] = "two scans"
        return rows, state, samples

    def _start(self, run_dir: Path, ranks: int, zero: int, dtype: str, steps: int,
               kill: dict[str, Any] | None, gated: bool = True,
               poison: Sequence[int] = ()) -> Attempt:
        """Start the run once and let it end, or kill it."""
        number = len(list(run_dir.glob("attempt-*")))
        notes = run_dir / f"attempt-{number}"
        notes.mkdir(parents=True)
        job = notes / "job.json"
        event = kill["event"] if kill else None
        job.write_text(json.dumps({
            "folder": str(notes), "event": event, "poison": list(poison), "arguments": [
            "--config", str(self._recipe()), f"run.dir={run_dir}", f"run.ranks={ranks}",
            f"train.zero={zero}", f"train.dtype={dtype}", f"train.steps={steps}",
            *(() if gated else SMOOTH), *(CALM if steps == ELASTIC_STEPS else [])]}))
        environment = {key: value for key, value in os.environ.items() if key != "RANK"}
        with open(notes / "log", "wb") as log:
            launcher = subprocess.Popen(
                [sys.executable, "-m", "tools.bench.victim", "launch", str(job)], cwd=ROOT,
                stdout=log, stderr=log, env={**environment, "OMP_NUM_THREADS": "1"})
        attempt = Attempt()
        _watch(launcher, notes, kill, ranks, attempt)
        _read_notes(notes, ranks, attempt)
        self._done += 1
        self.left -= 1
        if kill is None and attempt.status != 0:
            self._say(f"status {attempt.status}: {(notes / 'log').read_text()[-1500:]}")
        return attempt

    def _recipe(self) -> Path:
        from neurojepa.config import dump_config
        from tests.helpers.feeds import tiny_config

        path = self.folder / "recipe.yaml"
        config = tiny_config(str(self.folder / "feed"), "unset", global_batch=5, micro_batch=2,
                             checkpoint_every=4, log_every=3, steps=STEPS)
        config = config.model_copy(update={
            "data": config.data.model_copy(update={"cross_modal": 0.5}),
            "optim": config.optim.model_copy(update={"schedule": "constant"}),
            "run": config.run.model_copy(update={"launcher": "local"})})
        path.write_text(dump_config(config))
        return path

    def _say(self, text: str) -> None:
        passed = time.monotonic() - self._began
        left = passed / max(1, self._done) * max(0, self.left)
        print(f"[{passed / 60:.1f} min, {left / 60:.0f} left] {text}", flush=True)


# ---- kills ---------------------------------------------------------------------------------------

def _chains(quick: bool) -> Iterator[tuple[tuple[int, str], list[dict[str, Any]]]]:
    """Setups and kills of all chains, drawn by a fixed seed."""
    draw = random.Random(20)
    if quick:
        yield (3, "bf16"), [_event("write", 1, 6), _event("step", 0, 9), _event("latest", 0, 1),
                            _timed("launcher", 0.3, False)]
        yield (2, "bf16"), IN_ROLLBACK[2:4]
        return
    names = [name for name in EVENTS if name not in ("load", "rollback")] * 2
    draw.shuffle(names)
    who = [f"rank {number % 2}" for number in range(8)] + ["all"] * 5 + ["launcher"] * 5
    draw.shuffle(who)
    for number in range(9):
        kills = [_drawn_event(names.pop(), draw), _timed(who.pop(), draw.random(), False),
                 _drawn_event(names.pop(), draw),
                 _timed(who.pop(), draw.random(), number % 2 == 0)]
        if number % 3 == 0:  # needs a checkpoint to be loaded
            kills.insert(3, _event("load", draw.randrange(2), 1))
        yield SETUPS[number % len(SETUPS)], kills
    yield from (((2, "bf16"), IN_ROLLBACK), ((3, "fp32"), IN_ROLLBACK))


def _drawn_event(name: str, draw: random.Random) -> dict[str, Any]:
    rank = 0 if name in ONLY_RANK_0 else draw.randrange(2)
    return _event(name, rank, draw.randint(1, LARGEST[name]))


def _event(name: str, rank: int, count: int) -> dict[str, Any]:
    return {"what": f"{name} x {count}, rank {rank}",
            "event": {"name": name, "rank": rank, "count": count}}


def _timed(who: str, share: float, starting: bool) -> dict[str, Any]:
    """After ``share`` of two seconds of training, or of the eight seconds that a start takes."""
    after = share * (8.0 if starting else 2.0)
    return {"what": f"{who} {after:.2f} s into {'its start' if starting else 'training'}",
            "event": None, "who": who, "after_s": after, "starting": starting}


def _watch(launcher: subprocess.Popen[bytes], notes: Path, kill: dict[str, Any] | None, ranks: int,
           attempt: Attempt) -> None:
    """Wait for the launcher and its ranks to end; kill as planned."""
    began, due, victims = time.monotonic(), None, {}
    starting = bool(kill and kill.get("starting"))
    while launcher.poll() is None or any(process.is_running() and process.status() != "zombie"
                                         for process in victims.values()):
        if launcher.poll() is None:
            for process in psutil.Process(launcher.pid).children():
                victims[process.pid] = process
        if kill and kill["event"] is None and attempt.killed is None:
            if due is None and len(victims) == ranks and (starting or _trained(notes)):
                due = time.monotonic() + kill["after_s"]
            if due is not None and time.monotonic() >= due and launcher.poll() is None:
                attempt.killed = time.time()
                _kill(kill["who"], launcher, list(victims.values()))
        if time.monotonic() - began > TIMEOUT_S:
            _kill("all", launcher, list(victims.values()))
            launcher.kill()
        time.sleep(0.01)
    attempt.status, attempt.ended = launcher.wait(), time.time()
    if attempt.status == 0:
        attempt.killed = None  # it had just finished


def _trained(notes: Path) -> bool:
    return any('"step"' in path.read_text() for path in notes.glob("notes-*.jsonl"))


def _kill(who: str, launcher: subprocess.Popen[bytes], ranks: list[psutil.Process]) -> None:
    if who == "launcher":
        launcher.kill()
        return
    ranks = sorted(ranks, key=lambda process: process.create_time())
    for process in ranks if who == "all" else [ranks[int(who.split()[1])]]:
        if process.is_running():
            process.kill()


def _read_notes(notes: Path, ranks: int, attempt: Attempt) -> None:
    for rank in range(ranks):
        marks = {}
        for row in noted(notes / f"notes-{rank}.jsonl"):
            if "mark" in row:
                marks[row["mark"]] = row["time"]
            else:
                attempt.samples |= dict(zip(row["positions"], row["scans"], strict=True))
        attempt.killed = marks.pop("killed", attempt.killed)
        attempt.marks[rank] = marks


def _restart(killed: Attempt, after: Attempt) -> dict[str, float] | None:
    """Seconds of each part from the kill to the first new step of the slower rank."""
    slow = max(after.marks.values(), key=lambda marks: marks.get("step", 0.0))
    if killed.killed is None or any("step" not in marks for marks in after.marks.values()):
        return None
    ends = [killed.killed, killed.ended, slow["process"], slow["imports"], slow["world"],
            slow["engine"], min(slow.get("load", slow["engine"]), slow["step"]), slow["step"]]
    return dict(zip(PARTS, [b - a for a, b in itertools.pairwise(ends)], strict=True))


IN_ROLLBACK = [_event("rollback", place % 2, place) for place in range(1, 6)]


# ---- report --------------------------------------------------------------------------------------

def _report(chains: list[dict[str, Any]], elastic: list[dict[str, Any]]) -> dict[str, Any]:
    print_table(("chain", "zero", "dtype", "kills", "bit-equal"),
                [(row["name"], row["zero"], row["dtype"], "; ".join(row["kills"]),
                  "yes" if row["equal"] else "NO") for row in chains])
    print_table(("elastic", "dtype", "gates", "largest difference of a loss", "same samples",
                 "within"),
                [(row["case"], row["dtype"], "yes" if row["gated"] else "no", row["apart"],
                  str(row["same_samples"]), "yes" if row["close"] else "NO") for row in elastic])
    restarts = [parts for row in chains for parts in row["restarts"]]
    totals = [sum(parts.values()) for parts in restarts]
    medians = {part: statistics.median(parts[part] for parts in restarts) for part in PARTS}
    print_table(("from kill to step", *PARTS, "total"),
                [("median s", *medians.values(), statistics.median(totals)),
                 ("largest s", *(max(parts[part] for parts in restarts) for part in PARTS),
                  max(totals))])
    kills = sum(len(row["kills"]) for row in chains)
    equal = all(row["equal"] for row in chains) and all(row["close"] for row in elastic)
    return {"equal_runs": int(equal), "kill_to_step_s": statistics.median(totals),
            "kill_to_step_max_s": max(totals), "kills": kills, "parts_s": medians,
            "elastic": {f"{row['case']} {row['dtype']} {'gated' if row['gated'] else 'smooth'}":
                        row["apart"] for row in elastic}}
