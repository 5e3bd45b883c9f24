"""The air around a head, and whether it still holds the scanner's noise.

Air is what lies above the brain's lower half and farther from the brain than skull and scalp reach
(the "hat" of Mortamet et al., MRM 2009).  No threshold on intensities enters, so that ghosts stay
air.  Every second voxel or so is looked at (about 2 mm): noise and energy do not change when voxels
are left out, and the masks cost an eighth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

GRID_MM = 2.0
HEAD_DISTANCE_MM = 22.0  # skull and scalp are nearer to the brain
HAT_SHARE = 0.5  # of the brain's height: ears, face and neck are below
MIN_AIR_ML = 8.0
MIN_NOISY_SHARE = 0.05  # of the air; less is left over where a scanner or defacing set zeros
MIN_SCALP_SHARE = 0.15  # of the brain's volume, or the image is a stripped brain


@dataclass(frozen=True)
class Surroundings:
    """Values around and inside a head, on the coarse grid; filled voxels are left out."""

    whole: np.ndarray  # [n]
    head: np.ndarray  # [n]
    air: np.ndarray  # [n]
    image: np.ndarray  # [x, y, z]
    is_air: np.ndarray  # bool [x, y, z]

    def structured_share(self, level: float) -> float:
        """Share of air in pieces above ``level`` that are wider than a voxel."""
        bright = ndimage.binary_opening(self.is_air & (self.image > level))
        return float(bright.sum() / self.is_air.sum())


def surroundings(data: np.ndarray, mask: np.ndarray, spacing: np.ndarray) -> Surroundings | str:
    """Head and air around a brain, or the reason why no air can be measured.

    Parameters
    ----------
    data : float [x, y, z], at least 0, axes closest to R, A, S
    mask : bool [x, y, z], the brain
    spacing : [3] mm
    """
    steps = np.maximum(1, np.round(GRID_MM / spacing)).astype(int)
    every = tuple(slice(None, None, step) for step in steps)
    image, brain, spacing = data[every], mask[every], spacing * steps
    filled = _filled(image)
    if (~brain & ~filled).sum() < MIN_SCALP_SHARE * brain.sum():
        return "the image is a stripped brain"
    head = ndimage.maximum_filter(
        brain, [2 * int(np.ceil(HEAD_DISTANCE_MM / s)) + 1 for s in spacing])
    heights = np.flatnonzero(brain.any(axis=(0, 1)))
    hat = ~head
    hat[..., :int(heights[0] + HAT_SHARE * (heights[-1] - heights[0]))] = False
    air, voxel_ml = hat & ~filled, float(spacing.prod() / 1000)
    if hat.sum() * voxel_ml < MIN_AIR_ML:
        return "no air in the field of view"
    if air.sum() * voxel_ml < MIN_AIR_ML or air.sum() < MIN_NOISY_SHARE * hat.sum():
        return "air was set to a constant"
    return Surroundings(image[~filled], image[head & ~filled], image[air], image, air)


def _filled(image: np.ndarray) -> np.ndarray:
    """Voxels set to one value by scanner or software: their whole neighbourhood is equal."""
    flat = ndimage.maximum_filter(image, 3) == ndimage.minimum_filter(image, 3)
    if not flat.any():
        return flat
    return ndimage.binary_dilation(flat) & (image == np.median(image[flat]))
