"""Small heads with known truth, written as NIfTI files for the tests of data_prep.volumes."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

from data_prep.scan import Scan
from data_prep.volumes.placing.align import template


def brain(mm: int = 2, marker: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The template's brain (stripped) as float32 and its affine; a marker sits on the right.

    The marker is a bright cube of 10 mm at x = 34, y = -20, z = 20 (RAS mm).
    """
    target = template(mm)
    data = (1000 * target.image / target.image.max()).astype(np.float32)
    # No zeros inside, or the brain would not be one piece.
    data[target.mask] = np.maximum(data[target.mask], 20)
    if marker:
        low = np.linalg.inv(target.affine) @ np.array([29.0, -25.0, 15.0, 1.0])
        start, size = np.round(low[:3]).astype(int), 10 // mm
        data[tuple(slice(a, a + size) for a in start)] = 2500
    return data, target.affine.copy()


def ellipsoid() -> tuple[np.ndarray, np.ndarray]:
    """A head of three ellipsoids (skin, brain, one bright ball on the right) at 4 mm."""
    shape, affine = (48, 60, 52), np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = [-94.0, -130.0, -90.0]
    x, y, z = (np.arange(n) * 4.0 + o for n, o in zip(shape, affine[:3, 3], strict=True))
    grid = np.meshgrid(x, y, z, indexing="ij")

    def inside(centre: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
        return sum(((g - c) / r) ** 2
                   for g, c, r in zip(grid, centre, radii, strict=True)) < 1

    data = np.random.default_rng(0).uniform(0, 20, shape).astype(np.float32)
    data[inside((0, -17, 6), (80, 100, 92))] = 300
    data[inside((0, -17, 6), (66, 84, 72))] = 700
    data[inside((35, 0, 20), (14, 14, 14))] = 1200
    return data, affine


def save(path: Path, data: np.ndarray, affine: np.ndarray, axes: str | None = None) -> str:
    """Write a NIfTI file, with its axes stored in the order and direction of ``axes``."""
    image = nib.Nifti1Image(data, affine)
    if axes:
        image = image.as_reoriented(nib.orientations.ornt_transform(
            nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes)))
    image.set_sform(image.affine, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return str(path)


def moved(affine: np.ndarray, rotation_deg: float, shift_mm: tuple[float, float, float],
          axis: int = 0, zoom: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """A head turned about one axis, zoomed and shifted by its header: (affine, the motion)."""
    a, b = {0: (1, 2), 1: (0, 2), 2: (0, 1)}[axis]
    angle, motion = np.radians(rotation_deg), np.eye(4)
    motion[[a, a, b, b], [a, b, a, b]] = [np.cos(angle), -np.sin(angle), np.sin(angle),
                                          np.cos(angle)]
    motion[:3, :3] *= zoom
    motion[:3, 3] = shift_mm
    return motion @ affine, motion


def flirt_points(image: nib.Nifti1Image, voxels: np.ndarray) -> np.ndarray:
    """Where FLIRT counts voxels [n, 3] to be: scaled, x from the other end if not left-handed."""
    if np.linalg.det(image.affine[:3, :3]) > 0:
        voxels = np.c_[image.shape[0] - 1 - voxels[:, 0], voxels[:, 1:]]
    return voxels * np.array(image.header.get_zooms()[:3])


def flirt_matrix(uri: str, to_mni: np.ndarray) -> np.ndarray:
    """The matrix that FLIRT would write for a file that ``to_mni`` maps to MNI mm."""
    image = nib.load(uri)
    voxels = np.random.default_rng(0).uniform(0, image.shape, (50, 3))
    world = nib.affines.apply_affine(image.affine, voxels)
    reference = nib.Nifti1Image(np.zeros((182, 218, 182), np.uint8), np.array(
        [[-1.0, 0, 0, 90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]]))
    there = nib.affines.apply_affine(
        np.linalg.inv(reference.affine) @ to_mni, world)
    solved = np.linalg.lstsq(np.c_[flirt_points(image, voxels), np.ones(50)],
                             flirt_points(reference, there), rcond=None)[0]
    return np.vstack([solved.T, [0, 0, 0, 1]])


def save_matrix(path: Path, matrix: np.ndarray) -> str:
    path.write_text("\n".join("  ".join(f"{x:.10f}" for x in row) for row in matrix) + "  \n")
    return str(path)


def scan(uri: str, modality: str = "T1w", session: str = "1", **more: str) -> Scan:
    return Scan(uri=uri, cohort="test", participant="p", family="p", session=session,
                modality=modality, split="train", **more)  # type: ignore[arg-type]
