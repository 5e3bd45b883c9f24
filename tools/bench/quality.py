"""quality: what representations are good for, ours beside what they are measured against.

Frozen before the first table:
  cohort     data_prep synth, version 2 of its recipe, anatomies derived from the MNI152 template
             (16), 2 mm; the effect sizes are the constants of data_prep/synth/cohort.py.  Not the
             people of seed 0, by whom defaults were chosen
  split      by anatomy, under the key below: of the 16, 10 train, 1 is for choices (val), 5 test;
             the first number from 100 on that gives 1 or 2 for val, 5 for test with 50 to 75
             people, and no test anatomy of the first look; chosen before any model was trained
  way        prepare --preset quick, pack --grid 3mm; T1w, T2w and FLAIR
  budget     the same steps and scans a step for every method, the tiny encoder, 416 tokens of
             18 mm (on average 99.8 % of the voxels of a brain)
  dense      the plain JEPA: no sparse code, no spread of the latents, no tissue head
  tuning     sparse and dense JEPA, MAEs and CNN: three learning rates each at seed 0, chosen by the
             age error on val; the CNN's is chosen for age and kept for its other labels
  probes     on frozen embeddings (neurojepa/downstream/pooling.py): ridge, logistic; fitted on T1w
             scans of train, tested on those of test, or on its T2w and FLAIR (age, sex);
             segmentation: _quality_run.py
  control    the same on the plain mean over tokens, which measures head size: _quality_readout.py
  intervals  95 %, anatomies drawn first, then people in each; of the mean over seeds

CNN: a network per label, scored by its own head.  Ridge (automatic): volumes of the brain mask and
of three tissue classes of the prepared T1w.  Ridge (true): the volumes of the label maps, a
ceiling, for people are made from them.  Atlas: the mean share of each patch over train.  The column
"place told" came after a first small table, in which every token map stayed below the atlas.

Every run keeps a folder below --work (default build/bench-quality); what is finished is not done
again, so it can be interrupted.  The whole takes about 140 minutes on 2 cores.  The longer runs,
those of finer tokens, of single-token masks and of MAE with our tissue head came after the main
table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neurojepa.downstream.embed import describe, select_rows
from neurojepa.downstream.stats import mean_absolute_error
from neurojepa.feed.format import Feed, open_feed
from neurojepa.feed.loader import SampleReader
from tools.bench._quality_table import (
    FIGURES,
    Arrays,
    both_poolings,
    changes_by_pooling,
    figures_of,
    plain,
    row_of,
    scores_of,
    show,
)
from tools.bench._runs import (
    claim,
    command,
    features_of,
    make_all,
    tissue_of_codes,
    true_volumes,
    write_recipe,
)
from tools.bench.common import ROOT, machine, print_table

COHORT_SEED = 1
KEY = "anatomies of the quality table 2683"
CNN_LABELS = {"age": "age", "diagnosis": "diagnosis", "sex": "sex", "lesions": "lesion_ml"}
METHODS: dict[str, dict[str, Any]] = {
    "sparse JEPA": {},
    "tissue head alone": {},
    "dense JEPA": {"objective.sparse.code": "identity", "objective.spread": 0.0,
                   "objective.tissue_weight": 0.0},
    "MAE": {"objective.method": "mae"},
    "MAE with tissue head": {"objective.method": "mae", "objective.tissue_weight": 1.0},
    "CNN": {"objective.method": "cnn", "model.token_budget": None, "data.modalities": ["T1w"]},
}
FINE = {"model.patch_voxels": 3, "model.token_budget": 2400}
ABLATIONS: dict[str, dict[str, Any]] = {  # of the sparse JEPA where nothing else is said
    "no spread": {"objective.spread": 0.0},
    "spread 0.01": {"objective.spread": 0.01},
    "gated code": {"objective.sparse.code": "gated"},
    "no experts": {"model.moe": False},
    "gate per head": {"model.head_gate": True},
    "lambda 0": {"objective.sparse.l1": 0.0},
    "lambda 1e-2": {"objective.sparse.l1": 1e-2},
    "budget 320": {"model.token_budget": 320},
    "all tokens": {"model.token_budget": None},
    "air weighs as brain": {"objective.background_weight": 1.0},
    "by counts": {"data.balance": 1.0},
    "cross-modal half": {"data.cross_modal": 0.5},
    "region masks half": {"objective.masks.region_share": 0.5},
    "no tissue head": {"objective.tissue_weight": 0.0},
    "no augmentation": {"objective.augment": {"gamma": 0, "noise": 0, "bias_field": 0}},
    "scrambled coordinates": {},
    "slower average": {"optim.ema": 0.998},
    "4 times the steps": {"train.steps": 1600},
    "MAE, 4 times the steps": METHODS["MAE"] | {"train.steps": 1600},
    "MAE with tissue head, 9 times the steps": METHODS["MAE with tissue head"]
    | {"train.steps": 3600},
    "single-token masks": {"objective.masks": {"scales": [[500, 0.0, 0.001]] * 3}},
    "9 mm tokens": FINE,
    "MAE, 9 mm tokens": METHODS["MAE"] | FINE,
    "random init, 9 mm tokens": FINE,
}


@dataclass(frozen=True)
class Plan:
    """How much of it."""

    people: int
    steps: int
    seeds: tuple[int, ...]
    rates: tuple[float, ...]  # learning rates that are tried at the first seed
    methods: tuple[str, ...] = tuple(METHODS)
    labels: tuple[str, ...] = tuple(CNN_LABELS)
    ablations: tuple[str, ...] = tuple(ABLATIONS)
    spacing_mm: float = 2.0
    batch: int = 8


FULL = Plan(people=200, steps=400, seeds=(0, 1, 2), rates=(5e-4, 1e-3, 2e-3))
QUICK = Plan(people=16, steps=4, seeds=(0,), rates=(1e-3,), methods=("sparse JEPA", "MAE", "CNN"),
             labels=("age",), ablations=("scrambled coordinates",), spacing_mm=4.0)


@dataclass
class Job:
    """A run to make: its folder and recipe; ``steps`` 0 leaves the model as it begins."""

    folder: Path
    overrides: dict[str, Any] = field(default_factory=dict)
    rate: float = 1e-3
    seed: int = 0
    scrambled: bool = False
    head_alone: bool = False
    untrained: bool = False


def run(quick: bool, official: str | None, work: str | None = None) -> dict[str, Any]:
    """Make what is missing and print the tables; returns them."""
    folder = Path(work or ROOT / "build" / "bench-quality") / ("quick" if quick else "full")
    return measure(QUICK if quick else FULL, folder)


def measure(plan: Plan, work: Path) -> dict[str, Any]:
    """The table of a plan, below ``work``."""
    feed = prepared(plan, work)
    todo = [Job(work / "runs" / "random-0", untrained=True)]
    todo += [job(plan, work, method, rate=rate) for method in plan.methods for rate in plan.rates]
    Runs(plan, feed.uri).make(todo)
    chosen = {method: choose_rate(plan, work, method) for method in plan.methods}
    Runs(plan, feed.uri).make(list(remaining(plan, work, chosen)))
    return tables(plan, work, chosen)


def prepared(plan: Plan, work: Path) -> Feed:
    """The plan's feed below ``work``, and the scores of what needs no training."""
    print(machine())
    text = json.dumps(asdict(plan))
    print(text)
    claim(work, text)
    feed = open_feed(make_feed(plan, work))
    ridges(feed, work)
    return feed


