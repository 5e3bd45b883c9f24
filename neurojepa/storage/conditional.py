"""Writes that happen only if nobody else has written meanwhile.

Object stores take a condition with a PUT (S3: If-Match, If-None-Match), so a writer that read an
object can replace exactly what it read.  Local disks have no such thing; there, writers of a folder
take turns under a lock of the kernel, which ends with the process that holds it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from neurojepa.errors import DataError
from neurojepa.storage.files import is_local, local_path, open_store, read_if_there, sha256
from neurojepa.storage.outage import store_errors

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

LOCK_S = 60.0  # a turn takes milliseconds; whoever keeps it for so long was stopped
_POLL_S = 0.01
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # some network file systems
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # FUSE, exFAT, SMB


def create(uri: str, data: bytes) -> bool:
    """Write an object that must not be there yet; False if it is.

    Of several writers at once, exactly one gets True.
    """
    fs, path = open_store(uri)
    try:
        if is_local(fs):
            return _create_local(path, data)
        return _put(fs, path, data, None) is not None
    except store_errors() as error:
        raise DataError(f"{uri}: cannot be created ({error}); check the store") from error


def read_version(uri: str) -> tuple[bytes | None, str | None]:
    """An object and the version that ``write_if`` takes; two times None if there is none."""
    fs, path = open_store(uri)
    if is_local(fs):
        data = read_if_there(uri)
        return data, None if data is None else sha256(data)
    try:
        version = _version(fs, path)
        data = fs.cat_file(path)
        # replaced between the two: then the condition fails and the writer looks again
        return data, version
    except FileNotFoundError:
        return None, None
    except store_errors() as error:
        raise DataError(f"{uri}: cannot be read ({error}); check the store") from error


def write_if(uri: str, data: bytes, version: str | None) -> bool:
    """Replace an object of a store if it still has ``version`` (None: if there is none).

    False where another writer came first; then nothing was written.
    """
    fs, path = open_store(uri)
    try:
        return _put(fs, path, data, version) is not None
    except store_errors() as error:
        raise DataError(f"{uri}: cannot be written ({error}); check the store") from error


@contextmanager
def locked(folder: str) -> Iterator[None]:
    """Take turns with all other processes in a folder's writes; object stores need no turn.

    File systems without locks go on without one: what is checked before a write may then change
    while it is made.

    Raises
    ------
    DataError
        Someone has kept the turn for a minute.
    """
    path = local_path(folder)
    if path is None:
        yield
        return
    try:
        os.makedirs(path, exist_ok=True)
        handle = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise DataError(f"{path}: cannot be locked ({error.strerror}); free space or choose "
                        "another run.dir") from error
    try:
        _lock(handle, path)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, path: str) -> None:
    end = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise DataError(f"another process has held {path}/lock for {LOCK_S:.0f} s; is it "
                                "stopped?") from error
            time.sleep(_POLL_S)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return
            raise DataError(f"{path}: cannot be locked ({error.strerror})") from error


def _create_local(path: str, data: bytes) -> bool:
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # whole at once, and only if there is none
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # a reader may see it half written; there is no better way on such a disk
            with open(path, "xb") as file:
                file.write(data)
        return True
    except FileExistsError:
        return False
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _put(fs: AbstractFileSystem, path: str, data: bytes, version: str | None) -> str | None:
    """What was asked for, or None where the condition does not hold."""
    try:
        if version is None:
            fs.pipe_file(path, data, mode="create")
        elif _has_etags(fs):
            fs.pipe_file(path, data, IfMatch=version)
        elif _version(fs, path) == version:
            fs.pipe_file(path, data)
        else:
            return None
        return path
    except FileExistsError:
        return None
    except (OSError, ValueError) as error:  # 412: the condition; 409: two at once
        if _refused(error):
            return None
        raise


def _refused(error: BaseException | None) -> bool:
    while error is not None:
        answer = getattr(error, "response", None)
        if isinstance(answer, dict):
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = answer.get("Error", {}).get("Code")
            if status in (409, 412) or code in ("PreconditionFailed", "ConditionalRequestConflict"):
                return True
        error = error.__cause__
    return False


def _has_etags(fs: AbstractFileSystem) -> bool:
    return "s3" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def _version(fs: AbstractFileSystem, path: str) -> str:
    if _has_etags(fs):
        return str(fs.info(path, refresh=True)["ETag"])
    return sha256(fs.cat_file(path))
