"""Opening a store, whole objects in and out, what lies in a folder, tables of Parquet."""

from __future__ import annotations

import hashlib
import io
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from neurojepa.errors import DataError
from neurojepa.storage.outage import store_errors

if TYPE_CHECKING:
    import pyarrow as pa
    from fsspec import AbstractFileSystem

_CHECK_DISK = "check the path, its permissions and its disk"
_CHECK_STORE = "check the store and AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
MAGIC = re.compile(r"[*?\[]")  # what fsspec's methods for lists of paths take for a pattern


def join(uri: str, *parts: str) -> str:
    """Path arithmetic that is right for local directories and URIs alike."""
    return "/".join([uri.rstrip("/"), *parts])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- opening, reading, writing -------------------------------------------------------------------

def open_store(uri: str, own_retries: bool = True) -> tuple[AbstractFileSystem, str]:
    """The file system and path of a URI; s3:// is configured by the usual AWS_* variables.

    A path is a name, never a pattern or a chain of stores: ``a [1]::b?`` is a file of that name.
    So of the file system only methods for a single path may be used, and ``cat_ranges``: its
    ``cat``, ``rm``, ``get`` and ``put`` expand brackets, ``*`` and ``?``.

    An object store that refuses is noticed in seconds, one that is silent in two minutes.
    ``own_retries=False`` is for callers that ask again themselves: each request is made once.

    Raises
    ------
    DataError
        The URI's scheme is unknown, its driver is not installed, or an s3:// key holds
        ``?versionId=``, which its driver would cut off.
    """
    import fsspec

    scheme = match[1].lower() if (match := _SCHEME.match(uri)) else "file"
    try:
        kind = fsspec.get_filesystem_class(scheme)
        if scheme == "s3":
            if "?versionId=" in uri:
                raise DataError(f"{uri}: a key with \"?versionId=\" cannot be read; rename it")
            limits = {"connect_timeout": 5, "read_timeout": 20,
                      "retries": {"total_max_attempts": 1}}
            options = {"use_listings_cache": False, "config_kwargs": limits,
                       "skip_instance_cache": not own_retries}
        else:
            options = kind._get_kwargs_from_urls(uri)  # host and port of other stores
        fs = fsspec.filesystem(scheme, **options)
    except (ValueError, ImportError) as error:
        extra = {"s3": "s3", "hf": "hub"}.get(scheme) if isinstance(error, ImportError) else None
        cure = f"; run: pip install 'neurojepa[{extra}]'" if extra else ""
        raise DataError(f"{uri}: cannot open this kind of store ({error}){cure}") from error
    if scheme == "s3" and not own_retries:  # else s3fs asks five times itself
        fs.retries = 1
    return fs, kind._strip_protocol(uri)


def is_local(fs: AbstractFileSystem) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def local_path(uri: str) -> str | None:
    """The path on this machine, or None where the URI is of an object store."""
    fs, path = open_store(uri)
    return path if is_local(fs) else None


def write_bytes(uri: str, data: bytes, private: bool = False) -> None:
    """Write a whole object: it appears complete or not at all.

    Locally: temporary file, fsync, rename; if ``private``, nobody else can read it at any time.
    Object stores publish a PUT atomically.
    """
    fs, path = open_store(uri)
    if is_local(fs):
        _write_local(path, [data], private)
        return
    with _naming(uri, "written"):
        fs.pipe_file(path, data)


def write_parts(uri: str, parts: Iterable[bytes | memoryview]) -> None:
    """As ``write_bytes``, from pieces: an object larger than the memory at hand."""
    fs, path = open_store(uri)
    if is_local(fs):
        _write_local(path, parts)
        return
    # uploads in blocks; a failed one is never published
    with _naming(uri, "written"), fs.open(path, "wb") as file:
        for part in parts:
            file.write(part)


def _write_local(path: str, parts: Iterable[bytes | memoryview], private: bool = False) -> None:
    temporary, size = f"{path}.{uuid.uuid4().hex[:8]}.tmp", 0
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        opener = partial(os.open, mode=0o600) if private else None
        with open(temporary, "wb", opener=opener) as file:
            for part in parts:
                size += file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written, after {size} bytes ({error.strerror}); "
                        "free space or choose another place") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def read_bytes(uri: str) -> bytes:
    """Read a whole object, or raise DataError naming it."""
    if (data := read_if_there(uri)) is None:
        raise DataError(f"{uri}: not found; check the path")
    return data


def read_if_there(uri: str, tail_bytes: int | None = None) -> bytes | None:
    """The object, or its last ``tail_bytes``; None if there is none.

    Raises
    ------
    DataError
        The store cannot be read.
    """
    return read_range(uri, -tail_bytes if tail_bytes else 0)


def read_range(uri: str, start: int, end: int | None = None) -> bytes | None:
    """The bytes that a slice ``[start:end]`` of the object has; None if there is no object.

    Raises
    ------
    DataError
        The store cannot be read.
    """
    fs, path = open_store(uri)
    with _naming(uri, "read"):
        try:
            if start or end is not None:
                start, end, _ = slice(start, end).indices(fs.size(path))
                if start >= end:
                    return b""
            data: bytes = fs.cat_file(path, start=start or None, end=end)
            return data
        except (FileNotFoundError, NotADirectoryError):
            return None


# ---- folders -------------------------------------------------------------------------------------

def exists(uri: str) -> bool:
    """Whether there is an object or a folder."""
    fs, path = open_store(uri)
    with _naming(uri, "read"):
        return bool(fs.exists(path))


def list_names(uri: str) -> list[str]:
    """Names of what lies directly in a folder, sorted; none if it does not exist."""
    fs, path = open_store(uri)
    with _naming(uri, "listed"):
        try:
            found = fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
    root = path.rstrip("/")  # some stores list the folder itself
    return sorted(item.rstrip("/").rpartition("/")[2] for item in found if item.rstrip("/") != root)


def walk(uri: str) -> list[str]:
    """Paths, from a folder on, of all objects at any depth below it, sorted."""
    fs, path = open_store(uri)
    with _naming(uri, "listed"):
        found = fs.find(path)
    start = len(path.rstrip("/")) + 1
    return sorted(item[start:] for item in found if len(item) > start)


def remove(uri: str) -> None:
    """Delete an object, or a folder and everything below it; nothing if it is not there."""
    fs, path = open_store(uri)
    with _naming(uri, "removed"):
        if not fs.exists(path):
            return
        if is_local(fs) or not MAGIC.search(path):
            fs.rm(path, recursive=True)
        else:  # one by one, for rm would take the path for a pattern
            for item in fs.find(path):
                fs.rm_file(item)


@contextmanager
def _naming(uri: str, deed: str) -> Iterator[None]:
    """What a store raises, as a DataError that names the URI."""
    try:
        yield
    except store_errors() as error:
        local = is_local(open_store(uri)[0])
        said = (error.strerror if local and isinstance(error, OSError) else None) or str(error)
        raise DataError(f"{uri}: cannot be {deed} ({said or type(error).__name__}); "
                        f"{_CHECK_DISK if local else _CHECK_STORE}") from error


# ---- tables --------------------------------------------------------------------------------------

def parquet_bytes(table: pa.Table) -> bytes:
    """A table as the bytes of a Parquet file."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def parquet_table(data: bytes) -> pa.Table:
    """The table in the bytes of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Not pq.read_table, not a Python file: Arrow's threads must need no interpreter, or one that
    # still runs when the process exits aborts it (github.com/apache/arrow/issues/34314).
    return pq.ParquetFile(pa.BufferReader(data)).read()


