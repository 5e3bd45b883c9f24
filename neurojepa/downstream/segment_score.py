"""How alike two label maps on one grid are, region by region, at that grid's own resolution."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

TOLERANCE_MM = 2.0  # of the surface Dice
SCORES = ("dice", "hd95_mm", "surface_dice", "volume_bias_percent")


def score(found: np.ndarray, truth: np.ndarray, codes: list[int],
          spacing: np.ndarray) -> dict[int, dict[str, float]]:
    """Scores of each code that is in ``truth``.

    Surface voxels of a region have a neighbour (of 6) outside it.  ``hd95_mm`` is the 95th
    percentile of the distances from each surface voxel of one to the surface of the other, of both
    together; ``surface_dice`` the share of surface voxels within ``TOLERANCE_MM`` of the other
    surface (Nikolov et al., JMIR 2021, on voxels).  A region that was not found at all has Dice 0,
    surface Dice 0 and no distance (NaN).
    """
    return {code: _of_region(found == code, truth == code, spacing)
            for code in codes if (truth == code).any()}


def _of_region(found: np.ndarray, truth: np.ndarray, spacing: np.ndarray) -> dict[str, float]:
    box = tuple(slice(max(part.start - 1, 0), part.stop + 1)
                for part in ndimage.find_objects((found | truth).astype(np.uint8))[0])
    found, truth = (np.pad(each[box], 1) for each in (found, truth))
    bias = 100 * (int(found.sum()) / int(truth.sum()) - 1)
    if not found.any():
        return {"dice": 0.0, "hd95_mm": float("nan"), "surface_dice": 0.0,
                "volume_bias_percent": bias}
    surfaces = [each & ~ndimage.binary_erosion(each) for each in (found, truth)]
    away = [ndimage.distance_transform_edt(~each, sampling=spacing) for each in surfaces]
    gaps = np.concatenate([away[1][surfaces[0]], away[0][surfaces[1]]])
    return {"dice": float(2 * (found & truth).sum() / (found.sum() + truth.sum())),
            "hd95_mm": float(np.percentile(gaps, 95)),
            "surface_dice": float((gaps <= TOLERANCE_MM).mean()), "volume_bias_percent": bias}
