"""Smooth, invertible deformations of a label map, and focal ones that reach a wanted volume.

A field is a displacement u [3, a, b, c] in millimetres on nodes COARSE_MM apart, over a box whose
fine voxels are 1 mm: the label at x is read at x + u(x).  Every field here is the flow of a smooth
stationary velocity (scaling and squaring: Arsigny et al., MICCAI 2006), so it does not fold, and
flows are composed as fields; the labels themselves are sampled once, at the end.

``Shaper`` owns one anatomy's two focal velocities, which push the walls of the lateral ventricles
and of the hippocampi along their normals.  Time along these flows is solved for, so that the warped
soft masks have the wanted volumes.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

COARSE_MM = 3
SQUARINGS = 5  # 2^5 steps: each moves less than half a node for the velocities used here
VENTRICLES, HIPPOCAMPI = (4, 43), (17, 53)
FACTOR_LIMIT = 4.5  # of a structure's volume: at sevenfold growth the field comes close to folding
TIME_LIMIT = np.array([12.0, 5.0])  # of the two focal flows: beyond it walls meet other structures


def coarse_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Nodes that cover a box of 1 mm voxels; node i lies at voxel COARSE_MM * i."""
    return tuple(-(-(n - 1) // COARSE_MM) + 1 for n in shape)


def nodes_mm(shape: tuple[int, ...]) -> np.ndarray:
    """[3, a, b, c]: positions of a coarse grid's nodes."""
    return COARSE_MM * np.indices(shape, dtype=np.float32)


def sample(field: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Trilinear values of a coarse field [..., a, b, c] at points [3, ...] in millimetres."""
    flat = field.reshape(-1, *field.shape[-3:])
    coords = points / np.float32(COARSE_MM)
    values = np.stack([ndimage.map_coordinates(f, coords, order=1, mode="nearest") for f in flat])
    return values.reshape(*field.shape[:-3], *points.shape[1:])


def flow(velocity: np.ndarray) -> np.ndarray:
    """The displacement after unit time along a stationary velocity."""
    nodes = nodes_mm(velocity.shape[1:])
    field = velocity / np.float32(2 ** SQUARINGS)
    for _ in range(SQUARINGS):
        field = field + sample(field, nodes + field)
    return field


def random_velocity(rng: np.random.Generator, shape: tuple[int, ...], rms_mm: float,
                    smooth_mm: float) -> np.ndarray:
    """A smooth random velocity on a coarse grid of ``shape``, of the given size and width."""
    noise = rng.standard_normal((3, *shape), dtype=np.float32)
    width = smooth_mm / COARSE_MM
    smooth = np.stack([ndimage.gaussian_filter(n, width, mode="nearest") for n in noise])
    return smooth * np.float32(rms_mm / np.sqrt(np.mean(smooth ** 2)))


def compose(outer: np.ndarray, velocity: np.ndarray, scale: np.ndarray,
            centre: np.ndarray) -> np.ndarray:
    """Displacement of: shrink about ``centre`` by ``scale``, flow of ``velocity``, then ``outer``.

    The result makes the head ``scale`` [3] times larger, since labels are read through it.
    """
    nodes = nodes_mm(velocity.shape[1:])
    centre_mm = centre.reshape(3, 1, 1, 1).astype(np.float32)
    points = (nodes - centre_mm) / scale.reshape(3, 1, 1, 1).astype(np.float32) + centre_mm
    points = points + sample(flow(velocity), points)
    return points + sample(outer, points) - nodes


def min_jacobian(field: np.ndarray) -> float:
    """Smallest Jacobian determinant of x + u(x); above 0 means no folding."""
    rows = [np.gradient(component, COARSE_MM) for component in field]
    matrix = np.stack([np.stack(row) for row in rows]) + np.eye(3)[:, :, None, None, None]
    return float(np.linalg.det(np.moveaxis(matrix, (0, 1), (-2, -1))).min())


def upsample(field: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A coarse field [..., a, b, c] on the 1 mm voxels of ``shape`` (separable, trilinear)."""
    for axis, num in enumerate(shape):
        position = np.arange(num) / COARSE_MM
        low = np.minimum(position.astype(int), field.shape[axis - 3] - 2)
        weight = (position - low).astype(np.float32)
        weight = weight.reshape(-1, *[1] * (2 - axis))
        left = np.take(field, low, axis - 3)
        field = left + weight * (np.take(field, low + 1, axis - 3) - left)
    return field


def warp_labels(labels: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Labels [x, y, z] read once through a coarse field, by the nearest voxel."""
    index = np.zeros(labels.shape, np.int32)
    for axis, num in enumerate(labels.shape):
        along = np.arange(num, dtype=np.float32).reshape(-1, *[1] * (2 - axis))
        source = np.rint(upsample(field[axis], labels.shape) + along)
        index = index * num + np.clip(source, 0, num - 1).astype(np.int32)
    return labels.ravel()[index]


def distance_mm(mask: np.ndarray) -> np.ndarray:
    """Millimetres from each coarse node inside ``mask`` (of 1 mm voxels) to its outside."""
    nodes = np.pad(mask, [(0, COARSE_MM * (n - 1) + 1 - m) for n, m
                          in zip(coarse_shape(mask.shape), mask.shape, strict=True)], mode="edge")
    nodes = nodes[(slice(None, None, COARSE_MM),) * 3]
    return (ndimage.distance_transform_edt(nodes) * COARSE_MM).astype(np.float32)


class Shaper:
    """Gives one anatomy's lateral ventricles and hippocampi the volumes that are asked for."""

    def __init__(self, labels: np.ndarray) -> None:
        inside = (labels > 0) & (labels < 256)
        box = ndimage.find_objects(inside.astype(np.uint8))[0]
        # the focal flows stop at the skull, so the box of its inside is enough
        self.box = tuple(slice(b.start // COARSE_MM, (b.stop - 1) // COARSE_MM + 2) for b in box)
        self.full_shape = coarse_shape(labels.shape)
        labels = labels[tuple(slice(b.start * COARSE_MM, (b.stop - 1) * COARSE_MM + 1)
                              for b in self.box)]
        self.shape = coarse_shape(labels.shape)
        damp = np.clip(distance_mm((labels > 0) & (labels < 256)) / 12, 0, 1)
        # the ventricles' wall must not carry the hippocampus along, else it grows with them
        apart = np.clip(distance_mm(~np.isin(labels, HIPPOCAMPI)) / 8, 0, 1)
        ventricles = _wall(np.isin(labels, VENTRICLES), 12.0)
        hippocampi = _wall(np.isin(labels, HIPPOCAMPI), 5.0)
        self.masks = np.stack([ventricles[0], hippocampi[0]])
        self.velocities = np.stack([ventricles[1] * damp * apart, hippocampi[1] * damp])
        self.volumes = self._measure(np.zeros((3, *self.shape), np.float32))
        grown = [self._measure(self._field(np.array(t))) for t in ((2.0, 0.0), (0.0, 1.0))]
        self.slopes = np.log([grown[0][0], grown[1][1]] / self.volumes) / (2.0, 1.0)

    def _field(self, times: np.ndarray) -> np.ndarray:
        return flow(np.tensordot(times.astype(np.float32), self.velocities, 1))

    def _measure(self, field: np.ndarray) -> np.ndarray:
        """[2] millilitres of the warped soft masks."""
        warped = sample(self.masks, nodes_mm(self.shape) + field)
        return warped.sum((1, 2, 3)) * COARSE_MM ** 3 / 1000

    def solve(self, wanted_ml: np.ndarray) -> np.ndarray:
        """The field after which ventricles and hippocampi have ``wanted_ml`` [2].

        A secant iteration on log volume, to 3 % of the soft masks (hard labels differ by some
        10 %).  A wish beyond FACTOR_LIMIT is met as far as that.  So the true volumes are
        measured from the final labels, never taken from here.
        """
        wanted_ml = np.clip(wanted_ml, self.volumes / FACTOR_LIMIT, self.volumes * FACTOR_LIMIT)
        times, measured = np.zeros(2), self.volumes
        slopes = self.slopes
        for _ in range(5):
            step = np.log(wanted_ml / measured) / slopes
            updated = np.clip(times + step, -TIME_LIMIT, TIME_LIMIT)
            field = self._field(updated)
            volumes = self._measure(field)
            moved = updated - times
            rate = np.log(volumes / measured) / np.where(np.abs(moved) > 0.1, moved, np.inf)
            slopes = np.where(rate > 0.3 * self.slopes, rate, slopes)
            times, measured = updated, volumes
            if np.all(np.abs(np.log(wanted_ml / measured)) < 0.03):
                break
        full = np.zeros((3, *self.full_shape), np.float32)
        full[(slice(None), *self.box)] = field
        return full


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
    shape = coarse_shape(mask.shape)
    nodes, velocity = np.zeros(shape, np.float32), np.zeros((3, *shape), np.float32)
    nodes[place] = soft
    for axis, slope in enumerate(np.gradient(signed)):
        # reading at x + u with u against the normal moves the wall outwards
        velocity[axis][place] = ndimage.gaussian_filter(-slope[step] * fade, 0.7)
    return nodes, velocity
