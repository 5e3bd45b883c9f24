"""The structural scans of one session: brain masks, bias fields, and one common space.

The first of the ranked scans is the anchor (the finest T1w, else the finest other scan); the rest
is registered to it rigidly, or follows it by the cohort's own matrices where these share one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

import numpy as np
import SimpleITK as sitk

from data_prep.qc import Figures, describe, quality
from data_prep.scan import Scan, ScanError
from data_prep.volumes.placing.align import Placement, place_given
from data_prep.volumes.placing.geometry import centre_of, nearest_rotation, resample, to_itk
from data_prep.volumes.placing.matching import dice
from data_prep.volumes.placing.orientation import fits_as_stated, refuse_turned
from data_prep.volumes.placing.transforms import template_to_scan
from data_prep.volumes.placing.within import (
    check_session_shift,
    mirrored_error,
    register_rigid,
    same_side,
)
from data_prep.volumes.preset import Preset
from data_prep.volumes.reading.volume import Volume
from data_prep.volumes.results import Rejected, rejected
from data_prep.volumes.structural.brain import brain_mask, check_mask
from data_prep.volumes.structural.intensity import correct_bias_field

MIN_SESSION_DICE = 0.8  # of the masks of two scans of one session, where both were scanned
MAX_SHARED_STRETCH = 1e-3  # between two of the cohort's matrices that are one and the same


@dataclass
class StructuralScan:
    """A scan on its way."""

    scan: Scan
    volume: Volume
    scan_id: str
    mask: np.ndarray | None = None
    mask_source: str = ""
    figures: Figures = field(default_factory=dict)  # quality in native space, what it is
    template_to_scan: np.ndarray | None = None  # mm to mm, by the cohort
    transform_fault: str | None = None  # why the cohort's transform was not used
    placement: Placement | None = None  # by the cohort's transform; of an anchor that passed
    to_anchor: np.ndarray = field(default_factory=lambda: np.eye(4))  # anchor mm to this scan's mm
    session_dice: float | None = None
    same_side: bool | None = None  # left and right agree with another scan; None: it is not known

    @property
    def brain(self) -> np.ndarray:
        assert self.mask is not None
        return self.mask

    @property
    def centre(self) -> np.ndarray:
        """Of the brain, world mm."""
        return centre_of(self.brain, self.volume.affine)


Numbered = tuple[int, StructuralScan]  # with the scan's place in the caller's list


def anchor_rank(item: Numbered) -> tuple[bool, float, float, str]:
    """T1w first, then the finest voxels; the name decides ties, so that order does not matter."""
    volume = item[1].volume
    return (item[1].scan.modality != "T1w", max(volume.spacing), volume.voxel_ml, volume.name)


def join_session(ranked: list[Numbered], preset: Preset) -> tuple[list[Numbered],
                                                                  dict[int, Rejected]]:
    """Masks and registrations inside a session; the first of the kept scans is the anchor."""
    kept: list[Numbered] = []
    lost: dict[int, Rejected] = {}
    for number, work in ranked:
        try:
            if work.scan.transform_uri:
                _read_transform(work, work.scan.transform_uri)
            if kept:
                _join(work, kept[0][1], preset)
            else:
                _mask(work, preset)
                _adopt_transform(work, preset)
            kept.append((number, work))
        except ScanError as error:
            lost[number] = rejected(work.scan, error, work.volume.flags)
    return _without_mirrored(kept, lost)


def _without_mirrored(kept: list[Numbered], lost: dict[int, Rejected]
                      ) -> tuple[list[Numbered], dict[int, Rejected]]:
    """Drop the fewer scans whose left and right differ from the rest; all where it is even."""
    other = [item for item in kept[1:] if item[1].same_side is False]
    agree = [item for item in kept[1:] if item[1].same_side]
    if not other:
        if kept:
            kept[0][1].same_side = bool(agree) or None
        return kept, lost
    gone, anchor = other if len(agree) + 1 > len(other) else kept, kept[0][1]
    for number, work in gone:
        pair = other[0][1] if work is anchor else anchor
        lost[number] = rejected(work.scan, mirrored_error(work.volume.name, pair.volume.name),
                                work.volume.flags)
    anchor.same_side = bool(agree) or None
    numbers = {number for number, _ in gone}
    return [item for item in kept if item[0] not in numbers], lost


def _mask(work: StructuralScan, preset: Preset) -> None:
    work.mask, work.mask_source = brain_mask(work.volume, preset, work.scan.mask_uri)
    refuse_turned(work.volume, work.mask)
    work.figures = native_figures(work.scan, work.volume, work.mask)
    if preset.bias_field:
        volume = work.volume
        work.volume = replace(
            volume, data=correct_bias_field(volume.data, volume.affine, work.mask))


def native_figures(scan: Scan, volume: Volume, brain: np.ndarray) -> Figures:
    """Quality of a scan as it was read (a corrected bias field would hide faults), what it is."""
    facts = volume.facts | (json.loads(scan.facts) if scan.facts else {})
    return quality(volume, brain, modality=scan.modality) | describe(volume, facts, brain)


# ---- the cohort's own transform ------------------------------------------------------------------

def _read_transform(work: StructuralScan, uri: str) -> None:
    try:
        work.template_to_scan = template_to_scan(uri, work.volume)
    except ScanError as error:
        work.transform_fault = error.code


def _adopt_transform(anchor: StructuralScan, preset: Preset) -> None:
    """Place the anchor by the cohort's transform if that passes the gate; drop it if not."""
    if anchor.template_to_scan is None:
        return
    found = place_given(anchor.template_to_scan, head=anchor.volume, mask=anchor.brain,
                        modality=anchor.scan.modality, preset=preset)
    if isinstance(found, Placement):
        anchor.placement = found
    else:
        anchor.template_to_scan, anchor.transform_fault = None, found


