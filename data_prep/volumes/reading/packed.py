"""Packed bytes (gzip, bzip2, Zstandard) unpacked within a limit; the first bytes tell which.

What follows a complete stream and is no further one (the text of a failed upload, padding) does
not make it damaged: its checksum says that it is whole.
"""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable
from typing import Protocol

from data_prep.scan import ScanError

GZIP, BZIP2, ZSTD = b"\x1f\x8b", b"BZh", b"\x28\xb5\x2f\xfd"
_PIECE_BYTES = 1 << 12  # of Zstandard: 4 bytes can stand for 128 KiB


class _Stream(Protocol):
    """What zlib and bz2 have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def unpack(data: bytes, limit: int, name: str) -> tuple[bytes, bool]:
    """At most ``limit`` bytes of packed data, and whether other bytes follow the packed ones.

    Plain bytes pass through as a whole.

    Raises
    ------
    ScanError
        truncated: the stream ends early, or its content differs from its checksum.
    """
    if data.startswith(GZIP):
        return _streams(data, limit, name, GZIP, "gzip", lambda: zlib.decompressobj(31))
    if data.startswith(BZIP2):
        return _streams(data, limit, name, BZIP2, "bzip2", bz2.BZ2Decompressor)
    if data.startswith(ZSTD):
        return _frames(data, limit, name)
    return data, False


def unpack_head(data: bytes, limit: int, name: str) -> bytes:
    """The first ``limit`` bytes, of data of which only the beginning may be at hand."""
    try:
        if data.startswith(GZIP):
            head = zlib.decompressobj(31).decompress(data, limit)
        elif data.startswith(BZIP2):
            head = bz2.BZ2Decompressor().decompress(data, limit)
        elif data.startswith(ZSTD):
            head = _frames(data, limit, name)[0]
        else:
            return data[:limit]
    except (zlib.error, OSError) as error:
        raise _damaged(name, "packed", error) from error
    if not head:
        raise _damaged(name, "packed", EOFError("it ends early"))
    return head


def _streams(data: bytes, limit: int, name: str, magic: bytes, kind: str,
             start: Callable[[], _Stream]) -> tuple[bytes, bool]:
    """One stream after the other, as parallel packers write them."""
    parts, size = [], 0
    while data.startswith(magic) and size < limit:
        stream = start()
        try:
            # bz2 keeps what it has not used itself, zlib hands it back
            while not stream.eof and size < limit:
                part = stream.decompress(data, limit - size)
                data = getattr(stream, "unconsumed_tail", b"")
                parts.append(part)
                size += len(part)
                if not part and not stream.eof and not data:
                    raise EOFError("it ends early")
        except (zlib.error, OSError, EOFError) as error:
            raise _damaged(name, kind, error) from error
        if stream.eof:
            data = stream.unused_data
    return b"".join(parts), size < limit and bool(data.strip(b"\0"))


def _frames(data: bytes, limit: int, name: str) -> tuple[bytes, bool]:
    """As ``_streams``, of Zstandard, whose frames give all they hold of the bytes they are fed."""
    import zstandard

    parts, size, place = [], 0, 0
    while data[place:place + len(ZSTD)] == ZSTD and size < limit:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            while not frame.eof and size < limit:
                if not (piece := data[place:place + _PIECE_BYTES]):
                    raise EOFError("it ends early")
                parts.append(frame.decompress(piece))
                size += len(parts[-1])
                place += len(piece) - len(frame.unused_data)
        except (zstandard.ZstdError, EOFError) as error:
            raise _damaged(name, "Zstandard", error) from error
    return b"".join(parts)[:limit], size < limit and bool(data[place:].strip(b"\0"))


def _damaged(name: str, kind: str, error: Exception) -> ScanError:
    return ScanError("truncated", f"{name}: damaged {kind} stream ({error}); fetch it again")
