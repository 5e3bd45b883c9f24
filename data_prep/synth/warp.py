"""Smooth, invertible deformations of a label map, and reading it through them once.

A field is a displacement u [3, a, b, c] in millimetres on nodes COARSE_MM apart, over a box whose
fine voxels are 1 mm: the label at x is read at x + u(x).  Every field here is the flow of a smooth
stationary velocity (scaling and squaring: Arsigny et al., MICCAI 2006), so it does not fold, and
flows are composed as fields; the labels themselves are sampled once, at the end.

``Shaper`` (shaper.py) adds focal flows that reach a wanted volume.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

COARSE_MM = 3
SQUARINGS = 5  # 2^5 steps: each moves less than half a node for the velocities used here


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


def random_velocity(rng: np.random.Generator, shape: tuple[int, ...], *, rms_mm: float,
                    smooth_mm: float) -> np.ndarray:
    """A smooth random velocity on a coarse grid of ``shape``, of the given size and width."""
    noise = rng.standard_normal((3, *shape), dtype=np.float32)
    width = smooth_mm / COARSE_MM
    smooth = np.stack([ndimage.gaussian_filter(n, width, mode="nearest") for n in noise])
    return smooth * np.float32(rms_mm / np.sqrt(np.mean(smooth ** 2)))


def compose(outer: np.ndarray, *, velocity: np.ndarray, scale: np.ndarray,
            centre: np.ndarray) -> np.ndarray:
    """Displacement of: shrink about ``centre`` by ``scale``, flow of ``velocity``, then ``outer``.

    The result makes the head ``scale`` [3] times larger, since labels are read through it.
    """
    nodes = nodes_mm(velocity.shape[1:])
    centre_mm = centre.reshape(3, 1, 1, 1).astype(np.float32)
    points = (nodes - centre_mm) / scale.reshape(3, 1, 1, 1).astype(np.float32) + centre_mm
    points = points + sample(flow(velocity), points)
    return points + sample(outer, points) - nodes


def jacobian(field: np.ndarray) -> np.ndarray:
    """[a, b, c] Jacobian determinant of x + u(x); above 0 everywhere means no folding."""
    a, b, c = (np.stack(np.gradient(component, COARSE_MM)) for component in field)
    a[0] += 1
    b[1] += 1
    c[2] += 1
    return (a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0])
            + a[2] * (b[0] * c[1] - b[1] * c[0]))


def density(velocity: np.ndarray) -> np.ndarray:
    """[a, b, c] by how much reading through the flow of ``velocity`` enlarges each place.

    To first order: the divergence is taken where the flow starts, not along its way.
    """
    slopes = [np.gradient(velocity[k], COARSE_MM, axis=k) for k in range(3)]
    return np.exp(-(slopes[0] + slopes[1] + slopes[2]))


def upsample(field: np.ndarray, shape: tuple[int, ...],
             step: np.ndarray | float = 1 / COARSE_MM) -> np.ndarray:
    """A coarse field [..., a, b, c] on the voxels of ``shape`` (separable, trilinear).

    ``step`` is the voxel size in nodes, of all axes or of each.
    """
    for axis in (2, 1, 0):  # the last axis, which is slow to spread, while the rest is small
        num, width = shape[axis], np.broadcast_to(step, 3)[axis]
        position = np.arange(num) * width
        low = np.minimum(position.astype(int), field.shape[axis - 3] - 2)
        weight = (position - low).astype(np.float32)
        weight = weight.reshape(-1, *[1] * (2 - axis))
        left = np.take(field, low, axis - 3)
        right = np.take(field, low + 1, axis - 3)
        right -= left
        right *= weight
        right += left
        field = right
    return field


def scan_nodes(shape: tuple[int, ...], voxel_mm: np.ndarray) -> tuple[int, ...]:
    """Nodes about COARSE_MM apart that cover a scan of ``shape``; its first voxel is a node."""
    return tuple(max(2, int(np.ceil((n - 1) * v / COARSE_MM)) + 1)
                 for n, v in zip(shape, voxel_mm, strict=True))


def read_labels(labels: np.ndarray, *, field: np.ndarray, matrix: np.ndarray, offset: np.ndarray,
                shape: tuple[int, ...]) -> np.ndarray:
    """Labels [x, y, z] on a scan's grid, read once through a coarse field by the nearest voxel.

    ``matrix`` [3, 3] and ``offset`` [3] take the scan's voxel indices to the head's.  What lies
    beyond the label map is as its outermost voxels.
    """
    voxel_mm = np.linalg.norm(matrix, axis=0)
    nodes = np.indices(scan_nodes(shape, voxel_mm), dtype=np.float32)
    turn = (matrix / voxel_mm * COARSE_MM).astype(np.float32)
    points = np.tensordot(turn, nodes, 1) + offset.reshape(3, 1, 1, 1).astype(np.float32)
    points += sample(field, points)
    index = np.zeros(shape, np.int32)
    for along, num in zip(points, labels.shape, strict=True):
        source = upsample(along, shape, voxel_mm / COARSE_MM)
        np.rint(source, out=source)
        np.clip(source, 0, num - 1, out=source)
        index *= num
        index += source.astype(np.int32)
    return labels.ravel()[index]


def warp_labels(labels: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Labels [x, y, z] read through a coarse field on their own grid."""
    return read_labels(labels, field=field, matrix=np.eye(3), offset=np.zeros(3),
                       shape=labels.shape)
