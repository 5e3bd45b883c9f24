"""All scans of one person -> volumes on the archive grid, or a reason for each that is not.

    read -> RAS -> brain mask -> bias field -> alignment -> one interpolation -> intensity -> QC

Alignment is what makes the person the unit of work.  Each session has one anchor (its finest
T1w, else its finest other scan); the session's other scans are registered to it rigidly.  With
several sessions the anchors meet at their midpoint, whose mean image is placed in MNI152, so that
no visit is favoured.  The matrices are multiplied and every scan is interpolated once.

Every scan comes back, as Prepared or as Rejected; nothing is replaced by a stand-in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

import numpy as np
import SimpleITK as sitk

from data_prep.qc import Figures, quality
from data_prep.scan import Scan, ScanError
from data_prep.volumes.align import (
    Placement,
    average,
    check_session_shift,
    coverage,
    dice,
    midpoint,
    place,
    register_rigid,
    template,
)
from data_prep.volumes.brain import brain_mask, check_mask
from data_prep.volumes.geometry import centre_of, on_grid, resample, to_itk
from data_prep.volumes.intensity import correct_bias_field, scale
from data_prep.volumes.preset import Preset
from data_prep.volumes.read import Volume, read_scan
from neurojepa.feed.format import ARCHIVE_GRID

AIR, BRAIN, NOT_SCANNED = 0, 1, 2
MIN_SESSION_DICE = 0.8  # of the masks of two scans of one session, where both were scanned
MIN_COVERED = 0.99  # of the template's brain inside the field of view, or the scan is flagged


@dataclass
class Prepared:
    """A scan on ARCHIVE_GRID."""

    scan: Scan
    scan_id: str  # of the scan as read, see Volume.scan_id
    image: np.ndarray  # float32 [180, 216, 180], brain in [0, 1], 0 outside
    mask: np.ndarray  # uint8 codes: 0 air, 1 brain, 2 not scanned
    label: np.ndarray | None  # int16, where the scan came with a label map
    figures: Figures
    flags: list[str]


@dataclass
class Rejected:
    """A scan that cannot be used, and why."""

    scan: Scan
    reason: str  # code
    message: str  # one line: file, field, value


@dataclass
class _Work:
    """A scan on its way."""

    scan: Scan
    volume: Volume
    scan_id: str
    mask: np.ndarray | None = None
    mask_source: str = ""
    to_anchor: np.ndarray = field(default_factory=lambda: np.eye(4))  # anchor mm to this scan's mm
    session_dice: float | None = None

    @property
    def brain(self) -> np.ndarray:
        assert self.mask is not None
        return self.mask


def prepare_person(scans: list[Scan], preset: Preset) -> list[Prepared | Rejected]:
    """Prepare every scan of one person; their order is kept.

    Parameters
    ----------
    scans : all scans of one participant, of one or more sessions
    preset : one of ``PRESETS``

    Raises
    ------
    DataError
        The store cannot be read (a damaged or missing scan is Rejected instead).
    """
    people = {scan.participant for scan in scans}
    assert len(people) <= 1, f"scans of {len(people)} people in one call"
    # A task is one core, and results must not depend on the number of threads.
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    done: dict[int, Prepared | Rejected] = {}
    sessions: dict[str, list[tuple[int, _Work]]] = {}
    for number, scan in enumerate(scans):
        try:
            volume = read_scan(scan.uri, scan.member)
            sessions.setdefault(scan.session, []).append(
                (number, _Work(scan, volume, volume.scan_id)))
        except ScanError as error:
            done[number] = _rejected(scan, error)
    groups = [_session(sorted(work, key=_anchor_rank), preset, done)
              for _, work in sorted(sessions.items())]
    _finish([group for group in groups if group], preset, done)
    return [done[number] for number in range(len(scans))]


# ---- sessions ------------------------------------------------------------------------------------

def _anchor_rank(item: tuple[int, _Work]) -> tuple[bool, float, float, str]:
    """T1w first, then the finest voxels; the name decides ties, so that order does not matter."""
    volume = item[1].volume
    return (item[1].scan.modality != "T1w", max(volume.spacing), volume.voxel_ml, volume.name)


def _session(ranked: list[tuple[int, _Work]], preset: Preset,
             done: dict[int, Prepared | Rejected]) -> list[tuple[int, _Work]]:
    """Masks and registrations inside a session; the first of the result is the anchor."""
    kept: list[tuple[int, _Work]] = []
    for number, work in ranked:
        try:
            if kept:
                _join(work, kept[0][1], preset)
            else:
                _mask(work, preset)
            kept.append((number, work))
        except ScanError as error:
            done[number] = _rejected(work.scan, error)
    return kept


def _mask(work: _Work, preset: Preset) -> None:
    work.mask, work.mask_source = brain_mask(work.volume, preset, work.scan.mask_uri)
    if preset.bias_field:
        volume = work.volume
        work.volume = replace(
            volume, data=correct_bias_field(volume.data, volume.affine, work.mask))


def _join(work: _Work, anchor: _Work, preset: Preset) -> None:
    """Register a scan to its session's anchor, and give it a mask."""
    if not preset.share_mask or work.scan.mask_uri:
        _mask(work, preset)
    work.to_anchor = register_rigid(anchor.volume, anchor.brain, work.volume, preset)
    check_session_shift(work.to_anchor, centre_of(anchor.brain, anchor.volume.affine),
                        work.volume.name)
    volume, inverse = work.volume, np.linalg.inv(work.to_anchor)
    moved, covered = (
        resample(to_itk(data, anchor.volume.affine), inverse, volume.data.shape, volume.affine,
                 sitk.sitkNearestNeighbor).astype(bool)
        for data in (anchor.brain.astype(np.uint8), np.ones(anchor.brain.shape, np.uint8)))
    if work.mask is None:
        work.mask, work.mask_source = moved, "anchor"
        check_mask(work.mask, volume, preset, work.mask_source)
        return
    work.session_dice = dice(moved, work.mask & covered)
    if work.session_dice < MIN_SESSION_DICE:
        raise ScanError("registration_failed", f"{volume.name}: brain mask has Dice "
                        f"{work.session_dice:.2f} with its session's anchor (limit "
                        f"{MIN_SESSION_DICE})")


