"""PET and BOLD: images of what the brain does, placed by the anatomy of the same person.

    PET:   late frames' mean --rigid--> anchor --its mask--> archive grid --> SUVR
    BOLD:  temporal mean --rigid--> anchor; maps of the series take the same matrix
    in MNI space already (fMRIPrep, XCP-D, HCP), and CIFTI: as they lie

pose.py finds the place.  No bias field is corrected: these maps are measurements.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data_prep.flags import Flag, Note, of_companion
from data_prep.qc import Figures, describe, quality
from data_prep.scan import Scan, ScanError, split_member
from data_prep.volumes.functional import pet
from data_prep.volumes.functional.bold import bold_maps, scale_map
from data_prep.volumes.functional.cifti import archive_maps, read_cifti
from data_prep.volumes.functional.pet_table import known_tracer
from data_prep.volumes.functional.pose import Anchor, Pose, locate
from data_prep.volumes.output import (
    codes_on_archive,
    interpolate,
    judged,
    mask_codes,
    scanned,
    source_figures,
    to_archive,
)
from data_prep.volumes.preset import Preset
from data_prep.volumes.reading.decode import fetch
from data_prep.volumes.reading.volume import Series, Volume, read_series
from data_prep.volumes.results import Prepared, Rejected, rejected
from neurojepa.feed.format import MaskCode

MAX_CLIPPED = 0.01  # of the brain above the tracer's range, or the scan is flagged


def prepare_functional(scan: Scan, anchors: Sequence[Anchor], preset: Preset
                       ) -> Sequence[Prepared | Rejected]:
    """A PET image, or the maps of a BOLD series or CIFTI file, on the archive grid."""
    try:
        if is_cifti_name(scan):
            return _cifti(scan)
        try:
            series = read_series(scan.uri, scan.member, json.loads(scan.facts or "{}"),
                                 turn=scan.turn)
        except ScanError as error:
            if error.code != "cifti":  # a NIfTI by name, grayordinates by its intent code
                raise
            return _cifti(scan)
    except ScanError as error:
        return [rejected(scan, error)]
    try:
        return [_pet(scan, series, anchors, preset)] if scan.modality == "PET" else _bold(
            scan, series, anchors, preset)
    except ScanError as error:
        return [rejected(scan, error, series.flags)]


# ---- PET -----------------------------------------------------------------------------------------

def _pet(scan: Scan, series: Series, anchors: Sequence[Anchor], preset: Preset) -> Prepared:
    known_tracer(scan.tracer, series.name)  # or the search for its place would be in vain
    image, figures = pet.mean_frame(series, series.facts, tracer=scan.tracer,
                                    processing=scan.processing)
    pose = locate(image, scan, anchors, preset)
    seen = scanned(image, pose.matrix)
    brain = pose.brain & seen
    moved = interpolate(image, pose.matrix, brain=brain, preset=preset)
    reference = None
    if not pet.is_suvr(series.facts, scan.processing):
        reference, source = pet.reference_region(scan.tracer, label=pose.label, brain=brain,
                                                 to_template=pose.to_template)
        figures["pet_reference"] = source
        if source == "approximate":
            image.notes.append(Note.REFERENCE_APPROXIMATE)
    ratio, more = pet.suvr(moved, reference=reference, brain=brain, tracer=scan.tracer)
    if float(more["pet_clipped"] or 0) > MAX_CLIPPED:
        image.flags.append(Flag.PET_CLIPPED)
    figures |= more | _described(image, series, pose, "PET")
    return Prepared(scan, series.scan_id, ratio, mask_codes(pose.brain, seen), pose.label, figures,
                    [*image.flags, *pose.flags, *judged(figures, "PET", image.name)], image.notes)


# ---- BOLD ----------------------------------------------------------------------------------------

def _bold(scan: Scan, series: Series, anchors: Sequence[Anchor], preset: Preset) -> list[Prepared]:
    image = _still(series)
    pose = locate(image, scan, anchors, preset)
    confounds, fault = _confounds(scan)
    found = bold_maps(series, processing=scan.processing, confounds=confounds,
                      brain=pose.native_brain)
    if not found.maps:
        raise ScanError("no_maps", f"{series.name}: neither a mean nor fluctuations in "
                                   f"{series.data.shape[3]} volumes")
    # Cleaned series are zero where nothing was measured.
    seen = to_archive(image.data != 0, image.affine, pose.matrix) | (
        scanned(image, pose.matrix) & ~pose.brain)
    brain, mask = pose.brain & seen, mask_codes(pose.brain, seen)
    figures = found.figures | fault | _described(image, series, pose, "BOLD")
    flags = [*image.flags, *found.flags, *([Flag.BAD_CONFOUNDS] if fault else []), *pose.flags,
             *judged(figures, "BOLD", image.name)]
    notes = [*image.notes, *found.notes]
    return [Prepared(replace(scan, modality=name), map_id(series.scan_id, name),
                     scale_map(name, interpolate(volume, pose.matrix, brain=brain, preset=preset),
                               brain),
                     mask, pose.label, dict(figures), list(flags), list(notes))
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
            | describe(image, series.facts) | source_figures(image)  # faces show in neither
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
        "brain_ml_archive": float((mask == MaskCode.BRAIN).sum() / 1000)}
    label = None
    if scan.label_uri:  # a dlabel of the same grayordinates
        codes = read_cifti(*split_member(scan.label_uri), scan.surface_uri)
        label = codes_on_archive(next(iter(codes.maps.values())), np.eye(4))
        found.flags += of_companion("label", codes.flags)
    flags = [*found.flags, *([Flag.BAD_CONFOUNDS] if fault else []),
             *judged(figures, "BOLD", scan.uri)]
    prepared = [Prepared(replace(scan, modality=name), map_id(found.scan_id, name), image, mask,
                         label, dict(figures), list(flags), list(found.notes))
                for name, image in images.items()]
    if found.kind == "dtseries":  # the series of parcels goes with the first of its maps
        prepared[0].parcels = found.parcels
        prepared[0].figures["cifti_parcel_names"] = ";".join(found.names)
    return prepared
