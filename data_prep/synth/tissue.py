"""What changes a head without moving it: thinner or thicker cortex, and lesions of white matter.

Both work on the label map of an anatomy before it is deformed.  Ageing turns the cortex next to
fluid into fluid, or the reverse in a head younger than the anatomy; the inner border of the cortex
gives way likewise, until fluid and grey matter have the wanted volumes.  Which voxels go first is
a property of the anatomy: the narrowest sulci and the thinnest folds.  Lesions begin as caps on
the ventricles and as spots deep in the white matter, at places of the person's own; at a later
visit the same ones are larger.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from data_prep.synth import codes, warp
from data_prep.synth.shaper import distance_mm

NEAR_MM = 1.2  # width in which a voxel looks for its neighbours
SHARE_LIMIT = 0.45  # of fluid or cortex that may turn into the other
CAP_MM = 5.0  # reach of the caps on the ventricles
SPOT_WEIGHT = 0.3  # of the spots against the caps


class Tissue:
    """Orders in which the voxels of one anatomy change; indices are of the flat label map."""

    def __init__(self, labels: np.ndarray) -> None:
        box = ndimage.find_objects(codes.inside(labels).astype(np.uint8))[0]
        part = labels[box]
        flat = np.arange(labels.size, dtype=np.int32).reshape(labels.shape)[box]

        def near(*group: int) -> np.ndarray:
            return ndimage.gaussian_filter(np.isin(part, group).astype(np.float32), NEAR_MM)

        fluid, white = near(codes.FLUID), near(*codes.WHITE)
        left, right = near(codes.CORTEX[0]), near(codes.CORTEX[1])
        cortex = left + right

        def order(where: np.ndarray, towards: np.ndarray) -> np.ndarray:
            chosen = where & (towards > 0.02)
            return flat[chosen][np.argsort(-towards[chosen], kind="stable")]

        is_cortex, is_white = np.isin(part, codes.CORTEX), np.isin(part, codes.WHITE)
        self.cortex_to_fluid = order(is_cortex, fluid)
        self.fluid_to_cortex = order(part == codes.FLUID, cortex)
        self.cortex_to_white = order(is_cortex, white)
        self.white_to_cortex = order(is_white, cortex)
        self.right_side = np.zeros(labels.shape, bool)
        self.right_side[box] = right + near(codes.WHITE[1]) > left + near(codes.WHITE[0])
        deep = is_white & (white > 0.97)
        self.deep = flat[deep]
        # in millimetres of the label map
        self.places = np.stack(np.nonzero(deep)).astype(np.float32)
        self.places += np.array([[b.start] for b in box], np.float32)
        distance = distance_mm(~np.isin(labels, codes.VENTRICLES))
        self.caps = np.exp(-warp.sample(distance, self.places) / CAP_MM)

    def exchange(self, labels: np.ndarray, to_fluid: float, to_white: float) -> None:
        """Turn so many voxels of cortex into fluid and into white matter, or the reverse if < 0."""
        if to_fluid > 0:
            self._turn(labels, self.cortex_to_fluid, to_fluid, codes.CORTEX,
                       (codes.FLUID, codes.FLUID))
        else:
            self._turn(labels, self.fluid_to_cortex, -to_fluid, (codes.FLUID,), codes.CORTEX)
        if to_white > 0:
            self._turn(labels, self.cortex_to_white, to_white, codes.CORTEX, codes.WHITE)
        else:
            self._turn(labels, self.white_to_cortex, -to_white, codes.WHITE, codes.CORTEX)

    def _turn(self, labels: np.ndarray, order: np.ndarray, num: float, before: tuple[int, ...],
              after: tuple[int, int]) -> None:
        flat = labels.reshape(-1)
        order = order[np.isin(flat[order], before)]
        chosen = order[:int(min(num, SHARE_LIMIT * len(order)))]
        flat[chosen] = np.where(self.right_side.reshape(-1)[chosen], after[1], after[0])

    def add_lesions(self, labels: np.ndarray, num: int, rng: np.random.Generator) -> None:
        """Turn ``num`` voxels of white matter into lesions; ``rng`` is of the person."""
        noise = rng.standard_normal(warp.coarse_shape(labels.shape), dtype=np.float32)
        spots = ndimage.gaussian_filter(noise, 0.8)
        score = self.caps + SPOT_WEIGHT / spots.std() * warp.sample(spots, self.places)
        num = min(num, len(score) // 2)
        if num:
            chosen = self.deep[np.argpartition(-score, num)[:num]]
            flat = labels.reshape(-1)
            flat[chosen[np.isin(flat[chosen], codes.WHITE)]] = codes.LESION
