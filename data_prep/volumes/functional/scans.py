"""PET and BOLD: images of what the brain does, placed by the anatomy of the same person.

    PET:   late frames' mean --rigid--> anchor --its mask--> archive grid --> SUVR
    BOLD:  temporal mean --rigid--> anchor; maps of the series take the same matrix
    in MNI space already (fMRIPrep, XCP-D, HCP), and CIFTI: as they lie

The anchor is the session's T1w, else the T1w of the nearest session, else another scan.  Who has
none is placed by silhouette alone (flag ``no_anchor``).  PET scanners have coordinates of their
own, so that search also starts from the brains' centres.  No bias field is corrected: these maps
are measurements.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data_prep.qc import Figures, describe, quality
from data_prep.scan import Scan, ScanError, split_member
from data_prep.volumes.functional import pet
from data_prep.volumes.functional.bold import bold_maps, scale_map
from data_prep.volumes.functional.cifti import archive_maps, read_cifti
from data_prep.volumes.functional.pet_table import known_tracer
from data_prep.volumes.output import (
    codes_on_archive,
    interpolate,
    judged,
    mask_codes,
    placement_figures,
    placement_flags,
    scanned,
    source_figures,
    to_archive,
)
from data_prep.volumes.placing.align import Placement, place, template
from data_prep.volumes.placing.geometry import centre_of
from data_prep.volumes.placing.matching import dice
from data_prep.volumes.placing.within import check_session_shift, register_rigid_from
from data_prep.volumes.preset import Preset
from data_prep.volumes.reading.decode import fetch
from data_prep.volumes.reading.read import Series, Volume, read_scan, read_series
from data_prep.volumes.results import BRAIN, Prepared, Rejected, rejected
from data_prep.volumes.structural.brain import carried, check_mask, silhouettes
from data_prep.volumes.structural.session import Work, carried_from

# Of the anchor's mask with what is bright in PET or EPI: uptake leaves out ventricles and
# infarcts, EPI the frontal sinuses, and both show some scalp.  A wrong pose has less than 0.6.
MIN_SILHOUETTE_DICE = 0.7
MAX_CLIPPED = 0.01  # of the brain above the tracer's range, or the scan is flagged


@dataclass
class Anchor:
    """A session's anchor that was placed, with what other images of the person need of it."""

    work: Work
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


def prepare_functional(scan: Scan, anchors: Sequence[Anchor], preset: Preset
                       ) -> Sequence[Prepared | Rejected]:
    """A PET image, or the maps of a BOLD series or CIFTI file, on the archive grid."""
    try:
        if is_cifti_name(scan):
            return _cifti(scan)
        try:
            series = read_series(scan.uri, scan.member, json.loads(scan.facts or "{}"))
        except ScanError as error:
            if error.code != "cifti":  # a NIfTI by name, grayordinates by its intent code
                raise
            return _cifti(scan)
        return [_pet(scan, series, anchors, preset)] if scan.modality == "PET" else _bold(
            scan, series, anchors, preset)
    except ScanError as error:
        return [rejected(scan, error)]


