"""register: label maps carried from one anatomy to another, and how well they come to lie.

Heads at 3 mm are made from label maps (real ones beside the checkout, else those built from the
template): each anatomy is laid over the next one, so every pair is of two people.  Dice is the mean
over all structures inside the skull with 20 voxels or more in both; fluid outside the ventricles
does not count.  With --weights DIR there are two more rows: demons of our own on several channels,
with the intensity alone and with tokens of that encoder.  They show whether tokens add anything;
the command ``register`` does without.
Finished pairs are kept in --work (default build/bench-register).
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from data_prep.synth import codes
from data_prep.synth.anatomy import anatomy_names, load_anatomy
from data_prep.synth.contrast import TISSUES, scan_signal, tissue_table
from data_prep.volumes.placing.geometry import nearest_rigid
from neurojepa.downstream import register as ours
from neurojepa.downstream import warps
from neurojepa.downstream.images import (
    Image,
    affine_between,
    itk_array,
    itk_image,
    laid,
    stripped,
)
from neurojepa.feed.format import MNI_CENTRE_MM, Grid
from neurojepa.storage import write_bytes
from tools.bench._mixing import brain_of, label_folder
from tools.bench.common import ROOT, machine, print_table

MM = 3
NOISE, BIAS, CONTRAST_SD = 0.03, 0.05, 0.03
LEAST_VOXELS = 20
PAIRS, QUICK_PAIRS, DRAWS = 10, 2, 2000
INTENSITY = "demons on channels: intensity"
TOKENS = "demons on channels: intensity and tokens"


@dataclass(frozen=True)
class Head:
    """A stripped brain and its label map, on one grid."""

    image: Image
    labels: Image


def make_head(name: str, number: int, mm: int = MM) -> Head:
    """A T1w scan of an anatomy with a contrast, shading, noise and place of its own."""
    labels = load_anatomy(name, label_folder()).labels
    rng = np.random.default_rng([number, 5])
    shape = tuple(n // mm * mm for n in labels.shape)
    labels = labels[tuple(slice(n) for n in shape)]
    table = tissue_table("T1w", {tissue: rng.normal(0, CONTRAST_SD) for tissue in TISSUES})

    def shrunk(values: np.ndarray) -> np.ndarray:
        parts = [k for n in shape for k in (n // mm, mm)]
        return values.reshape(parts).mean((1, 3, 5)).astype(np.float32)

    data = scan_signal(shrunk(table[labels]), voxel_mm=np.full(3, float(mm)), rng=rng, bias=BIAS,
                       noise=NOISE)
    brain = brain_of(shrunk(codes.inside(labels) & (labels != codes.FLUID)), mm)
    affine = np.diag([mm, mm, mm, 1.0])
    affine[:3, 3] = rng.uniform(-20, 20, 3) - np.array(shape) / 2
    return Head(Image(name, data * brain, affine, brain=brain),
                Image(name, labels[mm // 2::mm, mm // 2::mm, mm // 2::mm].astype(np.int32), affine))


def dice(carried: np.ndarray, fixed: np.ndarray, moving: np.ndarray) -> float:
    """Mean over structures."""
    found = []
    for code in np.unique(fixed):
        enough = min((fixed == code).sum(), (moving == code).sum()) >= LEAST_VOXELS
        if 0 < code < codes.SKULL and code != codes.FLUID and enough:
            both = (fixed == code) & (carried == code)
            found.append(2 * both.sum() / ((fixed == code).sum() + (carried == code).sum()))
    return float(np.mean(found))


def run(quick: bool, official: str | None, weights: str | None = None,
        work: str | None = None) -> dict[str, Any]:
    """Measure the pairs that are missing and print the table; returns it."""
    folder = Path(work or ROOT / "build" / "bench-register") / kind_of(weights)
    names = anatomy_names(label_folder())
    count = QUICK_PAIRS if quick else min(PAIRS, len(names))
    loaded = None
    if weights:
        from neurojepa.weights import load

        loaded = load(weights)
    rows: dict[str, list[tuple[float, int, float]]] = {}
    for number in range(count):
        file = folder / f"{number}.json"
        if not file.exists():
            both = (make_head(names[each], each) for each in (number, (number + 1) % len(names)))
            write_bytes(str(file), json.dumps(_pair(*both, loaded)).encode())
            print(f"{number + 1} of {count} pairs", flush=True)
        for name, value in json.loads(file.read_text()).items():
            rows.setdefault(name, []).append(tuple(value))
    return _report(rows, count)


def kind_of(weights: str | None) -> str:
    """Folder of what is measured with these weights: what others gave is not theirs."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", f"tokens-{weights}") if weights else "plain"


