"""Where a PET or BOLD image lies: by its person's anchor, by its own silhouette, or as delivered.

The anchor is the session's T1w, else the T1w of the nearest session, else another scan.  Who has
none is placed by silhouette alone (flag ``no_anchor``).  PET scanners have coordinates of their
own, so that search also starts from the brains' centres.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data_prep.flags import Flag
from data_prep.qc import Figures
from data_prep.scan import Scan, ScanError
from data_prep.volumes.output import placement_figures, placement_flags, to_archive
from data_prep.volumes.placing.align import Placement, place, template
from data_prep.volumes.placing.geometry import centre_of
from data_prep.volumes.placing.matching import dice
from data_prep.volumes.placing.orientation import fits_as_stated, refuse_turned
from data_prep.volumes.placing.within import check_session_shift, register_rigid_from
from data_prep.volumes.preset import Preset
from data_prep.volumes.reading.volume import Volume
from data_prep.volumes.structural.brain import carried, check_mask, given_mask, silhouettes
from data_prep.volumes.structural.session import StructuralScan, carried_from

# Of the anchor's mask with what is bright in PET or EPI: uptake leaves out ventricles and
# infarcts, EPI the frontal sinuses, and both show some scalp.  A wrong pose has less than 0.6.
MIN_SILHOUETTE_DICE = 0.7


@dataclass
class Anchor:
    """A session's anchor that was placed, with what other images of the person need of it."""

    work: StructuralScan
    from_midpoint: np.ndarray  # [4, 4], midpoint mm to anchor mm
    placement: Placement
    label: np.ndarray | None  # the session's label map on ARCHIVE_GRID


@dataclass
class Pose:
    """Where a functional image lies."""

    matrix: np.ndarray  # [4, 4], archive mm to the image's mm
    native_brain: np.ndarray  # bool, on the image's grid
    brain: np.ndarray  # bool, on ARCHIVE_GRID
    figures: Figures
    flags: list[str] = field(default_factory=list)
    label: np.ndarray | None = None
    to_template: np.ndarray = field(default_factory=lambda: np.eye(4))  # archive mm to MNI152 mm


def in_template_space(scan: Scan) -> bool:
    """Whether the cohort delivered it in MNI space: a processing such as ``fmriprep:MNI152...``."""
    return (scan.processing or "").partition(":")[2].startswith("MNI")


def nearest_anchor(scan: Scan, anchors: Sequence[Anchor]) -> Anchor | None:
    """A T1w before others, then the closest session, by age where it is known."""
    sessions = sorted({anchor.work.scan.session for anchor in anchors} | {scan.session})

    def distance(anchor: Anchor) -> tuple[bool, bool, float]:
        other = anchor.work.scan
        if other.age_at_scan is not None and scan.age_at_scan is not None:
            apart = abs(other.age_at_scan - scan.age_at_scan)
        else:
            apart = abs(sessions.index(other.session) - sessions.index(scan.session))
        return other.modality != "T1w", other.session != scan.session, apart

    return min(anchors, key=distance, default=None)


def locate(image: Volume, scan: Scan, anchors: Sequence[Anchor], preset: Preset) -> Pose:
    """Find a functional image's place.

    Raises
    ------
    ScanError
        registration_failed, orientation_doubtful, implausible_mask, or what reading a given mask
        raised.
    """
    anchor = nearest_anchor(scan, anchors)
    try:
        pose = (_in_template(image, scan) if in_template_space(scan) else
                _alone(image, scan, preset) if anchor is None else
                _anchored(image, scan, anchor, preset))
    except ScanError as error:
        if error.code == "registration_failed":
            refuse_turned(image, silhouettes(image, scan.mask_uri, preset)[0])
        raise
    from_template = pose.matrix @ np.linalg.inv(pose.to_template)
    if not fits_as_stated(image, pose.native_brain, from_template):
        # A mask that was carried along may lie beside the brain; the image's own does not.
        refuse_turned(image, silhouettes(image, scan.mask_uri, preset)[0])
    return pose


def _in_template(image: Volume, scan: Scan) -> Pose:
    target = template(2)
    brain = (given_mask(image, scan.mask_uri) if scan.mask_uri else
             carried(Volume("MNI152", target.mask.astype(np.float32), target.affine), image))
    return Pose(np.eye(4), brain, to_archive(brain, image.affine, np.eye(4)), {
        "placement": "delivered", "mask_source": "given" if scan.mask_uri else "template",
        "archive_to_scan": json.dumps(np.eye(4).tolist())})


def _alone(image: Volume, scan: Scan, preset: Preset) -> Pose:
    brain = silhouettes(image, scan.mask_uri, preset)[0]
    check_mask(brain, image, preset, "silhouette")
    placement = place(image, brain, scan.modality, preset)
    return Pose(
        placement.rigid, brain, to_archive(brain, image.affine, placement.rigid),
        placement_figures(placement, placement.rigid)
        | {"mask_source": "given" if scan.mask_uri else "silhouette"},
        [*placement_flags(placement, preset), Flag.NO_ANCHOR],
        to_template=np.linalg.inv(placement.affine) @ placement.rigid)


def _anchored(image: Volume, scan: Scan, anchor: Anchor, preset: Preset) -> Pose:
    work, own = anchor.work, anchor.work.scan.session == scan.session
    bright = silhouettes(image, scan.mask_uri, preset)
    starts = [np.eye(4)]
    if scan.modality == "PET" or not own:
        starts.append(np.eye(4))
        starts[-1][:3, 3] = centre_of(bright[0], image.affine) - work.centre
    to_image = register_rigid_from(starts, fixed=work.volume, mask=work.brain, moving=image,
                                   preset=preset)
    if scan.modality != "PET" and own:
        check_session_shift(to_image, work.centre, image.name)
    brain, covered = carried_from(work, to_image, image)
    agreement = max(dice(piece & covered, brain) for piece in bright)
    if agreement < MIN_SILHOUETTE_DICE:
        raise ScanError("registration_failed", f"{image.name}: its silhouette has Dice "
                        f"{agreement:.2f} with the brain of {work.volume.name} (limit "
                        f"{MIN_SILHOUETTE_DICE})")
    placement = anchor.placement
    to_anchor = anchor.from_midpoint @ placement.rigid
    matrix = to_image @ to_anchor
    return Pose(
        matrix, brain, to_archive(work.brain, work.volume.affine, to_anchor),
        placement_figures(placement, matrix) | {
            "placement": "anchor" if own else "anchor of another session",
            "mask_source": "anchor", "mask_dice_session": agreement},
        placement_flags(placement, preset), anchor.label,
        np.linalg.inv(placement.affine) @ placement.rigid)
