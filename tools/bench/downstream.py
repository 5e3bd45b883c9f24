"""downstream: what embedding a scan costs, beside a MONAI pipeline, and what tasks tell from it.

*Cost.*  A raw synthetic T1w of 1 mm goes from file to embedding by the command, on one core, with
the small weights that the package ships.  Prepared volumes (the MNI152 brain with textures of its
own) go through the same encoder from a 3 mm feed, and through MONAI: files of 1 mm -> RAS, 3 mm,
percentiles, crop, pad -> its cache -> batches -> its vision transformer of the same width, depth
and patch, on all patches -> mean.  Every part runs in a process of its own, whose peak memory is
read at its end.

*Tasks.*  People, budget and recipes are those of compare.py, as far as it has them; those of val
and test who came again have a second visit and BOLD.  The session code is what we recommend: MAE
with the tissue head for three quarters of the budget, then ``neurojepa code``.  The dense JEPA
differs from the sparse one in its code alone.  A CNN's own head tells the label that it was taught,
and its features tell all else.  _downstream_tasks.py says how tasks are read.  Beside the methods
stand automatic volumes of regions; what anyone knows (age, sex and volume of the brain, less the
age where that is asked for; for change, age, sex and the true volume of the ventricles at the first
visit); both; and the true risk of the event.

Every run keeps a folder below --work (default build/bench-downstream), and so does the cost; what
is finished is not done again, and --finished shows what there is.  All of it takes about 80 CPU
minutes, 23 of them for people.  --quick takes sketched people, of whom nothing can be learnt.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from neurojepa.errors import ConfigError
from tools.bench import compare
from tools.bench._downstream_table import VOLUMES, tables
from tools.bench._people import Cohort, described, make_people
from tools.bench._runs import claim
from tools.bench._sketched import sketch_people
from tools.bench.common import ROOT, best, brains, machine, print_table
from tools.bench.compare import MAE, Arm, Job, Runner, folder_of
from tools.bench.feed import pack_brains

WEIGHTS, GRID = "synthetic-tiny", "3mm"
BATCH = 8  # of MONAI
KEY = "a public key for invented people"


RUN = "tools.bench._downstream_tasks"
CNN = {"objective.method": "cnn", "model.token_budget": None, "data.modalities": ["T1w"]}
METHODS = {
    "session code": compare.ARMS["session code"],
    "sparse JEPA": Arm(rate=5e-4),
    "dense JEPA": Arm({"objective.sparse.code": "identity"}, rate=5e-4),
    "MAE with tissue head": Arm(MAE),
    "CNN taught age": Arm(CNN | {"objective.label": "age"}, rate=5e-4),
    "CNN taught diagnosis": Arm(CNN | {"objective.label": "diagnosis"}, rate=5e-4),
    "random init": Arm(trained=False),
    VOLUMES: Arm(trained=False, changes={"volumes": True}),
}


@dataclass(frozen=True)
class Plan:
    """How much of it."""

    seconds: float  # of training
    seeds: tuple[int, ...]
    methods: tuple[str, ...] = tuple(METHODS)
    cohort: Cohort | None = None  # None: sketched people


FULL = Plan(120.0, (0, 1, 2), cohort=Cohort())
QUICK = Plan(1.0, (0,), ("random init", VOLUMES))


def run(quick: bool, official: str | None, work: str | None = None,
        finished: bool = False) -> dict[str, Any]:
    """Measure what is missing, or nothing if ``finished``, and print the tables; returns seconds of
    a raw scan, ratio_vs_monai of prepared ones, peaks in MiB, and the scores of tasks."""
    plan = QUICK if quick else FULL
    folder = Path(work or ROOT / "build" / "bench-downstream") / ("quick" if quick else "full")
    if finished and not (folder / "plan.json").exists():
        raise ConfigError(f"--finished: {folder} holds no runs; leave --finished out to make them, "
                          "or name the folder of others by --work")
    print(machine())
    claim(folder, json.dumps({"people": plan.cohort and described(plan.cohort),
                              "seconds": plan.seconds}))
    kept = folder / "cost.json"
    if not finished:
        if not kept.exists():
            kept.write_text(json.dumps(cost(quick)))
        make(plan, folder)
    found = json.loads(kept.read_text()) if kept.exists() else {}
    show_cost(found)
    return found | {"tasks": tables({name: [folder / "runs" / folder_of(name, seed)
                                            for seed in plan.seeds] for name in plan.methods})}


def cost(quick: bool) -> dict[str, Any]:
    """Of raw scans and of prepared ones."""
    count = 8 if quick else 16
    with tempfile.TemporaryDirectory(prefix="bench-downstream-") as name:
        folder = Path(name)
        raw = [raw_scan(folder, preset) for preset in (["quick"] if quick else
                                                       ["quick", "default"])]
        pack_brains(folder, count, GRID)
        write_files(folder, count)
        rows = {what: apart(part, folder, count) for what, part in PARTS.items()}
    ms = {what: spent for what, (spent, _) in rows.items()}
    return {"raw": {preset: {"cpu_s": cpu, "wall_s": wall, "peak_mib": peak}
                    for preset, cpu, wall, peak in raw},
            "ratio_vs_monai": ms["MONAI, from its cache"] / ms["ours, from the feed"],
            "ratio_vs_monai_files": ms["MONAI, from files"] / ms["ours, from the feed"],
            "cpu_ms": ms, "peak_mib": {what: peak for what, (_, peak) in rows.items()},
            "scans": count}


def show_cost(found: dict[str, Any]) -> None:
    if not found:
        return
    print("\nA raw T1w of 1 mm, from file to embedding, one core")
    print_table(("preset", "CPU s", "wall s", "peak MiB"),
                [(preset, *spent.values()) for preset, spent in found["raw"].items()])
    print(f"\nPrepared volumes, {found['scans']} of them, one core")
    print_table(("way", "CPU ms a scan", "peak MiB"), [
        (what, ms, found["peak_mib"][what]) for what, ms in found["cpu_ms"].items()])


# ---- tasks ---------------------------------------------------------------------------------------

def make(plan: Plan, folder: Path) -> None:
    """People and runs of a plan that are missing, those of the first seed first."""
    if plan.cohort is None:
        feed = sketch_people(folder)
    else:
        workers = len(os.sched_getaffinity(0))
        make_people(replace(plan.cohort, train=0), folder, workers, visit=1)
        feed = make_people(plan.cohort, folder, workers)
    jobs = [job for seed in plan.seeds for name in plan.methods if name != VOLUMES or not seed
            for job in jobs_of(plan, folder, name, seed)]
    runner = Runner(feed, folder, RUN)
    for first in (True, False):  # weights that a code is learnt on come before it
        runner.make([job for job in jobs if job.first == first])


def jobs_of(plan: Plan, folder: Path, name: str, seed: int) -> list[Job]:
    """The runs that a method needs; those of a code are compare's."""
    if METHODS[name].code:
        return compare.jobs_of(replace(compare.FULL, seconds=plan.seconds), folder, name, seed)
    return [Job(folder / "runs" / folder_of(name, seed), METHODS[name], seed, plan.seconds)]


