"""Placement in MNI152: where the head is, with its physical size kept.

    anchor's stripped brain --12-dof affine, correlation (or the cohort's own)--> template
        -> the rotation and translation nearest to it (no scale, no shear)
    other scans of the session --6-dof, mutual information--> anchor
    visits of a person --6-dof, mutual information--> their midpoint --> template

Correlation on stripped brains is more accurate and three times faster here than mutual
information, which over-stretches.  All matrices map output points to input points (template ->
midpoint -> anchor -> other scan), so that they multiply to the one matrix that resamples a scan.
Every registration runs on one thread with a fixed sampling, so that it is repeatable to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from data_prep.scan import ScanError
from data_prep.volumes.geometry import (
    centre_of,
    nearest_rotation,
    resample,
    to_itk,
    to_matrix,
    to_transform,
)
from data_prep.volumes.preset import Preset
from data_prep.volumes.read import Volume
from neurojepa.feed.format import MNI_CENTRE_MM

SetMetric = Callable[[sitk.ImageRegistrationMethod], None]
SEED = 20240
IMAGE_MODALITIES = ("T1w", "FLAIR")  # correlate with the T1w template; others by silhouette
MAX_SESSION_SHIFT_MM = 40.0  # of the brain's centre, between scans of one session
MAX_ROTATION_DEG = 45.0
# Of the mutual information at the start.  Where two grids coincide it starts high and a right
# answer, which interpolates, ends up to 6 % lower; a wrong one lost half.
MIN_KEPT = 0.8
MAX_TILT_DEG = 60.0  # of a head in its scanner


@dataclass(frozen=True)
class Template:
    """The MNI152 brain that nilearn ships: nothing is fetched."""

    image: np.ndarray  # float32 [x, y, z], zero outside the brain
    mask: np.ndarray  # bool [x, y, z]
    affine: np.ndarray

    @property
    def brain_ml(self) -> float:
        return float(self.mask.sum() * abs(np.linalg.det(self.affine[:3, :3])) / 1000)


@dataclass(frozen=True)
class Placement:
    """How a head lies in template space."""

    rigid: np.ndarray  # [4, 4], template mm to head mm: rotation and translation
    affine: np.ndarray  # [4, 4], template mm to head mm: 12 degrees of freedom
    volume_factor: float  # brain volume in the template over its volume in the head
    dice: float  # of the affinely placed mask with the template's, where the head was scanned
    ncc: float | None  # T1w only
    source: str = "registration"  # or "cohort": the transform that came with the scan


@cache
def template(mm: int) -> Template:
    """The template at 1 or 2 mm, loaded once per process."""
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

    image = load_mni152_template(resolution=mm)
    mask = load_mni152_brain_mask(resolution=mm)
    mask_data = np.asarray(mask.dataobj) > 0
    data = np.asarray(image.dataobj, np.float32) * mask_data
    return Template(data, mask_data, np.asarray(image.affine, float))


# ---- to the template -----------------------------------------------------------------------------

def place(head: Volume, mask: np.ndarray, modality: str, preset: Preset) -> Placement:
    """Place a head in template space, with one retry by mutual information.

    T1w and FLAIR correlate with the template's image, other modalities are held by silhouette.

    Raises
    ------
    ScanError
        registration_failed: neither attempt passes the preset's limits.
    """
    best: Placement | None = None
    for metric in ("correlation", "mutual information"):
        try:
            affine = _affine(head, mask, modality, preset, metric)
        except RuntimeError:  # SimpleITK: the images no longer overlap
            continue
        if not upright(affine):
            continue  # the optimiser stepped through a mirror image or onto a head upside down
        found = judge(affine, head, mask, modality)
        if best is None or found.dice > best.dice:
            best = found
        if best.dice >= preset.flag_dice:
            break
    what = "no overlap, or turned over" if best is None else fault(best, preset, preset.min_dice)
    if best is None or what:
        raise ScanError("registration_failed", f"{head.name}: placement in MNI152 failed: {what}")
    return best


def place_given(affine: np.ndarray, head: Volume, mask: np.ndarray, modality: str,
                preset: Preset) -> Placement | str:
    """Placement by the cohort's own affine (template mm to head mm), or what is wrong with it.

    It has to be as good as a placement that nobody would flag: registering anew is the cheaper
    mistake.
    """
    if not upright(affine):
        return "mirrored or turned over"
    found = judge(affine, head, mask, modality)
    return fault(found, preset, preset.flag_dice) or replace(found, source="cohort")


def upright(affine: np.ndarray) -> bool:
    """Whether an affine neither mirrors nor turns a head by more than people lie in a scanner."""
    return bool(np.linalg.det(affine[:3, :3]) > 0) and rotation_deg(affine) <= MAX_TILT_DEG


def fault(placement: Placement, preset: Preset, min_dice: float) -> str:
    """What is wrong with a placement; empty where it passes."""
    low, high = preset.volume_factor
    if placement.dice >= min_dice and low <= placement.volume_factor <= high:
        return ""
    return (f"mask Dice {placement.dice:.3f} (limit {min_dice}), volume factor "
            f"{placement.volume_factor:.2f} (limits {low} to {high})")


def nearest_rigid(affine: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The rotation and translation nearest to an affine.

    The rotation is the orthogonal factor of the polar decomposition (Higham 1986); the point
    ``centre`` goes where the affine takes it.
    """
    rigid = np.eye(4)
    rigid[:3, :3] = nearest_rotation(affine[:3, :3])
    rigid[:3, 3] = affine[:3, :3] @ centre + affine[:3, 3] - rigid[:3, :3] @ centre
    return rigid


