"""Gives the structures of one anatomy the volumes that are asked for.

``Shaper`` owns two focal velocities, which push the walls of the lateral ventricles and of the
hippocampi along their normals; time along these flows is solved for.  Everything is measured on
coarse nodes as soft masks, weighted by a ``density``: by how much the person's own deformation,
which comes on top, makes each place larger.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from data_prep.synth import codes, warp
from data_prep.synth.warp import COARSE_MM

FACTOR_LIMIT = 4.5  # of a structure's volume: at sevenfold growth the field comes close to folding
TIME_LIMIT = np.array([12.0, 5.0])  # of the two focal flows: beyond it walls meet other structures


class Shaper:
    """Soft masks and focal velocities of one anatomy."""

    def __init__(self, labels: np.ndarray) -> None:
        box = ndimage.find_objects(codes.inside(labels).astype(np.uint8))[0]
        # the focal flows stop at the skull, so the box of its inside is enough
        self.box = tuple(slice(b.start // COARSE_MM, (b.stop - 1) // COARSE_MM + 2) for b in box)
        self.full_shape = warp.coarse_shape(labels.shape)
        labels = labels[tuple(slice(b.start * COARSE_MM, (b.stop - 1) * COARSE_MM + 1)
                              for b in self.box)]
        self.shape = warp.coarse_shape(labels.shape)
        damp = np.clip(distance_mm(codes.inside(labels)) / 12, 0, 1)
        # the ventricles' wall must not carry the hippocampus along, else it grows with them
        apart = np.clip(distance_mm(~np.isin(labels, codes.HIPPOCAMPI)) / 8, 0, 1)
        ventricles = _wall(np.isin(labels, codes.VENTRICLES), 12.0)
        hippocampi = _wall(np.isin(labels, codes.HIPPOCAMPI), 5.0)
        self.masks = np.stack([ventricles[0], hippocampi[0]])
        self.velocities = np.stack([ventricles[1] * damp * apart, hippocampi[1] * damp])
        grey = np.isin(labels, codes.GREY)
        cortex = np.isin(labels, codes.CORTEX)
        self.tissues = np.stack([_soft(mask) for mask in (
            labels == codes.FLUID, cortex, grey & ~cortex, codes.inside(labels))])
        even = np.ones(self.shape, np.float32)
        volumes = self._measure(np.zeros((3, *self.shape), np.float32), even)
        grown = [self._measure(self._flow(np.array(t)), even) for t in ((2.0, 0.0), (0.0, 1.0))]
        self.slopes = np.log([grown[0][0], grown[1][1]] / volumes) / (2.0, 1.0)

    def _flow(self, times: np.ndarray) -> np.ndarray:
        return warp.flow(np.tensordot(times.astype(np.float32), self.velocities, 1))

    def _measure(self, field: np.ndarray, density: np.ndarray) -> np.ndarray:
        """[2] millilitres of the warped soft masks."""
        return _ml(self.masks, field, density)

    def intracranial_ml(self, density: np.ndarray) -> float:
        """What the skull holds under ``density`` [a, b, c] on all nodes."""
        return float((self.tissues[3] * density[self.box]).sum() * COARSE_MM ** 3 / 1000)

    def solve(self, wanted_ml: np.ndarray,
              density: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The field after which ventricles and hippocampi have ``wanted_ml`` [2].

        Returns the field [3, a, b, c] on all nodes and, under it, the millilitres [3] of outer
        fluid, of cortex and of the other grey matter.  A secant iteration on log volume, to 3 % of
        the soft masks (hard labels differ by some 10 %).  A wish beyond FACTOR_LIMIT is met as far
        as that.  So the true volumes are measured from the final labels, never taken from here.
        """
        density = density[self.box]
        measured = self._measure(np.zeros((3, *self.shape), np.float32), density)
        wanted_ml = np.clip(wanted_ml, measured / FACTOR_LIMIT, measured * FACTOR_LIMIT)
        times, slopes = np.zeros(2), self.slopes
        for _ in range(5):
            step = np.log(wanted_ml / measured) / slopes
            updated = np.clip(times + step, -TIME_LIMIT, TIME_LIMIT)
            field = self._flow(updated)
            volumes = self._measure(field, density)
            moved = updated - times
            rate = np.log(volumes / measured) / np.where(np.abs(moved) > 0.1, moved, np.inf)
            slopes = np.where(rate > 0.3 * self.slopes, rate, slopes)
            times, measured = updated, volumes
            if np.all(np.abs(np.log(wanted_ml / measured)) < 0.03):
                break
        full = np.zeros((3, *self.full_shape), np.float32)
        full[(slice(None), *self.box)] = field
        return full, _ml(self.tissues[:3], field, density)


def _ml(masks: np.ndarray, field: np.ndarray, density: np.ndarray) -> np.ndarray:
    warped = warp.sample(masks, warp.nodes_mm(field.shape[1:]) + field)
    return (warped * density).sum((1, 2, 3)) * COARSE_MM ** 3 / 1000


def _soft(mask: np.ndarray) -> np.ndarray:
    """Share of ``mask`` among the voxels around each node."""
    share = ndimage.uniform_filter(mask.astype(np.float32), COARSE_MM, mode="constant")
    soft = np.zeros(warp.coarse_shape(mask.shape), np.float32)
    part = share[(slice(None, None, COARSE_MM),) * 3]
    soft[tuple(slice(n) for n in part.shape)] = part
    return soft


def distance_mm(mask: np.ndarray) -> np.ndarray:
    """Millimetres from each coarse node inside ``mask`` (of 1 mm voxels) to its outside."""
    shape = warp.coarse_shape(mask.shape)
    nodes = np.pad(mask, [(0, COARSE_MM * (n - 1) + 1 - m)
                          for n, m in zip(shape, mask.shape, strict=True)], mode="edge")
    nodes = nodes[(slice(None, None, COARSE_MM),) * 3]
    return (ndimage.distance_transform_edt(nodes) * COARSE_MM).astype(np.float32)


def _wall(mask: np.ndarray, reach_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Soft mask on the nodes, and the velocity that moves its wall outwards by 1 mm per unit.

    The velocity fades within ``reach_mm`` outside and, by smoothing, towards the middle inside.
    """
    box = tuple(slice(max(0, int(b.start - 3 * reach_mm) // COARSE_MM * COARSE_MM),
                      int(b.stop + 3 * reach_mm)) for b in
                ndimage.find_objects(mask.astype(np.uint8))[0])
    step = (slice(None, None, COARSE_MM),) * 3
    part = mask[box]
    soft = ndimage.gaussian_filter(part.astype(np.float32), 1.5)[step]
    signed = ndimage.distance_transform_edt(~part) - ndimage.distance_transform_edt(part)
    signed = ndimage.gaussian_filter(signed.astype(np.float32), 2.0)
    fade = np.exp(-(np.maximum(signed[step], 0) / reach_mm) ** 2)
    place = tuple(slice(b.start // COARSE_MM, b.start // COARSE_MM + n)
                  for b, n in zip(box, soft.shape, strict=True))
    shape = warp.coarse_shape(mask.shape)
    nodes, velocity = np.zeros(shape, np.float32), np.zeros((3, *shape), np.float32)
    nodes[place] = soft
    for axis, slope in enumerate(np.gradient(signed)):
        # reading at x + u with u against the normal moves the wall outwards
        velocity[axis][place] = ndimage.gaussian_filter(-slope[step] * fade, 0.7)
    return nodes, velocity
