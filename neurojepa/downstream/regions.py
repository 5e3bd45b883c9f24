"""Regions of the brain on a grid: an atlas in MNI152 space, or lobes told by their coordinates.

Without an atlas, twelve regions (frontal, parietal, temporal, occipital, deep, cerebellum, left and
right) and the brainstem are told by planes along the central, Sylvian and parieto-occipital
fissures of the MNI152 brain.  They are right to a centimetre or two, which is the size of a token.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np

from neurojepa.errors import DataError
from neurojepa.feed.format import Grid, open_store, read_bytes

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
        A label map in MNI152 space (NIfTI); names from a .tsv of the same name beside it, with
        columns index and name, as BIDS has it.  None: lobes by coordinates.

    Raises
    ------
    DataError
        The atlas is missing, no label map, or lies outside the grid.
    """
    points = _points_mm(grid)
    brain = _nearest(*_template_brain(), points) > 0
    if atlas is None:
        codes, names = np.where(brain, lobes(points), 0), lobe_names()
        source = "lobes by MNI coordinates, approximate"
    else:
        codes, names = _of_atlas(atlas, points)
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


def _points_mm(grid: Grid) -> np.ndarray:
    """[X, Y, Z, 3] voxel centres in MNI mm."""
    axes = [start + grid.spacing_mm * np.arange(length)
            for start, length in zip(grid.affine[:3, 3], grid.shape, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1)


@cache
def _template_brain() -> tuple[np.ndarray, np.ndarray]:
    """Whether a voxel of MNI152 is brain, and its affine."""
    from nilearn.datasets import load_mni152_template

    image = load_mni152_template(resolution=1)  # stripped of the skull, inside the package
    return np.asarray(image.dataobj) > 0, np.asarray(image.affine)


def _nearest(data: np.ndarray, affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Values of the voxels nearest to points, 0 outside."""
    inverse = np.linalg.inv(affine)
    index = np.rint(points @ inverse[:3, :3].T + inverse[:3, 3]).astype(int)
    inside = ((index >= 0) & (index < data.shape)).all(-1)
    held = np.clip(index, 0, np.array(data.shape) - 1)
    return np.where(inside, data[tuple(np.moveaxis(held, -1, 0))], 0)


def _of_atlas(uri: str, points: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Codes 1 to R on the grid, and the names of those regions that lie in it."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    try:
        image = nibabel.Nifti1Image.from_bytes(_unzipped(read_bytes(uri)))
        data = np.asarray(image.dataobj)
    except (ImageFileError, HeaderDataError, WrapStructError, ValueError, OSError, EOFError,
            zlib.error) as error:
        raise DataError(f"--atlas {uri}: not a NIfTI label map ({error})") from error
    if data.ndim != 3 or np.any(data != np.rint(data)):
        raise DataError(f"--atlas {uri}: expected whole numbers in three dimensions, found "
                        f"{data.dtype} {data.shape}; take the label map, not the probabilities")
    labels = _nearest(data.astype(np.int64), np.asarray(image.affine), points)
    values = np.unique(labels[labels > 0])
    if not len(values):
        raise DataError(f"--atlas {uri}: no label lies in the feed's grid; it must be in MNI152 "
                        "space")
    names = _names(uri)
    codes = np.where(labels > 0, np.searchsorted(values, labels) + 1, 0)
    return codes, [names.get(int(value), str(value)) for value in values]


def _unzipped(data: bytes) -> bytes:
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def _names(uri: str) -> dict[int, str]:
    table = uri.removesuffix(".gz").removesuffix(".nii") + ".tsv"
    fs, path = open_store(table)
    if not fs.exists(path):
        return {}
    rows = list(csv.DictReader(io.StringIO(read_bytes(table).decode()), delimiter="\t"))
    try:
        return {int(row["index"]): row["name"] for row in rows}
    except (KeyError, ValueError) as error:
        raise DataError(f"{table}: expected columns index and name ({error})") from error


def _patch_shares(codes: np.ndarray, num_regions: int, patch: int) -> np.ndarray:
    """[n, R] from codes [X, Y, Z] of 0 (none) to R; patches run x, y, z as in ``patchify``."""
    x, y, z = (length // patch for length in codes.shape)
    split = codes.reshape(x, patch, y, patch, z, patch).transpose(0, 2, 4, 1, 3, 5)
    rows = split.reshape(x * y * z, -1) + (num_regions + 1) * np.arange(x * y * z)[:, None]
    counts = np.bincount(rows.ravel(), minlength=(num_regions + 1) * x * y * z)
    return counts.reshape(-1, num_regions + 1)[:, 1:] / patch**3
