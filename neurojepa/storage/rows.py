"""Files of rows (.jsonl) in a run directory: metrics.jsonl and events.jsonl.

Floats are written with repr, so they read back exactly; a value that is not finite becomes null.
A kill can cut the last line: readers leave it out and the next append removes it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any

from neurojepa.errors import DataError
from neurojepa.storage.files import MAGIC, local_path, open_store, read_if_there, write_bytes
from neurojepa.storage.outage import store_errors

TAIL_BYTES = 1 << 20  # longer than any row: one of the supervisor's names every rank


def read_rows(uri: str) -> list[dict[str, Any]]:
    """All whole rows; none if there is no file.

    Raises
    ------
    DataError
        The file cannot be read, or a line that is not the last is no row.
    """
    data = read_if_there(uri) or b""
    return [_row(uri, line) for line in data.split(b"\n")[:-1] if line]


def write_rows(uri: str, rows: list[dict[str, Any]]) -> None:
    """Replace the file by these rows, at once."""
    write_bytes(uri, rows_bytes(rows))


def append_rows(uri: str, rows: list[dict[str, Any]]) -> None:
    """Append rows, all or none.

    An object store makes a new object of the old one and the rows: S3 copies what is large on its
    own side, so the cost does not grow with the file; other stores get the whole object anew.
    Rows that the object ends with already are not added again: the answer to a try before was lost.
    """
    if (path := local_path(uri)) is None:
        _append_object(uri, rows)
        return
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "ab+") as file:
            end = file.seek(0, os.SEEK_END)
            tail = file.seek(max(0, end - TAIL_BYTES))
            file.truncate(tail + file.read().rfind(b"\n") + 1)
            file.write(rows_bytes(rows))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"{path}: cannot append ({error.strerror}); free space or choose another "
                        "run.dir") from error


def drop_rows(uri: str, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop rows from the end of the file up to the last one that ``keep`` accepts."""
    data = read_if_there(uri) or b""
    end = data.rfind(b"\n") + 1  # what follows was cut by a kill
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        if keep(_row(uri, data[start:end])):
            break
        end = start
    if end < len(data):
        write_bytes(uri, data[:end])


def _append_object(uri: str, rows: list[dict[str, Any]]) -> None:
    fs, path = open_store(uri)
    lines = rows_bytes(rows)
    appends = not MAGIC.search(path)  # s3fs does it by a method that takes the path for a pattern
    try:
        if fs.exists(path) and fs.tail(path, len(lines)) == lines:
            return
        if appends:
            with fs.open(path, "ab") as file:
                file.write(lines)
    except (NotImplementedError, ValueError):  # this kind of store cannot append
        appends = False
    except store_errors() as error:
        raise DataError(f"{uri}: cannot append ({error}); check the store") from error
    if not appends:
        write_rows(uri, read_rows(uri) + rows)


def _row(uri: str, line: bytes) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
        return row
    except ValueError as error:
        raise DataError(f"{uri}: {line[:80]!r} is no row ({error}); was the disk full? Delete that "
                        "line") from error


def rows_bytes(rows: list[dict[str, Any]]) -> bytes:
    """Rows as they stand in a file."""
    return "".join(json.dumps({key: _finite(value) for key, value in row.items()}) + "\n"
                   for row in rows).encode()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
