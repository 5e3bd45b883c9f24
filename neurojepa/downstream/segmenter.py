"""A segmentation model in use: ``neurojepa.load_segmenter(M).segment("t1.nii.gz")``."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike, fspath

import numpy as np
import torch

from neurojepa.downstream.images import Image, read_image, write_image
from neurojepa.downstream.segment import Segmenter


@dataclass(frozen=True)
class Segmentation:
    """Regions of a scan, on its own grid."""

    scan: Image
    data: np.ndarray  # int32 [x, y, z], codes
    names: dict[int, str]  # of codes

    @property
    def volumes(self) -> dict[str, float]:
        """Millilitres of each region by name."""
        ml = abs(np.linalg.det(self.scan.affine[:3, :3])) / 1000
        return {name: float((self.data == code).sum() * ml) for code, name in self.names.items()}

    def to_nifti(self, path: str) -> None:
        """Write a label map on the scan's grid, voxel on voxel as the scan was stored."""
        write_image(path, self.data, self.scan, "regions")


class Model:
    """A segmentation model on a device: ``neurojepa.load_segmenter(folder)`` gives one."""

    def __init__(self, model: Segmenter, device: torch.device) -> None:
        self.model, self.device = model, device
        model.network.to(device)

    def segment(self, scan: str | PathLike[str]) -> Segmentation:
        """Find the regions in a scan's file.

        Raises
        ------
        DataError
            It cannot be read, or shows no brain.
        """
        image = read_image(fspath(scan))
        return Segmentation(image, self.model.segment(image),
                            dict(zip(self.model.codes, self.model.names, strict=True)))
