"""One person's head at each visit, and the files that show it.

anatomy -> focal field (ventricles, hippocampi) after a personal smooth deformation and head size
-> labels once at 1 mm, with the marker -> per scan: contrast, pose, sampling on the scan's grid,
signal -> stored in a random orientation and type -> NIfTI.  Label maps lie on the T1w's grid, and
the volumes in the tables are counted on them.

The marker is a bright sphere beside the head, like the vitamin capsule taped to a temple: at
MARKER_SIDE of the person, in every scan.  Whoever swaps left and right moves it.
"""

from __future__ import annotations

import gzip
import io
import json
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from data_prep.synth import contrast, warp
from data_prep.synth.anatomy import FLUID, Anatomy, brain_centre
from data_prep.synth.cohort import Person, Visit, wanted_ml

MARKER_SIDE = +1  # sign of the marker's world x relative to the brain: +x is the person's right
MARKER_RADIUS_MM, MARKER_GAP_MM = 6.0, 4.0
VOLUME_COLUMNS = ("ventricle_ml", "hippocampus_ml", "brain_ml")


@dataclass(frozen=True)
class Pose:
    """Where the head lies in the scanner: world = rotation @ (voxel - centre) + shift."""

    rotation: np.ndarray  # [3, 3]
    centre: np.ndarray  # [3] voxels of the 1 mm head
    shift_mm: np.ndarray  # [3]

    def to_head(self, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Matrix and offset from a scan's voxel indices to the head's voxels."""
        return (self.rotation.T @ affine[:3, :3],
                self.rotation.T @ (affine[:3, 3] - self.shift_mm) + self.centre)


def visit_field(anatomy: Anatomy, person: Person, visit: Visit, seed: int) -> np.ndarray:
    """The whole deformation of a visit, [3, a, b, c] millimetres on coarse nodes."""
    scale = np.array(person.head_scale)
    volume_factor = float(np.prod(scale))
    wanted = wanted_ml(person, visit.age, anatomy.intracranial_ml * volume_factor)
    focal = anatomy.shaper.solve(wanted / volume_factor)
    rng = np.random.default_rng([seed, 3, person.index])  # of the person: visits share it
    own = warp.random_velocity(rng, anatomy.shaper.full_shape, rms_mm=2.5, smooth_mm=18.0)
    return warp.compose(focal, own, scale, anatomy.centre)


def visit_head(anatomy: Anatomy, person: Person, visit: Visit, seed: int) -> np.ndarray:
    """int16 label map of the person's head at a visit, 1 mm, with the marker."""
    labels = warp.warp_labels(anatomy.labels, visit_field(anatomy, person, visit, seed))
    _add_marker(labels)
    return labels


def _add_marker(labels: np.ndarray) -> None:
    centre = np.rint(brain_centre(labels)).astype(int)
    temple = labels[:, centre[1] - 8:centre[1] + 8, centre[2] - 8:centre[2] + 8] > 0
    edge = np.flatnonzero(temple.any((1, 2)))[-1 if MARKER_SIDE > 0 else 0]
    middle = edge + MARKER_SIDE * (MARKER_GAP_MM + MARKER_RADIUS_MM)
    x, y, z = np.ogrid[tuple(slice(n) for n in labels.shape)]
    squared = (x - middle) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2
    labels[squared <= MARKER_RADIUS_MM ** 2] = contrast.MARKER_CODE


# ---- grids ---------------------------------------------------------------------------------------

def _rotation(rng: np.random.Generator, sd_degrees: float) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    degrees = np.clip(rng.normal(0, sd_degrees, 3), -2 * sd_degrees, 2 * sd_degrees)
    return Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()


def _scan_grid(rng: np.random.Generator, extent_mm: np.ndarray, pose: Pose,
               voxel_mm: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine (still near RAS) of a box that holds the head; half of them are oblique."""
    tilt = _rotation(rng, 5.0) if rng.random() < 0.5 else np.eye(3)
    shape = tuple(int(n) for n in np.ceil((extent_mm + 12) / voxel_mm))
    affine = np.eye(4)
    affine[:3, :3] = tilt * voxel_mm
    middle = pose.rotation @ (extent_mm / 2 - pose.centre) + pose.shift_mm + rng.uniform(-3, 3, 3)
    affine[:3, 3] = middle - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return shape, affine


def _sample(volume: np.ndarray, pose: Pose, shape: tuple[int, ...], affine: np.ndarray,
            order: int) -> np.ndarray:
    matrix, offset = pose.to_head(affine)
    # below the cut neck nothing is scanned, as at the end of a coil
    return ndimage.affine_transform(volume, matrix, offset, shape, order=order, cval=0.0)


# ---- files ---------------------------------------------------------------------------------------

def _store(volume: np.ndarray, affine: np.ndarray, orientation: np.ndarray,
           slope: float, dtype: type) -> bytes:
    """Gzipped NIfTI of integers in another axis order and direction; the same bytes every time."""
    import nibabel as nib
    from nibabel.orientations import apply_orientation, inv_ornt_aff

    stored = apply_orientation(volume, orientation).astype(dtype)
    image = nib.Nifti1Image(stored, affine @ inv_ornt_aff(orientation, volume.shape))
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(slope, 0.0)
    buffer = io.BytesIO()
    image.to_stream(buffer)
    return gzip.compress(buffer.getvalue(), compresslevel=1, mtime=0)


def _random_orientation(rng: np.random.Generator) -> np.ndarray:
    """One of the 48 ways to store a volume, in nibabel's form."""
    return np.stack([rng.permutation(3), rng.choice([-1, 1], 3)], axis=1)


def file_names(person: Person, visit: Visit) -> dict[str, str]:
    """Path below the data set of each image of a visit, by modality, and of its label map."""
    folder = f"sub-{person.label}/ses-{visit.session}/anat"
    stem = f"sub-{person.label}_ses-{visit.session}"
    names = {m: f"{folder}/{stem}_{m}.nii.gz" for m in visit.modalities}
    names["labels"] = f"derivatives/labels/{folder}/{stem}_space-T1w_dseg.nii.gz"
    return names


def make_visit(anatomy: Anatomy, person: Person, visit: Visit, seed: int,
               spacing_mm: float) -> tuple[dict[str, bytes], dict[str, float]]:
    """All files of a visit (path below the data set: bytes), and its true volumes in millilitres.

    A pure function of its arguments.
    """
    head = visit_head(anatomy, person, visit, seed)
    rng = np.random.default_rng([seed, 4, person.index, int(visit.session)])
    centre = brain_centre(head)
    lying = Pose(_rotation(rng, 4.0), centre, rng.uniform(-10, 10, 3))
    names, files = file_names(person, visit), {}
    volumes: dict[str, float] = {}
    for modality in visit.modalities:
        pose = lying if modality == "T1w" else Pose(  # people move a little between scans
            _rotation(rng, 0.5) @ lying.rotation, centre, lying.shift_mm + rng.normal(0, 0.7, 3))
        voxel_mm = np.full(3, spacing_mm)
        if modality != "T1w":
            voxel_mm[2] *= person.site.slices
        shape, affine = _scan_grid(rng, np.array(head.shape), pose, voxel_mm)
        orientation = _random_orientation(rng)
        files[names[modality]] = _scan(head, rng, person, modality, pose, shape, affine,
                                       orientation)
        files[names[modality].replace(".nii.gz", ".json")] = _sidecar(person)
        if modality == "T1w":
            labels = _sample(head, pose, shape, affine, order=0)
            labels[labels >= 256] = 0
            volumes = measure(labels, float(np.prod(voxel_mm)))
            files[names["labels"]] = _store(labels, affine, orientation, 1.0, np.int16)
    return files, volumes


def measure(labels: np.ndarray, voxel_mm3: float) -> dict[str, float]:
    """Millilitres of lateral ventricles, hippocampi and brain (ventricles in, outer fluid out)."""
    counts = np.bincount(labels.ravel(), minlength=256)
    brain = counts[1:].sum() - counts[FLUID]
    sums = (counts[list(warp.VENTRICLES)].sum(), counts[list(warp.HIPPOCAMPI)].sum(), brain)
    return {name: round(float(n) * voxel_mm3 / 1000, 3)
            for name, n in zip(VOLUME_COLUMNS, sums, strict=True)}


def _scan(head: np.ndarray, rng: np.random.Generator, person: Person, modality: str, pose: Pose,
          shape: tuple[int, ...], affine: np.ndarray, orientation: np.ndarray) -> bytes:
    table = contrast.signal_table(modality, rng, person.site.contrast_sd)
    voxel_mm = np.linalg.norm(affine[:3, :3], axis=0)
    clean = ndimage.gaussian_filter(table[head], 0.4 * voxel_mm)  # a voxel averages over itself
    clean = _sample(clean, pose, shape, affine, order=1)
    signal = contrast.scan_signal(clean, rng, person.site.bias, person.site.noise)
    dtype = (np.int16, np.uint16)[rng.integers(2)]
    top = rng.uniform(800, 16000)
    slope = float(rng.choice([1.0, round(rng.uniform(0.01, 15), 4)]))
    stored = np.rint(signal * (top / signal.max()))
    return _store(stored, affine, orientation, slope, dtype)


def _sidecar(person: Person) -> bytes:
    return json.dumps({"Modality": "MR", "Manufacturer": person.site.manufacturer,
                       "MagneticFieldStrength": person.site.field_strength}, indent=1).encode()