# ---- runs ----------------------------------------------------------------------------------------

def job(plan: Plan, work: Path, method: str, rate: float, seed: int = 0,
        label: str = "age") -> Job:
    """A run of a method; a CNN has one for each label."""
    overrides = dict(METHODS[method])
    name = method.replace(" ", "-").lower()
    if method == "CNN":
        overrides["objective.label"], name = CNN_LABELS[label], f"{name}-{label}"
    return Job(work / "runs" / f"{name}-lr{rate:g}-{seed}", overrides, rate, seed,
               head_alone=method == "tissue head alone")


def ablation(work: Path, name: str, chosen: dict[str, float]) -> Job:
    """A run that differs in one thing from a method at the rate chosen for it."""
    rate = chosen["MAE" if name.startswith("MAE") else "sparse JEPA"]
    folder = work / "runs" / f"without-{name.replace(' ', '-')}"
    return Job(folder, ABLATIONS[name], rate, scrambled=name == "scrambled coordinates",
               untrained=name.startswith("random init"))


def remaining(plan: Plan, work: Path, chosen: dict[str, float]) -> Iterator[Job]:
    """Everything but the tuning, the main table first."""
    for seed in plan.seeds:
        yield Job(work / "runs" / f"random-{seed}", seed=seed, untrained=True)
        for method, rate in chosen.items():
            labels = plan.labels if method == "CNN" else ("age",)
            yield from (job(plan, work, method, rate, seed, label) for label in labels)
    for name in plan.ablations:
        yield ablation(work, name, chosen)


class Runs:
    """Makes runs, as many at once as there are cores, each in a process of one thread."""

    def __init__(self, plan: Plan, feed: str) -> None:
        self.plan, self.feed = plan, feed

    def make(self, jobs: list[Job]) -> None:
        """Those that are not finished."""
        make_all([each for each in jobs if not (each.folder / "scores.npz").exists()], self._make)

    def _make(self, each: Job) -> str:
        folder = each.folder
        write_recipe(folder, self.feed, steps=self.plan.steps, rate=each.rate, seed=each.seed,
                     overrides={"data.modalities": ["T1w", "T2w", "FLAIR"]} | each.overrides,
                     batch=self.plan.batch)
        (folder / "run.json").write_text(json.dumps({
            "scrambled": each.scrambled, "head_alone": each.head_alone}))
        if each.untrained:
            (folder / "untrained").touch()
        command(folder / "log.txt", "tools.bench._quality_run", str(folder))
        return folder.name


