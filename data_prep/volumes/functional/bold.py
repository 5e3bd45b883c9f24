"""A BOLD series -> maps of one volume each, which then go the way of any other scan.

    series --unsteady volumes dropped; drift, and motion where known, removed--> mean, tSNR, ALFF,
    fALFF, and framewise displacement as figures

What was done before decides: XCP-D and FIX derivatives are clean; fMRIPrep's are aligned and get
their motion regressed here from the confounds; anything else is ``minimal``: its maps carry the
motion that the figures beside them report.  A map that a series cannot give is left out with a
reason, never filled in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from data_prep.flags import Flag, Note
from data_prep.qc import Figures
from data_prep.scan import ScanError
from data_prep.volumes.functional.motion import Motion, estimate_motion, parse_motion
from data_prep.volumes.functional.temporal import (
    Plan,
    displacement_figures,
    make_plan,
    normalise,
    temporal_maps,
)
from data_prep.volumes.reading.volume import Series, Volume
from data_prep.volumes.structural.intensity import scale

CLEANED = ("xcp", "fix", "clean", "denoised")  # in the name of the processing
ALIGNED = ("fmriprep", *CLEANED)
BRAIN_LEVEL = 0.3  # of the 98th percentile of the mean image, where no mask is given
MARGIN_VOXELS = 2  # around the brain, so that interpolation at its edge finds values
# The value that becomes 1.  tSNR of 3 T scans at 2-3 mm is 30-150; ALFF over its brain mean is
# near 1, vessels and fluid reach 3; fALFF is a share.
RANGES = {"tSNR": 200.0, "ALFF": 4.0, "fALFF": 1.0}


@dataclass
class BoldMaps:
    """Maps by modality on the grid of the series; absent ones have a reason in ``figures``."""

    maps: dict[str, Volume]  # of "BOLD" (the mean), "tSNR", "ALFF", "fALFF"
    figures: Figures
    flags: list[str]  # of the time courses; the series has its own
    notes: list[str]


def bold_maps(series: Series, *, processing: str | None, confounds: bytes | None,
              brain: np.ndarray | None) -> BoldMaps:
    """Mean, tSNR, ALFF (over its brain mean) and fALFF of a series.

    Parameters
    ----------
    series : [x, y, z, t]
    processing : what was done before delivery, as in Scan; None for a raw series
    confounds : table of motion, see ``parse_motion``; one that does not fit is flagged
    brain : bool [x, y, z]; None: estimated from the mean image

    Returns
    -------
    BoldMaps
        Flags may hold short_series, no_tr, bad_confounds; notes minimal, cleaned_here, demeaned.
    """
    mean = series.data.mean(axis=3)
    if brain is None:
        brain = _bright(mean) if (mean > 0).any() else mean != 0
    whole = np.array([series.data[..., t][brain].mean() for t in range(series.data.shape[3])])
    plan, motion = plan_for(series.name, whole, tr_s=series.tr_s, processing=processing,
                            confounds=confounds)
    source, reason = "table", "the series is motion-corrected and came without a motion table"
    if motion is None and len(whole) > 1 and not _named(processing, ALIGNED):
        motion, source = estimate_motion(series), "estimated"
    # Only the brain is worth the time: most of a field of view is air.
    near = ndimage.binary_dilation(brain, iterations=MARGIN_VOXELS)
    kept = normalise(temporal_maps(_rows(series.data, near), plan), brain[near], plan)
    maps = {name: series.volume(_spread(values, near)) for name, values in kept.items()}
    if "BOLD" in maps:  # the mean image is there to be aligned: with its air
        maps["BOLD"] = series.volume(series.data[..., plan.first:].mean(axis=3))
    return BoldMaps(maps, plan.figures | displacement_figures(motion, plan, source=source,
                                                              reason=reason),
                    plan.flags, plan.notes)


def plan_for(name: str, whole: np.ndarray, *, tr_s: float | None, processing: str | None,
             confounds: bytes | None) -> tuple[Plan, Motion | None]:
    """How to treat a series after what was done before, and its motion table where one fits.

    ``whole`` is the brain's mean over time [t].
    """
    motion, figures, flags = None, {"bold_processing": processing or "raw"}, list[str]()
    if confounds is not None:
        try:
            motion = parse_motion(confounds, len(whole), name)
        except ScanError as error:  # the series itself is good
            figures["confounds_reason"] = str(error)
            flags.append(Flag.BAD_CONFOUNDS)
    cleaned = _named(processing, CLEANED)
    here = (_named(processing, ALIGNED) and not cleaned and motion is not None
            and motion.parameters is not None)
    plan = make_plan(len(whole), tr_s=tr_s, whole=whole, motion=motion, remove_motion=here)
    plan.figures |= figures
    plan.flags += flags
    plan.notes += [Note.CLEANED_HERE] if here else [] if cleaned else [Note.MINIMAL]
    return plan, motion


def _named(processing: str | None, words: tuple[str, ...]) -> bool:
    return any(word in (processing or "").lower() for word in words)


def _bright(mean: np.ndarray) -> np.ndarray:
    mask = ndimage.binary_opening(mean > BRAIN_LEVEL * np.percentile(mean, 98))
    return mask if mask.any() else mean > 0


def _rows(data: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Time courses [n, t] of the voxels of a mask, in its order."""
    rows = np.empty((int(where.sum()), data.shape[3]), np.float32)
    for t in range(data.shape[3]):  # time is the slowest axis in memory
        rows[:, t] = data[..., t][where]
    return rows


def _spread(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    image = np.zeros(where.shape, np.float32)
    image[where] = values
    return image


def scale_map(name: str, image: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """A map to [0, 1], 0 outside the brain; float32.

    tSNR, ALFF and fALFF by their fixed RANGES, so that they compare between people; the mean
    image has no unit and goes by the brain's own window, like a T2w.
    """
    if name == "BOLD":
        return scale(image, brain)
    return np.where(brain, np.clip(image / RANGES[name], 0, 1), 0).astype(np.float32)
