"""compare: which way of training says most of people, at equal CPU seconds.

Frozen before the first result:
  people     _people.py: 500 to learn from, 200 to choose by, 500 tested, on the 3 mm grid; seed 14,
             fold 0, nuisance of dose "medium" (--dose: small, large).  T1w and T2w of all, FLAIR of
             a third.  Effect sizes are those of data_prep/synth/cohort.py
  sources    the twelve real label maps where they are at hand, else sixteen from the template;
             split first (7, 2, 3 and 10, 2, 4), then mixed within a split
  model      size tiny, tokens of 18 mm, 416 of them, 8 scans a step, fp32, one thread
             (--size small, for a GPU: tokens of 9 mm, 3000 of them, bf16; seconds are the clock's)
  budget     equal CPU seconds of training, 120 (--budget: 60, 360): steps are the budget over the
             measured CPU seconds of a step of each recipe.  A frozen teacher's training counts: a
             quarter of the budget
  tuning     none here: rate 5e-4 for the present sparse JEPA and 2e-3 for all else, as val chose
             among 5e-4, 1e-3, 2e-3 for the table of quality.py; new recipes take MAE's rate
  seeds      0, 1, 2 of weights, order and masks; of a first look 0 alone.  3 and 4 were added
             after the first results
  probes     on embeddings as users get them (downstream/pooling.py), or on atoms pooled alike:
             ridge and logistic, from 500 and from 100 people; nearest people; T1w to T2w and FLAIR;
             the T2w scan of the same session among 100; a linear token head for segmentation
  primary    mean of age R2, diagnosis AUROC, Dice and retrieval, each over its standard deviation
             between the methods of the table
  interval   95 %, 1000 draws of source person, then person in it, and seed; paired differences to
             MAE with the tissue head

Added after the first results, and so exploratory: codes of a session (_session.py), on the weights
of MAE with the head, of whose budget a code has 30 s.  Settings by the people of val, seed 0.  Then
the aim of the session in the encoder, curves of intensity, slices and one modality, with settings
set once; these leave the unit of the endpoint as it was (_compare_table.LATER).

Departures, such as the rate of a shared code, are told in docs/results/compare.md.

What is on trial and not in the package stands in _recipes.py.  Beside them: ridge on volumes that
a simple program finds (_compare_table.py) and on the true ones.

With --feed the same is made of that feed and its labels, with no synthetic part.  Every run keeps a
folder below --work (default build/bench-compare); what is finished is not done again, and
--finished shows what there is.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

from neurojepa.downstream.sessions import NO_SESSION
from neurojepa.errors import ConfigError, NeurojepaError
from neurojepa.feed.format import open_feed
from tools.bench import _compare_table
from tools.bench._compare_table import DIVERGED
from tools.bench._people import Cohort, described, make_people
from tools.bench._runs import claim, command, make_all, write_recipe
from tools.bench.common import ROOT, machine

RATE = 2e-3
SINGLE = {"objective.masks": {"scales": [[500, 0.0, 0.001]]}}  # one mask, of single tokens
MAE = {"objective.method": "mae", "objective.tissue_weight": 1.0}
SESSION = MAE | {"objective.method": "jepa", "data.cross_modal": 1.0,  # _recipes.SessionMAE
                 "objective.sparse.l1": 2e-3}
T1W = {"data.modalities": ["T1w"]}
TEACHER_SHARE = 0.25  # of the budget
CODE_SECONDS = 30.0  # of the budget, for a code of the session; the weights below have the others
RUN = "tools.bench._compare_run"


@dataclass(frozen=True)
class Arm:
    """A way of training: what its recipe changes, and what _recipes.py does."""

    recipe: dict[str, Any] = field(default_factory=dict)
    rate: float = RATE
    changes: dict[str, Any] = field(default_factory=dict)
    teacher: bool = False
    trained: bool = True
    code: str | None = None  # a second stage of _session.py, on this recipe with these changes
    first: str = "first stage"  # the name of what the code is learnt on


ARMS = {
    "random init": Arm(trained=False),
    "MAE with tissue head": Arm(MAE),
    "tissue head alone": Arm(SINGLE, changes={"head_alone": True}),
    "sparse JEPA": Arm(rate=5e-4),
    "one mask": Arm(SINGLE),
    "frozen teacher": Arm(SINGLE | {"objective.spread": 0.0}, teacher=True),
    "place-centred": Arm(SINGLE, changes={"centred": True}),
    "shared code": Arm(SINGLE | {"objective.sparse.visible": 1.0}, rate=1e-3),
    # added after the first results
    "session code": Arm(MAE, trained=False, code="sparse"),
    "session code, dense": Arm(MAE, trained=False, code="dense"),
    "session code, wide dense": Arm(MAE, trained=False, code="wide"),
    "session code, split": Arm(MAE, trained=False, code="split"),
    "code of own tokens": Arm(MAE, trained=False, code="own"),
    "session aim": Arm(SESSION, changes={"variant": "session"}),
    "session aim, session code": Arm(SESSION, changes={"variant": "session"}, trained=False,
                                     code="sparse", first="first stage, session aim"),
    "session code with curves": Arm(MAE, changes={"variant": "curves"}, trained=False,
                                    code="sparse", first="first stage, curves"),
    "session code, 2D slices": Arm(MAE, changes={"variant": "slices"}, trained=False,
                                   code="sparse", first="first stage, slices"),
    "session code, T1w alone": Arm(MAE | T1W, trained=False, code="T1w",
                                   first="first stage, T1w"),
}


@dataclass(frozen=True)
class Size:
    """What is trained."""

    token_mm: int
    recipe: dict[str, Any]


SIZES = {"tiny": Size(18, {}),
         "small": Size(9, {"model.size": "small", "model.token_budget": 3000,
                           "train.dtype": "bf16"})}
DECIDED = ("random init", "MAE with tissue head", "sparse JEPA", "session code",
           "session code, wide dense")


@dataclass(frozen=True)
class Plan:
    """How much of it."""

    cohort: Cohort
    seconds: float
    seeds: tuple[int, ...]
    arms: tuple[str, ...] = tuple(ARMS)
    size: str = "tiny"


FULL = Plan(Cohort(), 120.0, (0, 1, 2, 3, 4))
QUICK = Plan(Cohort(train=16, val=6, test=10), 8.0, (0,), ("random init", "MAE with tissue head",
                                                         "frozen teacher", "shared code"))


@dataclass
class Job:
    """A run to make, in its folder."""

    folder: Path
    arm: Arm
    seed: int
    seconds: float
    teacher: Path | None = None
    first: bool = False  # others need it


def run(quick: bool, official: str | None, work: str | None = None, feed: str | None = None,
        finished: bool = False, dose: str = "medium",
        budget: float | None = None, size: str = "tiny") -> dict[str, Any]:
    """Make what is missing, or nothing if ``finished``, and print the tables; returns them."""
    if feed and dose != "medium":
        raise ConfigError(f"--dose {dose}: of people that are made, and --feed {feed} has its own; "
                          "leave one of them out")
    plan = QUICK if quick else FULL
    plan = replace(plan, cohort=replace(plan.cohort, dose=dose))
    name = ("quick" if quick else "full") + ("" if dose == "medium" else f"-{dose}")
    people = folder = Path(work or ROOT / "build" / "bench-compare") / name
    if size != "tiny":
        plan, folder = replace(plan, size=size, arms=DECIDED), people / size
    if budget and budget != plan.seconds:
        folder = folder / f"budget-{budget:g}"
    if finished and not (folder / "plan.json").exists():
        raise ConfigError(f"--finished: {folder} holds no runs; leave --finished out to make them, "
                          "or name the folder of others by --work")
    if feed:
        open_feed(feed)  # before the folder is claimed for it
    print(machine())
    claim(people, plan_text(replace(plan, size="tiny"), feed))
    plan = replace(plan, seconds=float(budget or plan.seconds))
    claim(folder, plan_text(plan, feed))
    if not finished:
        measure(plan, people, folder, feed)
    runs = folder / "runs"
    return _compare_table.tables({arm: [runs / folder_of(arm, seed) for seed in plan.seeds]
                                  for arm in plan.arms}, runs)


def measure(plan: Plan, people: Path, work: Path, feed: str | None = None) -> None:
    """All runs of a plan, below ``work``; of a feed at hand or of the plan's people."""
    if feed is None:
        feed = make_people(plan.cohort, people, len(os.sched_getaffinity(0)))
    _compare_table.ridges(open_feed(feed), work / "runs")
    jobs = [job for seed in plan.seeds for arm in plan.arms
            for job in jobs_of(plan, work, arm, seed)]
    first = {job.folder: job for job in jobs if job.first}
    runner = Runner(feed, people if plan.size == "tiny" else people / plan.size, size=plan.size)
    for stage in (list(first.values()), [job for job in jobs if not job.first]):
        runner.make(stage)


