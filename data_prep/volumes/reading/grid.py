"""The grid of a scan as its file has it, for maps that are to lie on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import nibabel as nib
import numpy as np

from data_prep.scan import TURN
from data_prep.volumes.reading.decode import decode
from data_prep.volumes.reading.headers import choose_affine, in_mm
from data_prep.volumes.reading.turn import AS_STATED, turn_matrix
from data_prep.volumes.reading.volume import MAX_SERIES_VOXELS, thickness_mm


@dataclass(frozen=True)
class OwnGrid:
    """Voxels in the order of the file."""

    shape: tuple[int, int, int]
    stored: np.ndarray  # [4, 4], the affine as the file has it, which viewers read
    affine: np.ndarray  # [4, 4], voxel index to mm (RAS), as preparation understood it


def own_grid(uri: str, member: str | None = None,
             facts: Mapping[str, object] | None = None) -> OwnGrid:
    """Of a file, archive member or DICOM series (as dcm2niix turns it into NIfTI); of a series of
    volumes the grid of each.

    Parameters
    ----------
    facts : what the sidecar says, as of ``read_scan``, and how prepare --turn turned it

    Raises
    ------
    ScanError, DataError
        As ``read_scan``.
    """
    found = decode(uri, member, MAX_SERIES_VOXELS)
    shape = found.shape[0], found.shape[1], found.shape[2]
    stored = affine = np.asarray(found.image.affine, np.float64)
    header = found.image.header
    if isinstance(header, nib.Nifti1Header):
        affine, _ = choose_affine(header, shape, found.name, thickness_mm(found, facts))
        affine, _ = in_mm(affine, header, shape)
    return OwnGrid(shape, stored, turn_matrix(str((facts or {}).get(TURN, AS_STATED))) @ affine)
