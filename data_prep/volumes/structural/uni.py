"""MP2RAGE's uniform image (UNI, BIDS UNIT1): a ratio, so that air is noise as bright as tissue.

UNI = S1 S2 / (S1^2 + S2^2) of two inversions (Marques et al., NeuroImage 2010).  Where both are
nothing but noise, it takes any value from voxel to voxel; inside the head it is smooth.  So the
head is where neighbours are alike, and what is around it is set to the image's least value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from data_prep.flags import Flag, Note
from data_prep.volumes.reading.volume import Volume
from data_prep.volumes.structural.brain import largest_component

# Of the faces of the field of view, but the lower one: spread over the image's range, and the
# difference of neighbours over that spread (1.1 of independent noise, 0.3 of tissue).
NOISY_SPREAD, NOISY_STEP = 0.2, 0.8
STATED_SPREAD = 0.1  # enough of a spread where the sidecar says UNI
SMOOTH_MM, CLOSE_MM = 4.0, 8.0
MAX_ROUGH = 0.5  # of the head, by the air around it
MIN_HEAD_ML = 700.0


def is_uni(facts: Mapping[str, object]) -> bool:
    """Whether the sidecar's ImageType names a uniform image."""
    kind = facts.get("ImageType")
    words = kind if isinstance(kind, list) else [kind]
    return any(part == "UNI" for word in words
               for part in re.split(r"[\\_\s-]", str(word or "").upper()))


def quiet_background(volume: Volume, facts: Mapping[str, object]) -> Volume:
    """The volume with the noise around its head set to 0, where it is such an image.

    All values are counted from the least, since a ratio goes below zero.
    """
    spread, step = _faces(volume.data)
    if not (step > NOISY_STEP and spread > (STATED_SPREAD if is_uni(facts) else NOISY_SPREAD)):
        return volume
    head = _smooth_part(volume)
    if not MIN_HEAD_ML <= head.sum() * volume.voxel_ml <= 0.9 * head.size * volume.voxel_ml:
        return volume
    data = np.where(head, volume.data - volume.data.min(), 0).astype(np.float32)
    return replace(volume, data=data, notes=[*volume.notes, Note.RATIO_BACKGROUND_REMOVED],
                   flags=[flag for flag in volume.flags if flag != Flag.NEGATIVE_VALUES])


def _faces(data: np.ndarray) -> tuple[float, float]:
    """Median over the faces of the spread, by the image's range, and of neighbours' differences."""
    low, high = np.percentile(data.ravel()[::max(1, data.size // (1 << 19))], (2, 98))
    if not high > low:
        return 0.0, 0.0
    faces = [data[0], data[-1], data[:, 0], data[:, -1], data[:, :, -1]]
    spreads = [float(face.std()) for face in faces]
    steps = [float(np.abs(np.diff(face, axis=0)).mean() / spread) if spread else 0.0
             for face, spread in zip(faces, spreads, strict=True)]
    return float(np.median(spreads) / (high - low)), float(np.median(steps))


def _smooth_part(volume: Volume) -> np.ndarray:
    """Where neighbours are alike: one piece, closed, without holes; bool."""
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    mean = ndimage.uniform_filter(volume.data, 3)
    rough = np.sqrt(np.maximum(ndimage.uniform_filter(np.square(volume.data), 3)
                               - np.square(mean), 0))
    rough = ndimage.gaussian_filter(rough, SMOOTH_MM / spacing / 2)
    smooth = sitk.GetArrayFromImage(sitk.OtsuThreshold(sitk.GetImageFromArray(rough), 1, 0)) > 0
    if rough[smooth].mean() > MAX_ROUGH * rough[~smooth].mean():
        return np.zeros(smooth.shape, bool)  # the same all over
    pieces = largest_component(ndimage.binary_opening(smooth))
    rounds = max(1, round(CLOSE_MM / float(spacing.max()) / 2))
    return ndimage.binary_fill_holes(ndimage.binary_closing(pieces, iterations=rounds))
