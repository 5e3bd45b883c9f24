"""Figures of time courses [voxels or grayordinates, time], the same for volumes and CIFTI.

A ``Plan`` says what the length, the repetition time and the motion table of a series allow;
``temporal_maps`` follows it over blocks of time courses, so memory does not grow with the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy import fft

from data_prep.flags import Flag, Note
from data_prep.qc import Figures
from data_prep.volumes.functional.motion import HIGH_FD_MM, Motion

BAND_HZ = (0.01, 0.08)  # Zang et al. 2007
TOP_HZ = 0.25  # the Nyquist frequency of Zou et al. 2008 (TR 2 s): fALFF of a fast series compares
MIN_TSNR_VOLUMES = 20
MIN_ALFF_VOLUMES, MIN_ALFF_S = 50, 60.0
MAX_UNSTEADY = 10
UNSTEADY_DEVIATIONS = 6.0
FILTERED_FALFF = 0.95  # noise alone has 0.3: more means that a band-pass filter came before
BLOCK = 1 << 14


@dataclass
class Plan:
    """How a series is to be summarised."""

    first: int  # volumes before it are not in steady state
    tr_s: float | None
    basis: np.ndarray  # float32 [t - first, k], orthonormal: drift, and motion where it is removed
    tsnr: bool
    alff: bool
    figures: Figures = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_plan(count: int, *, tr_s: float | None, whole: np.ndarray, motion: Motion | None,
              remove_motion: bool) -> Plan:
    """What can be computed from ``count`` volumes.

    Parameters
    ----------
    whole : float [count], the brain's mean over time, where unsteady volumes show
    motion : its ``unsteady`` is believed before ``whole``
    remove_motion : also regress the six parameters and their differences
    """
    first = min(max(motion.unsteady if motion else 0, _unsteady(whole)), max(0, count - 1))
    used = count - first
    basis = _basis(used, motion.parameters[first:] if motion and motion.parameters is not None
                   and remove_motion else None)
    plan = Plan(first, tr_s, basis, used >= MIN_TSNR_VOLUMES and basis.shape[1] < used / 2, False)
    plan.figures = {"bold_volumes": f"{used} of {count}", "bold_tr_s": tr_s,
                    "bold_duration_s": used * tr_s if tr_s else None}
    reason = None
    if used < MIN_ALFF_VOLUMES or (tr_s and used * tr_s < MIN_ALFF_S):
        reason = (f"{used} volumes, at least {MIN_ALFF_VOLUMES} and {MIN_ALFF_S:g} s are needed")
        plan.flags.append(Flag.SHORT_SERIES)
    elif not tr_s:
        reason = "no repetition time that holds for all volumes"
        plan.flags.append(Flag.NO_TR)
    elif 0.5 / tr_s < BAND_HZ[1]:
        reason = f"a repetition time of {tr_s:g} s does not reach {BAND_HZ[1]} Hz"
    elif not plan.tsnr:
        reason = f"{basis.shape[1]} regressors for {used} volumes"
    plan.alff = reason is None
    if reason:
        plan.figures["alff_reason"] = reason
    if not plan.tsnr:
        plan.figures["tsnr_reason"] = f"{used} volumes, {basis.shape[1]} regressors"
    return plan


def _unsteady(whole: np.ndarray) -> int:
    """Leading volumes brighter than the rest by far: magnetisation is not yet in steady state."""
    middle = float(np.median(whole))
    deviation = 1.4826 * float(np.median(np.abs(whole - middle)))
    high = whole[:MAX_UNSTEADY] > middle + UNSTEADY_DEVIATIONS * max(deviation, 1e-3 * abs(middle))
    return int(np.argmin(np.append(high, False)))


def _basis(count: int, parameters: np.ndarray | None) -> np.ndarray:
    time = np.linspace(-1, 1, count) if count > 1 else np.zeros(1)
    columns = [np.ones(count), time, time**2]  # no scan drifts only linearly (Lowe & Russell 1999)
    if parameters is not None:
        columns += [*parameters.T, *np.diff(parameters, axis=0, prepend=parameters[:1]).T]
    u, weight, _ = np.linalg.svd(np.stack(columns, 1), full_matrices=False)
    return u[:, weight > 1e-8 * weight[0]].astype(np.float32)


def displacement_figures(motion: Motion | None, plan: Plan, *, source: str | None,
                         reason: str | None) -> Figures:
    """Framewise displacement over the volumes that were used; None with a reason."""
    steps = motion.displacement[plan.first + 1:] if motion else np.empty(0)
    steps = steps[np.isfinite(steps)]
    if not steps.size:
        return {"qc_fd_mean": None, "qc_fd_max": None, "qc_fd_share": None,
                "qc_fd_reason": reason or "fewer than two volumes"}
    return {"qc_fd_mean": float(steps.mean()), "qc_fd_max": float(steps.max()),
            "qc_fd_share": float((steps > HIGH_FD_MM).mean()), "qc_fd_source": source}


def blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, count, BLOCK))


def temporal_maps(values: np.ndarray, plan: Plan) -> dict[str, np.ndarray]:
    """Mean, and what the plan allows of tSNR, ALFF and fALFF, of time courses [n, t]; float32 [n].

    tSNR: mean over standard deviation after the basis is removed; 0 where nothing varies.
    ALFF: mean amplitude (root of power) in BAND_HZ (Zang et al., Brain & Development 2007), in the
    image's unit.  fALFF: amplitudes in the band over those up to TOP_HZ (Zou et al., J Neurosci
    Methods 2008).
    """
    out: dict[str, list[np.ndarray]] = {}
    for part in blocks(len(values)):
        for name, row in _block(values[part, plan.first:], plan).items():
            out.setdefault(name, []).append(row)
    return {name: np.concatenate(rows).astype(np.float32) for name, rows in out.items()}


def _block(values: np.ndarray, plan: Plan) -> dict[str, np.ndarray]:
    mean = values.mean(axis=1)
    maps = {"mean": mean}
    if not plan.tsnr:
        return maps
    centred = values - mean[:, None]  # float32 keeps its digits for what varies
    rest = centred - (centred @ plan.basis) @ plan.basis.T
    used, removed = plan.basis.shape
    sd = np.sqrt((rest**2).sum(axis=1) / (used - removed))
    alive = sd > 1e-6 * np.maximum(np.abs(mean), 1e-30)
    maps["sd"] = sd
    maps["tSNR"] = np.where(alive, np.divide(mean, sd, where=alive, out=np.zeros_like(mean)), 0)
    if plan.alff:
        assert plan.tr_s
        amplitude = np.abs(fft.rfft(rest, axis=1)) * np.float32(2 / used)
        hertz = fft.rfftfreq(used, plan.tr_s)
        band = (hertz >= BAND_HZ[0]) & (hertz <= BAND_HZ[1])
        top = amplitude[:, (hertz > 0) & (hertz <= TOP_HZ)].sum(axis=1)
        inside = amplitude[:, band].sum(axis=1)
        maps["ALFF"] = np.where(alive, inside / band.sum(), 0)
        maps["fALFF"] = np.where(alive, np.divide(inside, top, where=alive, out=np.zeros_like(top)),
                                 0)
    return maps


def normalise(maps: dict[str, np.ndarray], brain: np.ndarray, plan: Plan) -> dict[str, np.ndarray]:
    """Maps by modality (BOLD, tSNR, ALFF, fALFF) that mean something in this series.

    ALFF is divided by its mean over ``brain`` (bool like the maps).  Left out, with a reason in
    the plan's figures: mean and tSNR of a series whose mean was removed, fALFF of a filtered one.
    """
    kept: dict[str, np.ndarray] = {}
    live = brain & (maps["sd"] > 0) if "sd" in maps else brain
    demeaned = ("sd" in maps and live.any()
                and float(np.median(np.abs(maps["mean"][live]) / maps["sd"][live])) < 1)
    if demeaned:
        plan.notes.append(Note.DEMEANED)
        plan.figures["bold_reason"] = plan.figures["tsnr_reason"] = "the series has no mean"
    else:
        kept["BOLD"] = maps["mean"]
        if plan.tsnr:
            kept["tSNR"] = maps["tSNR"]
            plan.figures["bold_tsnr"] = float(np.median(maps["tSNR"][live])) if live.any() else None
    if plan.alff and live.any():
        level = float(maps["ALFF"][live].mean())
        plan.figures["alff_brain_mean"] = level
        kept["ALFF"] = maps["ALFF"] / np.float32(level)
        if float(np.median(maps["fALFF"][live])) > FILTERED_FALFF:
            plan.figures["falff_reason"] = "the series was band-pass filtered before"
        else:
            kept["fALFF"] = maps["fALFF"]
    return kept
