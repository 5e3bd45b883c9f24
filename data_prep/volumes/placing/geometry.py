"""Images with world coordinates, as SimpleITK needs them.

All SimpleITK images here carry RAS millimetres (nibabel's convention) instead of LPS.  SimpleITK
does not care which, as long as every image and transform agrees, and so nothing is ever flipped.
A transform is a 4x4 matrix that maps points of the output space to points of the input space,
which is the direction in which resampling needs it.
"""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from neurojepa.feed.format import Grid


def to_itk(data: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """An array [x, y, z] and its RAS affine as a SimpleITK image in RAS coordinates."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.transpose(2, 1, 0)))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    # Rounding in headers leaves the axes not quite orthogonal; take the nearest rotation.
    u, _, v = np.linalg.svd(affine[:3, :3] / spacing)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((u @ v).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def to_array(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0)


def to_transform(matrix: np.ndarray, centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
                 ) -> sitk.AffineTransform:
    """A 4x4 matrix as a transform; ``centre`` only conditions an optimiser's parameters."""
    transform = sitk.AffineTransform(3)
    transform.SetCenter(centre)
    transform.SetMatrix(matrix[:3, :3].ravel().tolist())
    point = np.array(centre)
    transform.SetTranslation((matrix[:3, :3] @ point + matrix[:3, 3] - point).tolist())
    return transform


def to_matrix(transform: sitk.Transform) -> np.ndarray:
    """[4, 4] float64 of a linear transform, whatever its centre."""
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    matrix = np.eye(4)
    matrix[:3, 3] = origin
    for axis in range(3):
        matrix[:3, axis] = np.array(transform.TransformPoint(np.eye(3)[axis].tolist())) - origin
    return matrix


def resample(image: sitk.Image, matrix: np.ndarray, *, shape: tuple[int, ...], affine: np.ndarray,
             interpolator: int = sitk.sitkLinear, outside: float = 0.0) -> np.ndarray:
    """``image`` on the grid (shape, affine); ``matrix`` maps that grid's points into the image."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    filter_ = sitk.ResampleImageFilter()
    filter_.SetSize([int(n) for n in shape])
    filter_.SetOutputSpacing(spacing.tolist())
    filter_.SetOutputOrigin(affine[:3, 3].tolist())
    filter_.SetOutputDirection((affine[:3, :3] / spacing).ravel().tolist())
    filter_.SetTransform(to_transform(matrix))
    filter_.SetInterpolator(interpolator)
    filter_.SetDefaultPixelValue(outside)
    filter_.SetNumberOfThreads(1)
    return to_array(filter_.Execute(image))


def on_grid(image: sitk.Image, matrix: np.ndarray, grid: Grid, interpolator: int,
            outside: float = 0.0) -> np.ndarray:
    return resample(image, matrix, shape=grid.shape, affine=grid.affine, interpolator=interpolator,
                    outside=outside)


def centre_of(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Centre of mass of a mask in world mm."""
    index = [np.average(np.arange(n), weights=mask.sum(axis=tuple({0, 1, 2} - {axis})))
             for axis, n in enumerate(mask.shape)]
    return affine[:3, :3] @ np.array(index) + affine[:3, 3]


def nearest_rotation(matrix: np.ndarray) -> np.ndarray:
    """Orthogonal factor of the polar decomposition of a 3x3 matrix with positive determinant."""
    u, _, v = np.linalg.svd(matrix)
    return u @ np.diag([1.0, 1.0, np.linalg.det(u @ v)]) @ v


def nearest_rigid(affine: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The rotation and translation nearest to an affine.

    The rotation is the orthogonal factor of the polar decomposition (Higham 1986); the point
    ``centre`` goes where the affine takes it.
    """
    rigid = np.eye(4)
    rigid[:3, :3] = nearest_rotation(affine[:3, :3])
    rigid[:3, 3] = affine[:3, :3] @ centre + affine[:3, 3] - rigid[:3, :3] @ centre
    return rigid


def rotation_deg(matrix: np.ndarray) -> float:
    cosine = (np.trace(nearest_rotation(matrix[:3, :3])) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
