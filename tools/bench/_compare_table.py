"""Tables of the comparison, from the predictions that runs have stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.synth import codes
from neurojepa.downstream.embed import describe, select_rows
from neurojepa.downstream.stats import auroc, r_squared
from neurojepa.errors import DataError
from neurojepa.feed.format import Feed
from neurojepa.feed.loader import SampleReader
from tools.bench._compare_run import ATOMS, read_people
from tools.bench._quality_run import finish
from tools.bench._quality_table import Arrays, scores_of
from tools.bench._runs import TRUE_VOLUMES, features_of, tissue_of_codes, true_volumes
from tools.bench.common import print_table

Metric = Callable[[np.ndarray, np.ndarray], float]
REFERENCE = "MAE with tissue head"
CONTROLS = ("random init", "tissue head alone", REFERENCE,  # that others are compared with
            "session code, wide dense", "session code")
# rows that came after the endpoint had been published: its unit stays what it was without them
LATER = ("session aim", "session aim: atoms", "session aim, session code",
         "session code with curves", "session code, 2D slices", "session code, T1w alone")
DRAWS = 1000
DIVERGED = "diverged.txt"  # in the folder of a run that came to nothing, with its last line
ZONES = {"ventricles": codes.VENTRICLES, "hippocampi": codes.HIPPOCAMPI, "cortex": codes.CORTEX,
         "white matter": codes.WHITE}
ZONE_SHARE = 0.1  # of the label maps of train that have a structure at a voxel of its zone


def _mean_of_second(_: np.ndarray, value: np.ndarray) -> float:
    return float(np.nanmean(value))


PRIMARY: dict[str, tuple[str, Metric]] = {
    "age R2": ("age", r_squared), "diagnosis AUROC": ("diagnosis", auroc),
    "Dice": ("segmentation", _mean_of_second), "retrieval": ("retrieval", _mean_of_second)}
# retrieval is near to what codes of a session are taught
ENDPOINTS = {"primary endpoint": tuple(PRIMARY),
             "without retrieval": tuple(name for name in PRIMARY if name != "retrieval")}
COLUMNS = PRIMARY | {
    "age R2, 100 people": ("age, 100 people", r_squared),
    "diagnosis AUROC, 100": ("diagnosis, 100 people", auroc),
    "age R2, nearest": ("age, nearest", r_squared),
    "age R2 to T2w": ("age on T2w", r_squared), "age R2 to FLAIR": ("age on FLAIR", r_squared),
    "sex AUROC": ("sex", auroc), "lesions R2": ("lesion_ml", r_squared),
    "small vessel AUROC": ("small_vessel", auroc), "contrast R2": ("t1w_contrast", r_squared),
    "texture R2": ("texture", r_squared), "Dice, place told": ("placed", _mean_of_second)}
FIGURES = {"place": "place", "place, modality": "place and modality", "scan": "scan",
           "rank of people": "participation", "rank of tokens": "participation of tokens",
           "r with head size": "size (test)", "active atoms": "active"}


def tables(runs: dict[str, list[Path]], folder: Path) -> dict[str, Any]:
    """Print and return all tables, of the runs that are finished."""
    found = {name: [scores_of(each) | {"train_cpu_s": np.array(cpu_of(each))}
                    for each in folders if (each / "scores.npz").exists()]
             for name, folders in runs.items()}
    for each in sorted(folder.glob(f"*/{DIVERGED}")):
        print(f"{each.parent.name}: {each.read_text()}")
    found = {name: scores for name, scores in found.items() if scores}
    found = with_atoms(found)
    rows = {name: {title: mean_of(scores, *column) for title, column in COLUMNS.items()}
            for name, scores in found.items()}
    beside = {f"ridge on {name} volumes": [scores_of(folder / f"ridge-{name}")]
              for name in ("automatic", "true") if (folder / f"ridge-{name}/scores.npz").exists()}
    show = rows | {name: {title: mean_of(scores, *column) for title, column in COLUMNS.items()}
                   for name, scores in beside.items()}
    print("\nmeans over seeds")
    print_table(("", "seeds", "CPU s", *COLUMNS), [
        (name, len((found | beside)[name]), _mean_cpu((found | beside)[name]), *row.values())
        for name, row in show.items()])
    primary = compared(found)
    for title, endpoint in primary.items():
        print(f"\n{title}, in standard deviations between methods, and 95 % intervals")
        print_table(("", "seeds", "value", *(f"above {name}" for name in CONTROLS)), [
            (name, len(found[name]), *(_interval(row.get(key)) for key in ("value", *CONTROLS)))
            for name, row in endpoint.items()])
    figures = {name: {title: _mean([scores[key] for scores in each if key in scores])
                      for title, key in FIGURES.items()} for name, each in found.items()}
    print("\nwhat tokens and people differ by: shares of the variance of brain tokens, and ranks")
    print_table(("", *FIGURES), [(name, *row.values()) for name, row in figures.items()])
    return {"table": show, "primary": primary, "figures": figures,
            "seeds": {name: len(scores) for name, scores in found.items()},
            "people_tested": {name: len(set(scores[0]["age/people"].tolist()))
                              for name, scores in found.items() if "age/people" in scores[0]}}


def cpu_of(folder: Path) -> float:
    """CPU seconds that a finished run was trained for, its teacher's with them."""
    own = float(scores_of(folder)["train_cpu_s"])
    teacher = json.loads((folder / "run.json").read_text()).get("teacher")
    return own + cpu_of(folder.parent / Path(teacher).parent.name) if teacher else own


