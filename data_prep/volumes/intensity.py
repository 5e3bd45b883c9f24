"""Intensities that compare between people: bias field, interpolation, one robust linear scale."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from data_prep.volumes.geometry import to_array, to_itk

BIAS_FIELD_MM = 4.0
BIAS_FIELD_ITERATIONS = (50, 50, 50, 50)


def correct_bias_field(data: np.ndarray, affine: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """N4 (Tustison et al., IEEE TMI 2010), fitted at about 4 mm inside the mask; float32."""
    low = float(data.min())
    image = to_itk((data - low).astype(np.float32), affine)  # N4 takes logarithms
    inside = to_itk(mask.astype(np.uint8), affine)
    factors = np.clip(np.round(BIAS_FIELD_MM / np.array(image.GetSpacing())), 1, None)
    shrink = factors.astype(int).tolist()
    method = sitk.N4BiasFieldCorrectionImageFilter()
    method.SetNumberOfThreads(1)
    method.SetMaximumNumberOfIterations(BIAS_FIELD_ITERATIONS)
    method.Execute(sitk.Shrink(image, shrink), sitk.Shrink(inside, shrink))
    bias = np.exp(to_array(method.GetLogBiasFieldAsImage(image)))
    return ((data - low) / bias + low).astype(np.float32)


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