def _affine(head: Volume, mask: np.ndarray, modality: str, preset: Preset,
            metric: str) -> np.ndarray:
    target = template(preset.template_mm)
    if modality in IMAGE_MODALITIES:
        fixed, moving = target.image, stripped(head.data, mask)
    else:
        fixed, moving = target.mask.astype(np.float32), mask.astype(np.float32)
    set_metric = (sitk.ImageRegistrationMethod.SetMetricAsCorrelation
                  if metric == "correlation" else _mutual_information)
    images = to_itk(fixed, target.affine), shrunk(moving, head.affine, 2.0 * preset.template_mm)
    # Rotation first: from a turned head the 12 parameters at once stop too early.
    rigid = sitk.Euler3DTransform()
    rigid.SetCenter(MNI_CENTRE_MM)
    rigid.SetTranslation((centre_of(mask, head.affine)
                          - centre_of(target.mask, target.affine)).tolist())
    coarse = _register(*images, rigid, shrink=preset.shrink, sampling=preset.sampling,
                       set_metric=set_metric).matrix
    return _register(*images, to_transform(coarse, MNI_CENTRE_MM), shrink=preset.shrink,
                     sampling=preset.sampling, set_metric=set_metric).matrix


def judge(affine: np.ndarray, head: Volume, mask: np.ndarray, modality: str) -> Placement:
    """Compare with the template at 2 mm, counting only what the head's field of view holds."""
    target = template(2)
    grid = (target.mask.shape, target.affine)
    inside = resample(to_itk(np.ones(mask.shape, np.uint8), head.affine), affine, *grid,
                      sitk.sitkNearestNeighbor).astype(bool)
    placed = resample(to_itk(mask.astype(np.uint8), head.affine), affine, *grid,
                      sitk.sitkNearestNeighbor).astype(bool)
    ncc = None
    if modality == "T1w":
        image = resample(to_itk(stripped(head.data, mask), head.affine), affine, *grid)
        both = target.mask & inside
        ncc = float(np.corrcoef(image[both], target.image[both])[0, 1]) if both.any() else 0.0
    return Placement(
        rigid=nearest_rigid(affine, np.array(MNI_CENTRE_MM)), affine=affine,
        volume_factor=float(1 / np.linalg.det(affine[:3, :3])),
        dice=dice(placed, target.mask & inside), ncc=ncc)


def coverage(matrix: np.ndarray, volume: Volume) -> float:
    """Share of the template's brain inside a field of view; ``matrix``: template to volume mm."""
    target = template(2)
    to_voxels = np.linalg.inv(volume.affine) @ matrix @ target.affine
    voxels = np.argwhere(target.mask) @ to_voxels[:3, :3].T + to_voxels[:3, 3]
    return float(((voxels > -0.5) & (voxels < np.array(volume.data.shape) - 0.5)).all(1).mean())


# ---- within a person -----------------------------------------------------------------------------

