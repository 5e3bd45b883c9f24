"""PET: frames -> one late image -> its ratio to a reference region (SUVR) in a fixed range.

    frames --duration-weighted mean over the tracer's late window--> image (native grid)
    image, brain (archive grid) --reference region by the tracer--> SUVR -> [0, suvr_max] -> [0, 1]

A ratio needs no dose and no weight, and its range is fixed by the tracer: percentiles would take
away the very difference between people that PET is for.  Motion between frames is not corrected
(``pet_frame_motion`` says so); decay correction is expected, as scanners deliver it.
What is known of each tracer stands in pet.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data_prep.flags import Flag, Note
from data_prep.qc import Figures
from data_prep.scan import ScanError
from data_prep.volumes.functional.pet_reference import reference_region
from data_prep.volumes.functional.pet_table import PET_TRACERS, TABLE, known_tracer, tracer_name
from data_prep.volumes.functional.pet_units import SUVR, unit_of
from data_prep.volumes.reading.volume import Series, Volume, check_content

__all__ = ["PET_TRACERS", "check_units", "is_suvr", "mean_frame", "reference_region", "suvr",
           "tracer_name"]

MIN_WINDOW_SHARE = 0.5  # of a frame inside the window, to be used
# Frames are timed one by one: a repetition time says nothing about them.
NOT_OF_FRAMES = (Flag.TR_DISAGREES, Flag.TR_IMPLAUSIBLE, Flag.TR_UNIT_GUESSED)
MAX_FRAME_S = 7200.0  # longer "seconds" are milliseconds
MIN_REFERENCE_LEVEL = 0.1  # of the brain's median
SUVR_MEDIAN = (0.2, 5.0)  # of a brain, where a file says that it holds SUVR


# ---- units ---------------------------------------------------------------------------------------

def is_suvr(facts: Mapping[str, object], processing: str | None = None) -> bool:
    """Whether an image is a ratio already, by its units or the name of its processing."""
    unit = unit_of(facts.get("Units"))
    return (unit is not None and unit.name == SUVR) or "suvr" in (processing or "").lower()


def check_units(facts: Mapping[str, object], processing: str | None, name: str) -> list[str]:
    """Notes on the units; ScanError unknown_units where they are not linear in activity.

    Images that a cohort has processed often lose their units; a raw one has to name them.
    """
    if is_suvr(facts, processing):
        return [Note.ALREADY_SUVR]
    stated = facts.get("Units")
    if unit_of(stated) is not None:
        return []
    if not str(stated or "").strip():
        if processing:
            return [Note.UNITS_MISSING]
        raise ScanError("unknown_units", f"{name}: the sidecar names no Units; write what the "
                        "image counts in (Bq/mL, kBq/mL, uCi/mL, counts, SUV or SUVR)")
    raise ScanError("unknown_units", f"{name}: Units {stated!r} is none of those known (Bq/mL, "
                    "kBq/cc, MBq/L, nCi/mL, counts, g/mL, SUV, SUVR and their spellings); correct "
                    "the sidecar")


# ---- frames --------------------------------------------------------------------------------------

def mean_frame(series: Series, facts: Mapping[str, object], *, tracer: str | None = None,
               processing: str | None = None) -> tuple[Volume, Figures]:
    """The duration-weighted mean of the frames in the tracer's late window.

    Parameters
    ----------
    series : frames [x, y, z, t] in any linear unit; activity is converted to Bq/mL
    facts : FrameTimesStart and FrameDuration in seconds, Units
    tracer : needed to choose among the frames of a dynamic scan
    processing : what the cohort did before delivery

    Returns
    -------
    volume, figures
        The volume's flags and notes are those of the series and of its frames.

    Raises
    ------
    ScanError
        unknown_units, unknown_tracer (dynamic only), bad_frames, no_late_frames, and those of
        ``check_content``.
    """
    units = check_units(facts, processing, series.name)
    count = series.data.shape[3]
    weights, window, more = _weights(facts, count, tracer, series.name)
    empty = np.array([not series.data[..., t].any() for t in range(count)])
    if (empty & (weights > 0)).any():
        more.append(Flag.EMPTY_FRAMES)
        weights = np.where(empty, 0, weights)
    if not weights.any():
        raise ScanError("no_late_frames", f"{series.name}: all frames in the window are empty")
    used = np.flatnonzero(weights)
    data = np.zeros(series.data.shape[:3], np.float32)
    for t in used:
        data += series.data[..., t] * np.float32(weights[t] / weights.sum())
    unit = unit_of(facts.get("Units"))
    data *= np.float32(unit.factor if unit else 1)
    volume = series.volume(data)
    volume.flags = [flag for flag in series.flags if flag not in NOT_OF_FRAMES] + more
    volume.notes += units
    check_content(volume)
    return volume, {
        "pet_frames": f"{used.size} of {count}",
        "pet_window_min": window,
        "pet_unit": unit.name if unit else None,
        "pet_frame_motion": "not corrected" if used.size > 1 else "single frame",
    }


def _weights(facts: Mapping[str, object], count: int, tracer: str | None, name: str
             ) -> tuple[np.ndarray, str | None, list[str]]:
    """Weight of each frame (its seconds), the window they span in minutes, and flags."""
    times = _frame_times(facts, count, name)
    if times is None:
        if count > TABLE["static_frames"]:
            raise ScanError("bad_frames", f"{name}: {count} frames without FrameTimesStart and "
                                          "FrameDuration; add them to the sidecar")
        return np.ones(count), None, [Flag.FRAME_TIMES_MISSING] if count > 1 else []
    start, duration = times
    static = (count <= TABLE["static_frames"] and duration.min() >= TABLE["static_frame_s"]
              and duration.sum() <= TABLE["static_total_s"])
    if count == 1 and tracer_name(tracer) is None:
        return np.ones(1), _span(start, duration), []
    low, high = (60 * m for m in known_tracer(tracer, name).window_min)
    inside = np.minimum(start + duration, high) - np.maximum(start, low)
    late = inside >= MIN_WINDOW_SHARE * duration
    if late.any():
        return np.where(late, duration, 0), _span(start[late], duration[late]), []
    if count == 1 or static:
        # Late scans are often timed from their own start, not from the injection.
        return duration, _span(start, duration), [Flag.FRAMES_OUTSIDE_WINDOW]
    raise ScanError("no_late_frames", f"{name}: frames of {_span(start, duration)} min, tracer "
                    f"{tracer} is read at {low / 60:g}-{high / 60:g} min")


def _span(start: np.ndarray, duration: np.ndarray) -> str:
    return f"{start.min() / 60:g}-{(start + duration).max() / 60:g}"


def _frame_times(facts: Mapping[str, object], count: int, name: str
                 ) -> tuple[np.ndarray, np.ndarray] | None:
    """Starts after the injection and durations, in seconds; None where the sidecar has neither."""
    values = [facts.get(key) for key in ("FrameTimesStart", "FrameDuration")]
    if values == [None, None]:
        return None
    try:
        start, duration = (np.atleast_1d(np.array(value, float)) for value in values)
    except (TypeError, ValueError) as error:
        raise ScanError("bad_frames", f"{name}: FrameTimesStart or FrameDuration is missing or no "
                                      f"list of numbers ({error})") from error
    if (start.shape != (count,) or duration.shape != (count,)
            or not np.isfinite(start + duration).all() or (np.diff(start) <= 0).any()
            or duration.min() <= 0 or duration.max() > MAX_FRAME_S):
        raise ScanError("bad_frames", f"{name}: {count} frames, {start.size} FrameTimesStart and "
                        f"{duration.size} FrameDuration; starts must rise and durations lie in 0 "
                        f"to {MAX_FRAME_S:g} s")
    injected = facts.get("InjectionStart")  # seconds after TimeZero, as the frames are
    return start - (injected if isinstance(injected, int | float) else 0), duration


# ---- ratio --------------------------------------------------------------------------------------

def suvr(image: np.ndarray, *, reference: np.ndarray | None, brain: np.ndarray, tracer: str | None
         ) -> tuple[np.ndarray, Figures]:
    """The ratio to the reference region, its fixed range mapped to [0, 1]; 0 outside the brain.

    Parameters
    ----------
    image : float32 on ARCHIVE_GRID, linear in activity
    reference : bool on ARCHIVE_GRID; None where the image is a ratio already (``is_suvr``)

    Returns
    -------
    image : float32 in [0, 1]; times ``pet_suvr_max`` it is the SUVR
    figures : pet_suvr_max, pet_reference_mean (native unit), pet_reference_ml, pet_suvr_median,
        pet_clipped (share of the brain above the range)

    Raises
    ------
    ScanError
        unknown_tracer, unknown_units, no_reference
    """
    top = known_tracer(tracer, "SUVR").suvr_max
    level = 1.0 if reference is None else float(image[reference].mean())
    median = float(np.median(image[brain]))
    if reference is not None and not level > MIN_REFERENCE_LEVEL * median:
        raise ScanError("no_reference", f"reference region of {tracer} has mean {level:g}, the "
                                        f"brain's median is {median:g}; was it scanned?")
    if reference is None and not SUVR_MEDIAN[0] <= median <= SUVR_MEDIAN[1]:
        raise ScanError("unknown_units", f"called SUVR, but the brain's median is {median:g} "
                        f"(expected {SUVR_MEDIAN[0]:g} to {SUVR_MEDIAN[1]:g})")
    ratio = image / np.float32(level)
    scaled = np.where(brain, np.clip(ratio / np.float32(top), 0, 1), 0).astype(np.float32)
    return scaled, {
        "pet_suvr_max": top,
        "pet_reference_mean": None if reference is None else level,
        "pet_reference_ml": None if reference is None else float(reference.sum() / 1000),
        "pet_suvr_median": median / level,
        "pet_clipped": float((ratio[brain] > top).mean()),
    }