# ---- a raw scan ----------------------------------------------------------------------------------

def raw_scan(folder: Path, preset: str) -> tuple[str, float, float, float]:
    """Preset, CPU and wall seconds of the command, and the peak MiB of any of its processes."""
    if not (folder / "cohort").exists():
        (folder / "key").write_text(KEY)
        (folder / "key").chmod(0o600)
        command(folder, "data_prep", "synth", "--out", "cohort", "--participants", "1",
                "--spacing-mm", "1", "--workers", "1")
    scan, began = min((folder / "cohort").rglob("*_T1w.nii.gz")), time.monotonic()
    told = command(folder, "tools.bench.downstream", "command", "embed", str(scan), "--weights",
                   WEIGHTS, "--preset", preset, "--out", f"out-{preset}")
    spent = json.loads(told.splitlines()[-1])
    return preset, spent["cpu_s"], time.monotonic() - began, spent["peak_mib"]


def command(folder: Path, *words: str) -> str:
    """Run a module in a folder on one thread; returns what it printed."""
    return subprocess.run([sys.executable, "-m", *words], cwd=folder, check=True, text=True,
                          stdout=subprocess.PIPE, env={
                              **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                              "PYTHONWARNINGS": "ignore",  # MONAI's
                              "NEUROJEPA_KEY_FILE": str(folder / "key")}).stdout


