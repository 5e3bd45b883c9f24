"""Files on any store: local disks and object stores alike, through fsspec.

What all packages share of storage: opening, whole reads, writes that appear complete or not at
all, rows of Parquet, hashes, and patience with a store that fails.  Drivers load when a URI needs
them.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from neurojepa.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from fsspec import AbstractFileSystem

T = TypeVar("T")
FIRST_DELAY_S, LONGEST_DELAY_S = 0.25, 8.0  # between tries; each is twice the one before
_CHECK_STORE = "check the store and AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
# what a store says when it is well
_ANSWERS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError,
            PermissionError)
_ANSWER_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)


def join(uri: str, *parts: str) -> str:
    """Path arithmetic that is right for local directories and URIs alike."""
    return "/".join([uri.rstrip("/"), *parts])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- opening, reading, writing -------------------------------------------------------------------

def open_store(uri: str, own_retries: bool = True) -> tuple[AbstractFileSystem, str]:
    """The file system and path of a URI; s3:// is configured by the usual AWS_* variables.

    An object store that refuses is noticed in seconds, one that is silent in two minutes.
    ``own_retries=False`` is for callers that ask again themselves: each request is made once.

    Raises
    ------
    DataError
        The URI's scheme is unknown or its driver is not installed.
    """
    import fsspec

    try:
        if not uri.startswith("s3:"):
            return fsspec.core.url_to_fs(uri)
        limits = {"connect_timeout": 5, "read_timeout": 20, "retries": {"total_max_attempts": 1}}
        fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False, config_kwargs=limits,
                                         skip_instance_cache=not own_retries)
        if not own_retries:  # else s3fs asks five times itself
            fs.retries = 1
        return fs, path
    except (ValueError, ImportError) as error:
        raise DataError(f"{uri}: cannot open this kind of store ({error})") from error


def is_local(fs: AbstractFileSystem) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole object: it appears complete or not at all.

    Locally: temporary file, fsync, rename.  Object stores publish a PUT atomically.
    """
    fs, path = open_store(uri)
    if is_local(fs):
        _write_local(path, [data])
        return
    try:
        fs.pipe_file(path, data)
    except store_errors() as error:
        raise DataError(f"{uri}: cannot be written ({error}); {_CHECK_STORE}") from error


def write_parts(uri: str, parts: Iterable[bytes | memoryview]) -> None:
    """As ``write_bytes``, from pieces: an object larger than the memory at hand."""
    fs, path = open_store(uri)
    if is_local(fs):
        _write_local(path, parts)
        return
    try:
        with fs.open(path, "wb") as file:  # uploads in blocks; a failed one is never published
            for part in parts:
                file.write(part)
    except store_errors() as error:
        raise DataError(f"{uri}: cannot be written ({error}); {_CHECK_STORE}") from error


def _write_local(path: str, parts: Iterable[bytes | memoryview]) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary, size = f"{path}.{uuid.uuid4().hex[:8]}.tmp", 0
    try:
        with open(temporary, "wb") as file:
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
    fs, path = open_store(uri)
    try:
        return fs.cat_file(path)
    except FileNotFoundError as error:
        raise DataError(f"{uri}: not found; check the path") from error
    except store_errors() as error:
        raise DataError(f"{uri}: cannot be read ({error}); {_CHECK_STORE}") from error


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


# ---- a store that fails --------------------------------------------------------------------------

def store_errors() -> tuple[type[Exception], ...]:
    """What a store raises when it cannot be reached (for ``except``); a driver's once loaded."""
    botocore, aiohttp = map(sys.modules.get, ("botocore.exceptions", "aiohttp"))
    return (OSError, *([botocore.BotoCoreError] if botocore else []),
            *([aiohttp.ClientError] if aiohttp else []))  # s3fs lets it pass: a cut answer


def is_outage(error: BaseException | None) -> bool:
    """Whether the store behind an error did not answer; "no such file" or "no space" is an answer.
    """
    while error is not None and not isinstance(error, store_errors()):
        error = error.__cause__
    return error is not None and not isinstance(error, _ANSWERS) and \
        getattr(error, "errno", None) not in _ANSWER_CODES


class Patience:
    """Does work again while the store fails; threads may share one.

    An outage costs time; only one that lasts longer than ``data.retry_s`` ends the run.  What is
    asked again must bear being done twice: the answer to a write that was done may be lost.

    Parameters
    ----------
    seconds : float
        For how long, from the first try of a piece of work.  What takes longer to fail is tried
        once more; with 0 nothing is.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.retries: deque[str] = deque()
        self._closed = threading.Event()

    def __call__(self, work: Callable[[], T]) -> T:
        """The result of ``work``, or its last error."""
        began, delay = time.monotonic(), FIRST_DELAY_S
        while True:
            try:
                return work()
            except Exception as error:
                left = began + self.seconds - time.monotonic()
                if delay == FIRST_DELAY_S and self.seconds:  # a slow failure is no refusal
                    left = max(left, delay)
                if not is_outage(error) or left <= 0 or self._closed.wait(min(delay, left)):
                    raise
                self.retries.append(f"{error or type(error).__name__}")
                delay = min(2 * delay, LONGEST_DELAY_S)

    def take(self) -> list[str]:
        """What the store said since then, when it was asked again."""
        return [self.retries.popleft() for _ in range(len(self.retries))]  # threads may append

    def close(self) -> None:
        """Ask no more: what waits to try again fails at once."""
        self._closed.set()
