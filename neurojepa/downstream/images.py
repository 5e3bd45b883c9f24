"""Single images in their own space: read and checked as preparation does, aligned, written back.

Arrays are turned to the axes closest to R, A, S while they are worked on, and files are written in
the order in which the scan was stored, so a result lies voxel on voxel over its scan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from os.path import basename
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

from neurojepa.errors import DataError
from neurojepa.storage import write_bytes

if TYPE_CHECKING:
    import SimpleITK as sitk

MAX_LABELS = 1000  # a label map of more is an image
MAX_CODE = 1 << 24  # files are read as float32, which holds whole numbers up to it
DISPLACEMENT = 1007  # NIfTI's intent "vector", by which ITK and ANTs know a displacement field
LPS = np.array([-1, -1, 1], np.float32)  # of a vector in RAS, as ITK counts


@dataclass(frozen=True)
class Image:
    """A 3D image in RAS order."""

    name: str  # its file
    data: np.ndarray  # float32 [x, y, z]; int32 of a label map
    affine: np.ndarray  # float64 [4, 4], voxels to world mm (RAS)
    orientation: str = "RAS"  # as stored, such as "LPS"
    brain: np.ndarray | None = None  # bool [x, y, z], where it was asked for
    notes: tuple[str, ...] = ()  # what reading it had to mend

    @property
    def spacing(self) -> np.ndarray:
        """[3] mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def stem_of(path: str) -> str:
    """The name of a file or folder without an image's ending: sub-1_T1w of a/sub-1_T1w.nii.gz."""
    from data_prep.filenames import stem

    return stem(basename(path.rstrip("/")))


def read_image(path: str, brain: bool = True) -> Image:
    """A scan and its brain: a mask as preparation finds one, or what is left of a stripped scan.
    With ``brain`` False the scan alone, which is quick.

    Raises
    ------
    DataError
        It cannot be read, is no 3D image, is empty, or shows no whole brain.
    """
    from data_prep.volumes.preset import PRESETS
    from data_prep.volumes.reading.volume import read_scan
    from data_prep.volumes.structural.brain import brain_mask

    found = read_scan(path)
    mask = brain_mask(found, PRESETS["default"])[0] if brain else None
    notes = tuple(f"{path}: {flag}" for flag in (*found.flags, *found.notes))
    return Image(path, found.data, found.affine, found.orientation, mask, notes)


def read_labels(path: str) -> Image:
    """A label map: int32 codes, 0 for none.

    Raises
    ------
    DataError
        It cannot be read, holds something else than whole numbers from 0 on, codes of
        ``MAX_CODE`` and more, no label at all, or too many.
    """
    from data_prep.volumes.reading.volume import read_scan

    found = read_scan(path, label=True)
    data = found.data
    wrong = data[(data != np.rint(data)) | (data < 0)]
    if wrong.size:
        raise DataError(f"{path}: holds {wrong[0]:g}, a label map holds whole numbers from 0 on; "
                        "is it an image, or a map of probabilities?")
    if data.max() >= MAX_CODE:
        raise DataError(f"{path}: holds label {data.max():.0f}, only codes below {MAX_CODE} can be "
                        "told apart; give its regions smaller codes")
    labels = data.astype(np.int32)
    number = len(np.unique(labels[labels > 0]))
    if not 1 <= number <= MAX_LABELS:
        raise DataError(f"{path}: holds {number} labels, 1 to {MAX_LABELS} are expected; is it a "
                        "label map?")
    return Image(path, labels, found.affine, found.orientation)


def stored(data: np.ndarray, like: Image) -> nib.Nifti1Image:
    """An array on an image's grid, [x, y, z, ...] in RAS order, as NIfTI in the image's own."""
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(like.affine), nib.orientations.axcodes2ornt(tuple(like.orientation)))
    affine = like.affine @ nib.orientations.inv_ornt_aff(turn, data.shape[:3])
    image = nib.Nifti1Image(nib.apply_orientation(data, turn), affine)
    image.set_qform(affine, "aligned")  # ITK and ANTs go by it where rounding sheared the other
    return image


def write_image(uri: str, data: np.ndarray, like: Image, description: str = "") -> None:
    """Write an array on an image's grid as .nii.gz; ``description`` has up to 79 letters."""
    write_bytes(uri, encoded(stored(data, like), description))


def write_field(uri: str, field_mm: np.ndarray, like: Image) -> None:
    """Write a displacement field [x, y, z, 3], RAS mm, as ITK, ANTs and SimpleITK read it.

    The file has five axes, the intent "vector", and vectors in LPS mm.
    """
    image = stored((field_mm * LPS)[:, :, :, None], like)
    image.header.set_intent(DISPLACEMENT)
    write_bytes(uri, encoded(image, "displacement, LPS mm"))


def encoded(image: nib.Nifti1Image, description: str) -> bytes:
    """The bytes of a .nii.gz, the same each time."""
    import gzip

    image.header["descrip"] = description.encode()
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), 4, mtime=0)


