"""Members of zip, tar and tar.gz archives, local or on an object store, never unpacked to disk.

A zip is read by ranges: its central directory, then the one member.  A plain tar skips from header
to header; a tar.gz streams.  What an archive claims is judged before anything of that size is
allocated, and an archive that could harm an unpacker (paths that leave their folder, links, two
members of one name) is refused as a whole, though nothing here ever writes a path.
"""

from __future__ import annotations

import gzip
import io
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, cast

from data_prep.scan import ScanError
from neurojepa.errors import DataError
from neurojepa.storage import open_store, store_errors

MAX_MEMBERS = 2_000_000  # a delivery of DICOM slices of a whole study in one zip
MAX_READ_BYTES = 256 << 20  # at once: bounds central directories and the long headers of tars
MAX_TOTAL_BYTES = 64 << 30  # claimed by all members together
# Masks and label maps deflate well, so the ratio counts only where the result is large.
BOMB_BYTES, BOMB_RATIO = 256 << 20, 300
_BLOCK_BYTES, _CHUNK_BYTES = 1 << 16, 8 << 20
_UNSAFE_NAME = re.compile(r"^/|^[A-Za-z]:|\\|\x00|(^|/)\.\.(/|$)|^$")


def list_members(uri: str) -> list[dict[str, Any]]:
    """``name`` and ``size`` (bytes, unpacked) of every file in an archive, as plain JSON.

    Raises
    ------
    ScanError
        With ``code``: missing, empty, not_downloaded, not_archive, truncated, encrypted,
        unsafe_archive, too_large.
    DataError
        The store cannot be read.
    """
    return [{"name": member.name, "size": member.size} for member in _members(uri)]


def first_member(uri: str, wanted: Callable[[str], bool]) -> str | None:
    """Name of the first wanted member; a tar.gz is unpacked up to its header and no further.

    Raises as ``list_members``, of what comes before that member in a tar, of all of a zip.
    """
    return next((member.name for member in _members(uri) if wanted(member.name)), None)


def read_member(uri: str, member: str, limit: int) -> bytes:
    """The bytes of one member, or a ScanError where it has more than ``limit``.

    Raises
    ------
    ScanError
        With the codes of ``list_members``, and missing_member.
    """
    for _, content in list(read_members(uri, member.__eq__, limit)):
        return content
    raise ScanError("missing_member", f"{uri}: has no member {member}; fetch the archive again")


def read_members(uri: str, wanted: Callable[[str], bool], limit: int
                 ) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each wanted member in one pass; together at most ``limit`` bytes.

    Only a pass that is read to its end has judged the whole of a tar.
    """
    left = limit
    for member in _members(uri):
        if not wanted(member.name):
            continue
        left -= member.size
        if left < 0:
            raise ScanError("too_large", f"{uri}::{member.name}: claims {member.size} bytes, the "
                                         f"limit is {limit}")
        with _faults_named(uri):
            content = b"".join(_chunks(member.open(), member.size))
        if len(content) != member.size:
            raise ScanError("truncated", f"{uri}::{member.name}: {len(content)} of {member.size} "
                                         "bytes are there; fetch the archive again")
        yield member.name, content


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    open: Callable[[], IO[bytes]]


def _members(uri: str) -> Iterator[_Member]:
    """Every file of an archive that passes the checks; of a zip all are checked first."""
    with _faults_named(uri):
        file = _Ranges(uri)
        # A large .zip is looked at from its end: that is all its listing needs to fetch.
        is_zip = (file.size > _BLOCK_BYTES and uri.lower().endswith(".zip")
                  and zipfile.is_zipfile(cast(IO[bytes], file)))
        file.seek(0)
        head = b"PK" if is_zip else file.read(512)
        file.seek(0)
        if head.startswith(b"PK"):
            yield from list(_judged(_of_zip(file, uri), uri, file.size))
        elif head.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield from _judged(_of_tar(cast(IO[bytes], unpacked), uri), uri, file.size)
        elif head[257:262] == b"ustar":
            yield from _judged(_of_tar(cast(IO[bytes], file), uri), uri, file.size)
        else:
            raise _no_archive(head, uri)


def _judged(members: Iterator[_Member], uri: str, packed: int) -> Iterator[_Member]:
    """The members, as long as names are safe and unique and the claimed sizes plausible."""
    seen: set[str] = set()
    total = 0
    for member in members:
        if _UNSAFE_NAME.search(member.name):
            raise ScanError("unsafe_archive", f"{uri}: member name {member.name!r} leaves its "
                                              "folder; get the archive from its source again")
        if member.name in seen:
            raise ScanError("unsafe_archive", f"{uri}: two members are named {member.name}; it is "
                                              "unclear which is meant; make the archive again")
        seen.add(member.name)
        total += member.size
        bomb = total > BOMB_BYTES and total > BOMB_RATIO * packed
        if bomb or total > MAX_TOTAL_BYTES or len(seen) > MAX_MEMBERS or member.size < 0:
            raise ScanError("too_large", f"{uri}: {packed} bytes that claim {total} in {len(seen)} "
                                         "members or more; not unpacked")
        yield member


def _of_zip(file: _Ranges, uri: str) -> Iterator[_Member]:
    archive = zipfile.ZipFile(cast(IO[bytes], _Careful(cast(IO[bytes], file), uri)))
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the packer knew no Unix
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _no_file(uri, info.filename)
        if info.flag_bits & 1:
            raise ScanError("encrypted", f"{uri}: member {info.filename} is encrypted; unpack it "
                                         "with its key first")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # Python inflates these without a bound on what comes out.
            raise ScanError("unsafe_archive", f"{uri}: member {info.filename} is packed by method "
                                              f"{info.compress_type}; use deflate")
        if not info.is_dir():
            yield _Member(info.filename, info.file_size, partial(archive.open, info))


def _of_tar(file: IO[bytes], uri: str) -> Iterator[_Member]:
    careful = _Careful(file, uri)
    with tarfile.open(fileobj=cast(IO[bytes], careful), mode="r:") as archive:
        for info in archive:
            if info.isdir():
                continue
            if not info.isfile() or info.issparse():
                raise _no_file(uri, info.name)
            yield _Member(_decoded(info.name).removeprefix("./"), info.size,
                          partial(_extract, archive, info))
        # tarfile takes a damaged header for the end, so look at what it read last.
        if careful.last != bytes(tarfile.BLOCKSIZE):
            raise ScanError("truncated", f"{uri}: ends without the end mark of a tar; fetch it "
                                         "again")
        file.read(_BLOCK_BYTES)  # padding; at the end gzip compares its checksum


def _decoded(name: str) -> str:
    """A name of a tar, whose bytes are Latin-1 where they are not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogateescape").decode("latin-1")
    return name


