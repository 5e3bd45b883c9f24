"""A scan with its matrices -> voxels on the archive grid, with figures and flags."""

from __future__ import annotations

import json

import numpy as np
import SimpleITK as sitk

from data_prep import qc
from data_prep.flags import Flag, Note, of_companion
from data_prep.qc import Figures
from data_prep.scan import Scan, ScanError, split_member
from data_prep.volumes.placing.align import Placement, coverage, template
from data_prep.volumes.placing.geometry import on_grid, resample, to_itk
from data_prep.volumes.preset import Preset
from data_prep.volumes.reading.volume import Volume, read_scan
from data_prep.volumes.results import Prepared
from data_prep.volumes.structural.intensity import scale
from data_prep.volumes.structural.session import StructuralScan
from neurojepa.feed.format import ARCHIVE_GRID, MaskCode

MIN_COVERED = 0.99  # of the template's brain inside the field of view, or the scan is flagged
SPLINE_REACH = 12  # voxels, after which a spline's coefficient knows nothing of a value
INT16 = np.iinfo(np.int16)


def write_scan(work: StructuralScan, to_scan: np.ndarray, placement: Placement,
               preset: Preset) -> Prepared:
    """Interpolate a structural scan once; ``to_scan`` maps midpoint mm to the scan's mm.

    Raises
    ------
    ScanError
        constant, label_range, a reject threshold of qc.yaml, or what reading the label raised.
    """
    volume, matrix = work.volume, to_scan @ placement.rigid
    brain = to_archive(work.brain, volume.affine, matrix)
    image = interpolate(volume, matrix, brain=brain, preset=preset)
    mask = mask_codes(brain, scanned(volume, matrix))
    covered = coverage(to_scan @ placement.affine, volume)
    figures = work.figures | source_figures(volume) | placement_figures(placement, matrix) | {
        "brain_ml_native": float(work.brain.sum() * volume.voxel_ml),
        "brain_ml_archive": float(brain.sum() / 1000),
        "mask_source": work.mask_source,
        "mask_dice_session": work.session_dice,
        "ncc_template": placement.ncc if work.scan.modality == "T1w" else None,
        "cohort_transform_fault": work.transform_fault,
        "template_covered": covered,
    }
    label, odd = label_map(work.scan, matrix)
    flags = volume.flags + odd + placement_flags(placement, preset)
    if covered < MIN_COVERED:
        flags.append(Flag.BRAIN_CUT)
    if work.transform_fault:
        flags.append(Flag.COHORT_TRANSFORM_FAILED)
    flags += judged(figures, work.scan.modality, volume.name)
    notes = volume.notes + ([] if work.same_side else [Note.LEFT_RIGHT_FROM_HEADER])
    return Prepared(work.scan, work.scan_id, scale(image, brain), mask, label, figures, flags,
                    notes)


# ---- voxels --------------------------------------------------------------------------------------

