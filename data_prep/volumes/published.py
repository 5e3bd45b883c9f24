"""Preset ``paper``: the order of the published Neuro-JEPA scripts, for comparison with them.

    reorient -> crop the neck -> N4 -> 12-dof affine to MNI152 -> cubic spline -> brain extraction
    -> 0.5th to 99.5th percentile of the whole volume to [0, 1]

Each scan goes alone, so that visits and contrasts of a person do not coincide, and the affine
takes head size away.  What differs from the scripts, which need FSL and FreeSurfer:

    - The affine is found between brains, as in the other presets, where the scripts give FLIRT
      whole heads.  No installed package ships a whole-head template, and a whole head on the
      template's brain went astray in 3 of 7 scans here.  So a first, discarded brain mask is drawn.
    - A head that lies turned by 90 degrees is refused, not turned: see orientation.py.
    - The preset's mask tool stands for SynthStrip, nilearn's MNI152 for FSL's and the ICBM T2w.
    - The volume has the 180 x 216 x 180 mm of the published crop but lies on the archive grid.
    - A registration that fails is rejected instead of passed on.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import SimpleITK as sitk

from data_prep.flags import Note
from data_prep.scan import Scan, ScanError
from data_prep.volumes.output import (
    judged,
    label_map,
    mask_codes,
    placement_figures,
    placement_flags,
    scanned,
    source_figures,
    to_archive,
)
from data_prep.volumes.placing.align import coverage, fault, judge, place
from data_prep.volumes.placing.geometry import on_grid, resample, to_array, to_itk
from data_prep.volumes.placing.orientation import refuse_turned
from data_prep.volumes.preset import Preset
from data_prep.volumes.reading.volume import Volume, read_scan
from data_prep.volumes.results import Prepared, Rejected, rejected
from data_prep.volumes.structural.brain import brain_mask, check_mask
from data_prep.volumes.structural.intensity import correct_bias_field, to_unit
from data_prep.volumes.structural.session import native_figures
from neurojepa.feed.format import ARCHIVE_GRID

HEAD_MM = 170.0  # kept below the top of the head, as FSL's robustfov does
MIN_HEAD_SHARE = 0.02  # of a slice that is head, for it to count as the top
PERCENTILES = (0.5, 99.5)  # of the whole volume, air included


def prepare_published(scan: Scan, preset: Preset) -> Prepared | Rejected:
    """One T1w, T2w or FLAIR in the published order, or the reason why it cannot be."""
    try:
        if scan.modality not in ("T1w", "T2w", "FLAIR"):
            raise ScanError("not_in_preset", f"{scan.uri}: the published order has no step for "
                            f"{scan.modality}; prepare it with the default preset")
        read = read_scan(scan.uri, scan.member, json.loads(scan.facts or "{}"), turn=scan.turn)
    except ScanError as error:
        return rejected(scan, error)
    try:
        return _prepared(scan, read, preset)
    except ScanError as error:
        return rejected(scan, error, read.flags)


def _prepared(scan: Scan, read: Volume, preset: Preset) -> Prepared:
    """A scan as read in the published order.

    Raises
    ------
    ScanError
        registration_failed, and those of brain extraction, orientation and qc.yaml.
    """
    head, inside = crop_neck(read)
    head = replace(head, data=correct_bias_field(head.data, head.affine, inside))
    first, source = brain_mask(head, preset)
    refuse_turned(head, first)
    matrix = place(head, first, scan.modality, preset).affine
    image = on_grid(to_itk(head.data, head.affine), matrix, ARCHIVE_GRID, sitk.sitkBSpline3)
    image = np.clip(image, head.data.min(), head.data.max())
    placed = Volume(read.name, image, ARCHIVE_GRID.affine)
    if source == "stripped":  # a spline swings into the zeros around it
        brain = to_archive(first, head.affine, matrix)
    else:
        brain, source = brain_mask(placed, preset)
    placement = judge(np.eye(4), head=placed, mask=brain, modality=scan.modality)
    placement = replace(placement, affine=matrix, rigid=matrix,
                        volume_factor=float(1 / np.linalg.det(matrix[:3, :3])))
    if what := fault(placement, preset, preset.min_dice):
        raise ScanError("registration_failed", f"{read.name}: placement in MNI152 failed: {what}")
    native = _native(brain, matrix, read)
    check_mask(native, read, preset, source)  # what was not finite in the file is known there
    figures = native_figures(scan, read, native) | source_figures(read)
    figures |= placement_figures(placement, matrix) | {
        "brain_ml_archive": float(brain.sum() / 1000), "mask_source": source,
        "ncc_template": placement.ncc, "template_covered": coverage(matrix, read)}
    label, odd = label_map(scan, matrix)
    flags = [*read.flags, *odd, *placement_flags(placement, preset),
             *judged(figures, scan.modality, read.name)]
    low, high = np.percentile(np.where(brain, image, 0), PERCENTILES)
    return Prepared(scan, read.scan_id, to_unit(image, brain, low=low, high=high),
                    mask_codes(brain, scanned(read, matrix)), label, figures, flags,
                    [*read.notes, Note.LEFT_RIGHT_FROM_HEADER])


def crop_neck(volume: Volume) -> tuple[Volume, np.ndarray]:
    """The upper HEAD_MM of a head, and where in it the head is (Otsu's threshold; bool)."""
    bright = to_array(sitk.OtsuThreshold(to_itk(volume.data, volume.affine), 0, 1)) > 0
    height = np.linalg.norm(volume.affine[:3, 2])
    filled = np.flatnonzero(bright.mean(axis=(0, 1)) > MIN_HEAD_SHARE)
    top = int(filled[-1]) if filled.size else volume.data.shape[2] - 1
    low = max(0, top - round(HEAD_MM / height))
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, 2] * low
    return replace(volume, data=np.ascontiguousarray(volume.data[:, :, low:]), affine=affine,
                   invalid=None, outside=None), bright[:, :, low:]


def _native(brain: np.ndarray, matrix: np.ndarray, volume: Volume) -> np.ndarray:
    """The brain mask of the archive grid on the scan's own, for figures of quality."""
    return resample(to_itk(brain.astype(np.uint8), ARCHIVE_GRID.affine), np.linalg.inv(matrix),
                    shape=volume.data.shape, affine=volume.affine,
                    interpolator=sitk.sitkNearestNeighbor).astype(bool)