# ---- person --------------------------------------------------------------------------------------

def _finish(groups: list[list[tuple[int, _Work]]], preset: Preset,
            done: dict[int, Prepared | Rejected]) -> None:
    """Place the person in the template and write every scan that is left."""
    if not groups:
        return
    try:
        placement, to_anchors = _place([group[0][1] for group in groups], preset)
    except ScanError as error:
        for number, work in (item for group in groups for item in group):
            done[number] = _rejected(work.scan, error)
        return
    for group, to_anchor in zip(groups, to_anchors, strict=True):
        for number, work in group:
            try:
                done[number] = _write(work, work.to_anchor @ to_anchor, placement, preset)
            except ScanError as error:
                done[number] = _rejected(work.scan, error)


def _place(anchors: list[_Work], preset: Preset) -> tuple[Placement, list[np.ndarray]]:
    """The person's placement, and for each anchor the matrix from midpoint mm to anchor mm."""
    first = anchors[0]
    if len(anchors) == 1:
        return place(first.volume, first.brain, first.scan.modality, preset), [np.eye(4)]
    centre = centre_of(first.brain, first.volume.affine)
    from_first = [np.eye(4)]
    for other in anchors[1:]:
        start = np.eye(4)
        start[:3, 3] = centre_of(other.brain, other.volume.affine) - centre
        from_first.append(register_rigid(first.volume, first.brain, other.volume, preset, start))
    to_midpoint = midpoint(from_first, centre)
    matrices = [matrix @ np.linalg.inv(to_midpoint) for matrix in from_first]
    middle = to_midpoint[:3, :3] @ centre + to_midpoint[:3, 3]
    head, mask = average([a.volume for a in anchors], [a.brain for a in anchors], matrices, middle,
                         f"midpoint of {len(anchors)} visits with {first.volume.name}")
    modalities = {anchor.scan.modality for anchor in anchors}
    return place(head, mask, modalities.pop() if len(modalities) == 1 else "mixed",
                 preset), matrices


