"""Rows of the quality table, from the predictions that runs have stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from neurojepa.downstream.stats import Score, auroc, mean_absolute_error, r_squared, score
from tools.bench.common import print_table

Metric = Callable[[np.ndarray, np.ndarray], float]
Arrays = dict[str, np.ndarray]
Row = dict[str, Score | None]
PLAIN = "plain mean: "  # before the names of what the plain mean over tokens gave


def _mean_overlap(_: np.ndarray, dice: np.ndarray) -> float:
    return float(np.nanmean(dice))


COLUMNS: dict[str, tuple[str, Metric]] = {  # title: predictions of a run, metric
    "age MAE (years)": ("age", mean_absolute_error),
    "age R2": ("age", r_squared),
    "diagnosis AUROC": ("diagnosis", auroc),
    "sex AUROC": ("sex", auroc),
    "lesions R2": ("lesions", r_squared),
    "segmentation Dice": ("segmentation", _mean_overlap),
    "Dice, place told": ("placed", _mean_overlap),
    "age R2, T1w to T2w": ("age on T2w", r_squared),
    "age R2, T1w to FLAIR": ("age on FLAIR", r_squared),
    "sex AUROC, T1w to T2w": ("sex on T2w", auroc),
    "sex AUROC, T1w to FLAIR": ("sex on FLAIR", auroc),
}


def scores_of(folder: Path) -> Arrays:
    """The stored predictions of a finished run."""
    with np.load(folder / "scores.npz") as stored:
        return dict(stored)


def value_of(way: str, metric: Metric, runs: list[Arrays],
             against: list[Arrays] | None = None) -> Score | None:
    """A metric as the mean over runs, or how much it is above that of others; None if not all
    have it."""
    groups = [runs, against or []]
    if not all(f"{way}/truth" in each for group in groups for each in group) or not runs:
        return None
    predicted = np.stack([each[f"{way}/predicted"] for group in groups for each in group], 1)

    def mean(truth: np.ndarray, guess: np.ndarray, of: slice) -> float:
        return float(np.mean([metric(truth, guess[:, k]) for k in range(*of.indices(
            guess.shape[1]))]))

    def compared(truth: np.ndarray, guess: np.ndarray) -> float:
        ours = mean(truth, guess, slice(0, len(runs)))
        return ours - mean(truth, guess, slice(len(runs), None)) if against else ours

    first = runs[0]
    return score(compared, first[f"{way}/truth"], predicted, first[f"{way}/people"],
                 first[f"{way}/groups"])


def row_of(runs: list[Arrays], against: list[Arrays] | None = None, prefix: str = "") -> Row:
    """All columns, as ``value_of``, of predictions whose names begin with ``prefix``."""
    return {title: value_of(prefix + way, metric, runs, against)
            for title, (way, metric) in COLUMNS.items()}


def both_poolings(found: dict[str, list[Arrays]]) -> dict[str, Row]:
    """The rows of methods, each with one below it for the plain mean over tokens where it has one.
    """
    rows: dict[str, Row] = {}
    for name, runs in found.items():
        rows[name] = row_of(runs)
        plain_row = row_of(runs, prefix=PLAIN)
        if any(plain_row.values()):
            rows[f"{name}, plain mean"] = plain_row
    return rows


def changes_by_pooling(found: dict[str, list[Arrays]]) -> dict[str, Row]:
    """How much each column is above what the plain mean over tokens gives, paired."""
    rows = {f"{name} - its plain mean": row_of(runs, [
        {key.removeprefix(PLAIN): value for key, value in run.items() if key.startswith(PLAIN)}
        for run in runs]) for name, runs in found.items()}
    return {name: row for name, row in rows.items() if any(row.values())}


FIGURES = {  # title: what runs store, see _quality_readout.py
    "first component": "first component", "r with head size": "size",
    "the same, test": "size (test)", "participation": "participation",
    "of tokens": "participation of tokens", "place": "place",
    "place, modality": "place and modality", "scan": "scan",
}


def figures_of(found: dict[str, list[Arrays]]) -> dict[str, dict[str, float | None]]:
    """How people and tokens differ under both poolings, by method, means over seeds."""
    rows: dict[str, dict[str, float | None]] = {}
    for name, runs in found.items():
        for suffix, prefix in (("", ""), (", plain mean", PLAIN)):
            row = {title: float(np.mean([run[prefix + key] for run in runs]))
                   if all(prefix + key in run for run in runs) else None
                   for title, key in FIGURES.items()}
            if any(value is not None for value in row.values()):
                rows[name + suffix] = row
    return rows


def show(rows: dict[str, Row]) -> None:
    """Print rows by name."""
    print_table(("", *COLUMNS), [(name, *(None if value is None else str(value)
                                          for value in row.values()))
                                 for name, row in rows.items()])


def plain(rows: dict[str, Row]) -> dict[str, Any]:
    """Rows as JSON has them."""
    return {name: {title: value and value.as_dict() for title, value in row.items()}
            for name, row in rows.items()}
