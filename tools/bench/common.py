"""What the benchmarks share: clocks, tables, the machine's description, volumes to work on."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Spent:
    """Time that a block took, set when it ends."""

    wall_s: float = 0.0
    cpu_s: float = 0.0  # of all threads of this process


@contextmanager
def clock() -> Iterator[Spent]:
    """Measure a block: ``with clock() as spent: ...``, then ``spent.cpu_s``."""
    spent = Spent()
    wall, cpu = time.perf_counter(), time.process_time()
    yield spent
    spent.wall_s, spent.cpu_s = time.perf_counter() - wall, time.process_time() - cpu


def device_here() -> Any:
    """The GPU where one is visible, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def spent_s() -> float:
    """Seconds that work costs here, from any start: of the clock where a GPU is visible, when it
    has done what was asked; else of all this process's threads."""
    import torch

    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def best(repeats: int, work: Callable[[], Any]) -> Spent:
    """The least wall and CPU time of several runs of ``work``: the rest is other load."""
    runs = []
    for _ in range(repeats):
        with clock() as spent:
            work()
        runs.append(spent)
    return Spent(min(run.wall_s for run in runs), min(run.cpu_s for run in runs))


def machine() -> str:
    """The machine in a line, for tables of results."""
    import torch

    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in cpu if line.startswith("model name")),
                platform.machine())
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (f"{name}, {os.cpu_count()} cores{gpu}, Python {platform.python_version()}, torch "
            f"{torch.__version__}")


def code_hash(*patterns: str) -> str:
    """Of the sources that match ``patterns`` below the checkout: results of other code do not
    count."""
    digest = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A Markdown table, columns aligned."""
    cells = [[cell if isinstance(cell, str) else f"{cell:.4g}" if isinstance(cell, float)
              else "-" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    for number, row in enumerate([list(header), *cells]):
        print("| " + " | ".join(cell.ljust(width)
                                for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def brains(count: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Volumes on the archive grid that compress as scans do: the MNI152 brain, each with its own
    texture, shading and noise.

    Yields
    ------
    image : float32 [180, 216, 180] in [0, 1], 0 outside the brain
    mask : uint8 codes 0 air, 1 brain
    """
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template
    from scipy import ndimage

    from neurojepa.feed.format import ARCHIVE_GRID

    def on_grid(image: Any) -> np.ndarray:
        matrix = np.linalg.inv(image.affine) @ ARCHIVE_GRID.affine
        return ndimage.affine_transform(np.asarray(image.dataobj, np.float32), matrix[:3, :3],
                                        matrix[:3, 3], ARCHIVE_GRID.shape, order=1)

    template = on_grid(load_mni152_template(resolution=1))
    mask = (on_grid(load_mni152_brain_mask(resolution=1)) > 0.5).astype(np.uint8)
    template = template / np.percentile(template[mask > 0], 99) * 0.8
    rng = np.random.default_rng(seed)
    for _ in range(count):
        smooth = ndimage.zoom(rng.normal(0, 0.1, (6, 7, 6)).astype(np.float32), 31,
                              order=1)[:180, :216, :180]
        noise = rng.standard_normal(mask.shape, np.float32) * 0.03
        image = np.clip(template * (1 + smooth) + noise, 0, 1) * mask
        yield image.astype(np.float32), mask
