"""prepare: seconds of one core per T1w, by step, and how well the brain is found and placed.

A whole head at 1 mm with known brain (the synthetic cohort's) goes three ways: the default preset
from the raw scan; the same with the mask and the FLIRT matrix that a cohort delivers; and the
published order (preset paper), whose scripts need FSL and FreeSurfer, so that ours stand in for
them.  Where real scans are at hand ($NEUROJEPA_SCANS, or ../shared/data beside the checkout), all
of them are prepared too, and their masks compared with given ones.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from data_prep.scan import Scan
from data_prep.volumes import output, pipeline, published
from data_prep.volumes.pipeline import Prepared, prepare_person
from data_prep.volumes.placing.align import template
from data_prep.volumes.placing.geometry import centre_of, resample, to_itk
from data_prep.volumes.placing.matching import dice
from data_prep.volumes.placing.transforms import FSL_MNI152_1MM, stored_geometry
from data_prep.volumes.placing.within import register_rigid_from
from data_prep.volumes.preset import PRESETS, Preset
from data_prep.volumes.reading.volume import Volume, read_scan
from data_prep.volumes.structural import session
from data_prep.volumes.structural.brain import _deepbet as load_network
from data_prep.volumes.structural.brain import brain_mask, carried
from neurojepa.feed.format import MaskCode
from tools.bench.common import clock, machine, print_table

Seconds = defaultdict[str, float]  # by step
TARGET_RAW_S, TARGET_GIVEN_S = 30.0, 5.0
# Step: where its functions are looked up when they are called.
STEPS: dict[str, list[tuple[Any, str]]] = {
    "read": [(pipeline, "read_scan"), (published, "read_scan")],
    "mask": [(session, "brain_mask"), (published, "brain_mask")],
    "N4": [(session, "correct_bias_field"), (published, "correct_bias_field")],
    "registration": [(pipeline, "place"), (session, "place_given"), (session, "register_rigid"),
                     (published, "place"), (published, "judge")],
    "resample": [(output, "interpolate"), (output, "to_archive"), (published, "on_grid"),
                 (published, "scanned")],
    "intensity": [(output, "scale"), (published, "to_unit")],
    "QC": [(session, "native_figures"), (published, "native_figures"), (output, "coverage")],
}


@dataclass
class Timed:
    """One scan prepared, and the CPU seconds of its steps."""

    result: Prepared
    steps: Seconds

    @property
    def total_s(self) -> float:
        return self.steps["all"]


def run(quick: bool, official: str | None) -> dict[str, Any]:
    """Measure; returns raw_s, given_s and paper_s per T1w at 1 mm among others."""
    import torch

    torch.set_num_threads(1)
    print(machine())
    load_network()  # once per process, as the templates
    template(1), template(2)
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as name:
        head = _head(Path(name))
        raw = timed([head], PRESETS["default"])[0]
        given = timed([_delivered(head, raw.result)], PRESETS["default"])[0]
        paper = timed([head], PRESETS["paper"])[0]
        truth = _truth_dice(head, raw.result)
    ways = {"default, from raw": raw, "default, mask and transform given": given,
            "published order": paper}
    print("\nA T1w head of 1 mm, CPU seconds on one core")
    print_table(("way", *STEPS, "other", "all", "scans/core-hour"),
                [(way, *(one.steps[step] for step in STEPS),
                  one.total_s - sum(one.steps[step] for step in STEPS), one.total_s,
                  3600 / one.total_s) for way, one in ways.items()])
    print("\nThe same: how it lies")
    print_table(("way", "Dice to the template", "NCC", "brain ml", "mask"),
                [(way, one.result.figures["mask_dice_template"],
                  one.result.figures["ncc_template"], one.result.figures["brain_ml_archive"],
                  one.result.figures["mask_source"]) for way, one in ways.items()])
    print(f"Dice of the raw scan's mask with the true brain: {truth:.3f}")
    return {"raw_s": raw.total_s, "given_s": given.total_s, "paper_s": paper.total_s,
            "raw_margin_s": TARGET_RAW_S - raw.total_s,
            "given_margin_s": TARGET_GIVEN_S - given.total_s,
            "scans_per_core_hour": 3600 / raw.total_s,
            "scans_per_core_hour_given": 3600 / given.total_s,
            "scans_per_core_hour_paper": 3600 / paper.total_s,
            "mask_dice_truth": truth, **_real_scans(quick)}


# ---- time by step --------------------------------------------------------------------------------

def timed(scans: list[Scan], preset: Preset) -> list[Timed]:
    """Prepare one person's scans; the steps' seconds are those of all scans together."""
    steps: Seconds = defaultdict(float)
    with _watched(steps), clock() as spent:
        results = prepare_person(scans, preset)
    steps["all"] = spent.cpu_s
    failed = [result for result in results if not isinstance(result, Prepared)]
    if failed:
        raise RuntimeError(failed[0].message)
    return [Timed(result, steps) for result in results if isinstance(result, Prepared)]


@contextmanager
def _watched(steps: Seconds) -> Iterator[None]:
    """Count the CPU time of every step's functions into ``steps``."""
    kept = [(module, name, getattr(module, name), step)
            for step, places in STEPS.items() for module, name in places]
    try:
        for module, name, function, step in kept:
            setattr(module, name, _counting(function, step, steps))
        yield
    finally:
        for module, name, function, _ in kept:
            setattr(module, name, function)


