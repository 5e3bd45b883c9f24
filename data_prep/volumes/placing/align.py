"""Placement in MNI152: where the head is, with its physical size kept.

    anchor's stripped brain --12-dof affine, correlation (or the cohort's own)--> template
        -> the rotation and translation nearest to it (no scale, no shear)
    other scans of the session --rigid--> anchor; visits --rigid--> their midpoint (within.py)

Correlation on stripped brains is more accurate and three times faster here than mutual
information, which over-stretches.  All matrices map output points to input points (template ->
midpoint -> anchor -> other scan), so that they multiply to the one matrix that resamples a scan.
Every registration runs on one thread with a fixed sampling, so that it is repeatable to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import SimpleITK as sitk

from data_prep.scan import ScanError
from data_prep.volumes.placing.geometry import (
    centre_of,
    nearest_rigid,
    resample,
    rotation_deg,
    to_itk,
    to_transform,
)
from data_prep.volumes.placing.matching import dice, mutual_information, register, shrunk, stripped
from data_prep.volumes.preset import Preset
from data_prep.volumes.reading.volume import Volume
from neurojepa.feed.format import MNI_CENTRE_MM

IMAGE_MODALITIES = ("T1w", "FLAIR")  # correlate with the T1w template; others by silhouette
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
        found = judge(affine, head=head, mask=mask, modality=modality)
        if best is None or found.dice > best.dice:
            best = found
        if best.dice >= preset.flag_dice:
            break
    what = "no overlap, or turned over" if best is None else fault(best, preset, preset.min_dice)
    if best is None or what:
        raise ScanError("registration_failed", f"{head.name}: placement in MNI152 failed: {what}")
    return best


def place_given(affine: np.ndarray, *, head: Volume, mask: np.ndarray, modality: str,
                preset: Preset) -> Placement | str:
    """Placement by the cohort's own affine (template mm to head mm), or what is wrong with it.

    It has to be as good as a placement that nobody would flag: registering anew is the cheaper
    mistake.
    """
    if not upright(affine):
        return "mirrored or turned over"
    found = judge(affine, head=head, mask=mask, modality=modality)
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


def _affine(head: Volume, mask: np.ndarray, modality: str, preset: Preset,
            metric: str) -> np.ndarray:
    target = template(preset.template_mm)
    if modality in IMAGE_MODALITIES:
        fixed, moving = target.image, stripped(head.data, mask)
    else:
        fixed, moving = target.mask.astype(np.float32), mask.astype(np.float32)
    set_metric = (sitk.ImageRegistrationMethod.SetMetricAsCorrelation
                  if metric == "correlation" else mutual_information)
    images = to_itk(fixed, target.affine), shrunk(moving, head.affine, 2.0 * preset.template_mm)
    # Rotation first: from a turned head the 12 parameters at once stop too early.
    rigid = sitk.Euler3DTransform()
    rigid.SetCenter(MNI_CENTRE_MM)
    rigid.SetTranslation((centre_of(mask, head.affine)
                          - centre_of(target.mask, target.affine)).tolist())
    coarse = register(*images, rigid, shrink=preset.shrink, sampling=preset.sampling,
                       set_metric=set_metric).matrix
    return register(*images, to_transform(coarse, MNI_CENTRE_MM), shrink=preset.shrink,
                     sampling=preset.sampling, set_metric=set_metric).matrix


def judge(affine: np.ndarray, *, head: Volume, mask: np.ndarray, modality: str) -> Placement:
    """Compare with the template at 2 mm, counting only what the head's field of view holds."""
    target = template(2)

    def on_target(data: np.ndarray, interpolator: int) -> np.ndarray:
        return resample(to_itk(data, head.affine), affine, shape=target.mask.shape,
                        affine=target.affine, interpolator=interpolator)

    inside = on_target(head.seen.astype(np.uint8), sitk.sitkNearestNeighbor).astype(bool)
    placed = on_target(mask.astype(np.uint8), sitk.sitkNearestNeighbor).astype(bool)
    ncc = None
    if modality == "T1w":
        image = on_target(stripped(head.data, mask), sitk.sitkLinear)
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
    voxels = np.rint(np.argwhere(target.mask) @ to_voxels[:3, :3].T + to_voxels[:3, 3]).astype(int)
    inside = ((voxels >= 0) & (voxels < np.array(volume.data.shape))).all(axis=1)
    return float(volume.seen[tuple(voxels[inside].T)].sum() / len(voxels))
