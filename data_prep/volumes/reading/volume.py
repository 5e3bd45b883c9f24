"""One scan file -> one Volume or Series in canonical orientation, or a ScanError with a code.

    bytes (file, archive member, DICOM series; local or object store) -> magic -> header checks
    -> voxels (slope and intercept applied) -> the voxel axes turned to the closest of R, A, S

World coordinates are never changed: axes are only permuted and flipped, and the affine with them.
What is odd but legal becomes a flag; what cannot be a brain scan is refused with the file, the
field, the value and a code for the quarantine table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import nibabel as nib
import numpy as np

from data_prep.flags import Flag, Note
from data_prep.scan import ScanError
from data_prep.volumes.reading.decode import Decoded, decode
from data_prep.volumes.reading.headers import (
    choose_affine,
    in_mm,
    mirrored_forms,
    refuse_made_up,
)
from data_prep.volumes.reading.padding import at_border, find_padding
from data_prep.volumes.reading.timing import repetition_time
from data_prep.volumes.reading.turn import AS_STATED, turn_matrix

MAX_VOXELS = 1 << 28  # 1 GiB as float32; a 0.5 mm head has half of it
MAX_SERIES_VOXELS = 5 << 28  # 5 GiB as float32; 1,200 volumes on the MNI grid at 2 mm have 4.3
MIN_SLICES = 20
MIN_EXTENT_MM = 60.0
MAX_EXTENT_MM = 400.0
MAX_SHEAR = 0.02  # largest difference between a voxel axis and its nearest rotation
MAX_FORM_DISTANCE_MM = 2.0  # sform against qform, at the corners of the field of view
NEGATIVE_SHARE = 0.01
INT16_JUMP = 1 << 15  # half the range of int16: neighbours in a real image do not differ by it
MIN_WRAPPED_VOXELS = 10


@dataclass
class Volume:
    """A 3D image in closest-canonical orientation and what its file said about itself."""

    name: str  # where it came from, for messages
    data: np.ndarray  # float32 [x, y, z], axes closest to R, A, S
    affine: np.ndarray  # float64 [4, 4], voxel index to world mm (RAS)
    orientation: str = "RAS"  # as stored, e.g. "PSR"
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)  # mm, of the axes as stored
    dtype: str = "float32"  # as stored
    sform_code: int | None = None  # None where the format has none
    qform_code: int | None = None
    flags: list[str] = field(default_factory=list)  # of flags.Flag
    notes: list[str] = field(default_factory=list)  # of flags.Note
    # bool [x, y, z]: voxels that were NaN, Inf or padding (padding.py) and hold no measurement
    invalid: np.ndarray | None = None
    outside: np.ndarray | None = None  # bool: those of them that reach the border, not scanned
    facts: dict[str, object] = field(default_factory=dict)  # of a DICOM series, BIDS keys
    turn: str | None = None  # as the user stated it, applied; see turn.py

    @property
    def seen(self) -> np.ndarray:
        """Where the scan was measured; bool [x, y, z]."""
        return np.ones(self.data.shape, bool) if self.outside is None else ~self.outside

    @property
    def voxel_ml(self) -> float:
        return float(abs(np.linalg.det(self.affine[:3, :3])) / 1000)

    @property
    def scan_id(self) -> str:
        """First 24 hex digits of the sha256 of voxels and affine: equal scans share it.

        File name, compression, storage order and byte order do not enter.
        """
        return content_id(self.data, self.affine)


@dataclass
class Series:
    """Volumes over time (BOLD), over frames (PET), or one alone, with one affine."""

    name: str
    data: np.ndarray  # float32 [x, y, z, t], axes closest to R, A, S
    affine: np.ndarray  # float64 [4, 4]
    tr_s: float | None = None  # repetition time; None where neither header nor sidecar knows
    facts: dict[str, object] = field(default_factory=dict)  # keys of FACTS in data_prep/scan.py
    flags: list[str] = field(default_factory=list)
    orientation: str = "RAS"
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    dtype: str = "float32"
    notes: list[str] = field(default_factory=list)
    turn: str | None = None

    @property
    def scan_id(self) -> str:
        """As ``Volume.scan_id``; a series of one volume has the id of that volume."""
        data = self.data[..., 0] if self.data.shape[3] == 1 else self.data
        return content_id(data, self.affine)

    def volume(self, data: np.ndarray) -> Volume:
        """A map [x, y, z] computed from the series, as a Volume on its grid."""
        return Volume(self.name, np.ascontiguousarray(data, np.float32), self.affine,
                      self.orientation, self.spacing, self.dtype, flags=list(self.flags),
                      notes=list(self.notes), turn=self.turn)


def content_id(data: np.ndarray, affine: np.ndarray) -> str:
    """24 hex digits of what an image holds: shape, values, affine."""
    digest = hashlib.sha256(np.array(data.shape, "<i4").tobytes())
    for part in data:  # slab by slab: a series is large
        # Adding 0.0 turns -0.0, which a flip of the axes produces, into 0.0.
        digest.update(np.ascontiguousarray(part + np.float32(0), "<f4").tobytes())
    digest.update((np.round(affine, 4) + 0.0).astype("<f8").tobytes())
    return digest.hexdigest()[:24]


def read_scan(uri: str, member: str | None = None, facts: Mapping[str, object] | None = None, *,
              label: bool = False, turn: str | None = None, max_voxels: int = MAX_VOXELS
              ) -> Volume:
    """Read NIfTI-1/2 (.nii, .nii.gz, .hdr + .img), MGH/MGZ or a DICOM series from any store.

    Parameters
    ----------
    uri : path or URI of the file, of the zip or tar that holds it, or of a DICOM folder with "/"
    member : path inside the archive
    facts : what the sidecar says (keys of FACTS); its slice thickness may settle the voxel size
    label : the file is a mask or label map: few slices, constants and negatives are allowed
    turn : where the header's R, A and S really point, as the user says; see turn.py
    max_voxels : headers that claim more are refused before anything is allocated

    Raises
    ------
    ScanError
        With ``code``: missing, too_large, empty, not_nifti, not_downloaded, truncated,
        unsupported_dtype, cifti, not_3d, unknown_orientation, left_right_doubtful, bad_pixdim,
        voxel_size_disagrees, singular_affine, sheared_affine,
        too_few_slices, small_field_of_view, all_zero, constant, integer_wrap; those of
        ``cohorts.archive.read_member`` and of ``volumes.dicom.to_nifti``.
    DataError
        The store itself cannot be read.
    """
    found = decode(uri, member, max_voxels)
    if len(found.shape) != 3:
        raise ScanError("not_3d", f"{found.name}: shape {found.shape}, a 3D volume is expected")
    if not label:
        _check_wrap(found)
    volume = _canonical(found, turn, facts, label)[0]
    finite = np.isfinite(volume.data)
    if not finite.all():
        volume.invalid = ~finite
        volume.data[volume.invalid] = 0
        volume.flags.append(Flag.NON_FINITE_CLEANED)
    if not label:
        _clear_padding(volume)
        if volume.invalid is not None:
            volume.outside = at_border(volume.invalid)
        check_content(volume)
    return volume


def _clear_padding(volume: Volume) -> None:
    """Take constants that are no intensities out of a volume, with a note."""
    found = find_padding(volume.data)
    if found is not None:
        volume.data[found.where] = found.fill
        volume.invalid = found.where if volume.invalid is None else found.where | volume.invalid
        volume.notes.append(Note.PADDING_REMOVED)


def read_series(uri: str, member: str | None = None, facts: Mapping[str, object] | None = None, *,
                turn: str | None = None, max_voxels: int = MAX_SERIES_VOXELS) -> Series:
    """Read a 4D scan (t = 1 for a 3D one); containers and stores as ``read_scan``.

    Parameters
    ----------
    facts : what the sidecar says (keys of FACTS); it is believed before the header
    turn : as of ``read_scan``

    Returns
    -------
    Series
        Its flags may hold tr_disagrees (the sidecar's time was kept), tr_implausible,
        tr_unit_guessed, and those of ``read_scan``.

    Raises
    ------
    ScanError, DataError
        As ``read_scan``.
    """
    found = decode(uri, member, max_voxels)
    _check_wrap(found)
    first, axes = _canonical(found, turn, facts)
    count = found.shape[3] if len(found.shape) == 4 else 1
    finite = True
    # Time is the slowest axis in memory, as in the file, so that reading is one pass.
    data = np.moveaxis(np.empty((count, *first.data.shape), np.float32), 0, 3)
    for t in range(count):
        data[..., t] = nib.apply_orientation(_voxels(found, t), axes)
        finite &= bool(np.isfinite(data[..., t]).all())
    if not finite:
        np.nan_to_num(data, copy=False, nan=0, posinf=0, neginf=0)
        first.flags.append(Flag.NON_FINITE_CLEANED)
    # One value in the first frame, the middle one and the last: it was never measured.
    padding = find_padding(data[..., count // 2])
    if padding is not None:
        same = padding.where & np.isin(data[..., 0], padding.values) & np.isin(
            data[..., -1], padding.values)
        data[same] = padding.fill
        first.notes.append(Note.PADDING_REMOVED)
    first.data = data.mean(axis=3)  # one frame may well be empty, before the tracer arrives
    check_content(first)
    known = {**found.facts, **(facts or {})}
    frames = count == 1 or "FrameTimesStart" in known  # of PET, whose steps are no constant
    tr_s, flags = (None, []) if frames else repetition_time(found.image.header, known)
    return Series(found.name, data, first.affine, tr_s, known, first.flags + flags,
                  first.orientation, first.spacing, first.dtype, first.notes, turn)


# ---- voxels and axes -----------------------------------------------------------------------------

def _voxels(found: Decoded, t: int = 0) -> np.ndarray:
    """One volume in the file's own axes, slope and intercept applied; float32."""
    proxy = found.image.dataobj
    data = np.asanyarray(proxy[..., t]) if len(found.shape) == 4 else np.asanyarray(proxy)
    return data.reshape(found.shape[:3]).astype(np.float32)


def _canonical(found: Decoded, turn: str | None, facts: Mapping[str, object] | None,
               label: bool = False) -> tuple[Volume, np.ndarray]:
    """The first volume, its axes turned to the closest of R, A, S, and how they were turned."""
    image, name, shape = found.image, found.name, found.shape[:3]
    header = image.header
    nifti = isinstance(header, nib.Nifti1Header)
    affine, flags = np.asarray(image.affine, np.float64), list[str]()
    if nifti:
        affine, flags = choose_affine(header, shape, name, thickness_mm(found, facts))
    size = np.prod(np.linalg.norm(affine[:3, :3], axis=0))
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) <= 1e-6 * size:
        raise ScanError("singular_affine", f"{name}: affine {affine[:3].round(3).tolist()} maps "
                                           "voxels onto a plane; restore the header")
    if nifti:
        affine, more = in_mm(affine, header, shape)
        flags += more
        if not label and turn is None:
            refuse_made_up(affine, name)
            if mirrored_forms(header):
                raise ScanError("left_right_doubtful", f"{name}: sform and qform disagree about "
                                "left and right. Correct the wrong one; or name the scan in the "
                                "table of prepare --turn, with RAS if the sform is right, LAS if "
                                "the qform is")
    affine = turn_matrix(turn or AS_STATED) @ affine
    axes = nib.io_orientation(affine)
    volume = Volume(
        name=name, data=np.ascontiguousarray(nib.apply_orientation(_voxels(found), axes)),
        affine=affine @ nib.orientations.inv_ornt_aff(axes, shape),
        orientation="".join(nib.aff2axcodes(affine)),
        spacing=tuple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0).round(4)),
        dtype=str(image.get_data_dtype()),
        sform_code=int(header["sform_code"]) if nifti else None,
        qform_code=int(header["qform_code"]) if nifti else None,
        flags=found.flags + flags, notes=list(found.notes), facts=dict(found.facts),
        turn=turn)
    if nifti and volume.sform_code and volume.qform_code:
        _compare_forms(volume, header, shape)
    _check_shear(volume)
    return volume, axes


