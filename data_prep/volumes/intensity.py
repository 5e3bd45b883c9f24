"""Intensities that compare between people: bias field, interpolation, one robust linear scale."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from data_prep.volumes.geometry import to_array, to_itk

BIAS_FIELD_MM = 4.0
BOX_MARGIN_MM = 8.0
BIAS_FIELD_ITERATIONS = (50, 50, 50, 50)


def correct_bias_field(data: np.ndarray, affine: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """N4 (Tustison et al., IEEE TMI 2010), fitted at about 4 mm inside the mask; float32.

    Only the box around the brain is corrected: it is where the field is known.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    box = _box_around(mask, np.ceil(BOX_MARGIN_MM / spacing).astype(int))
    low = float(data[box].min())
    image = to_itk(data[box] - low, affine)  # N4 takes logarithms
    inside = to_itk(mask[box].astype(np.uint8), affine)
    shrink = np.clip(np.round(BIAS_FIELD_MM / spacing), 1, None).astype(int).tolist()
    method = sitk.N4BiasFieldCorrectionImageFilter()
    method.SetNumberOfThreads(1)
    method.SetMaximumNumberOfIterations(BIAS_FIELD_ITERATIONS)
    method.Execute(sitk.Shrink(image, shrink), sitk.Shrink(inside, shrink))
    bias = np.exp(to_array(method.GetLogBiasFieldAsImage(image)))
    corrected = data.copy()
    corrected[box] = (data[box] - low) / bias + low
    return corrected


def _box_around(mask: np.ndarray, margin: np.ndarray) -> tuple[slice, ...]:
    inside = np.argwhere(mask)
    low, high = inside.min(axis=0) - margin, inside.max(axis=0) + margin + 1
    return tuple(slice(max(0, a), b) for a, b in zip(low.tolist(), high.tolist(), strict=True))


def window(values: np.ndarray) -> tuple[float, float]:
    """The intensities that become 0 and 1, from the brain's voxels.

    The 2nd and 98th percentile, with a margin of 10 % below and 30 % above: a lesion of up to
    2 % of the brain (30 ml) does not move them and, being brighter, still has room to be seen,
    whereas percentiles of the whole volume move with the share of air.
    """
    low, high = (float(p) for p in np.percentile(values, (2, 98)))
    return low - 0.1 * (high - low), high + 0.3 * (high - low)


def scale(data: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Brain to [0, 1] by its ``window``, 0 outside; float32."""
    low, high = window(data[brain])
    scaled = np.clip((data - low) / max(high - low, 1e-6), 0, 1)
    return np.where(brain, scaled, 0).astype(np.float32)
