"""Figures of image quality of one scan; None with a reason where one cannot be measured.

They are measured in native space on the image as read, before bias field and interpolation.  The
definitions follow MRIQC (Esteban et al., PLoS ONE 2017) where it has one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data_prep.qc.air import Surroundings, surroundings
from data_prep.qc.tissue import Tissue, draw, neighbours, split
from data_prep.rows import Figures
from data_prep.scan import ScanError
from data_prep.volumes.reading.volume import Volume

Measured = Mapping[str, float | str]  # a text is the reason why there is no number

STRUCTURAL = ("T1w", "T2w", "FLAIR")
GHOST_LEVEL = 3.5  # times the median of air: Rayleigh noise is above it once in 5000 voxels
# Of the brain's median: what is fainter disturbs nothing, however empty the air around it.
MIN_GHOST = 0.03
_RAYLEIGH = (2 - np.pi / 2) ** 0.5
_TISSUE = ("qc_snr_tissue", "qc_cnr", "qc_cjv", "qc_inhomogeneity")
_AIR = ("qc_snr", "qc_efc", "qc_fber", "qc_ghost", "qc_air_level")
FIGURES = ("qc_mask_ml", "qc_cut_cm2", "qc_fwhm_mm", *_TISSUE, *_AIR)


def quality(volume: Volume, mask: np.ndarray, *, tissue: np.ndarray | None = None,
            modality: str = "T1w") -> Figures:
    """Figures of one scan in native space.

    Parameters
    ----------
    volume : the scan as read: a corrected bias field would hide what is measured here
    mask : bool [x, y, z], the brain
    tissue : int [x, y, z] with FreeSurfer's codes, on the scan's grid; None: classes are estimated
    modality : figures of air and of grey and white matter exist for T1w, T2w and FLAIR only

    Returns
    -------
    dict
        For each of FIGURES a number, or None and ``<name>_reason``:

        qc_mask_ml : brain mask, ml.
        qc_cut_cm2 : largest area of the mask on a face of the field of view: the brain is cut.
        qc_fwhm_mm : smoothness inside the brain (Forman et al., MRM 1995), mean of three axes;
            noise lowers it, blur raises it.
        qc_snr : brain median over the standard deviation of air, corrected for its Rayleigh
            distribution (Dietrich et al., JMRI 2007).
        qc_snr_tissue : white matter over the noise in it, from pseudo-residuals (Coupe et al.,
            IEEE TMI 2008); needs no air, and interpolation makes it too high.
        qc_cnr : difference of white and grey matter over that noise (Magnotta and Friedman,
            J. Digit. Imaging 2006, with noise from tissue instead of air).
        qc_cjv : coefficient of joint variation of grey and white matter (Ganzetti et al., Front.
            Neuroinform. 2016); higher is worse.
        qc_inhomogeneity : range (5th to 95th percentile) of a smooth field fitted to log
            intensities of tissue; 0 is a flat field.
        qc_efc : entropy focus criterion (Atkinson et al., IEEE TMI 1997), 0 to 1; ghosts and blur
            of motion raise it.
        qc_fber : mean energy of the head over that of air (Shehzad et al., Front. Neurosci. 2015).
        qc_ghost : share of air in structures brighter than its noise (as QI1 of Mortamet et al.,
            MRM 2009) and than 3 % of the brain: ghosts, spikes, wrapped tissue.
        qc_air_level : median of air over the median of the brain.

    Raises
    ------
    ScanError
        empty_mask: there is no brain to measure in.
    """
    if not mask.any():
        raise ScanError("empty_mask", f"{volume.name}: the brain mask is empty")
    # An intercept may put the air below zero; signal is counted from there.
    data = volume.data - min(0.0, float(volume.data.min()))
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    sample = draw(mask)
    values = data.ravel()[sample].astype(np.float64)
    measured: dict[str, float | str] = {
        "qc_mask_ml": float(mask.sum() * volume.voxel_ml),
        "qc_cut_cm2": _cut(mask, spacing),
        "qc_fwhm_mm": _fwhm(data, mask, sample, values, spacing),
    }
    if modality in STRUCTURAL:
        measured |= _tissue(split(data, sample, values=values, spacing=spacing, modality=modality,
                                  codes=tissue))
        measured |= _air(surroundings(data, mask, spacing), float(np.median(values)))
    else:
        measured |= dict.fromkeys((*_TISSUE, *_AIR), f"not defined for {modality}")
    return _stored(measured)


def _stored(measured: Measured) -> Figures:
    """Numbers to six digits (the rest changes with the number of threads), and reasons."""
    stored: Figures = {}
    for name in FIGURES:
        value = measured[name]
        known = not isinstance(value, str) and np.isfinite(value)
        stored[name] = float(f"{value:.6g}") if known else None
        stored[f"{name}_reason"] = (None if known else value if isinstance(value, str)
                                    else "not finite")
    return stored


def _cut(mask: np.ndarray, spacing: np.ndarray) -> float:
    faces = [float(mask.take(end, axis).sum() * np.delete(spacing, axis).prod() / 100)
             for axis in range(3) for end in (0, -1)]
    return max(faces)


def _fwhm(data: np.ndarray, mask: np.ndarray, sample: np.ndarray, values: np.ndarray,
          spacing: np.ndarray) -> float | str:
    widths = []
    for axis in range(3):
        beside, inside = neighbours(data, sample, axis=axis, step=1)
        inside &= neighbours(mask, sample, axis=axis, step=1)[0]
        step, spread = np.var(beside[inside] - values[inside]), np.var(values)
        correlation = 1 - step / (2 * spread) if spread > 0 else 0.0
        if not 0 < correlation < 1:
            return "neighbouring voxels are not correlated"
        widths.append(spacing[axis] * (-2 * np.log(2) / np.log(correlation)) ** 0.5)
    return float(np.mean(widths))


def _tissue(tissue: Tissue | str) -> Measured:
    if isinstance(tissue, str):
        return dict.fromkeys(_TISSUE, tissue)
    contrast = abs(tissue.white_mean - tissue.grey_mean)
    noise, flat = tissue.noise, "no noise in the tissue"
    return {
        "qc_snr_tissue": tissue.white_mean / noise if noise > 0 else flat,
        "qc_cnr": contrast / noise if noise > 0 else flat,
        "qc_cjv": ((tissue.grey_sd + tissue.white_sd) / contrast if contrast > 0
                   else "grey and white matter look alike"),
        "qc_inhomogeneity": tissue.field_range,
    }


def _air(around: Surroundings | str, brain: float) -> Measured:
    if isinstance(around, str):
        return dict.fromkeys(_AIR, around)
    air, level = around.air, float(np.median(around.air))
    seen = around.whole[around.whole > 0]  # x log x is 0 at 0
    share = seen / np.sqrt(np.sum(np.square(seen)))
    most = np.sqrt(around.whole.size) * np.log(np.sqrt(around.whole.size))
    measured: dict[str, float | str] = {"qc_efc": float(-np.sum(share * np.log(share)) / most)}
    if level <= 0 or brain <= 0:
        return dict.fromkeys(_AIR, "most of the air is zero") | measured
    return measured | {
        "qc_snr": brain / (float(air.std()) / _RAYLEIGH),
        "qc_fber": float(np.mean(np.square(around.head)) / np.mean(np.square(air))),
        "qc_ghost": around.structured_share(max(GHOST_LEVEL * level, MIN_GHOST * brain)),
        "qc_air_level": level / brain,
    }
