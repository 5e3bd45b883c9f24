"""Scans of one person among themselves: what no scanner promises and no atlas is needed for.

    other scans of the session --6-dof, mutual information--> anchor
    visits --6-dof, mutual information--> their midpoint, whose mean image has no favourite

All matrices map points of the fixed image to points of the moving one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from data_prep.scan import ScanError
from data_prep.volumes.placing.geometry import (
    centre_of,
    nearest_rigid,
    resample,
    rotation_deg,
    to_itk,
)
from data_prep.volumes.placing.matching import (
    Registered,
    mutual_information,
    register,
    shrunk,
    stripped,
)
from data_prep.volumes.preset import Preset
from data_prep.volumes.reading.volume import Volume

MAX_SESSION_SHIFT_MM = 40.0  # of the brain's centre, between scans of one session
MAX_ROTATION_DEG = 45.0
SIDE_MM = 4.0
# Mutual information with a mirror image over that as it is: 0.55 to 0.87 in 6 real and 6 synthetic
# pairs (T1w with T1w, T2w, FLAIR; 1 to 4 mm slices), so at least 1.15 where one is mirrored.
SAME_SIDE, OTHER_SIDE = 0.95, 1.05
# Of the mutual information at the start.  Where two grids coincide it starts high and a right
# answer, which interpolates, ends up to 6 % lower; a wrong one lost half.
MIN_KEPT = 0.8


def register_rigid(fixed: Volume, *, mask: np.ndarray, moving: Volume, preset: Preset,
                   start: np.ndarray | None = None) -> np.ndarray:
    """Rigid transform between two scans of a person: fixed mm to moving mm, [4, 4].

    ``register_rigid_from`` with one start (default: the scanner's coordinates).
    """
    return register_rigid_from([np.eye(4) if start is None else start], fixed=fixed, mask=mask,
                               moving=moving, preset=preset)


def register_rigid_from(starts: list[np.ndarray], *, fixed: Volume, mask: np.ndarray,
                        moving: Volume, preset: Preset) -> np.ndarray:
    """The best rigid transform from several starts: fixed mm to moving mm, [4, 4].

    Mattes mutual information, seen through the fixed scan's brain mask, dilated to hold skull and
    scalp: the inside of a T2w alone is too uniform to pull a coarse optimiser the right way.
    Coarse to fine; where that goes astray, once more on the fine level alone.

    Raises
    ------
    ScanError
        registration_failed: all attempts lose a good part of the information at their start.
    """
    images = (shrunk(fixed.data, fixed.affine, preset.rigid_mm),
              shrunk(moving.data, moving.affine, preset.rigid_mm))
    seen = to_itk(_dilated(mask, fixed).astype(np.uint8), fixed.affine)
    centre, found, what = centre_of(mask, fixed.affine), [], ""
    for start in starts:
        try:
            found.append(_register_rigid(start, centre, images, seen))
        except _AstrayError as error:
            what = str(error)
    if not found:
        raise ScanError("registration_failed", f"{moving.name}: registration to {fixed.name} went "
                        f"astray ({what})")
    return min(found, key=lambda one: one.value).matrix


class _AstrayError(Exception):
    """A registration that ended worse than it began; the message says by how much."""


def _register_rigid(start: np.ndarray, centre: np.ndarray, images: tuple[sitk.Image, sitk.Image],
                    seen: sitk.Image) -> Registered:
    initial = sitk.Euler3DTransform()
    initial.SetCenter(centre.tolist())
    initial.SetMatrix(start[:3, :3].ravel().tolist(), 1e-6)
    initial.SetTranslation((start[:3, 3] + start[:3, :3] @ centre - centre).tolist())
    what = ""
    for shrink in ((2, 1), (1,)):
        try:
            found = register(*images, initial, shrink=shrink, sampling=0.5, step_mm=0.5,
                              set_metric=mutual_information, mask=seen)
        except RuntimeError:  # SimpleITK: the images do not overlap
            what = "the images do not overlap"
            continue
        if found.value <= MIN_KEPT * found.start_value:
            return found
        what = f"mutual information {-found.value:.3f}, {-found.start_value:.3f} at the start"
    raise _AstrayError(what)


def same_side(fixed: Volume, *, mask: np.ndarray, moving: Volume, matrix: np.ndarray
              ) -> bool | None:
    """Whether left and right of two scans of a person agree; None where it cannot be told.

    No brain is its own mirror image, so the scan fits its pair better than its reflection does.
    Which of the two is mirrored, if they disagree, this does not say.

    Parameters
    ----------
    mask : bool [x, y, z], the brain in ``fixed``
    matrix : [4, 4], the rigid transform found: fixed mm to moving mm
    """
    centre = centre_of(mask, fixed.affine)
    there = _reflection(float(matrix[0] @ np.r_[centre, 1]))
    mirror = replace(moving, data=moving.data[::-1], affine=there @ moving.affine
                     @ _reflection((moving.data.shape[0] - 1) / 2))
    image = shrunk(fixed.data, fixed.affine, SIDE_MM)
    seen = to_itk(_dilated(mask, fixed).astype(np.uint8), fixed.affine)
    try:
        as_is, mirrored = (
            _register_rigid(start, centre, (image, shrunk(one.data, one.affine, SIDE_MM)), seen)
            for one, start in ((moving, matrix),
                               (mirror, there @ matrix @ _reflection(float(centre[0])))))
    except _AstrayError:
        return None
    ratio = mirrored.value / as_is.value
    return True if ratio < SAME_SIDE else False if ratio > OTHER_SIDE else None


def _reflection(x: float) -> np.ndarray:
    """[4, 4], left and right exchanged about the plane at ``x``."""
    matrix = np.diag([-1.0, 1.0, 1.0, 1.0])
    matrix[0, 3] = 2 * x
    return matrix


def mirrored_error(name: str, other: str) -> ScanError:
    """What to say where left and right of two scans disagree."""
    return ScanError("left_right_doubtful", f"{name}: left and right are exchanged against "
                     f"{other}, and no header proves which is right. Compare both with their "
                     "source, and name the wrong one in the table of prepare --turn, with turn LAS")


def check_session_shift(matrix: np.ndarray, centre: np.ndarray, name: str) -> None:
    """Raise ScanError when two scans of a session would lie implausibly far apart."""
    shift = float(np.linalg.norm(matrix[:3, :3] @ centre + matrix[:3, 3] - centre))
    angle = rotation_deg(matrix)
    if shift > MAX_SESSION_SHIFT_MM or angle > MAX_ROTATION_DEG:
        raise ScanError("registration_failed",
                        f"{name}: {shift:.0f} mm and {angle:.0f} degrees from its session's anchor "
                        f"(limits {MAX_SESSION_SHIFT_MM:.0f} and {MAX_ROTATION_DEG:.0f})")


def midpoint(transforms: list[np.ndarray], centre: np.ndarray) -> np.ndarray:
    """The average of rigid transforms of one reference: reference mm to midpoint mm, [4, 4].

    Rotations are averaged as matrices and projected back (the chordal mean); ``centre`` (the
    reference brain's) goes to the mean of its images.  For two visits this is halfway.
    """
    mean = np.mean(transforms, axis=0)
    return nearest_rigid(mean, centre)


def average(volumes: list[Volume], *, masks: list[np.ndarray], matrices: list[np.ndarray],
            centre: np.ndarray, name: str) -> tuple[Volume, np.ndarray]:
    """Mean of stripped brains on a 2 mm box around ``centre``; ``matrices``: box mm to volume mm.

    Returns
    -------
    volume : the mean image
    mask : bool, where at least half of the masks agree
    """
    shape = (104, 124, 104)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = centre - (np.array(shape) - 1)
    images = [resample(shrunk(stripped(v.data, m), v.affine, 2.0), t, shape=shape, affine=affine)
              for v, m, t in zip(volumes, masks, matrices, strict=True)]
    shares = [resample(to_itk(m.astype(np.float32), v.affine), t, shape=shape, affine=affine)
              for v, m, t in zip(volumes, masks, matrices, strict=True)]
    return Volume(name, np.mean(images, axis=0), affine), np.mean(shares, axis=0) >= 0.5


def _dilated(mask: np.ndarray, volume: Volume, mm: float = 12.0) -> np.ndarray:
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    size = [2 * round(mm / s) + 1 for s in spacing]
    return ndimage.maximum_filter(mask, size=size)