# ---- where it lies -------------------------------------------------------------------------------

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
        registration_failed, implausible_mask, or what reading a given mask raised.
    """
    if in_template_space(scan):
        return _in_template(image, scan)
    anchor = nearest_anchor(scan, anchors)
    if anchor is None:
        return _alone(image, scan, preset)
    return _anchored(image, scan, anchor, preset)


def _in_template(image: Volume, scan: Scan) -> Pose:
    target = template(2)
    source = (read_scan(*split_member(scan.mask_uri), label=True) if scan.mask_uri
              else Volume("MNI152", target.mask.astype(np.float32), target.affine))
    brain = carried(source, image)
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
        [*placement_flags(placement, preset), "no_anchor"],
        to_template=np.linalg.inv(placement.affine) @ placement.rigid)


def _anchored(image: Volume, scan: Scan, anchor: Anchor, preset: Preset) -> Pose:
    work, own = anchor.work, anchor.work.scan.session == scan.session
    bright = silhouettes(image, scan.mask_uri, preset)
    starts = [np.eye(4)]
    if scan.modality == "PET" or not own:
        starts.append(np.eye(4))
        starts[-1][:3, 3] = centre_of(bright[0], image.affine) - work.centre
    to_image = register_rigid_from(starts, work.volume, work.brain, image, preset)
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


# ---- PET -----------------------------------------------------------------------------------------

def _pet(scan: Scan, series: Series, anchors: Sequence[Anchor], preset: Preset) -> Prepared:
    known_tracer(scan.tracer, series.name)  # or the search for its place would be in vain
    image, figures, flags = pet.mean_frame(series, series.facts, scan.tracer, scan.processing)
    pose = locate(image, scan, anchors, preset)
    seen = scanned(image, pose.matrix)
    brain = pose.brain & seen
    moved = interpolate(image, pose.matrix, brain, preset)
    reference = None
    if not pet.is_suvr(series.facts, scan.processing):
        reference, source = pet.reference_region(scan.tracer, pose.label, brain, pose.to_template)
        figures["pet_reference"] = source
        if source == "approximate":
            flags.append("reference_approximate")
    ratio, more = pet.suvr(moved, reference, brain, scan.tracer)
    if float(more["pet_clipped"] or 0) > MAX_CLIPPED:
        flags.append("pet_clipped")
    figures |= more | _described(image, series, pose, "PET")
    return Prepared(scan, series.scan_id, ratio, mask_codes(pose.brain, seen), pose.label, figures,
                    flags + pose.flags + judged(figures, "PET", image.name))


# ---- BOLD ----------------------------------------------------------------------------------------

def _bold(scan: Scan, series: Series, anchors: Sequence[Anchor], preset: Preset) -> list[Prepared]:
    image = _still(series)
    pose = locate(image, scan, anchors, preset)
    confounds, fault = _confounds(scan)
    found = bold_maps(series, scan.processing, confounds, pose.native_brain)
    if not found.maps:
        raise ScanError("no_maps", f"{series.name}: neither a mean nor fluctuations in "
                                   f"{series.data.shape[3]} volumes")
    # Cleaned series are zero where nothing was measured.
    seen = to_archive(image.data != 0, image.affine, pose.matrix) | (
        scanned(image, pose.matrix) & ~pose.brain)
    brain, mask = pose.brain & seen, mask_codes(pose.brain, seen)
    figures = found.figures | fault | _described(image, series, pose, "BOLD")
    flags = [*found.flags, *(["bad_confounds"] if fault else []), *pose.flags,
             *judged(figures, "BOLD", image.name)]
    return [Prepared(replace(scan, modality=name), map_id(series.scan_id, name),
                     scale_map(name, interpolate(volume, pose.matrix, brain, preset), brain),
                     mask, pose.label, dict(figures), list(flags))
            for name, volume in found.maps.items()]


def _still(series: Series) -> Volume:
    """The image of a series that shows the head: its mean, or its spread where it is demeaned."""
    some = series.data[::4, ::4, ::4]
    if np.abs(some.mean(axis=3)).mean() > some.std(axis=3).mean() or series.data.shape[3] == 1:
        return series.volume(series.data.mean(axis=3))
    return series.volume(np.stack([part.std(axis=-1) for part in series.data]))  # by slab: large


def _confounds(scan: Scan) -> tuple[bytes | None, Figures]:
    """The table of motion, or why there is none; the series is good without it."""
    if not scan.confounds_uri:
        return None, {}
    try:
        return fetch(*split_member(scan.confounds_uri)), {}
    except ScanError as error:
        return None, {"confounds_reason": error.code}


def map_id(scan_id: str, name: str) -> str:
    """Identity of a map: the series' own for its mean."""
    return scan_id if name == "BOLD" else f"{scan_id}-{name}"


def _described(image: Volume, series: Series, pose: Pose, modality: str) -> Figures:
    return (quality(image, pose.native_brain, modality=modality)
            | describe(image, series.facts, pose.native_brain) | source_figures(image)
            | {"brain_ml_archive": float(pose.brain.sum() / 1000)} | pose.figures)


# ---- CIFTI ---------------------------------------------------------------------------------------

def is_cifti_name(scan: Scan) -> bool:
    """Whether a name promises CIFTI-2: .dtseries.nii, .dscalar.nii, .pconn.nii and the like."""
    parts = (scan.member or scan.uri).rsplit("/", 1)[-1].lower().rsplit(".", 2)
    return len(parts) == 3 and parts[2] == "nii" and parts[1].startswith(
        ("dtseries", "dscalar", "dlabel", "dconn", "ptseries", "pscalar", "plabel", "pconn"))


def _cifti(scan: Scan) -> list[Prepared]:
    confounds, fault = _confounds(scan)
    found = read_cifti(scan.uri, scan.member, scan.surface_uri, processing=scan.processing,
                       confounds=confounds, facts=json.loads(scan.facts or "{}"))
    images, mask = archive_maps(found, scan.modality)
    figures = found.figures | fault | {
        "placement": "delivered", "mask_source": "grayordinates",
        "archive_to_scan": json.dumps(np.eye(4).tolist()),
        "brain_ml_archive": float((mask == BRAIN).sum() / 1000)}
    label = None
    if scan.label_uri:  # a dlabel of the same grayordinates
        codes = read_cifti(*split_member(scan.label_uri), scan.surface_uri)
        label = codes_on_archive(next(iter(codes.maps.values())), np.eye(4))
    flags = [*found.flags, *(["bad_confounds"] if fault else [])]
    prepared = [Prepared(replace(scan, modality=name), map_id(found.scan_id, name), image, mask,
                         label, dict(figures), list(flags))
                for name, image in images.items()]
    if found.kind == "dtseries":  # the series of parcels goes with the first of its maps
        prepared[0].parcels = found.parcels
        prepared[0].figures["cifti_parcel_names"] = ";".join(found.names)
    return prepared
