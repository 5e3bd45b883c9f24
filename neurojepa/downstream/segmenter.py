"""A segmentation model in use: ``neurojepa.load_segmenter(M).segment("t1.nii.gz")``."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch

from neurojepa.downstream.images import Image, read_image, write_image
from neurojepa.downstream.segment import Segmenter, load_segmenter, read_config
from neurojepa.downstream.segment_atlas import Atlas, load_atlas
from neurojepa.errors import ConfigError


@dataclass(frozen=True)
class Segmentation:
    """Regions of a scan, on its own grid."""

    scan: Image
    data: np.ndarray  # int32 [x, y, z], codes
    names: dict[int, str]  # of codes
    notes: tuple[str, ...] = ()  # which labelled heads could not be laid over it

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

    def __init__(self, model: Segmenter | Atlas, device: torch.device) -> None:
        self.model, self.device = model, device
        if isinstance(model, Segmenter):
            model.network.to(device)

    def segment(self, scan: str | PathLike[str]) -> Segmentation:
        """Find the regions in a scan's file.

        Raises
        ------
        DataError
            It cannot be read, shows no brain, or no labelled head can be laid over it.
        """
        image, notes = read_image(fspath(scan)), list[str]()
        if isinstance(self.model, Atlas):
            data, notes = self.model.segment(image)
        else:
            data = self.model.segment(image)
        return Segmentation(image, data,
                            dict(zip(self.model.codes, self.model.names, strict=True)),
                            tuple(notes))

    def about(self) -> dict[str, Any]:
        """How regions are found, for results.json."""
        if isinstance(self.model, Atlas):
            return {"method": "atlas"}
        recipe = self.model.recipe
        return {"method": "network", "mm": recipe.mm, "steps": recipe.steps,
                "prior": recipe.prior}


def load_model(uri: str, device: torch.device, workers: int = 1) -> Model:
    """The model in a folder that ``segment fit`` wrote; ``workers`` heads of an atlas are laid at
    once.

    Raises
    ------
    ConfigError
        ``workers`` is below 1.
    DataError
        There is none, or it is damaged.
    """
    if workers < 1:
        raise ConfigError(f"--workers {workers}: at least 1")
    config = read_config(uri)
    if config is not None and config.get("method") == "atlas":
        return Model(load_atlas(uri, config, workers), device)
    return Model(load_segmenter(uri), device)