def _counting(function: Callable[..., Any], step: str, steps: Seconds) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        with clock() as spent:
            value = function(*arguments, **named)
        steps[step] += spent.cpu_s
        return value

    return call


# ---- a head of 1 mm ------------------------------------------------------------------------------

def _head(folder: Path) -> Scan:
    """A synthetic T1w head with its label map, on disk as a cohort would have it."""
    from data_prep.synth.anatomy import anatomy_names, load_anatomy
    from data_prep.synth.cohort import draw_person
    from data_prep.synth.person import file_names, make_visit

    labels = scans_folder() / "labels"
    source = labels if labels.exists() else None
    person = draw_person(0, 0)
    visit = replace(person.visits[0], modalities=("T1w",))
    files, _ = make_visit(load_anatomy(anatomy_names(source)[0], source), person, visit, seed=0,
                          spacing_mm=1.0)
    names = file_names(person, visit)
    for key in ("T1w", "labels"):
        (folder / f"{key}.nii.gz").write_bytes(files[names[key]])
    return _scan(folder / "T1w.nii.gz", "T1w")


def _delivered(head: Scan, result: Prepared) -> Scan:
    """The head with what UK Biobank delivers beside it: a brain mask and a FLIRT matrix."""
    folder = Path(head.uri).parent
    volume = read_scan(head.uri)
    mask, _ = brain_mask(volume, PRESETS["default"])
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), volume.affine), folder / "mask.nii.gz")
    affine = np.array(json.loads(str(result.figures["template_affine"])))  # template to head mm
    flirt = (np.linalg.inv(FSL_MNI152_1MM.flirt_to_world) @ np.linalg.inv(affine)
             @ stored_geometry(volume).flirt_to_world)
    text = io.StringIO()
    np.savetxt(text, flirt, fmt="%.10f")
    (folder / "linear.mat").write_text(text.getvalue())
    return replace(head, mask_uri=str(folder / "mask.nii.gz"),
                   transform_uri=str(folder / "linear.mat"))


def _truth_dice(head: Scan, result: Prepared) -> float:
    """Of the prepared mask with all that the label map has inside the skull."""
    labels = read_scan(str(Path(head.uri).parent / "labels.nii.gz"), label=True)
    inside = Volume("truth", ((labels.data > 0) & (labels.data < 256)).astype(np.float32),
                    labels.affine)
    matrix = np.array(json.loads(str(result.figures["archive_to_scan"])))
    return dice(output.to_archive(inside.data > 0, inside.affine, matrix),
                result.mask == MaskCode.BRAIN)


