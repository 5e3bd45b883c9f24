"""All scans of one person -> volumes on the archive grid, or a reason for each that is not.

    read -> RAS -> brain mask -> bias field -> alignment -> one interpolation -> intensity -> QC

Alignment is what makes the person the unit of work.  Each session has one anchor (its finest
T1w, else its finest other scan); the session's other scans are registered to it rigidly.  With
several sessions the anchors meet at their midpoint, whose mean image is placed in MNI152, so that
no visit is favoured.  The matrices are multiplied and every scan is interpolated once.  PET and
BOLD come last, one at a time, and go where the anchors went (functional/).

Every scan comes back, as Prepared or as Rejected; nothing is replaced by a stand-in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk

from data_prep.scan import Scan, ScanError
from data_prep.volumes.functional.pose import Anchor
from data_prep.volumes.functional.prepare import prepare_functional
from data_prep.volumes.output import write_scan
from data_prep.volumes.placing.align import Placement, place, place_given
from data_prep.volumes.placing.within import (
    average,
    midpoint,
    mirrored_error,
    register_rigid,
    same_side,
)
from data_prep.volumes.preset import Preset
from data_prep.volumes.published import prepare_published
from data_prep.volumes.reading.volume import read_scan
from data_prep.volumes.results import Prepared, Rejected, rejected
from data_prep.volumes.structural.session import Numbered, StructuralScan, anchor_rank, join_session
from data_prep.volumes.structural.uni import quiet_background

__all__ = ["Prepared", "Rejected", "prepare_person"]

FUNCTIONAL = ("PET", "BOLD")
Results = dict[int, Sequence[Prepared | Rejected]]  # by the scan's place in the caller's list


def prepare_person(scans: list[Scan], preset: Preset) -> list[Prepared | Rejected]:
    """Prepare every scan of one person.

    Parameters
    ----------
    scans : all scans of one participant, of one or more sessions
    preset : one of ``PRESETS``

    Returns
    -------
    list
        At least one result per scan, in the order of the scans; a BOLD series gives one for each
        of its maps.

    Raises
    ------
    DataError
        The store cannot be read (a damaged or missing scan is Rejected instead).
    ConfigError
        The preset's mask tool is not installed.
    """
    people = {scan.participant for scan in scans}
    assert len(people) <= 1, f"scans of {len(people)} people in one call"
    # A task is one core, and results must not depend on the number of threads.
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    done: Results = {}
    wanted: list[tuple[int, Scan]] = []
    for number, scan in enumerate(scans):
        if scan.reason:
            done[number] = [Rejected(scan, scan.reason, f"{scan.uri}: ruled out by the cohort, "
                                                        "not read")]
        else:
            wanted.append((number, scan))
    if preset.published:
        done |= {number: [prepare_published(scan, preset)] for number, scan in wanted}
    else:
        anchors = _structural(
            [item for item in wanted if item[1].modality not in FUNCTIONAL], preset, done)
        for number, scan in wanted:
            if scan.modality in FUNCTIONAL:
                done[number] = prepare_functional(scan, anchors, preset)
    return [result for number in range(len(scans)) for result in done[number]]


# ---- structural scans ----------------------------------------------------------------------------

def _structural(scans: list[tuple[int, Scan]], preset: Preset, done: Results) -> list[Anchor]:
    """Prepare the structural scans into ``done``; returns where PET and BOLD can be brought."""
    sessions: dict[str, list[Numbered]] = {}
    for number, scan in scans:
        try:
            facts = json.loads(scan.facts or "{}")
            volume = read_scan(scan.uri, scan.member, facts, turn=scan.turn)
            sessions.setdefault(scan.session, []).append(
                (number, StructuralScan(
                    scan, quiet_background(volume, volume.facts | facts), volume.scan_id)))
        except ScanError as error:
            done[number] = [rejected(scan, error)]
    groups: list[list[Numbered]] = []
    for _, group in sorted(sessions.items()):
        kept, lost = join_session(sorted(group, key=anchor_rank), preset)
        done |= {number: [result] for number, result in lost.items()}
        if kept:
            groups.append(kept)
    if not groups:
        return []
    try:
        placement, to_anchors = _place([group[0][1] for group in groups], preset)
    except ScanError as error:
        done |= {number: [rejected(work.scan, error, work.volume.flags)]
                 for group in groups for number, work in group}
        return []
    return [_write_session(group, to_anchor, placement, preset, done)
            for group, to_anchor in zip(groups, to_anchors, strict=True)]


def _write_session(group: list[Numbered], to_anchor: np.ndarray, placement: Placement,
                   preset: Preset, done: Results) -> Anchor:
    label = None
    for number, work in group:
        try:
            result = write_scan(work, work.to_anchor @ to_anchor, placement, preset)
            label = result.label if label is None else label
            done[number] = [result]
        except ScanError as error:
            done[number] = [rejected(work.scan, error, work.volume.flags)]
    return Anchor(group[0][1], to_anchor, placement, label)


def _check_sides(first: StructuralScan, other: StructuralScan, matrix: np.ndarray) -> None:
    """Raise ScanError left_right_doubtful where two visits are mirror images of each other."""
    if first.volume.turn is not None and other.volume.turn is not None:
        return
    agree = same_side(first.volume, mask=first.brain, moving=other.volume, matrix=matrix)
    if agree is False:
        raise mirrored_error(other.volume.name, first.volume.name)
    for work in (first, other):
        work.same_side = work.same_side or agree


def _place(anchors: list[StructuralScan], preset: Preset) -> tuple[Placement, list[np.ndarray]]:
    """The person's placement, and for each anchor the matrix from midpoint mm to anchor mm."""
    first = anchors[0]
    if len(anchors) == 1:
        return first.placement or place(first.volume, first.brain, first.scan.modality,
                                        preset), [np.eye(4)]
    centre = first.centre
    from_first = [np.eye(4)]
    for other in anchors[1:]:
        start = np.eye(4)
        start[:3, 3] = other.centre - centre
        from_first.append(register_rigid(first.volume, mask=first.brain, moving=other.volume,
                                         preset=preset, start=start))
        _check_sides(first, other, from_first[-1])
    to_midpoint = midpoint(from_first, centre)
    matrices = [matrix @ np.linalg.inv(to_midpoint) for matrix in from_first]
    middle = to_midpoint[:3, :3] @ centre + to_midpoint[:3, 3]
    head, mask = average([a.volume for a in anchors], masks=[a.brain for a in anchors],
                         matrices=matrices, centre=middle,
                         name=f"midpoint of {len(anchors)} visits with {first.volume.name}")
    modalities = {anchor.scan.modality for anchor in anchors}
    modality = modalities.pop() if len(modalities) == 1 else "mixed"
    # Visits whose own transforms passed: their mean, since each favours one visit.
    given = [np.linalg.inv(matrix) @ anchor.placement.affine
             for anchor, matrix in zip(anchors, matrices, strict=True) if anchor.placement]
    found = (place_given(np.mean(given, axis=0), head=head, mask=mask, modality=modality,
                         preset=preset) if given else "none")
    if isinstance(found, str):
        for anchor in anchors if given else []:
            anchor.transform_fault = anchor.transform_fault or f"mean of the visits: {found}"
        found = place(head, mask, modality, preset)
    return found, matrices
