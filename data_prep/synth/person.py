"""One person's head at each visit, and the files that show it.

anatomy -> cortex thinned, lesions added (tissue.py) -> focal field for ventricles and hippocampi
(shaper.py), after a personal smooth deformation, the bend of the shape trait, and head size
-> per scan: pose and grid (scanner.py), labels read once on it, signal (contrast.py, series.py)
-> stored in a random orientation and type -> NIfTI.  Label maps lie on the T1w's grid, and the
volumes in the tables are counted on them.

Every scan shows a bright sphere beside the person's right temple, like the vitamin capsule that is
taped there.  Whoever swaps left and right moves it.
"""

from __future__ import annotations

import json

import numpy as np
from scipy import ndimage

from data_prep.synth import codes, contrast, scanner, series, warp
from data_prep.synth.anatomy import Anatomy
from data_prep.synth.cohort import CONTRAST, SyntheticPerson, Visit, truths, wanted_ml
from data_prep.synth.scanner import Head, Pose, View

VOLUME_COLUMNS = ("ventricle_ml", "hippocampus_ml", "cortex_gm_ml", "csf_ml", "lesion_ml",
                  "brain_ml")
PERSONAL = ((3.0, 20.0), (0.8, 10.0))  # rms and width of the personal deformation, millimetres
SHAPE_MM = 3.0  # by which one sd of the shape trait moves the poles of the brain
HALF_LENGTH_MM = 85.0  # from the middle of the brain to its poles


def visit_head(anatomy: Anatomy, person: SyntheticPerson, visit: Visit, seed: int,
               more: np.ndarray | None = None) -> Head:
    """The person's head at a visit; ``more`` is a velocity [3, a, b, c] on top of the person's."""
    scale = np.array(person.head_scale)
    own = _own_velocity(anatomy, person, visit, seed)
    if more is not None:
        own = own + more
    # by how much the personal deformation makes each place of the anatomy larger
    density = warp.density(own) * np.float32(scale.prod())
    wanted = wanted_ml(person, age=visit.age,
                       intracranial_ml=anatomy.shaper.intracranial_ml(density),
                       levels=anatomy.levels)
    focal, (csf, cortex, other_grey) = anatomy.shaper.solve(
        np.array([wanted.ventricles, wanted.hippocampi]), density)
    labels = anatomy.labels.copy()
    voxel_ml = float(np.mean(density[anatomy.shaper.box])) / 1000
    widened = wanted.csf - csf
    anatomy.tissue.exchange(labels, widened / voxel_ml,
                            (cortex - widened - (wanted.grey - other_grey)) / voxel_ml)
    places = np.random.default_rng([seed, 5, person.index])  # of the person: visits share them
    anatomy.tissue.add_lesions(labels, round(wanted.lesions / voxel_ml), places)
    return Head(labels, warp.compose(focal, velocity=own, scale=scale, centre=anatomy.centre),
                anatomy.centre)


def _own_velocity(anatomy: Anatomy, person: SyntheticPerson, visit: Visit, seed: int) -> np.ndarray:
    """The personal smooth velocity [3, a, b, c], which visits share."""
    rng = np.random.default_rng([seed, 3, person.index])
    shape = anatomy.shaper.full_shape
    velocity = sum(warp.random_velocity(rng, shape, rms_mm=rms, smooth_mm=width)
                   for rms, width in PERSONAL)
    return velocity + np.float32(truths(person, visit.age)["shape_trait"]) * _bend(anatomy)


def _bend(anatomy: Anatomy) -> np.ndarray:
    """The velocity of one sd of the shape trait; it changes no volume as a whole.

    Both poles move to one side and the middle to the other, and in the right half both poles move
    forward, in the left backward (as the Yakovlevian torque does).  A rigid or affine alignment
    leaves this as it is.
    """
    x, y, _ = warp.nodes_mm(anatomy.shaper.full_shape) - anatomy.centre.reshape(3, 1, 1, 1)
    along = np.clip(y / HALF_LENGTH_MM, -1.2, 1.2) ** 2 - 1 / 3
    velocity = np.stack([along, np.tanh(x / 25) * along, np.zeros_like(x)])
    return (SHAPE_MM * velocity).astype(np.float32)


# ---- files ---------------------------------------------------------------------------------------

def file_names(person: SyntheticPerson, visit: Visit) -> dict[str, str]:
    """Path below the data set of each image of a visit, by modality, and of its label map."""
    folder = f"sub-{person.label}/ses-{visit.session}"
    stem = f"sub-{person.label}_ses-{visit.session}"
    ends = {"PET": f"pet/{stem}_trc-{visit.tracer}_pet", "BOLD": f"func/{stem}_task-rest_bold"}
    names = {m: f"{folder}/{ends.get(m, f'anat/{stem}_{m}')}.nii.gz" for m in visit.modalities}
    names["labels"] = f"derivatives/labels/{folder}/anat/{stem}_space-T1w_dseg.nii.gz"
    return names


