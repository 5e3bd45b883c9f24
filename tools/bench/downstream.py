"""downstream: what embedding a scan costs, beside a MONAI pipeline doing the same.

A raw synthetic T1w of 1 mm goes from file to embedding by the command, on one core, with the small
weights that the package ships.  Prepared volumes (the MNI152 brain with textures of its own) go
through the same encoder from a 3 mm feed, and through MONAI: files of 1 mm -> RAS, 3 mm,
percentiles, crop, pad -> its cache -> batches -> its vision transformer of the same width, depth
and patch, on all patches -> mean.  Every part runs in a process of its own, whose peak memory is
read at its end.
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
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tools.bench.common import ROOT, best, brains, machine, print_table
from tools.bench.feed import pack_brains

WEIGHTS, GRID = "synthetic-tiny", "3mm"
BATCH = 8  # of MONAI
KEY = "a public key for invented people"


def run(quick: bool, official: str | None) -> dict[str, Any]:
    """Measure; returns seconds of a raw scan, ratio_vs_monai of prepared ones and peaks in MiB."""
    count = 8 if quick else 16
    print(machine())
    with tempfile.TemporaryDirectory(prefix="bench-downstream-") as name:
        folder = Path(name)
        raw = [raw_scan(folder, preset) for preset in (["quick"] if quick else
                                                       ["quick", "default"])]
        print("\nA raw T1w of 1 mm, from file to embedding, one core")
        print_table(("preset", "CPU s", "wall s", "peak MiB"), raw)
        pack_brains(folder, count, GRID)
        write_files(folder, count)
        rows = [(what, *apart(part, folder, count)) for what, part in PARTS.items()]
    print(f"\nPrepared volumes, {count} of them, one core")
    print_table(("way", "CPU ms a scan", "peak MiB"), rows)
    cost = {what: ms for what, ms, _ in rows}
    return {"raw": {preset: {"cpu_s": cpu, "wall_s": wall, "peak_mib": peak}
                    for preset, cpu, wall, peak in raw},
            "ratio_vs_monai": cost["MONAI, from its cache"] / cost["ours, from the feed"],
            "ratio_vs_monai_files": cost["MONAI, from files"] / cost["ours, from the feed"],
            "peak_mib": {what: peak for what, _, peak in rows}}


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
