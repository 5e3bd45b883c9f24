"""A coarse picture of a scan that was rejected, for the report: its voxels are not kept."""

from __future__ import annotations

import base64
import io

import numpy as np

from data_prep.scan import Scan, ScanError
from data_prep.volumes.placing.geometry import centre_of, resample, to_itk
from data_prep.volumes.reading.volume import Volume, read_scan

PREVIEW_MM = 4.0  # coarse enough that nobody is known by their profile
_SIDE = 64  # voxels: 256 mm


def preview_of(scan: Scan) -> str | None:
    """JPEG in base64, or None where the scan cannot be read as one volume."""
    try:
        return preview(read_scan(scan.uri, scan.member))
    except ScanError:
        return None


def preview(volume: Volume) -> str:
    """Sagittal, coronal and axial slices through the middle of what is bright; base64.

    Anterior is on the right of the first, the person's right on the viewer's right of the others.
    """
    from PIL import Image

    data = np.nan_to_num(volume.data.astype(np.float32))
    bright = data > data.mean()  # in a large field of view the head may be anywhere
    grid = np.diag([PREVIEW_MM, PREVIEW_MM, PREVIEW_MM, 1.0])
    centre = centre_of(bright if bright.any() else np.ones_like(bright), volume.affine)
    grid[:3, 3] = centre - PREVIEW_MM * (_SIDE - 1) / 2
    coarse = resample(to_itk(data, volume.affine), np.eye(4), shape=(_SIDE,) * 3, affine=grid)
    low, high = np.percentile(coarse, (1, 99.5))
    grey = (255 * np.clip((coarse - low) / max(high - low, 1e-6), 0, 1)).astype(np.uint8)
    panels = [grey.take(_SIDE // 2, axis).T[::-1] for axis in range(3)]
    picture = Image.fromarray(np.concatenate(panels, axis=1)).resize((3 * 2 * _SIDE, 2 * _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
