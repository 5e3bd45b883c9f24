"""Bytes of a scan -> its header, judged -> an image whose voxels are still on their way.

The name is never trusted: the first bytes decide what a file is.  A header is judged before
anything of the size it claims is allocated.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader, MGHImage

from data_prep.filenames import is_partner, partners
from data_prep.flags import Flag, Note
from data_prep.scan import ScanError
from data_prep.volumes.reading.headers import mend_header
from data_prep.volumes.reading.packed import unpack
from data_prep.volumes.reading.sniff import Kind, sniff
from neurojepa.errors import DataError
from neurojepa.storage import is_local, open_store

MAX_FILE_BYTES = 2 << 30  # as stored
MAX_UNPACKED_BYTES = 8 << 30  # a float64 series of twenty minutes fits
CIFTI_INTENTS = range(3000, 3100)
_LAST_FORM_CODE = 5  # of NIfTI; goodRASFlag of MGH is 1


@dataclass
class Decoded:
    """A file whose header passed; ``image`` decodes voxels when they are asked for."""

    name: str  # where it came from, for messages
    image: Any  # nibabel image, from memory
    shape: tuple[int, ...]  # without trailing axes of length 1; at least 3 axes
    facts: dict[str, object] = field(default_factory=dict)  # of a DICOM series
    flags: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def decode(uri: str, member: str | None, max_voxels: int) -> Decoded:
    """A file, archive member or DICOM series (ends in "/"), up to its voxels.

    Raises
    ------
    ScanError
        See ``read_scan``.
    DataError
        The store itself cannot be read.
    """
    name = f"{uri}::{member}" if member else uri
    if (member or uri).endswith("/"):
        from data_prep.volumes.reading.dicom import to_nifti

        raw, facts = to_nifti(uri, member)
        return _decode(raw, None, name, max_voxels, facts)
    raw, pair = fetch(uri, member), None
    if is_partner(member or uri):
        raw, pair = _partner(uri, member), raw
    elif sniff(raw, name, ScanError)[0] is Kind.PAIR:
        pair = _partner(uri, member)
    return _decode(raw, pair, name, max_voxels, {})


def fetch(uri: str, member: str | None) -> bytes:
    """Content of a file, or of one member of an archive, within MAX_FILE_BYTES."""
    if member:
        from data_prep.members import read_member

        return read_member(uri, member, MAX_FILE_BYTES)
    fs, path = open_store(uri)
    try:
        size = fs.size(path)
        if size is not None and size > MAX_FILE_BYTES:
            raise ScanError("too_large", f"{uri}: {size} bytes, the limit is {MAX_FILE_BYTES}")
        return fs.cat_file(path)
    except FileNotFoundError as error:
        if is_local(fs) and os.path.islink(path):
            raise ScanError("not_downloaded", f"{uri}: a link to content that is not here "
                                              "(git-annex); download it first") from error
        raise ScanError("missing", f"{uri}: not found; index the source again") from error
    except OSError as error:
        raise DataError(f"{uri}: cannot be read ({error}); check the store") from error


def _partner(uri: str, member: str | None) -> bytes:
    """Content of the .img that belongs to a .hdr, or the other way round."""
    path = member or uri
    if not (places := partners(path)):
        raise ScanError("not_nifti", f"{path}: header of a .hdr/.img pair under another name; "
                                     "rename it to .hdr")
    for place in places:
        try:
            return fetch(uri, place) if member else fetch(place, None)
        except ScanError as error:
            if error.code not in ("missing", "missing_member"):
                raise
    raise ScanError("missing", f"{path}: half of a pair, without {places[0].rpartition('/')[2]} "
                               "beside it; fetch that too")


# ---- header --------------------------------------------------------------------------------------

def _decode(raw: bytes, pair: bytes | None, name: str, max_voxels: int,
            facts: dict[str, object]) -> Decoded:
    kind, head = sniff(raw, name, ScanError)
    header = _header(kind, head, name)
    flags = _mend_offset(header, kind)
    if kind is not Kind.MGH and int(header["intent_code"]) not in CIFTI_INTENTS:
        flags += mend_header(header, name)
    shape = _check_header(header, kind, name, max_voxels)
    image, more = _load(kind, header, shape, raw, pair, name)
    if Flag.SURPLUS_BYTES in more:
        flags.append(Flag.SURPLUS_BYTES)
    return Decoded(name, image, shape, facts, flags,
                   [Note.TRAILING_BYTES] if Note.TRAILING_BYTES in more else [])


def _header(kind: Kind, head: bytes, name: str) -> Any:
    classes: dict[Kind, Any] = {
        Kind.NIFTI1: nib.Nifti1Header, Kind.PAIR: nib.nifti1.Nifti1PairHeader,
        Kind.NIFTI2: nib.Nifti2Header}
    try:
        if kind is Kind.MGH:
            return MGHHeader.from_fileobj(io.BytesIO(head), check=False)
        # The binary block alone: extensions may be longer than the bytes at hand.
        return classes[kind](head[:classes[kind].template_dtype.itemsize], check=False)
    except Exception as error:  # nibabel raises many kinds on damaged headers
        raise ScanError("not_nifti", f"{name}: header cannot be parsed ({error})") from error


def _mend_offset(header: Any, kind: Kind) -> list[str]:
    """Voxels of a single file cannot begin inside its header: then they follow it.

    Writers that leave vox_offset 0 mean that; what reads there takes the header for voxels.
    """
    first = {Kind.NIFTI1: 352, Kind.NIFTI2: 544}.get(kind)
    if first is None or not header["vox_offset"] < first:
        return []
    header["vox_offset"] = first
    return [Flag.VOXEL_OFFSET_MENDED]


def _check_header(header: Any, kind: Kind, name: str, max_voxels: int) -> tuple[int, ...]:
    """Shape without trailing axes of length 1; refuses before any allocation."""
    try:
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = header.get_data_dtype()
        offset = int(header.get_data_offset())
    except Exception as error:
        raise ScanError("not_nifti", f"{name}: dim, datatype or vox_offset is not valid "
                                     f"({error})") from error
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if kind is not Kind.MGH and int(header["intent_code"]) in CIFTI_INTENTS:
        raise ScanError("cifti", f"{name}: intent code {int(header['intent_code'])} is CIFTI "
                                 "(grayordinates), not a volume")
    if min(shape, default=0) < 1 or np.prod(shape, dtype=float) > max_voxels:
        raise ScanError("too_large", f"{name}: header claims {shape} voxels, the limit is "
                                     f"{max_voxels} in all")
    claimed = offset + int(np.prod(shape, dtype=float)) * dtype.itemsize
    if not 0 <= offset <= claimed <= MAX_UNPACKED_BYTES:
        raise ScanError("too_large", f"{name}: header claims {claimed} bytes ({dtype}, vox_offset "
                                     f"{offset}), the limit is {MAX_UNPACKED_BYTES}")
    if not 3 <= len(shape) <= 4:
        raise ScanError("not_3d", f"{name}: shape {shape}, a 3D volume or a series of them is "
                                  "expected")
    if dtype.fields is not None or dtype.kind == "c":
        raise ScanError("unsupported_dtype", f"{name}: datatype {dtype} (colour or complex) is no "
                                             "intensity")
    codes = ((header["goodRASFlag"],) if kind is Kind.MGH
             else (header["sform_code"], header["qform_code"]))
    if not any(0 < int(code) <= _LAST_FORM_CODE for code in codes):
        told = "0" if not any(map(int, codes)) else " and ".join(str(int(code)) for code in codes)
        raise ScanError("unknown_orientation", f"{name}: sform and qform codes are {told}, so left "
                                               "and right are unknown; restore the header")
    return shape


def _is_footer(rest: bytes) -> bool:
    """Whether the bytes behind the voxels of an MGH file are its footer: five numbers, tags."""
    return len(rest) <= 24 or not any(rest) or 0 < int.from_bytes(rest[20:24], "big") <= 100


def _load(kind: Kind, header: Any, shape: tuple[int, ...], raw: bytes, pair: bytes | None,
          name: str) -> tuple[Any, list[str]]:
    """The image, and whether other bytes follow its packed ones or its voxels."""
    offset = int(header.get_data_offset())
    needed = offset + int(np.prod(shape)) * header.get_data_dtype().itemsize
    # MGH files carry a footer with scan parameters after the voxels.
    content, trailed = unpack(pair if pair is not None else raw, needed + 4096, name)
    if len(content) < needed:
        raise ScanError("truncated", f"{name}: {len(content)} bytes, the header promises {needed}; "
                                     "fetch it again")
    more: list[str] = [Note.TRAILING_BYTES] if trailed else []
    if len(content) > needed and not (kind is Kind.MGH and _is_footer(content[needed:])):
        more.append(Flag.SURPLUS_BYTES)
    try:
        if pair is not None:
            head = unpack(raw, 1 << 20, name)[0]
            files = {"header": header.binaryblock + head[len(header.binaryblock):],
                     "image": content}
            return nib.Nifti1Pair.from_file_map(
                {key: nib.FileHolder(fileobj=io.BytesIO(data)) for key, data in files.items()}
            ), more
        if kind is Kind.MGH:
            return MGHImage.from_bytes(content), more
        if not content.startswith(header.binaryblock):  # it was mended
            content = header.binaryblock + content[len(header.binaryblock):]
        single = nib.Nifti1Image if kind is Kind.NIFTI1 else nib.Nifti2Image
        return single.from_bytes(content), more
    except Exception as error:
        raise ScanError("not_nifti", f"{name}: cannot be decoded ({error})") from error