def _write(work: _Work, to_scan: np.ndarray, placement: Placement, preset: Preset) -> Prepared:
    """Interpolate a scan once; ``to_scan`` maps midpoint mm to the scan's mm."""
    volume, matrix = work.volume, to_scan @ placement.rigid
    image = on_grid(to_itk(volume.data, volume.affine), matrix, ARCHIVE_GRID,
                    sitk.sitkBSpline3 if preset.spline else sitk.sitkLinear)
    # A spline swings below and above its data at sharp edges.
    image = np.clip(image, volume.data.min(), volume.data.max())
    brain, scanned = (
        on_grid(to_itk(data.astype(np.uint8), volume.affine), matrix, ARCHIVE_GRID,
                sitk.sitkNearestNeighbor).astype(bool)
        for data in (work.brain, np.ones(work.brain.shape)))
    mask = np.where(brain, BRAIN, np.where(scanned, AIR, NOT_SCANNED)).astype(np.uint8)
    covered = coverage(to_scan @ placement.affine, volume)
    figures = _figures(work, matrix, mask, placement) | {"template_covered": covered}
    return Prepared(work.scan, work.scan_id, scale(image, brain), mask, _label(work.scan, matrix),
                    figures, _flags(work, placement, covered, preset))


def _label(scan: Scan, matrix: np.ndarray) -> np.ndarray | None:
    """The label map that came with a scan, by world coordinates, nearest neighbour; int16."""
    if not scan.label_uri:
        return None
    source = read_scan(scan.label_uri, label=True)
    codes = np.rint(source.data)
    if not -32768 <= codes.min() <= codes.max() <= 32767:
        raise ScanError("label_range", f"{source.name}: codes {codes.min():g} to {codes.max():g} "
                                       "do not fit 16 bits; renumber them")
    return on_grid(to_itk(codes.astype(np.int16), source.affine), matrix, ARCHIVE_GRID,
                   sitk.sitkNearestNeighbor)


# ---- what is recorded ----------------------------------------------------------------------------

def _figures(work: _Work, matrix: np.ndarray, mask: np.ndarray, placement: Placement) -> Figures:
    volume = work.volume
    return {
        **quality(volume, work.brain),
        "brain_ml_native": float(work.brain.sum() * volume.voxel_ml),
        "brain_ml_archive": float((mask == BRAIN).sum() / 1000),
        "tiv_ml": template(2).brain_ml / placement.volume_factor,
        "affine_volume_factor": placement.volume_factor,
        "mask_dice_template": placement.dice,
        "mask_dice_session": work.session_dice,
        "ncc_template": placement.ncc if work.scan.modality == "T1w" else None,
        "mask_source": work.mask_source,
        "orientation": volume.orientation,
        "spacing": "x".join(f"{s:g}" for s in volume.spacing),
        "stored_dtype": volume.dtype,
        "archive_to_scan": json.dumps(matrix.round(6).tolist()),  # mm to mm, RAS
        "template_affine": json.dumps(placement.affine.round(6).tolist()),
    }


def _flags(work: _Work, placement: Placement, covered: float, preset: Preset) -> list[str]:
    flags = list(work.volume.flags)
    if placement.dice < preset.flag_dice:
        flags.append("low_mask_dice")
    if placement.ncc is not None and placement.ncc < preset.flag_ncc:
        flags.append("low_ncc")
    if covered < MIN_COVERED:
        flags.append("brain_cut")
    return flags


def _rejected(scan: Scan, error: ScanError) -> Rejected:
    return Rejected(scan, error.code, str(error))
