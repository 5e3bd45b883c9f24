"""The region that a PET image is divided by: from the person's labels, else from an atlas.

No atlas of the cerebellum ships with an installed package, so one is drawn: planes and ellipsoids
in MNI coordinates, kept below the tentorium by a margin against spill from the occipital lobe, and
the tissue maps of the template that nilearn ships.  Such a region is called approximate.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from data_prep.scan import ScanError
from data_prep.volumes.functional.pet_table import REGIONS, Region, known_tracer
from neurojepa.feed.format import ARCHIVE_GRID

MIN_REFERENCE_ML = 2.0
MIN_LABELS_IN_PLACE = 0.5  # of a labelled reference region, where the atlas has that structure
# Boxes that hold the structures in archive mm, heads of any size: x, y, z
CEREBELLUM_BOX = ((-75, 75), (-120, -10), (-80, 10))
BRAINSTEM_BOX = ((-25, 25), (-55, 0), (-65, 0))
FLUID, GREY, WHITE = 0, 1, 2


def reference_region(tracer: str | None, *, label: np.ndarray | None, brain: np.ndarray,
                     to_template: np.ndarray | None = None) -> tuple[np.ndarray, str]:
    """The tracer's reference region on ARCHIVE_GRID, and where it came from.

    Parameters
    ----------
    label : int16 FreeSurfer codes on ARCHIVE_GRID; another code system is noticed by its place
    brain : bool on ARCHIVE_GRID
    to_template : [4, 4], archive mm to MNI152 mm by the affine; the archive keeps a head's own
        size, the atlas does not

    Returns
    -------
    region : bool, same grid
    source : "labels", or "approximate" (MNI coordinates and the template's grey matter)

    Raises
    ------
    ScanError
        unknown_tracer, no_reference
    """
    region = REGIONS[known_tracer(tracer, "reference region").region]
    tissue, inside = _structure(region, np.eye(4) if to_template is None else to_template)
    if label is not None:
        found = np.isin(label, region.labels) & brain
        if (found.sum() >= 1000 * MIN_REFERENCE_ML
                and inside[found].mean() >= MIN_LABELS_IN_PLACE):
            return _lower(found, region), "labels"
    wanted = (GREY,) if region.grey else (GREY, WHITE)
    found = _lower(inside & np.isin(tissue, wanted) & brain, region)
    if found.sum() < 1000 * MIN_REFERENCE_ML:
        raise ScanError("no_reference", f"reference region of {tracer} has {found.sum() / 1000:g} "
                        f"ml inside the brain mask (limit {MIN_REFERENCE_ML:g}); was it scanned?")
    return found, "approximate"


def _lower(region: np.ndarray, kind: Region) -> np.ndarray:
    if not kind.lower_half or not region.any():
        return region
    heights = np.cumsum(region.sum(axis=(0, 1)))
    region = region.copy()
    region[:, :, int(np.searchsorted(heights, heights[-1] / 2)) + 1:] = False
    return region


def _structure(region: Region, to_template: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tissue codes and where the cerebellum or the brainstem lies, both on ARCHIVE_GRID."""
    stem = 16 in region.labels
    origin = ARCHIVE_GRID.affine[:3, 3]
    box = tuple(slice(max(0, int(low - o)), int(high - o)) for (low, high), o
                in zip(BRAINSTEM_BOX if stem else CEREBELLUM_BOX, origin, strict=True))
    index = np.meshgrid(*(np.arange(s.start, s.stop, dtype=np.float32) for s in box),
                        indexing="ij")
    matrix = (to_template @ ARCHIVE_GRID.affine).astype(np.float32)
    x, y, z = (sum(matrix[axis, k] * index[k] for k in range(3)) + matrix[axis, 3]
               for axis in range(3))
    middle = (x / 14) ** 2 + ((y + 29) / 13) ** 2 + ((z + 32) / 14) ** 2 < 1  # of the brainstem
    tentorium = -8 + 0.35 * np.minimum(y + 45, 0) - 0.25 * np.abs(x)
    inside = np.zeros(ARCHIVE_GRID.shape, bool)
    inside[box] = middle if stem else (y < -36) & (z < tentorium) & ~middle
    tissue = np.full(ARCHIVE_GRID.shape, FLUID, np.uint8)
    tissue[box] = _tissue_at(x, y, z)
    return tissue, inside


def _tissue_at(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The template's likeliest tissue at points in MNI mm."""
    codes, affine = _template_tissue()
    voxel = [np.rint(p - o).astype(int) for p, o in zip((x, y, z), affine[:3, 3], strict=True)]
    valid = np.all([(v >= 0) & (v < n) for v, n in zip(voxel, codes.shape, strict=True)], axis=0)
    held = tuple(np.clip(v, 0, n - 1) for v, n in zip(voxel, codes.shape, strict=True))
    return np.where(valid, codes[held], FLUID)


@cache
def _template_tissue() -> tuple[np.ndarray, np.ndarray]:
    from nilearn.datasets import load_mni152_gm_template, load_mni152_wm_template

    grey = load_mni152_gm_template(resolution=1)  # 1 mm, axes along R, A, S
    white = np.asarray(load_mni152_wm_template(resolution=1).dataobj)
    shares = np.asarray(grey.dataobj)
    codes = np.argmax([1 - shares - white, shares, white], axis=0).astype(np.uint8)
    return codes, np.asarray(grey.affine)
