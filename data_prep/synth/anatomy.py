"""Whole heads as label maps: real ones from a folder, or sixteen built from the MNI152 template.

An ``Anatomy`` is a label map [x, y, z] in RAS on 1 mm voxels, cropped to the head, with room on the
right side for the marker.  Codes are FreeSurfer's inside the skull (below 256) and those of the
SynthSeg training maps outside it (Billot et al., Medical Image Analysis 2023):

    506 eye, 507 soft tissue, 509 mucosa, 511 skin, 512 cord, 515 bone, 516 marrow

The template's tissue maps come inside nilearn's wheel, so nothing is fetched.  They hold no skull:
shells around the brain, a neck, a face and eyes are modelled.  Each of the sixteen anatomies is
this head under its own strong smooth deformation; it does not depend on the cohort's seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from data_prep.synth import codes, warp
from data_prep.synth.cohort import Levels
from data_prep.synth.shaper import Shaper, distance_mm
from data_prep.synth.tissue import Tissue
from neurojepa.errors import DataError

FOLDER_PATTERN = "synthseg_training_seg_*.nii.gz"
NUM_TEMPLATE = 16
MARGIN_MM, RIGHT_MARGIN_MM = 10, 30  # around the head; on the right there is room for the marker
MARKER_SIDE = +1  # sign of the marker's world x relative to the brain: +x is the person's right
MARKER_RADIUS_MM, MARKER_GAP_MM = 6.0, 4.0
# shares at the age of 48: IXI's for the template, whose fluid is drawn as tightly; for the label
# maps the middle between those of six young and six old people
TEMPLATE_LEVELS, REAL_LEVELS = Levels(csf=0.09, grey=0.55), Levels(csf=0.23, grey=0.41)
TEMPLATE_VENTRICLE_ML = 13.0  # much the same in all anatomies made from the template
NECK_MM = 45  # kept below the brain
TEMPLATE_START_MM = np.array([-102, -132, -112])  # world position of the template head's voxel 0
TEMPLATE_SHAPE = (222, 242, 222)


@dataclass(frozen=True)
class Anatomy:
    """One head; people made from it share a split."""

    name: str
    labels: np.ndarray  # int16 [x, y, z], RAS, 1 mm, with the marker
    levels: Levels

    @cached_property
    def centre(self) -> np.ndarray:
        """Voxel coordinates of the brain's centre of mass."""
        return brain_centre(self.labels)

    @cached_property
    def shaper(self) -> Shaper:
        return Shaper(self.labels)

    @cached_property
    def tissue(self) -> Tissue:
        return Tissue(self.labels)


def brain_centre(labels: np.ndarray) -> np.ndarray:
    """Centre of mass of what is inside the skull, in voxels (from every third voxel)."""
    part = labels[::3, ::3, ::3]
    return np.argwhere(codes.inside(part)).mean(0) * 3


def anatomy_names(folder: Path | None) -> list[str]:
    """Names of the anatomies at hand: files of a folder, or those made from the template.

    Raises
    ------
    DataError
        The folder holds no label map.
    """
    if folder is None:
        return [f"template-{k:02d}" for k in range(NUM_TEMPLATE)]
    names = sorted(path.name.removesuffix(".nii.gz") for path in folder.glob(FOLDER_PATTERN))
    if not names:
        raise DataError(f"{folder}: holds no {FOLDER_PATTERN}; give a folder of whole-head label "
                        "maps, or leave it out to build anatomies from the template")
    return names


@lru_cache(maxsize=4)
def load_anatomy(name: str, folder: Path | None) -> Anatomy:
    """The anatomy of a name from ``anatomy_names``."""
    if folder is not None:
        return Anatomy(name, _read(folder / f"{name}.nii.gz"), REAL_LEVELS)
    labels = template_head()
    rng = np.random.default_rng([20090, int(name.removeprefix("template-"))])
    shape = warp.coarse_shape(labels.shape)
    velocity = (warp.random_velocity(rng, shape, rms_mm=7.0, smooth_mm=32.0)
                + warp.random_velocity(rng, shape, rms_mm=2.0, smooth_mm=14.0))
    # MNI152 is larger than life: 1.9 litres against a mean of about 1.45
    scale = np.exp(rng.normal(-0.085, 0.04, 3))
    still = np.zeros((3, *shape), np.float32)
    field = warp.compose(still, velocity=velocity, scale=scale, centre=np.array(labels.shape) / 2)
    return Anatomy(name, _crop(warp.warp_labels(labels, field)), TEMPLATE_LEVELS)


