"""The cohort's own linear transforms: FLIRT matrices of FSL, as text.

FLIRT counts in scaled voxels of the files as stored: voxel index times voxel size, the x axis
counted from its other end where the file's affine has a positive determinant (Jenkinson & Smith,
Medical Image Analysis 2001; FSL's newimage).  So a matrix means something only together with the
geometry of both files.  The reference here is FSL's MNI152_T1_1mm.
"""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np

from data_prep.scan import ScanError, split_member
from data_prep.volumes.reading.decode import fetch
from data_prep.volumes.reading.volume import Volume


@dataclass(frozen=True)
class Geometry:
    """Voxels of a file as it is stored."""

    shape: tuple[int, ...]
    affine: np.ndarray  # [4, 4], voxel index to world mm

    @property
    def flirt_to_world(self) -> np.ndarray:
        """[4, 4], FLIRT's scaled voxels to world mm."""
        spacing = np.linalg.norm(self.affine[:3, :3], axis=0)
        scaled = np.diag([*spacing, 1.0])
        if np.linalg.det(self.affine[:3, :3]) > 0:
            scaled[0, 0] *= -1
            scaled[0, 3] = (self.shape[0] - 1) * spacing[0]
        return self.affine @ np.linalg.inv(scaled)


FSL_MNI152_1MM = Geometry((182, 218, 182), np.array(
    [[-1.0, 0, 0, 90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]]))


def flirt_to_world(matrix: np.ndarray, source: Geometry, reference: Geometry = FSL_MNI152_1MM
                   ) -> np.ndarray:
    """A FLIRT matrix (-omat) as source mm to reference mm, both RAS; [4, 4]."""
    return reference.flirt_to_world @ matrix @ np.linalg.inv(source.flirt_to_world)


def stored_geometry(volume: Volume) -> Geometry:
    """The geometry of a volume's file, before its axes were turned to RAS."""
    axes = nib.orientations.axcodes2ornt(volume.orientation)
    shape = tuple(volume.data.shape[int(axis)] for axis in axes[:, 0])
    return Geometry(shape, volume.affine @ np.linalg.inv(
        nib.orientations.inv_ornt_aff(axes, shape)))


def read_flirt(uri: str) -> np.ndarray:
    """The 4 x 4 matrix of a text file, or of a member written ARCHIVE::MEMBER.

    Raises
    ------
    ScanError
        bad_transform, missing, and what reading a member raises.
    DataError
        The store cannot be read.
    """
    data = fetch(*split_member(uri))
    try:
        matrix = np.array([line.split() for line in data.decode("ascii").splitlines()
                           if line.strip()], np.float64)
    except ValueError as error:
        raise ScanError("bad_transform", f"{uri}: no matrix of numbers ({error})") from error
    if (matrix.shape != (4, 4) or not np.isfinite(matrix).all()
            or not np.allclose(matrix[3], (0, 0, 0, 1), atol=1e-6)):
        raise ScanError("bad_transform", f"{uri}: shape {matrix.shape}, expected 4 x 4 finite "
                                         "numbers with the last row 0 0 0 1")
    if not np.linalg.det(matrix[:3, :3]) > 0:
        raise ScanError("bad_transform", f"{uri}: determinant "
                        f"{np.linalg.det(matrix[:3, :3]):.3g}, a head is not mirrored or flattened")
    return matrix


def template_to_scan(uri: str, volume: Volume) -> np.ndarray:
    """MNI152 mm to the scan's mm, [4, 4], from the FLIRT matrix that came with the scan.

    Raises
    ------
    ScanError, DataError
        As ``read_flirt``.
    """
    return np.linalg.inv(flirt_to_world(read_flirt(uri), stored_geometry(volume)))
