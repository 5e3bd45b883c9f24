"""Lesions for segment: networks that learnt drawn ones, on heads with a truth.

    label map + lesions of white matter (data_prep synth) --FLAIR or T2w, 1 x 1 x 3 mm--> heads
    of ten anatomies learnt; two others, a stroke (T2w) and visits with MS (FLAIR) --> tested

Beside the network stands a threshold: brain voxels so many robust sd brighter than the brain's
median, the number that suits the learnt heads best.  The masks of the MS patients show lesions that
changed between two visits, in a space of their own, not all lesions.  So two tables: what is found
against whole masks, and new lesions of the patient with both visits against the mask of change,
with the share of changed voxels that is found at the later visit for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from data_prep.synth import codes
from data_prep.synth.anatomy import anatomy_names, load_anatomy
from data_prep.synth.contrast import TISSUES, scan_signal, tissue_table
from data_prep.volumes.placing.geometry import centre_of
from data_prep.volumes.placing.matching import register
from neurojepa.downstream.images import Image, itk_image, laid, read_image, read_labels, smoothed
from neurojepa.downstream.segment import Recipe, Segmenter
from neurojepa.downstream.segment_fit import fit, started, taught
from neurojepa.downstream.segment_score import score
from tools.bench._mixing import brain_of, label_folder
from tools.bench.common import print_table
from tools.bench.register import Head

RECIPE = Recipe(window=48, filters=8, steps=200)
PEOPLE, TESTED = 10, 2
VOXEL = np.array([1, 1, 3])  # mm
LESIONS_ML = (1.0, 30.0)  # of a person, drawn evenly on a log scale
CONTRAST_SD, NOISE, BIAS = 0.08, 0.04, 0.08
THRESHOLDS = np.arange(0.5, 6, 0.25)  # robust sd above the brain's median
OUTLINE_MM = 4.0  # blur of brain masks that are laid over one another
CODE = 1
NETWORK, THRESHOLD = "network", "threshold"
VISITS = {"ms01": (1, 2), "ms03": (2,), "ms20": (2,)}  # with a FLAIR


def drawn_head(name: str, number: int, modality: str) -> Head:
    """A scan of an anatomy with lesions, and where they are (``CODE``)."""
    anatomy = load_anatomy(name, label_folder())
    rng = np.random.default_rng([number, 6])
    labels = anatomy.labels.copy()
    amount = np.exp(rng.uniform(*np.log(LESIONS_ML)))
    anatomy.tissue.add_lesions(labels, round(1000 * amount), rng)
    labels = labels[tuple(slice(n) for n in np.array(labels.shape) // VOXEL * VOXEL)]
    table = tissue_table(modality, {tissue: rng.normal(0, CONTRAST_SD) for tissue in TISSUES})

    def shrunk(values: np.ndarray) -> np.ndarray:
        parts = [k for n, v in zip(values.shape, VOXEL.tolist(), strict=True) for k in (n // v, v)]
        return values.reshape(parts).mean((1, 3, 5)).astype(np.float32)

    data = scan_signal(shrunk(table[labels]), voxel_mm=VOXEL.astype(float), rng=rng, bias=BIAS,
                       noise=NOISE)
    inside = codes.inside(labels) & (labels != codes.FLUID)
    brain = shrunk(brain_of(inside.astype(np.float32), 1)) > 0.5
    affine = np.diag([*VOXEL, 1.0])
    lesions = (shrunk(labels == codes.LESION) > 0.5) * CODE
    return Head(Image(name, data * brain, affine, brain=brain),
                Image(name, lesions.astype(np.int32), affine))


def measure(folder: Path, kept: Callable[[Path, Callable[[], Any]], Any]) -> dict[str, Any]:
    """Rows {modality: {"scores", "cpu_s"}}; nothing where the real scans are not at hand."""
    labels = label_folder()
    files = None if labels is None else labels.parent
    if files is None or not all((files / each).exists() for each in ("stroke", "bids-ms")):
        print("lesions: left out, for there are none in $NEUROJEPA_SCANS or ../shared/data")
        return {}
    return {modality: kept(folder / f"lesions {modality}.json", lambda modality=modality: _learnt(
        modality, files, str(folder / f"lesions {modality}")))
        for modality in ("FLAIR", "T2w")}


def _learnt(modality: str, files: Path, kept: str) -> dict[str, Any]:
    """Scores {person: {method: scores}} of a modality."""
    names = anatomy_names(label_folder())[:TESTED + PEOPLE]
    heads = [drawn_head(name, number, modality) for number, name in enumerate(names)]
    tested, teachers = heads[:TESTED], heads[TESTED:]
    people = [taught(head.image, head.labels, np.array([CODE]), RECIPE.mm) for head in teachers]
    network = started(people, RECIPE, 1)
    fit(network, people, RECIPE, kept)
    model = Segmenter(network, RECIPE, [CODE], ["lesion"])
    number = _best_threshold(teachers)
    methods: dict[str, Callable[[Image], np.ndarray]] = {
        NETWORK: lambda scan: model.segment(scan) == CODE,
        THRESHOLD: lambda scan: _brightness(scan) > number}
    whole = {f"synthetic {rank + 1}": head for rank, head in enumerate(tested)}
    if modality == "T2w":
        whole["stroke"] = Head(read_image(str(files / "stroke/M2307_T2w.nii.gz")),
                               read_labels(str(files / "stroke/M2307_label-lesion_mask.nii.gz")))
    scores: dict[str, Any] = {
        person: {method: _scored(find(head.image), head.labels) for method, find in methods.items()}
        for person, head in whole.items()}
    if modality == "FLAIR":
        scores |= {person: _changed(files / "bids-ms", person, methods) for person in VISITS}
    return scores


def _brightness(scan: Image) -> np.ndarray:
    """Robust sd above the brain's median; -inf outside the brain."""
    assert scan.brain is not None
    inside = scan.data[scan.brain]
    middle = np.median(inside)
    sd = 1.4826 * np.median(np.abs(inside - middle))
    return np.where(scan.brain, (scan.data - middle) / sd, -np.inf)