def to_archive(mask: np.ndarray, affine: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A mask on the archive grid, nearest neighbour; ``matrix``: archive mm to the mask's mm."""
    return on_grid(to_itk(mask.astype(np.uint8), affine), matrix, ARCHIVE_GRID,
                   sitk.sitkNearestNeighbor).astype(bool)


def scanned(volume: Volume, matrix: np.ndarray) -> np.ndarray:
    """Where the archive grid lies inside a field of view; bool."""
    return to_archive(volume.seen, volume.affine, matrix)


def interpolate(volume: Volume, matrix: np.ndarray, *, brain: np.ndarray, preset: Preset
                ) -> np.ndarray:
    """A volume on the archive grid, computed in the box that holds the brain, 0 elsewhere."""
    found = np.zeros(ARCHIVE_GRID.shape, np.float32)
    if not brain.any():
        return found
    inside = [np.flatnonzero(brain.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    box = tuple(slice(int(i[0]), int(i[-1]) + 1) for i in inside)
    affine = ARCHIVE_GRID.affine
    affine[:3, 3] += affine[:3, :3] @ [part.start for part in box]
    shape = tuple(part.stop - part.start for part in box)
    image = resample(_source_box(volume, matrix @ affine, shape), matrix, shape=shape,
                     affine=affine,
                     interpolator=sitk.sitkBSpline3 if preset.spline else sitk.sitkLinear)
    # A spline swings below and above its data at sharp edges.
    found[box] = np.clip(image, volume.data.min(), volume.data.max())
    return found


def _source_box(volume: Volume, matrix: np.ndarray, shape: tuple[int, ...]) -> sitk.Image:
    """The part of a volume that voxels of an output box need; ``matrix``: its voxels to mm.

    A spline's coefficients depend on all voxels, but by 0.27 to the power of their distance.
    """
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
    to_voxel = np.linalg.inv(volume.affine) @ matrix
    voxels = to_voxel[:3, :3] @ corners + to_voxel[:3, 3:]
    low = np.clip(np.floor(voxels.min(axis=1)).astype(int) - SPLINE_REACH, 0, None)
    high = np.ceil(voxels.max(axis=1)).astype(int) + SPLINE_REACH
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ low
    return to_itk(volume.data[tuple(map(slice, low, high))], affine)


def mask_codes(brain: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """uint8 of MaskCode, from where the brain is and what was seen; bool [x, y, z] both."""
    outside = np.where(seen, MaskCode.AIR, MaskCode.NOT_SCANNED)
    return np.where(brain & seen, MaskCode.BRAIN, outside).astype(np.uint8)


def label_map(scan: Scan, matrix: np.ndarray) -> tuple[np.ndarray | None, list[str]]:
    """The label map that came with a scan and its flags.

    By world coordinates, nearest neighbour; int16.
    """
    if not scan.label_uri:
        return None, []
    source = read_scan(*split_member(scan.label_uri), label=True, turn=scan.turn)
    return codes_on_archive(source, matrix), of_companion("label", source.flags)


def codes_on_archive(source: Volume, matrix: np.ndarray) -> np.ndarray:
    """Codes on the archive grid, int16; ``matrix``: archive mm to the map's mm."""
    codes = np.rint(source.data)
    if not INT16.min <= codes.min() <= codes.max() <= INT16.max:
        raise ScanError("label_range", f"{source.name}: codes {codes.min():g} to {codes.max():g} "
                                       "do not fit 16 bits; renumber them")
    return on_grid(to_itk(codes.astype(np.int16), source.affine), matrix, ARCHIVE_GRID,
                   sitk.sitkNearestNeighbor)


# ---- what is recorded ----------------------------------------------------------------------------

def source_figures(volume: Volume) -> Figures:
    """How the file was stored."""
    return {"orientation": volume.orientation,
            "spacing": "x".join(f"{s:g}" for s in volume.spacing),
            "stored_dtype": volume.dtype}


def placement_figures(placement: Placement, matrix: np.ndarray) -> Figures:
    """Where the scan lies; ``matrix``: archive mm to the scan's mm, RAS."""
    return {
        "placement": placement.source,
        "mask_dice_template": placement.dice,
        "affine_volume_factor": placement.volume_factor,
        "tiv_ml": template(2).brain_ml / placement.volume_factor,
        "archive_to_scan": json.dumps(matrix.round(6).tolist()),
        "template_affine": json.dumps(placement.affine.round(6).tolist()),
    }


def placement_flags(placement: Placement, preset: Preset) -> list[str]:
    flags: list[str] = []
    if placement.dice < preset.flag_dice:
        flags.append(Flag.LOW_MASK_DICE)
    if placement.ncc is not None and placement.ncc < preset.flag_ncc:
        flags.append(Flag.LOW_NCC)
    return flags


def judged(figures: Figures, modality: str, name: str) -> list[str]:
    """Flags by the thresholds of qc.yaml; ScanError where one of them rejects."""
    if (found := qc.rejection(figures, modality)) is not None:
        raise ScanError(found[0], f"{name}: {found[1]}")
    return qc.flags(figures, modality)