def make_feed(plan: Plan, work: Path) -> str:
    """The cohort, prepared and packed; returns the feed."""
    cohort, archive, feed = (str(work / name) for name in ("cohort", "archive", "feed"))
    manifest, key = str(work / "manifest.parquet"), work / "key"
    if not (work / "feed" / "feed.json").exists():
        key.touch(mode=0o600)
        key.write_text(KEY)
        for stage in (
            ("synth", "--out", cohort, "--participants", str(plan.people), "--seed",
             str(COHORT_SEED), "--spacing-mm", str(plan.spacing_mm)),
            ("index", "--cohort", "bids", "--name", "quality", "--source", cohort, "--out",
             manifest, "--key", str(key)),
            ("prepare", "--manifest", manifest, "--out", archive, "--preset", "quick"),
            ("pack", "--archive", archive, "--out", feed, "--grid", "3mm"),
        ):
            command(None, "data_prep", *stage)
    return feed


# ---- ridge on volumes ----------------------------------------------------------------------------

def ridges(feed: Feed, work: Path) -> None:
    """Scores of the two ridges on volumes."""
    from tools.bench._quality_run import finish, probed

    rows = select_rows(feed, "T1w", None)
    for name, values in (("ridge-automatic", tissue_volumes(feed, rows)),
                         ("ridge-true", true_volumes(feed, rows))):
        folder = work / "runs" / f"{name}-0"
        if not (folder / "scores.npz").exists():
            folder.mkdir(parents=True, exist_ok=True)
            finish(folder, probed(describe(feed, rows, features_of(values)), feed))


def tissue_volumes(feed: Feed, rows: np.ndarray) -> np.ndarray:
    """[n, 4] ml of the brain mask and of dark, middle and bright tissue in each prepared T1w."""
    reader, volumes = SampleReader(feed), []
    for row in rows.tolist():
        counts, kind = tissue_of_codes(reader.image(row))
        volumes.append([counts.sum(), *(counts[kind == k].sum() for k in range(3))])
    return np.array(volumes) * feed.grid.spacing_mm**3 / 1000


# ---- tables --------------------------------------------------------------------------------------

def choose_rate(plan: Plan, work: Path, method: str) -> float:
    """The learning rate with the least error of age on val."""
    def error(rate: float) -> float:
        found = scores_of(job(plan, work, method, rate).folder)
        if "val age/truth" not in found:  # a cohort too small to choose by
            return 0.0
        return mean_absolute_error(found["val age/truth"], found["val age/predicted"])

    errors = {rate: error(rate) for rate in plan.rates}
    print(f"{method}: error of age on val by learning rate: "
          + ", ".join(f"{rate:g}: {value:.2f}" for rate, value in errors.items()))
    return min(errors, key=lambda rate: errors[rate])


def tables(plan: Plan, work: Path, chosen: dict[str, float]) -> dict[str, Any]:
    """Print and return the main table, the differences and the ablations."""
    main: dict[str, list[Arrays]] = {}
    for method, rate in chosen.items():
        labels = plan.labels if method == "CNN" else ("age",)
        main[method] = [
            {key: value for label in labels for key, value in scores_of(
                job(plan, work, method, rate, seed, label).folder).items()}
            for seed in plan.seeds]
    runs = work / "runs"
    main["random init"] = [scores_of(runs / f"random-{seed}") for seed in plan.seeds]
    for name in ("automatic", "true"):
        main[f"ridge on {name} volumes"] = [scores_of(runs / f"ridge-{name}-0")]
    atlas = main["random init"][0]
    main["atlas"] = [{key.replace("atlas", way): value for key, value in atlas.items()
                      for way in ("segmentation", "placed") if key.startswith("atlas")}]
    table, figures = both_poolings(main), figures_of(main)
    differences = {f"sparse JEPA - {other}": row_of(main["sparse JEPA"], main[other])
                   for other in ("random init", "MAE", "MAE with tissue head", "dense JEPA")
                   if other in main} | changes_by_pooling(main)
    ablations = {name: row_of([scores_of(ablation(work, name, chosen).folder)])
                 for name in plan.ablations}
    if ablations:
        ablations = {"sparse JEPA (this seed)": row_of(main["sparse JEPA"][:1])} | ablations
    for title, rows in ((f"{len(plan.seeds)} seeds", table), ("differences", differences),
                        ("ablations, 1 seed", ablations)):
        if rows:
            print(f"\n{title}")
            show(rows)
    print("\nwhat embeddings and tokens differ by")
    print_table(("", *FIGURES), [(name, *row.values()) for name, row in figures.items()])
    seconds = {name: float(np.nanmean([run["train_cpu_s"] for run in found]))
               for name, found in main.items() if "train_cpu_s" in found[0]}
    print("\nCPU seconds of a training: "
          + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    return {"table": plain(table), "differences": plain(differences),
            "ablations": plain(ablations), "figures": figures, "learning_rates": chosen,
            "train_cpu_s": seconds, "plan": asdict(plan)}
