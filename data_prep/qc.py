"""Figures of image quality of one scan; None with a reason where one cannot be measured."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from data_prep.volumes.read import Volume

Figures = dict[str, float | str | None]
MIN_AIR_VOXELS = 1000
AIR_DISTANCE_MM = 20.0  # from the brain
AIR_LEVEL = 0.2  # of the brain's median: brighter voxels outside are scalp, neck or ghosts


def quality(volume: Volume, mask: np.ndarray) -> Figures:
    """Signal to noise, contrast and size, in native space.

    Returns
    -------
    dict
        qc_mask_ml : brain mask in ml.
        qc_snr : brain median over the standard deviation of air, corrected for its Rayleigh
            distribution (Dietrich et al., JMRI 2007); None where there is no noisy air.
        qc_snr_reason : why qc_snr is None, else None.
        qc_cjv : coefficient of joint variation of two intensity classes inside the brain split by
            Otsu's method (as in MRIQC, with classes instead of tissues): lower is better.
        qc_spread : interquartile range over median inside the brain.
    """
    # An intercept may put the air below zero; signal is counted from there.
    data = volume.data - min(0.0, float(volume.data.min()))
    brain = data[mask]
    q1, median, q3 = (float(q) for q in np.percentile(brain, (25, 50, 75)))
    snr, reason = _snr(data, volume.affine, mask, median)
    return {
        "qc_mask_ml": float(mask.sum() * volume.voxel_ml),
        "qc_snr": snr,
        "qc_snr_reason": reason,
        "qc_cjv": _cjv(brain),
        "qc_spread": (q3 - q1) / median if median > 0 else None,
    }


def _snr(data: np.ndarray, affine: np.ndarray, mask: np.ndarray, median: float
         ) -> tuple[float | None, str | None]:
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    near = ndimage.maximum_filter(mask, [2 * int(np.ceil(AIR_DISTANCE_MM / s)) + 1
                                         for s in spacing])
    air = data[~near]
    air = air[air < AIR_LEVEL * median]
    if air.size < MIN_AIR_VOXELS:
        return None, "no air in the field of view"
    noisy = air[air != 0]  # scanners and defacing fill parts of the air with zeros
    if noisy.size < max(MIN_AIR_VOXELS, 0.05 * air.size):
        return None, "air was set to zero"
    noise = float(noisy.std()) / (2 - np.pi / 2) ** 0.5
    return (median / noise, None) if noise > 0 else (None, "air is constant")


def _cjv(values: np.ndarray) -> float | None:
    low, high = np.percentile(values, (2, 98))
    counts, edges = np.histogram(values, bins=128, range=(low, max(high, low + 1e-6)))
    middle = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts), counts.sum()
    sums = np.cumsum(counts * middle)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (sums[-1] * below / total - sums) ** 2 / (below * (total - below))
    split = middle[int(np.nanargmax(np.where(np.isfinite(between), between, -1)))]
    dark, bright = values[values <= split], values[values > split]
    if dark.size == 0 or bright.size == 0 or bright.mean() == dark.mean():
        return None
    return float((dark.std() + bright.std()) / (bright.mean() - dark.mean()))