def itk_image(data: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """As SimpleITK has it, in RAS mm; [x, y, z, 3] becomes an image of vectors."""
    import SimpleITK as sitk

    from data_prep.volumes.placing.geometry import to_itk

    if data.ndim == 3:
        return to_itk(data, affine)
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.transpose(2, 1, 0, 3)), isVector=True)
    image.CopyInformation(to_itk(np.zeros(data.shape[:3], np.uint8), affine))
    return image


def itk_array(image: sitk.Image) -> np.ndarray:
    """[x, y, z], or [x, y, z, 3] of vectors."""
    import SimpleITK as sitk

    return np.moveaxis(sitk.GetArrayFromImage(image), (0, 1, 2), (2, 1, 0))


def linear(matrix: np.ndarray) -> sitk.Transform:
    """A 4x4 matrix as SimpleITK has it."""
    from data_prep.volumes.placing.geometry import to_transform

    return to_transform(matrix)


def laid(data: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], grid: np.ndarray,
         matrix: np.ndarray | None = None, outside: float = 0.0) -> np.ndarray:
    """An array [x, y, z] on another grid, read linearly; float32.

    Parameters
    ----------
    affine : [4, 4] of ``data``
    shape, grid : of the result; [4, 4]
    matrix : [4, 4], where its points lie in the space of ``data``; None: where they are
    outside : value beyond ``data``
    """
    import SimpleITK as sitk

    like = itk_image(np.zeros(shape, np.uint8), grid)
    through = linear(np.eye(4) if matrix is None else matrix)
    return itk_array(sitk.Resample(itk_image(data.astype(np.float32), affine), like, through,
                                   sitk.sitkLinear, outside))


def smoothed(data: np.ndarray, spacing: np.ndarray, mm: float) -> np.ndarray:
    """Float32 [x, y, z] of voxels of ``spacing`` [3] mm, blurred as voxels of ``mm`` see it."""
    from scipy import ndimage

    sd = np.sqrt(np.maximum(mm**2 - spacing**2, 0)) / 2.355 / spacing
    return ndimage.gaussian_filter(data.astype(np.float32), sd)


def box_around(image: Image, where: np.ndarray, margin_mm: float) -> tuple[slice, ...]:
    """The box of an image around ``where``, bool [x, y, z], and a margin."""
    margin = np.ceil(margin_mm / image.spacing).astype(int)
    inside = np.argwhere(where)
    return tuple(slice(max(low, 0), high) for low, high in zip(
        (inside.min(0) - margin).tolist(), (inside.max(0) + margin + 1).tolist(), strict=True))


def cut(image: Image, box: tuple[slice, ...]) -> Image:
    """The part of an image in a box, where it lies."""
    affine = image.affine.copy()
    affine[:3, 3] += image.affine[:3, :3] @ [side.start for side in box]
    brain = None if image.brain is None else image.brain[box]
    return replace(image, data=image.data[box], affine=affine, brain=brain)


def around_brain(image: Image, mm: float, margin_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """A grid of ``mm`` along the image's axes from a margin before its brain on: its affine [4, 4],
    and how far it has to reach to a margin behind, [3] mm."""
    assert image.brain is not None
    axes = image.affine[:3, :3] / image.spacing
    where = np.argwhere(image.brain)
    low = where.min(0) * image.spacing - margin_mm
    affine = np.eye(4)
    affine[:3, :3] = axes * mm
    affine[:3, 3] = image.affine[:3, 3] + axes @ low
    return affine, where.max(0) * image.spacing + margin_mm - low


def stripped(image: Image) -> np.ndarray:
    """The brain alone, scaled to [0, 1]; float32."""
    from data_prep.volumes.placing.matching import stripped

    assert image.brain is not None
    return stripped(image.data, image.brain)


def affine_between(fixed: Image, moving: Image) -> np.ndarray:
    """[4, 4], fixed mm to moving mm: of 12 degrees of freedom, by correlation of the two brains.

    Raises
    ------
    DataError
        The search left the images, or ended in a mirror image or upside down.
    """
    import SimpleITK as sitk

    from data_prep.volumes.placing.align import upright
    from data_prep.volumes.placing.geometry import centre_of, to_transform
    from data_prep.volumes.placing.matching import register, shrunk

    assert fixed.brain is not None and moving.brain is not None
    target, source = (shrunk(stripped(each), each.affine, 2.0) for each in (fixed, moving))
    centre = centre_of(fixed.brain, fixed.affine)
    start = sitk.Euler3DTransform()
    start.SetCenter(centre.tolist())
    start.SetTranslation((centre_of(moving.brain, moving.affine) - centre).tolist())
    metric = sitk.ImageRegistrationMethod.SetMetricAsCorrelation
    try:
        rigid = register(target, source, start, shrink=(4, 2), sampling=0.5,
                         set_metric=metric).matrix
        found = register(target, source, to_transform(rigid, tuple(centre.tolist())),
                         shrink=(4, 2), sampling=0.5, set_metric=metric).matrix
    except RuntimeError as error:  # SimpleITK: the images no longer overlap
        raise DataError(f"{moving.name}: cannot be laid over {fixed.name}, the search left it; are "
                        "both whole heads?") from error
    if not upright(found):
        raise DataError(f"{moving.name}: over {fixed.name} it came to lie mirrored or turned over; "
                        "check the orientation in both headers")
    return found