def make_visit(anatomy: Anatomy, person: SyntheticPerson, visit: Visit, *, seed: int,
               spacing_mm: float) -> tuple[dict[str, bytes], dict[str, float]]:
    """All files of a visit (path below the data set: bytes), and what is true of it.

    A pure function of its arguments.  The truth is volumes in millilitres, counted on the label
    map, and the numbers that volumes do not hold.
    """
    head = visit_head(anatomy, person, visit, seed)
    rng = np.random.default_rng([seed, 4, person.index, int(visit.session)])
    lying = Pose(scanner.rotation(rng, 4.0), rng.uniform(-10, 10, 3))
    truth = truths(person, visit.age)
    names, files = file_names(person, visit), {}
    volumes: dict[str, float] = {}
    for modality in visit.modalities:
        # people move a little between scans
        pose = lying if modality == "T1w" else lying.moved(rng, 0.5, 0.7)
        voxel_mm = _voxel_mm(modality, person, spacing_mm)
        view = scanner.draw_view(rng, head, pose, voxel_mm)
        if modality == "PET":
            image, facts = series.pet(view, rng, visit.tracer or "", truth)
        elif modality == "BOLD":
            image, facts = series.bold(view, rng, person.site, truth)
        else:
            image, facts = _anatomical(view, rng, person, modality, truth)
        files[names[modality]] = image
        files[names[modality].replace(".nii.gz", ".json")] = json.dumps(
            _scanner_facts(modality, person) | facts, indent=1).encode()
        if modality == "T1w":
            labels = np.where(view.labels < codes.SKULL, view.labels, 0)
            volumes = measure(labels, float(np.prod(voxel_mm)))
            files[names["labels"]] = view.stored(labels, slope=1.0, noisy=False)
    return files, volumes | truth


def measure(labels: np.ndarray, voxel_mm3: float) -> dict[str, float]:
    """Millilitres of each of VOLUME_COLUMNS; the brain has the ventricles, not the outer fluid."""
    counts = np.bincount(labels.ravel(), minlength=codes.SKULL)
    groups = (codes.VENTRICLES, codes.HIPPOCAMPI, codes.CORTEX, (codes.FLUID,), (codes.LESION,))
    sums = [*(counts[list(group)].sum() for group in groups),
            counts[1:].sum() - counts[codes.FLUID]]
    return {name: round(float(n) * voxel_mm3 / 1000, 3)
            for name, n in zip(VOLUME_COLUMNS, sums, strict=True)}


def _voxel_mm(modality: str, person: SyntheticPerson, spacing_mm: float) -> np.ndarray:
    if modality in series.VOXEL_MM:
        return np.full(3, max(series.VOXEL_MM[modality], spacing_mm))
    return spacing_mm * np.array([1, 1, 1 if modality == "T1w" else person.site.slices])


def _anatomical(view: View, rng: np.random.Generator, person: SyntheticPerson, modality: str,
                truth: dict[str, float]) -> tuple[bytes, dict[str, object]]:
    site, voxel_mm = person.site, view.grid.voxel_mm
    table = contrast.signal_table(modality, site, rng)
    if modality == "T1w":
        table[list(contrast.TISSUES["cortex"][0])] *= truth["t1w_contrast"] / CONTRAST
    clean = view.mean_signal(table)
    clean = ndimage.gaussian_filter(clean, 0.4, truncate=3)  # neighbours share some signal
    signal = contrast.scan_signal(clean, voxel_mm=voxel_mm, rng=rng, bias=site.bias,
                                  noise=site.noise)
    dtype = (np.int16, np.uint16)[rng.integers(2)]
    signal *= rng.uniform(800, 16000) / signal.max()
    slope = float(rng.choice([1.0, round(rng.uniform(0.01, 15), 4)]))
    flat = modality != "T1w" and site.slices > 1
    return view.stored(np.rint(signal, out=signal), slope=slope, dtype=dtype), {
        "MRAcquisitionType": "2D" if flat else "3D", "SliceThickness": round(float(voxel_mm[2]), 3)}


def _scanner_facts(modality: str, person: SyntheticPerson) -> dict[str, object]:
    if modality == "PET":
        return {"Modality": "PT", "Manufacturer": person.site.manufacturer}
    return {"Modality": "MR", "Manufacturer": person.site.manufacturer,
            "MagneticFieldStrength": person.site.field_strength}
