"""PET and BOLD: scans in frames, coarse, whose truth is in time or in uptake.

PET is late uptake in Bq/mL, in one frame or four: cortex over cerebellum is the person's amyloid or
glucose ratio.  BOLD is an EPI series: networks of fixed places fluctuate below 0.1 Hz by the
person's amplitude, with drift, small movements and noise.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from data_prep.synth import contrast
from data_prep.synth.cohort import Site
from data_prep.synth.scanner import View

VOXEL_MM = {"PET": 2.0, "BOLD": 4.0}

PET_FWHM_MM = 4.0
PET_NOISE = 0.10  # sd of a voxel of one frame at the uptake of the cerebellum, before smoothing
DYNAMIC_SHARE = 0.4
FRAME_S, NUM_FRAMES = 300, 4
LATE_S = {"AV45": 3000, "FDG": 2400}  # from injection to the first frame
DOSE_MBQ = {"AV45": 370.0, "FDG": 185.0}
WASH_IN = 0.02  # by which all target uptake grows from frame to frame
TRUTH_OF_TRACER = {"AV45": "av45_ratio", "FDG": "fdg_ratio"}

TR_S, NUM_VOLUMES = 2.0, 60
# centres (on both sides) of networks, as shares of the brain's half-extents from its middle
NETWORKS = (((0.15, 0.65, 0.35), (0.35, -0.65, 0.35)),  # default mode: front, angular
            ((0.65, -0.15, 0.75), (0.65, 0.0, 0.55)),  # sensorimotor
            ((0.15, -0.90, -0.05), (0.30, -0.80, 0.1)),  # visual
            ((0.60, 0.55, 0.35), (0.55, -0.45, 0.65)),  # executive
            ((0.60, 0.20, -0.05), (0.10, 0.30, 0.45)))  # salience
HALF_EXTENTS_MM = np.array([68.0, 85.0, 65.0])
NETWORK_WIDTH = 0.22  # of a place, in the same shares
DRIFT, BOLD_NOISE, STEP_MM = 0.004, 0.006, 0.03  # drift, noise: of the mean; movement per volume


def pet(view: View, rng: np.random.Generator, tracer: str,
        truth: dict[str, float]) -> tuple[bytes, dict[str, object]]:
    """One late frame of twenty minutes, or four of five; and the BIDS sidecar."""
    table = contrast.tissue_table(tracer)
    table[list(contrast.TISSUES["cortex"][0])] = truth[TRUTH_OF_TRACER[tracer]]
    uptake = view.mean_signal(table)
    sd = PET_FWHM_MM / 2.355 / view.grid.voxel_mm
    uptake = ndimage.gaussian_filter(uptake, sd)
    num = NUM_FRAMES if rng.random() < DYNAMIC_SHARE else 1
    seconds = FRAME_S * NUM_FRAMES // num
    weight_kg, dose_mbq = rng.normal(75, 10), DOSE_MBQ[tracer] * rng.uniform(0.95, 1.05)
    scale = dose_mbq * 1e3 / weight_kg  # Bq/mL at an uptake of 1 (SUV), of the cerebellum too
    frames = np.empty((*view.grid.shape, num), np.float32)
    for frame in range(num):
        grown = uptake * np.float32(1 + WASH_IN * (frame - (num - 1) / 2))
        noise = rng.standard_normal(view.grid.shape, dtype=np.float32)
        noise *= np.sqrt(grown) * np.float32(PET_NOISE * (num ** 0.5))
        frames[..., frame] = np.maximum(grown + ndimage.gaussian_filter(noise, 0.6 * sd), 0)
    slope = float(frames.max()) * scale / 32000
    stored = np.rint(frames * np.float32(scale / slope))
    image = view.stored(stored[..., 0] if num == 1 else stored, slope=slope)
    return image, _pet_facts(tracer, num, seconds, dose_mbq, weight_kg)


def _pet_facts(tracer: str, num: int, seconds: int, dose_mbq: float,
               weight_kg: float) -> dict[str, object]:
    return {
        "TracerName": tracer, "TracerRadionuclide": "F18", "Units": "Bq/mL",
        "InjectedRadioactivity": round(dose_mbq, 1), "InjectedRadioactivityUnits": "MBq",
        "InjectedMass": "n/a", "InjectedMassUnits": "n/a", "SpecificRadioactivity": "n/a",
        "SpecificRadioactivityUnits": "n/a", "ModeOfAdministration": "bolus",
        "BodyWeight": round(weight_kg, 1), "RadionuclideHalfLife": 6586.2,
        "TimeZero": "10:00:00", "InjectionStart": 0, "ScanStart": LATE_S[tracer],
        "FrameTimesStart": [LATE_S[tracer] + k * seconds for k in range(num)],
        "FrameDuration": [seconds] * num, "AcquisitionMode": "list mode",
        "ImageDecayCorrected": True, "ImageDecayCorrectionTime": 0,
        "ReconMethodName": "simulated", "ReconMethodParameterLabels": ["fwhm"],
        "ReconMethodParameterUnits": ["mm"], "ReconMethodParameterValues": [PET_FWHM_MM],
        "ReconFilterType": "gaussian", "ReconFilterSize": PET_FWHM_MM,
        "AttenuationCorrection": "true map"}


def bold(view: View, rng: np.random.Generator, site: Site,
         truth: dict[str, float]) -> tuple[bytes, dict[str, object]]:
    """An EPI series at rest; and its sidecar."""
    table = contrast.signal_table("BOLD", site, rng)
    grey = np.zeros_like(table)
    for tissue in ("cortex", "thalamus", "caudate and accumbens", "putamen"):
        grey[list(contrast.TISSUES[tissue][0])] = 1
    mean = ndimage.gaussian_filter(view.mean_signal(table), 0.4)
    maps = _networks(view) * view.mean_signal(grey)
    waves = _slow_waves(rng, len(maps)) * truth["fluctuation"]
    drift = np.linspace(-0.5, 0.5, NUM_VOLUMES) * rng.normal(0, DRIFT)
    change = np.tensordot(maps, waves, (0, 0)) + drift.astype(np.float32)
    steps = np.cumsum(rng.normal(0, STEP_MM, (3, NUM_VOLUMES)), axis=1)
    steps /= view.grid.voxel_mm[:, None]
    moved = np.tensordot(np.stack(np.gradient(mean)), steps.astype(np.float32), (0, 0))
    change += np.float32(BOLD_NOISE) * rng.standard_normal(change.shape, dtype=np.float32)
    frames = mean[..., None] * (1 + change) - moved
    frames += np.float32(site.noise / 3) * rng.random(frames.shape, dtype=np.float32)  # in air too
    frames = np.maximum(frames, 0)
    frames *= 12000 / frames.max()
    image = view.stored(np.rint(frames, out=frames), slope=1.0, tr_s=TR_S)
    return image, {"TaskName": "rest", "RepetitionTime": TR_S, "EchoTime": 0.03,
                   "MRAcquisitionType": "2D",
                   "SliceThickness": round(float(view.grid.voxel_mm[2]), 3)}


def _networks(view: View) -> np.ndarray:
    """[n, x, y, z] weight of each network; the places are those of the head, whatever its pose."""
    grid, pose = view.grid, view.pose
    voxels = np.indices(grid.shape, dtype=np.float32)
    world = (np.tensordot(grid.affine[:3, :3].astype(np.float32), voxels, 1)
             + (grid.affine[:3, 3] - pose.shift_mm).astype(np.float32).reshape(3, 1, 1, 1))
    place = np.tensordot(pose.rotation.T.astype(np.float32), world, 1)
    place /= HALF_EXTENTS_MM.astype(np.float32).reshape(3, 1, 1, 1)
    place[0] = np.abs(place[0])
    return np.stack([sum(np.exp(-0.5 * sum((place[k] - centre[k]) ** 2 for k in range(3))
                                / NETWORK_WIDTH ** 2) for centre in centres)
                     for centres in NETWORKS]).astype(np.float32)


def _slow_waves(rng: np.random.Generator, num: int) -> np.ndarray:
    """float32 [num, volumes]: noise between 0.01 and 0.08 Hz, each of sd 1."""
    hertz = np.fft.rfftfreq(NUM_VOLUMES, TR_S)
    spectrum = np.fft.rfft(rng.standard_normal((num, NUM_VOLUMES)))
    spectrum[:, (hertz < 0.01) | (hertz > 0.08)] = 0
    waves = np.fft.irfft(spectrum, NUM_VOLUMES)
    return (waves / waves.std(axis=1, keepdims=True)).astype(np.float32)