def with_atoms(found: dict[str, list[Arrays]]) -> dict[str, list[Arrays]]:
    """A row more where a run was read by its atoms; what is read token by token is the same."""
    rows: dict[str, list[Arrays]] = {}
    for name, runs in found.items():
        rows[name] = runs
        if any(key.startswith(ATOMS) for key in runs[0]):
            rows[f"{name}: atoms"] = [
                {key: value for key, value in run.items()
                 if key.startswith(("segmentation/", "placed/", "train_cpu_s"))}
                | {key.removeprefix(ATOMS): value for key, value in run.items()
                   if key.startswith(ATOMS)} for run in runs]
    return rows


def mean_of(runs: list[Arrays], way: str, metric: Metric) -> float | None:
    """A metric's mean over seeds; None where a run lacks it."""
    if not all(f"{way}/truth" in run for run in runs):
        return None
    return _mean([metric(run[f"{way}/truth"], run[f"{way}/predicted"]) for run in runs])


# ---- the primary endpoint ------------------------------------------------------------------------

def compared(found: dict[str, list[Arrays]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The endpoints of each method that has all their parts: value, low and high, alone and above
    others.  Spreads between methods are those of all people and seeds, also in draws, and without
    ``LATER`` ones, which so move no others."""
    methods = [name for name, runs in found.items() if all(
        mean_of(runs, way, metric) is not None for way, metric in PRIMARY.values())]
    if len(methods) < 2:
        return {}
    parts = np.array([[mean_of(found[name], *column) for column in PRIMARY.values()]
                      for name in methods], float)
    first = [name not in LATER for name in methods]
    spread = parts[first if sum(first) > 1 else slice(None)].std(0, ddof=1) + 1e-9
    every_draw = np.stack(draws(found, methods)) / spread
    endpoints: dict[str, dict[str, dict[str, Any]]] = {}
    for title, names in ENDPOINTS.items():
        taken = [list(PRIMARY).index(name) for name in names]
        value, drawn = (each[..., taken].mean(-1) for each in (parts / spread, every_draw))
        rows = endpoints[title] = {}
        for k, name in enumerate(methods):
            rows[name] = {"value": _with_interval(value[k], drawn[:, k])}
            for other in CONTROLS:
                if other in methods and other != name:
                    j = methods.index(other)
                    rows[name][other] = _with_interval(value[k] - value[j],
                                                       drawn[:, k] - drawn[:, j])
    return endpoints


def draws(found: dict[str, list[Arrays]], methods: list[str], seed: int = 0) -> list[np.ndarray]:
    """[methods, parts] for each draw of source person, person and seed, alike for all methods."""
    rng = np.random.default_rng(seed)
    first = found[methods[0]][0]
    people, groups = first["age/people"], first["age/groups"]
    members = [np.unique(people[groups == group]) for group in np.unique(groups)]
    result = []
    for _ in range(DRAWS):
        chosen = np.concatenate([rng.choice(members[k], len(members[k])) for k in
                                 rng.integers(len(members), size=len(members))])
        names, times = np.unique(chosen, return_counts=True)
        drawn = np.zeros((len(methods), len(PRIMARY)))
        luck = rng.random(max(len(found[name]) for name in methods))
        for k, name in enumerate(methods):
            runs = found[name]
            seeds = [runs[int(u * len(runs))] for u in luck[:len(runs)]]
            for j, (way, metric) in enumerate(PRIMARY.values()):
                rows = _rows_of(runs[0][f"{way}/people"], names, times)
                drawn[k, j] = np.mean([metric(run[f"{way}/truth"][rows],
                                              run[f"{way}/predicted"][rows]) for run in seeds])
        if np.isfinite(drawn).all():
            result.append(drawn)
    return result


def _rows_of(people: np.ndarray, names: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Rows of people, each as many times as the person was drawn."""
    at = np.searchsorted(names, people).clip(max=len(names) - 1)
    return np.repeat(np.arange(len(people)), np.where(names[at] == people, times[at], 0))


def _with_interval(value: float, drawn: np.ndarray) -> list[float]:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return [float(value), float(low), float(high)]


def _interval(found: list[float] | None) -> str | None:
    return None if found is None else f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"


def _mean(values: list[Any]) -> float | None:
    return float(np.mean(values)) if values else None


def _mean_cpu(runs: list[Arrays]) -> float | None:
    return _mean([run["train_cpu_s"] for run in runs if "train_cpu_s" in run])


# ---- ridge on volumes ----------------------------------------------------------------------------

def ridges(feed: Feed, folder: Path) -> None:
    """Predictions from volumes: those a simple program finds, and the true ones where labels have
    them."""
    rows = select_rows(feed, "T1w", None)
    kinds = {"automatic": lambda: automatic_volumes(feed, rows)}
    if set(TRUE_VOLUMES) <= set(feed.labels()["name"].to_pylist()):
        kinds["true"] = lambda: true_volumes(feed, rows)
    for name, measured in kinds.items():
        target = folder / f"ridge-{name}"
        if (target / "scores.npz").exists():
            continue
        try:
            values = measured()
        except DataError as error:
            print(f"ridge on {name} volumes: left out: {error}")
            continue
        target.mkdir(parents=True, exist_ok=True)
        finish(target, read_people(describe(feed, rows, features_of(values)), feed))


def automatic_volumes(feed: Feed, rows: np.ndarray) -> np.ndarray:
    """[n, 13] ml of the brain mask, and of dark, middle and bright tissue in zones of structures.

    A structure's zone is where some label maps of train have it.

    Raises
    ------
    DataError
        No scan of train has a label map.
    """
    reader, volumes = SampleReader(feed), []
    zones = zones_of(feed, reader)
    for row in rows.tolist():
        image = reader.image(row)
        counts, nearest = tissue_of_codes(image)
        kind = np.concatenate([[3], nearest, [3]])[image]  # 3: no brain
        volumes.append([counts.sum(), *(float((kind[zone] == k).sum())
                                        for zone in zones for k in range(3))])
    return np.array(volumes) * feed.grid.spacing_mm**3 / 1000


def zones_of(feed: Feed, reader: SampleReader) -> list[np.ndarray]:
    """bool [X, Y, Z] of each of ``ZONES``."""
    rows = [row for row, (split, length) in enumerate(zip(
        feed.index["split"].to_pylist(), feed.index["label_length"].to_pylist(), strict=True))
        if split == "train" and length]
    if not rows:
        raise DataError(f"{feed.uri}: no scan of split train has a label map to take zones from")
    share = np.zeros((len(ZONES), *feed.grid.shape))
    for row in rows:
        label = reader.label(row)
        share += np.stack([np.isin(label, group) for group in ZONES.values()])
    return list(share / len(rows) >= ZONE_SHARE)