def spent_by_all() -> dict[str, float]:
    """CPU seconds of this process and its children, and the peak MiB of the largest of them.

    The child that prepares lives as long as this process, so it is asked itself.  What getrusage
    says of a process's own peak begins with that of the one that started it.
    """
    living = [psutil.Process(), *psutil.Process().children(recursive=True)]
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    peaks = [int(line.split()[1]) for process in living
             for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
             if line.startswith("VmHWM:")]
    return {"cpu_s": sum(sum(process.cpu_times()[:4]) for process in living),
            "peak_mib": max(*peaks, ended.ru_maxrss) / 1024}


# ---- prepared volumes ----------------------------------------------------------------------------

def write_files(folder: Path, count: int) -> None:
    """The volumes of ``pack_brains`` as NIfTI of 1 mm, for MONAI."""
    import nibabel as nib

    from neurojepa.feed.format import ARCHIVE_GRID

    for number, (image, _) in enumerate(brains(count)):
        nib.Nifti1Image(image, ARCHIVE_GRID.affine).to_filename(folder / f"{number}.nii.gz")


def apart(part: str, folder: Path, count: int) -> tuple[float, float]:
    """CPU ms a scan and peak MiB of a part in a process of its own."""
    told = json.loads(command(folder, "tools.bench.downstream", part, str(count)).splitlines()[-1])
    return told["cpu_ms"], told["peak_mib"]


def ours(count: int) -> Callable[[], Any]:
    """Embedding of all scans of the feed, as the command does it."""
    from neurojepa.downstream.embed import embed
    from neurojepa.feed.format import open_feed
    from neurojepa.weights import load

    weights, feed = load(WEIGHTS), open_feed("feed")
    return lambda: embed(weights.model, weights.config, feed, np.arange(count), weights.places)


def monai(count: int, cached: bool) -> Callable[[], Any]:
    """Embedding of all files by MONAI."""
    import torch
    from monai.data import DataLoader, Dataset, PersistentDataset
    from monai.networks.nets import ViT
    from monai.transforms import (
        Compose,
        CropForeground,
        EnsureChannelFirst,
        LoadImage,
        Orientation,
        ResizeWithPadOrCrop,
        ScaleIntensityRangePercentiles,
        Spacing,
    )

    from neurojepa.model.sizes import SIZES
    from neurojepa.weights import load

    weights = load(WEIGHTS)
    grid, size = weights.grid, SIZES[weights.config.model.size]
    transform = Compose([
        LoadImage(image_only=True), EnsureChannelFirst(), Orientation("RAS"),
        Spacing(grid.spacing_mm), ScaleIntensityRangePercentiles(0.5, 99.5, 0, 1, clip=True),
        CropForeground(), ResizeWithPadOrCrop(grid.shape)])
    files = [f"{number}.nii.gz" for number in range(count)]
    data = PersistentDataset(files, transform, "cache") if cached else Dataset(files, transform)
    network = ViT(1, grid.shape, weights.config.model.patch_voxels, hidden_size=size.dim,
                  mlp_dim=4 * size.dim, num_layers=size.depth, num_heads=size.heads).eval()

    @torch.no_grad()
    def work() -> list[Any]:
        return [network(batch)[0].mean(1) for batch in DataLoader(data, batch_size=BATCH)]

    if cached:
        work()  # fills the cache
    return work


PARTS = {"ours, from the feed": "ours", "MONAI, from its cache": "cached",
         "MONAI, from files": "files"}


def main(part: str, *words: str) -> None:
    """A part in this process: its cost as JSON, or a command of neurojepa and its peak memory."""
    if part == "command":
        from neurojepa.__main__ import main as neurojepa

        neurojepa(list(words))
        print(json.dumps(spent_by_all()))
        return
    count = int(words[0])
    work = ours(count) if part == "ours" else monai(count, cached=part == "cached")
    spent = best(1 if part == "files" else 3, work)
    print(json.dumps({"cpu_ms": 1e3 * spent.cpu_s / count,
                      "peak_mib": spent_by_all()["peak_mib"]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
