"""One scan file -> one Volume in canonical orientation, or a ScanError with a code.

    bytes (local or object store, perhaps a member of a zip or tar) -> magic -> header checks
    -> voxels (slope and intercept applied) -> the voxel axes turned to the closest of R, A, S

The name is never trusted: the first bytes decide what a file is.  A header is judged before
anything of the size it claims is allocated.  World coordinates are never changed: axes are only
permuted and flipped, and the affine with them.  What is odd but legal becomes a flag; what cannot
be a brain scan is refused with the file, the field, the value and a code for the quarantine table.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zipfile
import zlib
from dataclasses import dataclass, field
from typing import Any

import nibabel as nib
import numpy as np

from data_prep.scan import ScanError
from data_prep.volumes.sniff import Kind, sniff
from neurojepa.errors import DataError
from neurojepa.feed.format import open_store

MAX_FILE_BYTES = 2 << 30
MAX_VOXELS = 1 << 28  # 1 GiB as float32; a 0.5 mm head has half of it
MIN_SLICES = 20
MIN_EXTENT_MM = 60.0
MAX_SHEAR = 0.02  # largest difference between a voxel axis and its nearest rotation
MAX_FORM_DISTANCE_MM = 2.0  # sform against qform, at the corners of the field of view
NEGATIVE_SHARE = 0.01


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
    flags: list[str] = field(default_factory=list)
    invalid: np.ndarray | None = None  # bool [x, y, z]: voxels that were NaN or Inf, now 0

    @property
    def voxel_ml(self) -> float:
        return float(abs(np.linalg.det(self.affine[:3, :3])) / 1000)

    @property
    def scan_id(self) -> str:
        """First 24 hex digits of the sha256 of voxels and affine: equal scans share it.

        File name, compression, storage order and byte order do not enter.
        """
        # Adding 0.0 turns -0.0, which a flip of the axes produces, into 0.0.
        digest = hashlib.sha256(np.array(self.data.shape, "<i4").tobytes())
        digest.update(np.ascontiguousarray(self.data + np.float32(0), "<f4").tobytes())
        digest.update((np.round(self.affine, 4) + 0.0).astype("<f8").tobytes())
        return digest.hexdigest()[:24]


def read_scan(uri: str, member: str | None = None, *, label: bool = False,
              max_voxels: int = MAX_VOXELS) -> Volume:
    """Read NIfTI-1/2 (.nii, .nii.gz, .hdr + .img) or MGH/MGZ from any store.

    Parameters
    ----------
    uri : path or URI of the file, or of the zip or tar that holds it
    member : path inside the archive
    label : the file is a mask or label map: few slices, constants and negatives are allowed
    max_voxels : headers that claim more are refused before anything is allocated

    Raises
    ------
    ScanError
        With ``code``: missing, missing_member, too_large, empty, not_nifti, not_downloaded,
        truncated, unsupported_dtype, cifti, not_3d, unknown_orientation, singular_affine,
        sheared_affine, too_few_slices, small_field_of_view, all_zero, constant.
    DataError
        The store itself cannot be read.
    """
    name = f"{uri}::{member}" if member else uri
    raw = _fetch(uri, member)
    pair = None
    named_image = (member or uri).lower().removesuffix(".gz").endswith(".img")
    if named_image:
        raw, pair = _fetch(*_partner(uri, member)), raw
    kind, head = sniff(raw, name, ScanError)
    if kind is Kind.PAIR and pair is None:
        pair = _fetch(*_partner(uri, member))
    header = _header(kind, head, name)
    shape = _check_header(header, kind, name, max_voxels)
    image = _load(kind, header, shape, raw, pair, name)
    volume = _canonical(image, shape, name)
    _check_affine(volume)
    _clean(volume)
    if not label:
        _check_content(volume)
    return volume


# ---- bytes ---------------------------------------------------------------------------------------

def _fetch(uri: str, member: str | None) -> bytes:
    fs, path = open_store(uri)
    try:
        size = fs.size(path)
        if size is not None and size > MAX_FILE_BYTES:
            raise ScanError("too_large", f"{uri}: {size} bytes, the limit is {MAX_FILE_BYTES}")
        data = fs.cat_file(path)
    except FileNotFoundError as error:
        raise ScanError("missing", f"{uri}: not found; index the source again") from error
    except OSError as error:
        raise DataError(f"{uri}: cannot be read ({error}); check the store") from error
    return _member(data, uri, member) if member else data


def _member(data: bytes, uri: str, member: str) -> bytes:
    """One named member of a zip or tar, never more than the limit of it."""
    try:
        if data[:2] == b"PK":
            with zipfile.ZipFile(io.BytesIO(data)) as archive, archive.open(member) as file:
                content = file.read(MAX_FILE_BYTES + 1)
        else:
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                extracted = tar.extractfile(member)
                if extracted is None:
                    raise KeyError(member)
                content = extracted.read(MAX_FILE_BYTES + 1)
    except KeyError as error:
        raise ScanError("missing_member", f"{uri}: has no member {member}") from error
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise ScanError("truncated", f"{uri}: damaged archive ({error}); fetch it again") from error
    if len(content) > MAX_FILE_BYTES:
        raise ScanError("too_large", f"{uri}::{member}: over the limit of {MAX_FILE_BYTES} bytes")
    return content


def _partner(uri: str, member: str | None) -> tuple[str, str | None]:
    """The .img that belongs to a .hdr, or the other way round."""
    path = member or uri
    stem, _, ending = path.removesuffix(".gz").rpartition(".")
    other = {"hdr": "img", "img": "hdr", "HDR": "IMG", "IMG": "HDR"}.get(ending)
    if other is None:
        raise ScanError("not_nifti", f"{path}: header of a .hdr/.img pair under another name; "
                                     "rename it to .hdr")
    partner = f"{stem}.{other}{'.gz' if path.endswith('.gz') else ''}"
    return (uri, partner) if member else (partner, None)


def _inflate(data: bytes, limit: int, name: str) -> bytes:
    """At most ``limit`` bytes of a gzip stream; plain bytes pass through."""
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            return file.read(limit)
    except (EOFError, OSError, zlib.error) as error:
        raise ScanError("truncated", f"{name}: damaged gzip stream ({error}); fetch it "
                                     "again") from error


# ---- header --------------------------------------------------------------------------------------

def _header(kind: Kind, head: bytes, name: str) -> Any:
    classes = {Kind.NIFTI1: nib.Nifti1Header, Kind.PAIR: nib.nifti1.Nifti1PairHeader,
               Kind.NIFTI2: nib.Nifti2Header}
    try:
        if kind is Kind.MGH:
            return nib.freesurfer.MGHImage.header_class.from_fileobj(io.BytesIO(head), check=False)
        # The binary block alone: extensions may be longer than the bytes at hand.
        return classes[kind](head[:classes[kind].template_dtype.itemsize], check=False)
    except Exception as error:  # nibabel raises many kinds on damaged headers
        raise ScanError("not_nifti", f"{name}: header cannot be parsed ({error})") from error


def _check_header(header: Any, kind: Kind, name: str, max_voxels: int) -> tuple[int, ...]:
    """Shape without trailing axes of length 1; refuses before any allocation."""
    try:
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = header.get_data_dtype()
        int(header.get_data_offset())
    except Exception as error:
        raise ScanError("not_nifti", f"{name}: dim, datatype or vox_offset is not valid "
                                     f"({error})") from error
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if kind is not Kind.MGH and 3000 <= int(header["intent_code"]) < 3100:
        raise ScanError("cifti", f"{name}: intent code {int(header['intent_code'])} is CIFTI "
                                 "(grayordinates), not a volume")
    if min(shape, default=0) < 1 or np.prod(shape, dtype=float) > max_voxels:
        raise ScanError("too_large", f"{name}: header claims {shape} voxels, the limit is "
                                     f"{max_voxels} in all")
    if len(shape) != 3:
        raise ScanError("not_3d", f"{name}: shape {shape}, a 3D volume is expected")
    if dtype.fields is not None or dtype.kind == "c":
        raise ScanError("unsupported_dtype", f"{name}: datatype {dtype} (colour or complex) is no "
                                             "intensity")
    codes = ((header["goodRASFlag"],) if kind is Kind.MGH
             else (header["sform_code"], header["qform_code"]))
    if not any(int(code) for code in codes):
        raise ScanError("unknown_orientation", f"{name}: sform and qform codes are 0, so left and "
                                               "right are unknown; restore the header")
    return shape


def _load(kind: Kind, header: Any, shape: tuple[int, ...], raw: bytes, pair: bytes | None,
          name: str) -> Any:
    offset = int(header.get_data_offset())
    needed = offset + int(np.prod(shape)) * header.get_data_dtype().itemsize
    # MGH files carry a footer with scan parameters after the voxels.
    content = _inflate(pair if pair is not None else raw, needed + 4096, name)
    if len(content) < needed:
        raise ScanError("truncated", f"{name}: {len(content)} bytes, the header promises {needed}; "
                                     "fetch it again")
    try:
        if pair is not None:
            files = {"header": _inflate(raw, 1 << 20, name), "image": content}
            return nib.Nifti1Pair.from_file_map(
                {key: nib.FileHolder(fileobj=io.BytesIO(data)) for key, data in files.items()})
        classes: dict[Kind, Any] = {Kind.NIFTI1: nib.Nifti1Image, Kind.NIFTI2: nib.Nifti2Image,
                                    Kind.MGH: nib.freesurfer.MGHImage}
        return classes[kind].from_bytes(content)
    except Exception as error:
        raise ScanError("not_nifti", f"{name}: cannot be decoded ({error})") from error


# ---- content -------------------------------------------------------------------------------------

def _canonical(image: Any, shape: tuple[int, ...], name: str) -> Volume:
    affine = np.asarray(image.affine, np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise ScanError("singular_affine", f"{name}: affine {affine[:3].round(3).tolist()} maps "
                                           "voxels onto a plane; restore the header")
    axes = nib.io_orientation(affine)
    data = np.asanyarray(image.dataobj).reshape(shape).astype(np.float32)
    data = nib.apply_orientation(data, axes)
    header = image.header
    nifti = isinstance(header, nib.Nifti1Header)
    volume = Volume(
        name=name, data=np.ascontiguousarray(data),
        affine=affine @ nib.orientations.inv_ornt_aff(axes, shape),
        orientation="".join(nib.aff2axcodes(affine)),
        spacing=tuple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0).round(4)),
        dtype=str(image.get_data_dtype()),
        sform_code=int(header["sform_code"]) if nifti else None,
        qform_code=int(header["qform_code"]) if nifti else None)
    if nifti and volume.sform_code and volume.qform_code:
        _compare_forms(volume, header, shape)
    return volume


def _compare_forms(volume: Volume, header: Any, shape: tuple[int, ...]) -> None:
    """Flag a qform that puts the corners elsewhere; the sform is used, as nibabel and FSL do."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
    difference = header.get_sform() - header.get_qform()
    distance = np.linalg.norm(difference[:3, :3] @ corners + difference[:3, 3:], axis=0).max()
    if not distance <= MAX_FORM_DISTANCE_MM:
        volume.flags.append("sform_qform_disagree")


def _check_affine(volume: Volume) -> None:
    linear = volume.affine[:3, :3]
    axes = linear / np.linalg.norm(linear, axis=0)
    u, _, v = np.linalg.svd(axes)
    shear = np.abs(axes - u @ v).max()
    if shear > MAX_SHEAR:
        raise ScanError("sheared_affine", f"{volume.name}: affine has shear {shear:.3f} (limit "
                                          f"{MAX_SHEAR}); resample it to an orthogonal grid")


def _clean(volume: Volume) -> None:
    finite = np.isfinite(volume.data)
    if not finite.all():
        volume.invalid = ~finite
        volume.data[volume.invalid] = 0
        volume.flags.append("non_finite_cleaned")


def _check_content(volume: Volume) -> None:
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
    if extent.max() > 400:
        volume.flags.append("huge_field_of_view")
    if (volume.data < 0).mean() > NEGATIVE_SHARE:
        volume.flags.append("negative_values")