def plan_text(plan: Plan, feed: str | None) -> str:
    """What a folder of runs is made for; more seeds and arms may come later."""
    return json.dumps({"people": feed or described(plan.cohort), "seconds": plan.seconds}
                      | ({"size": plan.size} if plan.size != "tiny" else {}), indent=1)


# ---- runs ----------------------------------------------------------------------------------------

def folder_of(arm: str, seed: int) -> str:
    return f"{arm.replace(' ', '-').lower()}-{seed}"


def jobs_of(plan: Plan, work: Path, name: str, seed: int) -> list[Job]:
    """The runs that an arm needs, its teacher first."""
    arm, runs = ARMS[name], work / "runs"
    if arm.code:
        first = runs / folder_of(arm.first, seed)
        return [Job(first, Arm(arm.recipe, changes=arm.changes | {"unread": True}), seed,
                    plan.seconds - CODE_SECONDS, first=True),
                Job(runs / folder_of(name, seed), arm, seed, 0, first / "weights")]
    if not arm.teacher:
        return [Job(runs / folder_of(name, seed), arm, seed, plan.seconds)]
    teacher = runs / f"teacher-{seed}"
    return [Job(teacher, Arm(MAE, changes={"unread": True}), seed,
                TEACHER_SHARE * plan.seconds, first=True),
            Job(runs / folder_of(name, seed), arm, seed, (1 - TEACHER_SHARE) * plan.seconds,
                teacher / "weights")]


