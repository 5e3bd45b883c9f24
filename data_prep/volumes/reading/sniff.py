"""What a file is, by its first bytes; names and endings are often wrong."""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import Enum

from data_prep.volumes.reading.packed import unpack_head

HEADER_BYTES = 544  # the NIfTI-2 header and its extension flag
_PACKED_BYTES = 1 << 20  # holds the first block of bzip2, which unpacks as a whole


class Kind(Enum):
    """The containers ``read_scan`` knows."""

    NIFTI1 = "NIfTI-1"
    NIFTI2 = "NIfTI-2"
    PAIR = "NIfTI-1 .hdr/.img"
    MGH = "MGH"


def sniff(data: bytes, name: str, error: Callable[[str, str], Exception]) -> tuple[Kind, bytes]:
    """The kind of image and its first bytes, uncompressed; ``error(code, message)`` is raised.

    Codes: empty, not_downloaded, truncated, unknown_orientation (Analyze), not_nifti.
    """
    if not data:
        raise error("empty", f"{name}: zero bytes; fetch it again")
    if data.startswith(b"version https://git-lfs") or b"/annex/objects/" in data[:512]:
        raise error("not_downloaded", f"{name}: a pointer of git-lfs or git-annex, not the scan; "
                                      "download its content first")
    head = unpack_head(data[:_PACKED_BYTES], HEADER_BYTES, name)
    if head[128:132] == b"DICM":
        raise error("not_nifti", f"{name}: one DICOM file; give the folder of its series, with a "
                                 "\"/\" at the end")
    sizes = {struct.unpack(order, head[:4])[0] for order in ("<i", ">i")} if len(head) > 3 else {0}
    if 348 in sizes and len(head) >= 348:
        magic = head[344:347]
        if magic in (b"n+1", b"ni1"):
            return (Kind.NIFTI1 if magic == b"n+1" else Kind.PAIR), head
        raise error("unknown_orientation", f"{name}: an Analyze header (magic {magic!r}) does not "
                                           "say where left is; convert it from its source")
    if 540 in sizes and head[4:7] == b"n+2" and len(head) >= 540:
        return Kind.NIFTI2, head
    if head[:4] == b"\x00\x00\x00\x01" and len(head) >= 284:
        return Kind.MGH, head
    if sizes & {348, 540}:
        raise error("truncated", f"{name}: ends inside its header; fetch it again")
    raise error("not_nifti", f"{name}: begins with {head[:12]!r}, which is no NIfTI or MGH header")
