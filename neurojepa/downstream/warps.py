"""Deformations as displacement fields [x, y, z, 3] in RAS mm on a grid, and what is read through
them: the point x of the grid is read at x + d(x) of the other image.
"""

from __future__ import annotations

import numpy as np

from neurojepa.downstream.images import Image, itk_array, itk_image, linear

SLAB = 1 << 21  # points handled at once


def points_of(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """float32 [x, y, z, 3]: world mm of every voxel."""
    index = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij"),
                     -1)
    return index @ affine[:3, :3].T.astype(np.float32) + affine[:3, 3].astype(np.float32)


def sample(values: np.ndarray, grid: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Linear values of an array [x, y, z] on the grid [4, 4] at points [..., 3] in mm; beyond it as
    at its border."""
    from scipy import ndimage

    back = np.linalg.inv(grid)
    where = points @ back[:3, :3].T + back[:3, 3]
    return ndimage.map_coordinates(values, np.moveaxis(where, -1, 0), order=1, mode="nearest")


def onto(field: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], target: np.ndarray,
         through: np.ndarray) -> np.ndarray:
    """A field of the grid ``affine`` where ``through`` [4, 4] takes the points of a target grid;
    beyond its grid it goes on as at the border."""
    import SimpleITK as sitk

    like = itk_image(np.zeros(shape, np.uint8), target)
    return itk_array(sitk.Resample(itk_image(field, affine), like, linear(through), sitk.sitkLinear,
                                   0.0, sitk.sitkVectorFloat32, True))


def total(field: np.ndarray, affine: np.ndarray, like: Image, matrix: np.ndarray) -> np.ndarray:
    """Displacement on an image's grid of ``field`` (on the grid ``affine``), then ``matrix``."""
    here = points_of(like.data.shape, like.affine)
    inner = onto(field, affine, like.data.shape, like.affine, np.eye(4))
    moved = (here + inner) @ matrix[:3, :3].T.astype(np.float32) + matrix[:3, 3].astype(np.float32)
    return moved - here


def inverse_total(inverse: np.ndarray, affine: np.ndarray, like: Image,
                  matrix: np.ndarray) -> np.ndarray:
    """Displacement on an image's grid that undoes ``total``: first ``matrix`` back, then the field
    ``inverse`` (on the grid ``affine``)."""
    back = np.linalg.inv(matrix)
    here = points_of(like.data.shape, like.affine)
    laid = here @ back[:3, :3].T.astype(np.float32) + back[:3, 3].astype(np.float32)
    return laid + onto(inverse, affine, like.data.shape, like.affine, back) - here


def read_through(image: Image, field: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """An image [x, y, z] read linearly through a field on the grid ``grid`` [4, 4]; 0 outside."""
    import SimpleITK as sitk

    transform = sitk.DisplacementFieldTransform(itk_image(field.astype(np.float64), grid))
    like = itk_image(np.zeros(field.shape[:3], np.uint8), grid)
    return itk_array(sitk.Resample(itk_image(image.data.astype(np.float32), image.affine), like,
                                   transform, sitk.sitkLinear, 0.0))


def labels_through(labels: Image, field: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """int32 [x, y, z]: of each voxel the label whose one-hot map, interpolated linearly, is highest
    at the point where it is read; 0 outside the label map.

    The eight neighbours of that point vote with their weights, which is the same and does not
    depend on how many labels there are.
    """
    points = (points_of(field.shape[:3], grid) + field).reshape(-1, 3)
    back = np.linalg.inv(labels.affine)
    found = np.zeros(len(points), np.int32)
    for start in range(0, len(points), SLAB):
        part = slice(start, start + SLAB)
        found[part] = _vote(labels.data, points[part] @ back[:3, :3].T + back[:3, 3])
    return found.reshape(field.shape[:3])


def _vote(labels: np.ndarray, where: np.ndarray) -> np.ndarray:
    """[n] labels at voxel coordinates [n, 3]."""
    shape, result = np.array(labels.shape), np.zeros(len(where), np.int32)
    inside = np.flatnonzero(((where > -0.5) & (where < shape - 0.5)).all(1))
    where = where[inside]
    low = np.floor(where).astype(np.int32)
    share = (where - low).astype(np.float32)
    codes, weights = [], []
    for corner in np.ndindex(2, 2, 2):
        at = np.clip(low + corner, 0, shape - 1)
        codes.append(labels[tuple(at.T)])
        weights.append(np.prod(np.where(corner, share, 1 - share), axis=1))
    code, weight = np.stack(codes), np.stack(weights)
    mixed = np.flatnonzero((code != code[0]).any(0))
    result[inside] = code[0]
    code, weight = code[:, mixed], weight[:, mixed]
    score = np.stack([(weight * (code == one)).sum(0) for one in code])
    # of equal scores the lowest label, so that the order of neighbours says nothing
    best = np.where(score >= score.max(0, initial=0) - 1e-6, code, np.iinfo(np.int32).max)
    result[inside[mixed]] = best.min(0)
    return result


def jacobian(field: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """float32 [x, y, z]: by how much x + d(x) enlarges each place; 0 or less where it folds."""
    spacing = np.linalg.norm(grid[:3, :3], axis=0)
    axes = (grid[:3, :3] / spacing).astype(np.float32)
    rows = []
    for component in range(3):
        slopes = np.stack(np.gradient(field[..., component], *spacing.astype(np.float32)))
        row = np.tensordot(axes, slopes, 1)  # along world axes
        row[component] += 1
        rows.append(row)
    a, b, c = rows
    found = (a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0])
             + a[2] * (b[0] * c[1] - b[1] * c[0]))
    return found.astype(np.float32)
