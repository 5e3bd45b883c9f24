"""Regions of the brain on a grid: an atlas in MNI152 space, or lobes told by their coordinates.

Without an atlas, twelve regions (frontal, parietal, temporal, occipital, deep, cerebellum, left and
right) and the brainstem are told by planes along the central, Sylvian and parieto-occipital
fissures of the MNI152 brain.  They are right to a centimetre or two, which is the size of a token.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neurojepa.downstream.images import stem_of
from neurojepa.errors import ConfigError
from neurojepa.feed.format import Grid
from neurojepa.objective.anatomy import by_patch, grid_mm, ranked, read_atlas, template, values_at

SIDES = ("left", "right")
LOBES = ("frontal", "parietal", "temporal", "occipital", "deep", "cerebellum")


@dataclass(frozen=True)
class Regions:
    """R named regions, and how much of each patch lies in them."""

    names: list[str]
    share_nR: np.ndarray  # float64, of a patch's voxels; rows sum to 1 or less
    brain: np.ndarray  # bool [X, Y, Z], the template's
    source: str


def load_regions(grid: Grid, patch: int, atlas: str | None = None) -> Regions:
    """Regions of the grid's patches.

    Parameters
    ----------
    grid : Grid
        Of the feed.
    patch : int
        Edge of a patch, in voxels.
    atlas : str
        Path of a label map in MNI152 space (NIfTI); names from a .tsv of the same name beside it,
        with columns index and name, as BIDS has it.  None: lobes by coordinates.

    Raises
    ------
    ConfigError
        The atlas is missing, no label map, or lies outside the grid.
    """
    points = grid_mm(grid)
    origin, inside, *_ = template()
    brain = values_at(inside, origin=origin, where=points) > 0
    if atlas is None:
        codes, names = np.where(brain, lobes(points), 0), lobe_names()
        source = "lobes by MNI coordinates, approximate"
    else:
        codes, names = _of_atlas(atlas, grid)
        source = atlas
    return Regions(names, _patch_shares(codes, len(names), patch), brain, source)


def lobe_names() -> list[str]:
    """Names of the codes 1, 2, ... of ``lobes``."""
    return [f"{side} {lobe}" for lobe in LOBES for side in SIDES] + ["brainstem"]


def lobes(points: np.ndarray) -> np.ndarray:
    """Codes of MNI points [..., 3], mm: an index into ``lobe_names`` plus 1."""
    x, y, z = np.moveaxis(points, -1, 0)
    lateral = np.abs(x)
    sylvian = 5 - 0.55 * (y + 12)  # height of the fissure, falling towards the front
    central = -5 - 0.45 * (z - 15)  # the sulcus leans back towards the vertex
    tentorium = -10 - 0.25 * (-36 - y) - 0.2 * lateral
    rules = [  # the first that holds
        ("brainstem", (lateral < 15) & (y > -42) & (y < -10) & (z < -8)),
        ("cerebellum", (y < -36) & (z < tentorium)),
        ("deep", (lateral < 40) & (y > -35) & (y < 20) & (z > -12) & (z < 18)),
        ("occipital", y < -65 - 0.4 * np.maximum(z, 0)),
        ("temporal", (lateral > 15) & (y < 20) & (z < sylvian)),
        ("frontal", y > central),
    ]
    lobe = np.select([rule for _, rule in rules],
                     [LOBES.index(name) if name in LOBES else len(LOBES) for name, _ in rules],
                     LOBES.index("parietal"))
    return np.where(lobe == len(LOBES), 2 * len(LOBES) + 1, 2 * lobe + 1 + (x > 0))


def _of_atlas(path: str, grid: Grid) -> tuple[np.ndarray, list[str]]:
    """Codes 1 to R on the grid, and the names of those regions that lie in it."""
    values, codes = ranked(read_atlas(path, grid, f"--atlas {path}"))
    if not len(values):
        raise ConfigError(f"--atlas {path}: no label lies in the feed's grid; it must be in MNI152 "
                          "space")
    names = names_beside(path)
    return codes, [names.get(int(value), str(value)) for value in values]


def names_beside(path: str) -> dict[int, str]:
    """Names of codes from the .tsv that lies beside a label map under its name, with columns index
    and name; empty where there is none.

    Raises
    ------
    ConfigError
        It has other columns, or a row without a name.
    """
    table = Path(path).with_name(f"{stem_of(path)}.tsv")
    if not table.exists():
        return {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        named = {int(row["index"]): row["name"] for row in rows}
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{table}: expected columns index and name ({error})") from error
    nameless = next((code for code, name in named.items() if not name), None)
    if nameless is not None:
        raise ConfigError(f"{table}: code {nameless} has no name; give it one, or take out its row")
    return named


def _patch_shares(codes: np.ndarray, num_regions: int, patch: int) -> np.ndarray:
    """[n, R] from codes [X, Y, Z] of 0 (none) to R."""
    split = by_patch(codes, patch)
    rows = split + (num_regions + 1) * np.arange(len(split))[:, None]
    counts = np.bincount(rows.ravel(), minlength=(num_regions + 1) * len(split))
    return counts.reshape(-1, num_regions + 1)[:, 1:] / patch**3