def thickness_mm(found: Decoded, facts: Mapping[str, object] | None) -> float | None:
    """Of a slice, as the sidecar or the DICOM series says it."""
    value = {**found.facts, **(facts or {})}.get("SliceThickness")
    return float(value) if isinstance(value, int | float) else None


def _compare_forms(volume: Volume, header: Any, shape: tuple[int, ...]) -> None:
    """Flag a qform that puts the corners elsewhere; the sform is used, as nibabel and FSL do."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
    difference = header.get_sform() - header.get_qform()
    distance = np.linalg.norm(difference[:3, :3] @ corners + difference[:3, 3:], axis=0).max()
    if not distance <= MAX_FORM_DISTANCE_MM:
        volume.flags.append(Flag.SFORM_QFORM_DISAGREE)


def _check_shear(volume: Volume) -> None:
    linear = volume.affine[:3, :3]
    axes = linear / np.linalg.norm(linear, axis=0)
    u, _, v = np.linalg.svd(axes)
    shear = np.abs(axes - u @ v).max()
    if shear > MAX_SHEAR:
        raise ScanError("sheared_affine", f"{volume.name}: affine has shear {shear:.3f} (limit "
                                          f"{MAX_SHEAR}); resample it to an orthogonal grid")


# ---- content -------------------------------------------------------------------------------------

def check_content(volume: Volume) -> None:
    """Raise ScanError where a volume cannot be a brain scan; flag what is odd about it."""
    shape, name = volume.data.shape, volume.name
    low, high = float(volume.data.min()), float(volume.data.max())
    if low == high:
        raise ScanError("all_zero" if high == 0 else "constant",
                        f"{name}: every voxel is {high:g}; there is no image in it")
    if min(shape) < MIN_SLICES:
        raise ScanError("too_few_slices", f"{name}: {min(shape)} slices (limit {MIN_SLICES}); "
                                          "partial coverage or a localiser")
    extent = np.linalg.norm(volume.affine[:3, :3], axis=0) * shape
    if extent.min() < MIN_EXTENT_MM:
        raise ScanError("small_field_of_view", f"{name}: covers {extent.min():.0f} mm (limit "
                                               f"{MIN_EXTENT_MM:.0f} mm)")
    if extent.max() > MAX_EXTENT_MM:
        volume.flags.append(Flag.HUGE_FIELD_OF_VIEW)
    if (volume.data < 0).mean() > NEGATIVE_SHARE:
        volume.flags.append(Flag.NEGATIVE_VALUES)


def _check_wrap(found: Decoded) -> None:
    """Refuse int16 values above 32767 that were stored as negative ones.

    Such tissue shows as islands of negative values whose rim jumps by more than half of the type's
    range.  What they were cannot be told from one scan, so nothing is repaired.
    """
    proxy = found.image.dataobj
    scaling = (getattr(proxy, "slope", 1), getattr(proxy, "inter", 0))
    if proxy.dtype != np.int16 or scaling != (1, 0):
        return  # with a slope, writers spread any image over the whole range of the type
    stored = _voxels(found, found.shape[3] // 2 if len(found.shape) == 4 else 0)
    stored[stored == np.iinfo(np.int16).min] = 0  # padding, or the end of the range: no overflow
    if stored.max() - stored.min() < INT16_JUMP:
        return
    from scipy import ndimage

    islands, count = ndimage.label(stored < 0)
    rim = ndimage.maximum_filter(stored, size=3) - stored >= INT16_JUMP
    border = np.ones(stored.shape, bool)
    border[1:-1, 1:-1, 1:-1] = False
    enclosed = np.setdiff1d(islands[rim & (stored < 0)], islands[border])
    wrapped = int(np.isin(islands, enclosed).sum()) if count else 0
    if wrapped >= MIN_WRAPPED_VOXELS:
        raise ScanError("integer_wrap", f"{found.name}: {wrapped} voxels inside bright tissue are "
                        f"negative (down to {stored.min():g}): values above 32767 wrapped around "
                        "in int16; convert it again from its source")
