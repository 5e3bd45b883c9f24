"""Tables of what tasks tell, from the scores that _downstream_tasks.py has stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from neurojepa.errors import ConfigError
from tools.bench._downstream_tasks import ALONE, COLUMNS, DRAWS, SITE, TRUE, WITH, WITHOUT
from tools.bench._quality_table import Arrays, scores_of
from tools.bench.common import print_table

ALIKE = 1e-6  # of what anyone knows, beside two methods
VOLUMES, KNOWN = "region volumes", "age, sex, brain volume"
PEERS = (VOLUMES, "MAE with tissue head", "random init")  # that others are told above
Cells = dict[str, list[float] | None]  # value, low and high of each column


def tables(runs: dict[str, list[Path]]) -> dict[str, Any]:
    """Print and return all tables, of the runs of each method that are finished."""
    made = [folder for folders in runs.values() for folder in folders
            if (folder / "scores.npz").exists()]
    scored = {folder: scores_of(folder) for folder in made}
    check_alike(scored)
    found = {name: [scored[folder] for folder in folders if folder in scored]
             for name, folders in runs.items()}
    found = {name: scores for name, scores in found.items() if scores}
    told = {name: row(scores, ALONE) for name, scores in found.items()}
    shown = {f"told, with 95 % intervals; of {SITE!r} less is better": told,
             f"added to {KNOWN}": {name: row(scores, WITH, scores, WITHOUT)
                                   for name, scores in found.items()}}
    if plain := found.get(VOLUMES):
        told |= {KNOWN: row(plain, WITHOUT), f"{VOLUMES}; {KNOWN}": row(plain, WITH),
                 "true risk": row(plain, TRUE)}
    for peer in PEERS:
        if others := found.get(peer):
            shown[f"above {peer}"] = {name: row(scores, ALONE, others, ALONE)
                                      for name, scores in found.items() if name != peer}
    for title, rows in shown.items():
        print(f"\n{title}")
        print_table(("", "seeds", *COLUMNS), [
            (name, len(found.get(name, plain or [])), *map(_cell, cells.values()))
            for name, cells in rows.items()])
    spent = {name: [float(each["train_cpu_s"]) for each in scores]
             for name, scores in found.items()}
    # a training that went on in another process has no time
    means = {name: float(np.mean(known)) for name, seconds in spent.items()
             if (known := [each for each in seconds if np.isfinite(each)])}
    print("\nCPU seconds of a training: " + (", ".join(
        f"{name} {seconds:.0f}" for name, seconds in means.items() if seconds) or "none was made"))
    return {"tables": shown, "train_cpu_s": means,
            "seeds": {name: len(scores) for name, scores in found.items()}}


def check_alike(scored: dict[Path, Arrays]) -> None:
    """What anyone knows says the same beside every method, if people and scores are the same.

    Raises
    ------
    ConfigError
        A run has it otherwise, so its scores are of other code and cannot be compared.
    """
    first: dict[str, tuple[Path, float]] = {}
    for folder, scores in scored.items():
        for key in (WITHOUT + column for column in COLUMNS if WITHOUT + column in scores):
            value = float(scores[key][0])
            other, expected = first.setdefault(key, (folder, value))
            if abs(value - expected) > ALIKE:
                raise ConfigError(f"{folder}: {key!r} is {value:.4f}, and {expected:.4f} in "
                                  f"{other}; one of them was scored by other code. Delete "
                                  "scores.npz of the older one and run the benchmark again")


def row(runs: list[Arrays], prefix: str, others: list[Arrays] | None = None,
        of_others: str = "") -> Cells:
    """Each column of rows that begin with ``prefix``, less that of others; None where it lacks."""
    def of(runs: list[Arrays], key: str) -> list[np.ndarray]:
        return [run[key] for run in runs if key in run]

    return {column: summary(of(runs, prefix + column), of(others or [], of_others + column))
            if of(runs, prefix + column) else None for column in COLUMNS}


def summary(runs: list[np.ndarray], less: list[np.ndarray]) -> list[float]:
    """Mean over seeds, low and high: 95 % of draws of people and of seeds; less that of others."""
    means, spread = [], []
    for each in filter(None, (runs, less)):
        seeds = np.random.default_rng(0).integers(len(each), size=(DRAWS, len(each)))
        stacked = np.stack(each)
        means.append(stacked[:, 0].mean())
        spread.append(np.take_along_axis(stacked[:, 1:].T, seeds, 1).mean(1))
    value, draws = (each[0] - sum(each[1:]) for each in (means, spread))
    return [float(value), *np.nanpercentile(draws, [2.5, 97.5]).tolist()]


def _cell(found: list[float] | None) -> str | None:
    return found and f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"