class Runner:
    """Makes runs, each in a process of one thread."""

    def __init__(self, feed: str, work: Path, module: str = RUN, size: str = "tiny") -> None:
        self.feed, self.work, self.module = feed, work, module
        self.measuring = Lock()  # a cost is measured once an arm, and one at a time
        patch = round(SIZES[size].token_mm / open_feed(feed).grid.spacing_mm)
        self.overrides = {"model.patch_voxels": patch, **SIZES[size].recipe}

    def make(self, jobs: list[Job]) -> None:
        """Those that are not finished."""
        make_all([job for job in jobs if not any(
            (job.folder / name).exists() for name in ("scores.npz", DIVERGED))], self._make)

    def _make(self, job: Job) -> str:
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "run.json").write_text(json.dumps(
            job.arm.changes | ({"teacher": str(job.teacher)} if job.teacher else {})
            | ({"code": job.arm.code} if job.arm.code else {})))
        if not job.arm.trained:
            (job.folder / "untrained").touch()
        steps = self._steps(job) if job.arm.trained else 1
        self._write(job, steps, job.folder)
        try:
            command(job.folder / "log.txt", self.module, str(job.folder))
        except NeurojepaError:
            last = (job.folder / "log.txt").read_text().strip().rpartition("\n")[2]
            if not any(said in last for said in ("training diverged", NO_SESSION)):
                raise
            (job.folder / DIVERGED).write_text(last)  # a result too, which the table names
        return job.folder.name

    def _steps(self, job: Job) -> int:
        """The budget over the cost of a step, which is measured once an arm and kept."""
        arm = job.folder.name.rpartition("-")[0]
        file = self.work / "runs" / f"{arm}.cost"
        with self.measuring:
            if not file.exists():
                folder = job.folder / "cost"
                self._write(job, 1000, folder)
                (folder / "run.json").write_text((job.folder / "run.json").read_text())
                command(folder / "log.txt", self.module, str(folder), "--cost")
                file.parent.mkdir(parents=True, exist_ok=True)  # runs of another budget lie deeper
                file.write_text((folder / "log.txt").read_text().splitlines()[-1])
        return max(10, round(job.seconds / float(file.read_text()) / 10) * 10)

    def _write(self, job: Job, steps: int, folder: Path) -> None:
        write_recipe(folder, self.feed, steps=steps, rate=job.arm.rate, seed=job.seed,
                     overrides=self.overrides | job.arm.recipe)