def register_rigid(fixed: Volume, mask: np.ndarray, moving: Volume, preset: Preset,
                   start: np.ndarray | None = None) -> np.ndarray:
    """Rigid transform between two scans of a person: fixed mm to moving mm, [4, 4].

    ``register_rigid_from`` with one start (default: the scanner's coordinates).
    """
    return register_rigid_from([np.eye(4) if start is None else start], fixed, mask, moving, preset)


def register_rigid_from(starts: list[np.ndarray], fixed: Volume, mask: np.ndarray, moving: Volume,
                        preset: Preset) -> np.ndarray:
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
                    seen: sitk.Image) -> _Registered:
    initial = sitk.Euler3DTransform()
    initial.SetCenter(centre.tolist())
    initial.SetMatrix(start[:3, :3].ravel().tolist(), 1e-6)
    initial.SetTranslation((start[:3, 3] + start[:3, :3] @ centre - centre).tolist())
    what = ""
    for shrink in ((2, 1), (1,)):
        try:
            found = _register(*images, initial, shrink=shrink, sampling=0.5, step_mm=0.5,
                              set_metric=_mutual_information, mask=seen)
        except RuntimeError:  # SimpleITK: the images do not overlap
            what = "the images do not overlap"
            continue
        if found.value <= MIN_KEPT * found.start_value:
            return found
        what = f"mutual information {-found.value:.3f}, {-found.start_value:.3f} at the start"
    raise _AstrayError(what)


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


def rotation_deg(matrix: np.ndarray) -> float:
    cosine = (np.trace(nearest_rotation(matrix[:3, :3])) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


# ---- pieces --------------------------------------------------------------------------------------

def dice(a: np.ndarray, b: np.ndarray) -> float:
    total = int(a.sum()) + int(b.sum())
    return 2 * float((a & b).sum()) / total if total else 0.0


def stripped(data: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The brain alone, clipped at its 99.5th percentile and scaled to [0, 1]; float32."""
    high = np.percentile(data[mask], 99.5)
    low = min(0.0, float(np.percentile(data[mask], 0.5)))
    return np.where(mask, np.clip((data - low) / max(high - low, 1e-6), 0, 1), 0).astype(np.float32)


def shrunk(data: np.ndarray, affine: np.ndarray, mm: float) -> sitk.Image:
    """Block means of an image, at most about ``mm`` apart: faster, and no aliasing."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    factors = np.clip(np.round(mm / spacing), 1, None).astype(int).tolist()
    return sitk.BinShrink(to_itk(data.astype(np.float32), affine), factors)


def _dilated(mask: np.ndarray, volume: Volume, mm: float = 12.0) -> np.ndarray:
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    size = [2 * round(mm / s) + 1 for s in spacing]
    return ndimage.maximum_filter(mask, size=size)


def _mutual_information(method: sitk.ImageRegistrationMethod) -> None:
    method.SetMetricAsMattesMutualInformation(32)


class _Registered(NamedTuple):
    matrix: np.ndarray  # [4, 4], fixed mm to moving mm
    start_value: float  # of the metric, lower is better
    value: float


def _register(fixed: sitk.Image, moving: sitk.Image, start: sitk.Transform, *,
              shrink: tuple[int, ...], sampling: float,
              set_metric: SetMetric,
              step_mm: float = 2.0, mask: sitk.Image | None = None) -> _Registered:
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)  # sums over threads are not repeatable
    set_metric(method)
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(sampling, SEED)
    if mask is not None:
        method.SetMetricFixedMask(mask)
    method.SetOptimizerAsRegularStepGradientDescent(step_mm, 1e-3, 200, 0.6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(list(shrink))
    method.SetSmoothingSigmasPerLevel([s / 2 for s in shrink])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetInitialTransform(start, inPlace=False)
    start_value = method.MetricEvaluate(fixed, moving)
    matrix = to_matrix(method.Execute(fixed, moving))
    return _Registered(matrix, start_value, method.GetMetricValue())


def average(volumes: list[Volume], masks: list[np.ndarray], matrices: list[np.ndarray],
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
    images = [resample(shrunk(stripped(v.data, m), v.affine, 2.0), t, shape, affine)
              for v, m, t in zip(volumes, masks, matrices, strict=True)]
    shares = [resample(to_itk(m.astype(np.float32), v.affine), t, shape, affine)
              for v, m, t in zip(volumes, masks, matrices, strict=True)]
    return Volume(name, np.mean(images, axis=0), affine), np.mean(shares, axis=0) >= 0.5