def _pair(moving: Head, fixed: Head, weights: Any) -> dict[str, tuple[float, int, float]]:
    """Dice, folded voxels and CPU seconds of each way."""
    def scored(warp: np.ndarray, cpu_s: float) -> tuple[float, int, float]:
        carried = warps.labels_through(moving.labels, warp, fixed.labels.affine)
        folds = int((warps.jacobian(warp, fixed.image.affine) <= 0).sum())
        return dice(carried, fixed.labels.data, moving.labels.data), folds, cpu_s

    def linearly(matrix: np.ndarray) -> np.ndarray:
        still = np.zeros((2, 2, 2, 3), np.float32)
        return warps.total(still, fixed.image.affine, fixed.image, matrix)

    start = time.process_time()
    matrix = affine_between(fixed.image, moving.image)
    spent = time.process_time() - start
    centre = fixed.image.affine[:3, :3] @ (np.array(fixed.image.data.shape) / 2)
    rigid = nearest_rigid(matrix, centre + fixed.image.affine[:3, 3])
    results = {"rigid": scored(linearly(rigid), spent), "affine": scored(linearly(matrix), spent)}
    for name, evened in (("demons (shipped)", True), ("demons, contrast as it is", False)):
        start = time.process_time()
        warp = ours.register(moving.image, fixed.image, evened).warp()
        results[name] = scored(warp, time.process_time() - start)
    return results if weights is None else results | _channels(moving, fixed, matrix, weights,
                                                               scored)


def centred(grid: Grid, image: Image) -> np.ndarray:
    """[4, 4] of the weights' grid, moved over the middle of an image's brain."""
    assert image.brain is not None
    middle = image.affine @ [*np.argwhere(image.brain).mean(0), 1]
    affine = grid.affine.copy()
    affine[:3, 3] += middle[:3] - np.array(MNI_CENTRE_MM)
    return affine


def _channels(moving: Head, fixed: Head, matrix: np.ndarray, weights: Any,
              scored: Any) -> dict[str, tuple[float, int, float]]:
    """Both rows of demons on channels, on the weights' grid around the fixed brain."""
    from tools.bench._register_tokens import demons, token_maps

    grid = weights.grid
    affine = centred(grid, fixed.image)
    brains = [laid(stripped(head.image), head.image.affine, grid.shape, affine, through)
              for head, through in ((fixed, None), (moving, matrix))]
    matched = itk_array(sitk.HistogramMatching(*(itk_image(each, affine) for each in brains[::-1]),
                                               256, 15, True))
    found = {}
    for name, tokens in ((INTENSITY, False), (TOKENS, True)):
        start = time.process_time()
        channels = [brains[0][None], matched[None]]
        if tokens:
            sd = brains[0][brains[0] > 0].std()
            channels = [np.concatenate([own, each * sd * 0.5])
                        for own, each in zip(channels, token_maps(weights, brains), strict=True)]
        field = demons(*channels) * np.float32(grid.spacing_mm)
        warp = warps.total(field, affine, fixed.image, matrix)
        found[name] = scored(warp, time.process_time() - start)
    return found


def _report(rows: dict[str, list[tuple[float, int, float]]], count: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, count, (DRAWS, count))
    base = np.array([value[0] for value in rows["affine"]])
    lines, table = [], {}
    for name, values in rows.items():
        scores = np.array([value[0] for value in values])
        low, high = np.percentile((scores - base)[drawn].mean(1), [2.5, 97.5])
        table[name] = {"dice": float(scores.mean()), "over_affine": [float(low), float(high)],
                       "folds": sum(value[1] for value in values),
                       "cpu_s": float(np.mean([value[2] for value in values]))}
        lines.append([name, f"{scores.mean():.3f}", f"{(scores - base).mean():+.3f} "
                      f"[{low:+.3f}, {high:+.3f}]", str(table[name]["folds"]),
                      f"{table[name]['cpu_s']:.1f}"])
    source = (label_folder() and "real label maps") or "anatomies built from the template"
    print(f"{machine()}\n{count} pairs of {source} at {MM} mm")
    print_table(["", "Dice", "over affine", "folded voxels", "CPU s a pair"], lines)
    gain = None
    if TOKENS in rows:
        more = np.array([a[0] - b[0] for a, b in zip(rows[TOKENS], rows[INTENSITY], strict=True)])
        low, high = np.percentile(more[drawn].mean(1), [2.5, 97.5])
        gain = {"value": float(more.mean()), "low": float(low), "high": float(high)}
        print(f"tokens beside intensity: {more.mean():+.4f} [{low:+.4f}, {high:+.4f}] Dice, pairs "
              "resampled")
    return {"pairs": count, "table": table, "tokens": gain}