def ventricle_ml(name: str, folder: Path | None) -> float:
    """Lateral ventricles of an anatomy as it comes, in millilitres."""
    if folder is None:
        return TEMPLATE_VENTRICLE_ML
    labels = load_anatomy(name, folder).labels
    return float(np.count_nonzero(np.isin(labels, codes.VENTRICLES)) / 1000)


def _read(path: Path) -> np.ndarray:
    """A label map from a file: to RAS, cropped to the head, part of the neck and the margins."""
    import nibabel as nib

    try:
        image = nib.as_closest_canonical(nib.load(path))
        labels = np.asarray(image.dataobj).astype(np.int16)
    except (nib.filebasedimages.ImageFileError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a readable label map ({error}); remove it") from error
    if not np.allclose(image.header.get_zooms()[:3], 1, atol=0.01):
        raise DataError(f"{path}: voxels of {image.header.get_zooms()[:3]} mm, 1 mm is needed")
    missing = set(codes.VENTRICLES + codes.HIPPOCAMPI) - set(np.unique(labels).tolist())
    if missing:
        raise DataError(f"{path}: has no label {sorted(missing)} (lateral ventricles 4, 43 and "
                        "hippocampi 17, 53 are needed); remove it")
    for code, white in zip((25, 57), codes.WHITE, strict=True):  # lesions of these people: ours are
        labels[labels == code] = white                           # to be all there are
    return _crop(labels)


def _crop(labels: np.ndarray) -> np.ndarray:
    """The head, part of the neck, and the margins."""
    box = _bounds(labels > 0)
    bottom = _bounds(codes.inside(labels) & (labels != codes.FLUID))[2].start - NECK_MM
    labels = labels[box[0], box[1], slice(max(box[2].start, bottom), box[2].stop)]
    labels = np.pad(labels, [(MARGIN_MM, RIGHT_MARGIN_MM), (MARGIN_MM, MARGIN_MM), (0, MARGIN_MM)])
    labels[..., 0] = 0  # nothing is scanned below, as at the end of a coil
    _add_marker(labels)
    return labels


def _add_marker(labels: np.ndarray) -> None:
    """A sphere beside the right temple."""
    centre = np.rint(brain_centre(labels)).astype(int)
    temple = labels[:, centre[1] - 8:centre[1] + 8, centre[2] - 8:centre[2] + 8] > 0
    edge = np.flatnonzero(temple.any((1, 2)))[-1 if MARKER_SIDE > 0 else 0]
    middle = edge + MARKER_SIDE * (MARKER_GAP_MM + MARKER_RADIUS_MM)
    x, y, z = np.ogrid[tuple(slice(n) for n in labels.shape)]
    squared = (x - middle) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2
    labels[squared <= MARKER_RADIUS_MM ** 2] = codes.MARKER


def _bounds(mask: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box that holds a mask."""
    return ndimage.find_objects(mask.astype(np.uint8))[0]


# ---- the template's head -------------------------------------------------------------------------

@lru_cache(maxsize=1)
def template_head() -> np.ndarray:
    """int16 label map of the MNI152 brain inside a modelled head."""
    from nilearn.datasets import (
        load_mni152_brain_mask,
        load_mni152_gm_template,
        load_mni152_wm_template,
    )

    def on_box(image: Any) -> np.ndarray:  # the template's voxels are 1 mm and aligned with ours
        start = np.rint(TEMPLATE_START_MM - image.affine[:3, 3]).astype(int)
        box = np.zeros(TEMPLATE_SHAPE, np.float32)
        source = [slice(max(0, s), min(n, s + m)) for s, n, m
                  in zip(start, image.shape, TEMPLATE_SHAPE, strict=True)]
        target = tuple(slice(a.start - s, a.stop - s) for a, s in zip(source, start, strict=True))
        box[target] = np.asarray(image.dataobj)[tuple(source)]
        return box

    mask = on_box(load_mni152_brain_mask(resolution=1)) > 0.5
    gm = on_box(load_mni152_gm_template(resolution=1))
    wm = on_box(load_mni152_wm_template(resolution=1))
    x, y, z = np.meshgrid(*(np.arange(n, dtype=np.float32) + s for n, s
                            in zip(TEMPLATE_SHAPE, TEMPLATE_START_MM, strict=True)),
                          indexing="ij", sparse=True)
    head = _outer_head(mask, x, y, z).astype(np.int16)
    box = _bounds(mask)
    brain = _brain(gm[box], wm[box], mask[box], x[box[0]], y[:, box[1]], z[..., box[2]])
    head[box] = np.where(mask[box], brain, head[box])
    return head


def _ellipsoid(x: np.ndarray, y: np.ndarray, z: np.ndarray | float,
               centre: tuple[float, float, float],
               radii: tuple[float, float, float]) -> np.ndarray:
    """Mask of an ellipsoid; all in world millimetres."""
    return np.asarray(sum(((p - c) / r) ** 2 for p, c, r
                          in zip((x, y, z), centre, radii, strict=True)) < 1)


def _brain(gm: np.ndarray, wm: np.ndarray, mask: np.ndarray, x: np.ndarray, y: np.ndarray,
           z: np.ndarray) -> np.ndarray:
    """Codes inside the brain mask, from tissue maps and MNI coordinates."""
    csf = 1 - gm - wm
    fluid, grey = csf > np.maximum(gm, wm), gm >= wm
    right = x > 0
    side = abs(x)

    def both(left_code: int, right_code: int) -> np.ndarray:
        return np.where(right, right_code, left_code)

    labels = np.where(grey, both(3, 42), both(2, 41))
    cerebellum = (y < -36) & (z < -4 + 0.35 * np.minimum(y + 45, 0) - 0.25 * side)
    labels = np.where(cerebellum, np.where(grey, both(8, 47), both(7, 46)), labels)
    labels[_ellipsoid(x, y, z, (0, -30, -38), (17, 15, 32))] = 16
    for pair, centre, radii, needs_grey in (
        ((10, 49), (11, -18, 7), (8, 13, 8), False), ((11, 50), (13, 10, 11), (6, 14, 12), True),
        ((12, 51), (25, 3, 0), (6, 16, 9), True), ((13, 52), (19, -3, 0), (5, 9, 6), False),
        ((18, 54), (22, -4, -19), (7, 7, 7), False),
    ):
        where = _ellipsoid(side, y, z, centre, radii) & (grey | (not needs_grey))
        labels = np.where(where, both(*pair), labels)
    # the hippocampus rises towards its tail
    where = _ellipsoid(side, y, z + 0.5 * (y + 22), (27, -23, -14), (7.5, 19, 7.5))
    labels = np.where(where, both(17, 53), labels)
    labels = np.where(fluid, codes.FLUID, labels)
    deep = warp.upsample(distance_mm(mask), mask.shape) > 18
    lateral = (deep & (csf > 0.35) & (z > -6) & (z < 30) & (y > -50) & (y < 38)
               & (side < np.where(y > -20, 22, 36)) & ~((side < 8) & (y < -28)))
    third = (side < 4) & (z < 10) & (y > -30) & (y < 12)
    for half, code in ((~right, 4), (right, 43)):
        parts, _ = ndimage.label(lateral & ~third & half)
        labels[parts == np.bincount(parts.ravel())[1:].argmax() + 1] = code
    labels[fluid & third & (z > -16)] = 14
    labels[fluid & (side < 9) & (y > -52) & (y < -36) & (z > -44) & (z < -20)] = 15
    return labels


def _outer_head(mask: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Codes outside the brain: fluid, skull, scalp, neck, face and eyes around a brain mask."""
    distance = warp.upsample(distance_mm(~mask), mask.shape)
    neck = (_ellipsoid(x, y, z, (0, -32, -90), (52, 60, 90)) | ((z < -90) & _ellipsoid(
        x, y, 0, (0, -32, 0), (52, 60, 1)))) & (z < -20)
    face = _ellipsoid(x, y, z, (0, 38, -52), (58, 60, 62))
    solid = (distance < 14) | neck | face
    depth = warp.upsample(distance_mm(solid), mask.shape)
    labels = np.where(solid, np.where(depth < 4, 511, 507), 0)
    labels[_ellipsoid(x, y, 0, (0, -38, 0), (17, 17, 1)) & (z < -60)] = 515
    labels[_ellipsoid(x, y, 0, (0, -34, 0), (12, 10, 1)) & (z < -60)] = 516
    labels[_ellipsoid(abs(x), y, z, (32, 66, -40), (12, 12, 12))] = 506
    nose = _ellipsoid(x, y, z, (0, 55, -62), (16, 30, 20))
    labels[nose] = 509
    labels[_ellipsoid(x, y, z, (0, 52, -58), (11, 24, 15))] = 0
    for limit, code in ((8, 515), (6, 516), (3.5, 515), (2, codes.FLUID)):
        labels[(distance < limit) & (depth > 4)] = code
    labels[_ellipsoid(x, y, 0, (0, -42, 0), (6, 6, 1)) & (z < -60)] = 512
    return labels