def _scan(path: Path, modality: str, session_name: str = "1") -> Scan:
    return Scan(str(path), "bench", "p", "p", session_name, modality, "train")


# ---- real scans ----------------------------------------------------------------------------------

def scans_folder() -> Path:
    """Where real scans are, if anywhere."""
    root = Path(__file__).resolve().parents[2]
    return Path(os.environ.get("NEUROJEPA_SCANS", root.parent / "shared" / "data"))


def real_people(folder: Path) -> dict[str, list[Scan]]:
    """The structural scans of each person."""
    people: dict[str, list[Scan]] = {}
    for path in sorted([*folder.glob("bids-ms/sub-*/ses-*/anat/*.nii.gz"),
                        *folder.glob("ixi/*_T1w.nii.gz"), *folder.glob("colin27/ch2bet.nii.gz"),
                        *folder.glob("studyforrest/*_T1w.nii.gz"),
                        *folder.glob("stroke/*_T2w.nii.gz")]):
        name = path.name.removesuffix(".nii.gz")
        modality = name.rpartition("_")[2] if "_" in name else "T1w"
        person = name.split("_")[0]
        people.setdefault(person, []).append(
            _scan(path, modality, name.split("_")[1] if "ses-" in name else "1"))
    return people


def _real_scans(quick: bool) -> dict[str, Any]:
    folder = scans_folder()
    if not folder.exists():
        print("\nNo real scans here; set NEUROJEPA_SCANS to a folder that has them")
        return {"real_scans": 0}
    people = real_people(folder)
    rows = []
    for person, scans in list(people.items())[: 3 if quick else None]:
        for number, one in enumerate(timed(scans, PRESETS["default"])):
            rows.append((person, one.result, one.total_s / len(scans), *_given_dice(
                folder / f"bids-ms/derivatives/lesionchange/{person}/{person}_space-common_"
                         "desc-brain_mask.nii.gz", scans[number])))
    print("\nReal scans, default preset: CPU seconds per scan of the person")
    print_table(("person", "contrast", "spacing", "CPU s", "mask", "Dice to template", "NCC",
                 "Dice in session", "Dice to given mask", "same, moved rigidly"),
                [(person, r.scan.modality, str(r.figures["spacing"]), seconds,
                  str(r.figures["mask_source"]), r.figures["mask_dice_template"],
                  r.figures["ncc_template"], r.figures["mask_dice_session"], by_header, moved)
                 for person, r, seconds, by_header, moved in rows])
    moved = [row[4] for row in rows if row[4] is not None]
    return {"real_scans": len(rows),
            "real_median_s": float(np.median([row[2] for row in rows])),
            "real_median_dice_template": float(np.median(
                [float(row[1].figures["mask_dice_template"] or 0) for row in rows])),
            "real_median_dice_given": float(np.median(moved)) if moved else None}


def _given_dice(path: Path, scan: Scan) -> tuple[float | None, float | None]:
    """Dice of our mask with one drawn by others, as headers say and after a rigid motion.

    That mask lies in a space to which its makers had moved the scans, so that headers tell only
    part of the way.
    """
    if not path.exists():
        return None, None
    volume, given = read_scan(scan.uri), read_scan(str(path), label=True)
    mask, _ = brain_mask(volume, PRESETS["default"])
    fixed = replace(volume, data=mask.astype(np.float32))
    start = np.eye(4)
    start[:3, 3] = centre_of(given.data > 0, given.affine) - centre_of(mask, volume.affine)
    matrix = register_rigid_from([start], fixed=fixed, mask=mask, moving=given,
                                 preset=PRESETS["default"])
    moved = resample(to_itk((given.data > 0).astype(np.float32), given.affine), matrix,
                     shape=mask.shape, affine=volume.affine) > 0.5
    return dice(carried(given, volume), mask), dice(moved, mask)
