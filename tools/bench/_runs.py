"""Folders of runs that compare ways of training: whose plan they hold, recipes, processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from neurojepa.config import dump_config, validate
from neurojepa.errors import ConfigError, NeurojepaError
from neurojepa.feed.format import Feed
from neurojepa.feed.labels import scan_labels
from tools.bench.common import ROOT, device_here

TRUE_VOLUMES = ("brain_ml", "ventricle_ml", "hippocampus_ml", "cortex_gm_ml", "csf_ml",
                "lesion_ml")
J = TypeVar("J")


def claim(work: Path, plan: str) -> None:
    """Make ``work`` this plan's, or check that it is.

    Raises
    ------
    ConfigError
        It holds the runs of another plan.
    """
    file = work / "plan.json"
    if file.exists() and file.read_text() != plan:
        raise ConfigError(f"--work {work}: holds runs of another plan, {file.read_text()}; choose "
                          "another folder or delete it")
    work.mkdir(parents=True, exist_ok=True)
    file.write_text(plan)


def make_all(jobs: Sequence[J], make: Callable[[J], str]) -> None:
    """Make runs, as many at once as there are cores, but one on a GPU; ``make`` returns the name
    of what it made."""
    began = time.monotonic()
    at_once = 1 if device_here().type == "cuda" else len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(at_once) as pool:
        for done, name in enumerate(pool.map(make, jobs), 1):
            minutes = (time.monotonic() - began) / 60
            left = minutes / done * (len(jobs) - done)
            print(f"run {done}/{len(jobs)} {name}: {minutes:.1f} min so far, about {left:.0f} "
                  "min left of this stage", flush=True)


def write_recipe(folder: Path, feed: str, *, steps: int, rate: float, seed: int,
                 overrides: dict[str, Any], batch: int = 8) -> None:
    """recipe.yaml of a run in its folder: the tiny encoder, 416 tokens, fp32, and ``overrides`` by
    dotted names."""
    tree: dict[str, Any] = {
        "data": {"feed": feed, "read_threads": 2},
        "model": {"size": "tiny", "patch_voxels": 6, "token_budget": 416},
        "objective": {"sparse": {"l1_warmup_steps": steps // 10}},
        "optim": {"lr": rate, "warmup_steps": steps // 10, "ema": 0.99},
        "train": {"steps": steps, "global_batch": batch, "micro_batch": batch, "seed": seed,
                  "dtype": "fp32", "keep_last": 1, "log_every": 20,
                  "checkpoint_every": max(steps // 8, 1)},
        "run": {"dir": str(folder / "run")}}
    for dotted, value in overrides.items():
        *parents, leaf = dotted.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_config(validate(tree, str(folder))))


def command(log: Path | None, *arguments: str) -> None:
    """Run a module on one thread, in huge pages (a step saves a tenth); its output goes to a file,
    or to ours.

    Raises
    ------
    NeurojepaError
        It failed.
    """
    with open(log or os.devnull, "w") as file:
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT,
                              stdout=file if log else None, stderr=subprocess.STDOUT,
                              env={**os.environ, "OMP_NUM_THREADS": "1",
                                   "THP_MEM_ALLOC_ENABLE": "1"})
    if done.returncode:
        raise NeurojepaError(f"{' '.join(arguments[:2])} ended with status {done.returncode}; see "
                             f"{log or 'above'}")


# ---- volumes that a simple program finds ---------------------------------------------------------

def tissue_of_codes(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Three classes of intensity by k-means (Lloyd 1982) on the histogram, from fixed quantiles.

    Returns
    -------
    float [254], how many voxels have each code 1..254; int [254], the class of each code: dark,
    middle, bright
    """
    values = np.arange(1, 255)
    counts = np.bincount(image.ravel(), minlength=256)[1:255].astype(float)
    centres = np.interp([0.1, 0.45, 0.85], counts.cumsum() / counts.sum(), values)
    for _ in range(50):
        nearest = np.abs(values[:, None] - centres).argmin(1)
        centres = np.array([np.average(values[nearest == k], weights=counts[nearest == k] + 1e-9)
                            for k in range(3)])
    return counts, nearest


def true_volumes(feed: Feed, rows: np.ndarray) -> np.ndarray:
    """float64 [n, 6]: ``TRUE_VOLUMES`` of the people of ``rows``, from the feed's labels."""
    people, sessions = (np.array(feed.index[name].to_pylist())[rows].tolist()
                        for name in ("participant", "session"))
    table = feed.labels()
    return np.stack([scan_labels(table, name, people=people, sessions=sessions).astype(float)
                     for name in TRUE_VOLUMES], 1)


def features_of(volumes: np.ndarray) -> np.ndarray:
    """float32 [n, 3 k] for a ridge: volumes [n, k] in ml, their logarithms, and shares of all."""
    return np.concatenate([volumes, np.log1p(volumes), volumes / volumes.sum(1)[:, None]],
                          1).astype(np.float32)
