"""Brain-sized blobs with something inside, as images that come without a skull."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from neurojepa.downstream.images import Image

SHAPE, MM = (44, 48, 42), 4.0


def blob(seed: int, size: float = 1.0) -> Image:
    """An ellipsoid of about 1.2 litres with smooth texture in [0, 1], 0 outside, on 4 mm voxels."""
    index = (np.indices(SHAPE).astype(np.float32)
             - np.array(SHAPE).reshape(3, 1, 1, 1) / 2) * MM / size
    inside = sum((part / radius) ** 2 for part, radius in zip(index, (62, 76, 60), strict=True)) < 1
    texture = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 2.0)
    data = np.where(inside, np.clip(0.55 + 0.2 * texture / texture.std(), 0.15, 1), 0)
    affine = np.diag([MM, MM, MM, 1.0])
    affine[:3, 3] = -np.array(SHAPE) * MM / 2
    return Image(f"blob {seed}", data.astype(np.float32), affine, brain=np.asarray(inside))


def save(file: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """An array as NIfTI, on 4 mm voxels where no affine is given; returns its path."""
    kind = np.int16 if data.dtype.kind in "iu" else np.float32
    affine = np.diag([MM, MM, MM, 1]) if affine is None else affine
    image = nib.Nifti1Image(data.astype(kind), affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, file)
    return file