def _best_threshold(heads: Sequence[Head]) -> float:
    def dice(number: float) -> float:
        return float(np.mean([_scored(_brightness(head.image) > number, head.labels)["dice"]
                              for head in heads]))

    return max(THRESHOLDS.tolist(), key=dice)


def _scored(found: np.ndarray, labels: Image) -> dict[str, float]:
    truth = labels.data > 0
    ml = abs(np.linalg.det(labels.affine[:3, :3])) / 1000
    return {**score(found.astype(int), truth.astype(int), [1], labels.spacing)[1],
            "found_ml": float(found.sum() * ml), "truth_ml": float(truth.sum() * ml)}


# ---- two visits ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Common:
    """The space in which a patient's change is drawn: its brain, and where that changed."""

    brain: Image
    change: Image


def _changed(folder: Path, person: str, methods: dict[str, Callable[[Image], np.ndarray]]
             ) -> dict[str, dict[str, float]]:
    """Scores of new lesions where there are two visits, else what share of the change is found."""
    masks = folder / f"derivatives/lesionchange/sub-{person}"
    space = Common(*(read_labels(str(masks / f"sub-{person}_space-common_{name}_mask.nii.gz"))
                     for name in ("desc-brain", "label-lesionchange")))
    scans = [read_image(str(folder / f"sub-{person}/ses-{visit}/anat/"
                            f"sub-{person}_ses-{visit}_FLAIR.nii.gz"))
             for visit in VISITS[person]]
    places = [_place(space.brain, scan) for scan in scans]
    rows = {}
    for method, find in methods.items():
        carried = [laid(find(scan).astype(np.float32), scan.affine, space.change.data.shape,
                        space.change.affine, place) > 0.5
                   for scan, place in zip(scans, places, strict=True)]
        changed = space.change.data > 0
        rows[method] = {"found_of_change": float(carried[-1][changed].mean())}
        ml = abs(np.linalg.det(space.change.affine[:3, :3])) / 1000
        rows[method]["found_ml"] = float(carried[-1].sum() * ml)
        if len(carried) == 2:
            rows[method] |= _scored(carried[1] & ~carried[0], space.change)
    return rows


def _place(brain: Image, scan: Image) -> np.ndarray:
    """[4, 4], mm of a brain mask to mm of a scan: rigid, by the correlation of blurred masks."""
    assert scan.brain is not None
    target, source = (smoothed(mask, spacing, OUTLINE_MM * 2.355) for mask, spacing in (
        (brain.data > 0, brain.spacing), (scan.brain, scan.spacing)))
    centre, other = (centre_of(mask, affine) for mask, affine in (
        (brain.data > 0, brain.affine), (scan.brain, scan.affine)))
    start = sitk.Euler3DTransform()
    start.SetCenter(centre.tolist())
    start.SetTranslation((other - centre).tolist())
    return register(itk_image(target, brain.affine), itk_image(source, scan.affine), start,
                    shrink=(4, 2), sampling=0.5,
                    set_metric=sitk.ImageRegistrationMethod.SetMetricAsCorrelation).matrix


# ---- table ---------------------------------------------------------------------------------------

def report(rows: dict[str, Any]) -> dict[str, Any]:
    """Print scores of each person and method."""
    whole, change = [], []
    for modality, each in rows.items():
        print(f"{modality}: {each['cpu_s']:.0f} CPU s")
        for person, methods in each["scores"].items():
            for method, found in methods.items():
                line = [person, modality, method]
                if "found_of_change" in found:
                    line.append(f"{found['found_of_change']:.2f}")
                scores = [f"{found[name]:.2f}" if name in found else "-"
                          for name in ("dice", "hd95_mm")]
                volumes = [f"{found[name]:.1f}" if name in found else "-"
                           for name in ("truth_ml", "found_ml")]
                (change if "found_of_change" in found else whole).append(
                    [*line, *scores, *volumes])
    if whole:
        print_table(["lesions", "scan", "method", "Dice", "HD95, mm", "truth, ml", "found, ml"],
                    whole)
    if change:
        print_table(["new lesions", "scan", "method", "of the change found", "Dice", "HD95, mm",
                     "change, ml", "found, ml"], change)
    return rows
