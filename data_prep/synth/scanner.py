"""What all scans share: where the head lies, the scan's grid, and how a volume is stored."""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_prep.synth import warp

ROOM_MM = 4  # of the field of view around the box of the head


@dataclass(frozen=True)
class Head:
    """A person's head at a visit: the anatomy's changed labels and how they are deformed."""

    labels: np.ndarray  # int16 [x, y, z], 1 mm, with the marker
    field: np.ndarray  # [3, a, b, c] millimetres on coarse nodes
    centre: np.ndarray  # [3] voxels: the middle of the brain


@dataclass(frozen=True)
class Pose:
    """Where the head lies in the scanner: world = rotation @ (voxel - centre) + shift."""

    rotation: np.ndarray  # [3, 3]
    shift_mm: np.ndarray  # [3]

    def moved(self, rng: np.random.Generator, degrees: float, mm: float) -> Pose:
        """The pose after a small movement."""
        return Pose(rotation(rng, degrees) @ self.rotation, self.shift_mm + rng.normal(0, mm, 3))


@dataclass(frozen=True)
class Grid:
    """A scan's voxels, still near RAS."""

    shape: tuple[int, ...]
    affine: np.ndarray  # [4, 4]

    @property
    def voxel_mm(self) -> np.ndarray:
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def finer(self, parts: np.ndarray) -> Grid:
        """The grid whose voxels are these, cut into ``parts`` [3] along each axis."""
        affine = self.affine.copy()
        affine[:3, :3] /= parts
        affine[:3, 3] -= affine[:3, :3] @ ((parts - 1) / 2)
        return Grid(tuple(int(n) for n in np.array(self.shape) * parts), affine)


def rotation(rng: np.random.Generator, sd_degrees: float) -> np.ndarray:
    """A small random rotation [3, 3]."""
    from scipy.spatial.transform import Rotation

    degrees = np.clip(rng.normal(0, sd_degrees, 3), -2 * sd_degrees, 2 * sd_degrees)
    return Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()


def _grid(rng: np.random.Generator, head: Head, pose: Pose, voxel_mm: np.ndarray) -> Grid:
    """A box that holds the head; half of them are oblique."""
    tilt = rotation(rng, 5.0) if rng.random() < 0.5 else np.eye(3)
    extent_mm = np.array(head.labels.shape)
    shape = tuple(int(n) for n in np.ceil((extent_mm + ROOM_MM) / voxel_mm))
    affine = np.eye(4)
    affine[:3, :3] = tilt * voxel_mm
    middle = pose.rotation @ (extent_mm / 2 - head.centre) + pose.shift_mm + rng.uniform(-3, 3, 3)
    affine[:3, 3] = middle - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)


@dataclass(frozen=True)
class View:
    """A head in a scanner, about to be scanned on a grid and stored in some axis order."""

    head: Head
    pose: Pose
    grid: Grid
    orientation: np.ndarray  # [3, 2], in nibabel's form

    @cached_property
    def labels(self) -> np.ndarray:
        """int16 labels at the centres of the voxels."""
        return self._labels(self.grid)

    @property
    def parts(self) -> np.ndarray:
        """[3]: into how many parts a voxel is cut along each axis to be averaged."""
        return np.where(self.grid.voxel_mm > 1.99, 2, 1)

    @cached_property
    def fine_labels(self) -> np.ndarray:
        """int16 labels at the centres of the parts."""
        if (self.parts == 1).all():
            return self.labels
        return self._labels(self.grid.finer(self.parts))

    def _labels(self, grid: Grid) -> np.ndarray:
        back = self.pose.rotation.T
        return warp.read_labels(
            self.head.labels, field=self.head.field, matrix=back @ grid.affine[:3, :3],
            offset=back @ (grid.affine[:3, 3] - self.pose.shift_mm) + self.head.centre,
            shape=grid.shape)

    def mean_signal(self, table: np.ndarray) -> np.ndarray:
        """float32 signal: ``table`` [1000] by label, averaged over each voxel.

        From 2 mm on, a voxel is the average of two parts along each axis.
        """
        fine = table[self.fine_labels]
        for axis, part in enumerate(self.parts):
            if part > 1:
                shape = (*fine.shape[:axis], -1, part, *fine.shape[axis + 1:])
                fine = fine.reshape(shape).mean(axis + 1)
        return fine

    def stored(self, volume: np.ndarray, *, slope: float, dtype: type = np.int16,
               tr_s: float | None = None, noisy: bool = True) -> bytes:
        """Bytes of a file of a volume [x, y, z] or [x, y, z, t] on the grid."""
        return store(volume, affine=self.grid.affine, orientation=self.orientation, slope=slope,
                     dtype=dtype, tr_s=tr_s, noisy=noisy)


def draw_view(rng: np.random.Generator, head: Head, pose: Pose, voxel_mm: np.ndarray) -> View:
    """A scan that holds the whole head, in one of the 48 ways to store a volume."""
    grid = _grid(rng, head, pose, voxel_mm)
    return View(head, pose, grid, np.stack([rng.permutation(3), rng.choice([-1, 1], 3)], axis=1))


def store(volume: np.ndarray, *, affine: np.ndarray, orientation: np.ndarray, slope: float,
          dtype: type, tr_s: float | None = None, noisy: bool = True) -> bytes:
    """Gzipped NIfTI of integers in another axis order and direction; the same bytes every time.

    ``volume`` is [x, y, z] or [x, y, z, t]; ``noisy`` voxels are packed in half the time without
    looking for repeats, of which noise has none.
    """
    import nibabel as nib
    from nibabel.orientations import apply_orientation, inv_ornt_aff

    stored = apply_orientation(volume.astype(dtype), orientation)
    image = nib.Nifti1Image(stored, affine @ inv_ornt_aff(orientation, volume.shape[:3]))
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(slope, 0.0)
    if tr_s is not None:
        image.header.set_zooms((*image.header.get_zooms()[:3], tr_s))
    buffer = io.BytesIO()
    image.to_stream(buffer)
    strategy = zlib.Z_HUFFMAN_ONLY if noisy else zlib.Z_DEFAULT_STRATEGY
    packer = zlib.compressobj(1, zlib.DEFLATED, 31, 9, strategy)  # 31: a gzip header without time
    return packer.compress(buffer.getbuffer()) + packer.flush()