def _shared_transform(work: StructuralScan, anchor: StructuralScan) -> np.ndarray | None:
    """Anchor mm to this scan's mm, where the cohort moved both by one rigid chain.

    Affines found scan by scan disagree by 1 to 2 mm inside a session; only such as differ by a
    pure motion (UK Biobank's FLAIR takes the T1w's matrix) may replace a registration.
    """
    if work.template_to_scan is None or anchor.template_to_scan is None:
        return None
    matrix = work.template_to_scan @ np.linalg.inv(anchor.template_to_scan)
    stretch = np.abs(matrix[:3, :3] - nearest_rotation(matrix[:3, :3])).max()
    return matrix if stretch < MAX_SHARED_STRETCH else None


# ---- to the anchor -------------------------------------------------------------------------------

def _join(work: StructuralScan, anchor: StructuralScan, preset: Preset) -> None:
    """Bring a scan to its session's anchor, and give it a mask."""
    if not preset.share_mask or work.scan.mask_uri:
        _mask(work, preset)
    try:
        _register(work, anchor, preset)
    except ScanError as error:
        if work.mask is None and error.code == "registration_failed":
            refuse_turned(work.volume, brain_mask(work.volume, preset)[0])
        raise


def _register(work: StructuralScan, anchor: StructuralScan, preset: Preset) -> None:
    shared = _shared_transform(work, anchor)
    work.to_anchor = (register_rigid(anchor.volume, mask=anchor.brain, moving=work.volume,
                                     preset=preset)
                      if shared is None else shared)
    check_session_shift(work.to_anchor, anchor.centre, work.volume.name)
    if work.volume.turn is None or anchor.volume.turn is None:
        work.same_side = same_side(anchor.volume, mask=anchor.brain, moving=work.volume,
                                   matrix=work.to_anchor)
    moved, covered = carried_from(anchor, work.to_anchor, work.volume)
    if work.mask is None:
        work.mask, work.mask_source = moved & work.volume.seen, "anchor"
        check_mask(work.mask, work.volume, preset, work.mask_source)
        if not fits_as_stated(work.volume, moved):  # the anchor's mask may be beside the brain
            refuse_turned(work.volume, brain_mask(work.volume, preset)[0])
        work.figures = native_figures(work.scan, work.volume, work.mask)
        return
    work.session_dice = dice(moved, work.mask & covered)
    if work.session_dice < MIN_SESSION_DICE:
        raise ScanError("registration_failed", f"{work.volume.name}: brain mask has Dice "
                        f"{work.session_dice:.2f} with its session's anchor (limit "
                        f"{MIN_SESSION_DICE})")


def carried_from(anchor: StructuralScan, to_anchor: np.ndarray, volume: Volume
                 ) -> tuple[np.ndarray, np.ndarray]:
    """The anchor's brain mask and its field of view on a volume's grid, bool [x, y, z] both."""
    inverse = np.linalg.inv(to_anchor)
    moved, covered = (
        resample(to_itk(data, anchor.volume.affine), inverse, shape=volume.data.shape,
                 affine=volume.affine, interpolator=sitk.sitkNearestNeighbor).astype(bool)
        for data in (anchor.brain.astype(np.uint8), anchor.volume.seen.astype(np.uint8)))
    return moved, covered
