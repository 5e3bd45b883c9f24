"""Whether a head still has its face: cut away, filled with a constant, or smoothed and replaced.

Three signs, each of which is enough; all look below the frontal pole of the brain, where eyes and
nose are:

    recession : the foremost tissue lies behind the forehead (mri_deface, pydeface, quickshear)
    constant  : the place of the face holds one value (a box, or zeros up to the brain)
    smooth    : the face has far less fine structure than the rest of the head at these heights
                (blurred; or another face put there: afni_refacer_run -mode_reface, mri_reface)

How well they do is measured by ``python -m tools.bench flags``.  The tools' own output was not at
hand but for ten scans of one study and one of another; the rest is their effect, imitated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from data_prep.qc.air import MIN_SCALP_SHARE

FRONTAL_MM = 30.0  # depth of the frontal pole, whose underside is the face's upper limit
HALF_WIDTH_MM = 22.0  # of the slab about the midline that holds nose and inner eyes
DEPTH_MM = 45.0  # looked at, below the frontal pole
FOREHEAD_MM = 40.0  # above it
MIN_HEIGHT_MM = 10.0  # of the face inside the field of view, to say anything
STEP_MM = 8.0  # a recession has to last so long
# Measured: whole heads -9 to 8 mm, to 24 with the chin 15 degrees down; cut ones 25 to 63.
MAX_RECESSION_MM = 20.0
FACE_MM = (-12.0, 25.0)  # the face's box along y, from the brain's foremost point
MAX_CONSTANT = 0.9  # share of that box
WIDE_MM, BEHIND_MM, CHEEK_MM = 35.0, 35.0, 10.0  # where fine structure is compared
# Of the face over the head behind it: whole faces 0.6 to 2.1, smoothed and replaced 0.04 to 0.41.
MIN_ROUGHNESS = 0.45
MIN_TISSUE_VOXELS = 100
TISSUE_LEVEL = 0.15  # of the brain's median
SMOOTH_MM = 1.5  # before tissue is told from air


@dataclass(frozen=True)
class _Place:
    """Voxel indices: the midline, the brain's foremost plane, the frontal pole's underside, and the
    lowest plane that is looked at.
    """

    middle: int
    front: int
    top: int
    low: int


def face_is_gone(data: np.ndarray, mask: np.ndarray, spacing: np.ndarray) -> bool | None:
    """Whether a head was defaced; None where that cannot be seen.

    It cannot in a stripped brain, and where the field of view ends with the brain.

    Parameters
    ----------
    data : float [x, y, z], at least 0, axes closest to R, A, S
    mask : bool [x, y, z], the brain
    spacing : [3] mm
    """
    place = _landmarks(mask, spacing)
    level = TISSUE_LEVEL * float(np.median(data[mask]))
    if (place.top - place.low) * spacing[2] < MIN_HEIGHT_MM:
        return None
    if (data[~mask] > level).sum() < MIN_SCALP_SHARE * mask.sum():
        return None  # no scalp either: a stripped brain
    if _constant_share(data, place, spacing) > MAX_CONSTANT:
        return True
    if recession_mm(data, place, spacing, level) > MAX_RECESSION_MM:
        return True
    rough = roughness(data, mask, place, spacing, level)
    return rough is not None and rough < MIN_ROUGHNESS


def _landmarks(mask: np.ndarray, spacing: np.ndarray) -> _Place:
    x, y, _ = (np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3))
    front = int(y[-1])
    pole = mask[:, max(0, front - int(FRONTAL_MM / spacing[1])):]
    top = int(np.flatnonzero(pole.any(axis=(0, 1)))[0])
    return _Place(int(x[0] + x[-1]) // 2, front, top, max(0, top - int(DEPTH_MM / spacing[2])))


def _slab(place: _Place, half_mm: float, spacing: np.ndarray) -> slice:
    half = int(half_mm / spacing[0])
    return slice(max(0, place.middle - half), place.middle + half + 1)


def _constant_share(data: np.ndarray, place: _Place, spacing: np.ndarray) -> float:
    """Share of the box of nose and upper jaw that holds one value."""
    behind, ahead = (max(0, place.front + int(mm / spacing[1])) for mm in FACE_MM)
    face = data[_slab(place, HALF_WIDTH_MM, spacing), behind:ahead, place.low:place.top]
    return float((face == np.median(face)).mean()) if face.size else 0.0


def recession_mm(data: np.ndarray, place: _Place, spacing: np.ndarray, level: float) -> float:
    """How far the foremost tissue lies behind the forehead, over at least STEP_MM of height."""
    slab = data[_slab(place, HALF_WIDTH_MM, spacing), :, place.low:]
    tissue = ndimage.gaussian_filter(slab.astype(np.float32), SMOOTH_MM / spacing) > level
    foremost = np.where(tissue, np.arange(data.shape[1])[:, None], 0).max(axis=(0, 1))  # [z]
    under = place.top - place.low
    forehead = np.percentile(foremost[under:under + int(FOREHEAD_MM / spacing[2]) + 1], 80)
    behind = (forehead - foremost[:under + 1]) * spacing[1]
    count = max(1, round(STEP_MM / float(spacing[2])))
    return max((float(behind[start:start + count].min())
                for start in range(len(behind) - count + 1)), default=0.0)


def roughness(data: np.ndarray, mask: np.ndarray, place: _Place, spacing: np.ndarray, level: float
              ) -> float | None:
    """Fine structure within the face over that within the head behind it.

    None where there is too little of one of them.  Surfaces are left out: they are sharp in any
    head.
    """
    heights = slice(place.low, place.top)
    part = data[..., heights].astype(np.float32)
    axes = [axis for axis in range(3) if spacing[axis] < 1.5 * spacing.min()]
    fine = np.abs(part - np.mean([ndimage.uniform_filter1d(part, 3, axis=axis) for axis in axes],
                                 axis=0))
    tissue = ndimage.gaussian_filter(part, SMOOTH_MM / spacing) > level
    tissue = ndimage.binary_erosion(tissue, iterations=2) & ~ndimage.binary_dilation(
        mask[..., heights], iterations=2)
    face, back = np.zeros_like(tissue), np.zeros_like(tissue)
    cheek = max(0, place.front - int(CHEEK_MM / spacing[1]))
    face[_slab(place, WIDE_MM, spacing), cheek:] = True
    back[:, :max(0, place.front - int(BEHIND_MM / spacing[1]))] = True
    face, back = face & tissue, back & tissue
    if min(face.sum(), back.sum()) < MIN_TISSUE_VOXELS:
        return None
    behind = float(np.median(fine[back]))
    return float(np.median(fine[face])) / behind if behind > 0 else None