def _extract(archive: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    return cast(IO[bytes], archive.extractfile(info))


def _chunks(file: IO[bytes], size: int) -> Iterator[bytes]:
    while size > 0 and (data := file.read(min(size, _CHUNK_BYTES))):
        size -= len(data)
        yield data


# ---- files ---------------------------------------------------------------------------------------

class _Ranges(io.RawIOBase):
    """A stored file read by ranges: the last block as one, more ahead the longer it streams."""

    def __init__(self, uri: str) -> None:
        self._fs, self._path = open_store(uri)
        self.size = int(self._fs.size(self._path))
        self._position = 0
        self._start, self._window = 0, b""
        self._ahead = _BLOCK_BYTES

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0, /) -> int:
        position = offset + (0, self._position, self.size)[whence]
        if position < 0:
            raise ValueError(f"position {position} lies before the file")
        self._position = position
        return position

    def read(self, size: int = -1, /) -> bytes:
        left = max(0, self.size - self._position)
        size = left if size < 0 else min(size, left)
        place = self._position - self._start
        if not 0 <= place <= place + size <= len(self._window):
            streams = 0 <= place <= len(self._window)
            self._ahead = min(2 * self._ahead, _CHUNK_BYTES) if streams else _BLOCK_BYTES
            # near the end of the file, all of its end: a zip's directory in one request
            self._start = min(self._position, max(0, self.size - _BLOCK_BYTES))
            stop = min(self.size, self._position + max(size, self._ahead))
            self._window = self._fs.cat_file(self._path, start=self._start, end=stop)
            place = self._position - self._start
        self._position += size
        return self._window[place:place + size]


class _Careful:
    """A file for zipfile and tarfile, whose headers may ask for any number of bytes at once."""

    def __init__(self, file: IO[bytes], uri: str) -> None:
        self._file, self._uri = file, uri
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_READ_BYTES:
            raise ScanError("too_large", f"{self._uri}: a header claims {size} bytes (limit "
                                         f"{MAX_READ_BYTES}); not read")
        self.last = self._file.read(size)
        return self.last


# ---- faults --------------------------------------------------------------------------------------

@contextmanager
def _faults_named(uri: str) -> Iterator[None]:
    """Faults of the store and of the archive's bytes as errors that name the archive."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise ScanError("missing", f"{uri}: not found; index the source again") from error
    except (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error,
            struct.error, ValueError, RuntimeError) as error:  # what damaged bytes provoke
        raise ScanError("truncated", f"{uri}: damaged archive ({error}); fetch it again"
                        ) from error
    except store_errors() as error:
        raise DataError(f"{uri}: cannot be read ({error}); check the store") from error


def _no_file(uri: str, name: str) -> ScanError:
    return ScanError("unsafe_archive", f"{uri}: member {name!r} is a link, a device or sparse, not "
                                       "a plain file; make the archive again with its content")


def _no_archive(head: bytes, uri: str) -> ScanError:
    if not head:
        return ScanError("empty", f"{uri}: zero bytes; fetch it again")
    if head.startswith(b"version https://git-lfs") or b"/annex/objects/" in head:
        return ScanError("not_downloaded", f"{uri}: a pointer of git-lfs or git-annex, not the "
                                           "archive; download its content first")
    return ScanError("not_archive", f"{uri}: begins with {head[:12]!r}, which is no zip, tar or "
                                    "tar.gz")
