"""Files of rows (.jsonl) in a run directory: metrics.jsonl and events.jsonl.

Floats are written with repr, so they read back exactly; a value that is not finite becomes null.
A kill can cut the last line: readers leave it out and the next append removes it.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

from neurojepa.errors import DataError
from neurojepa.feed.format import is_local, open_store, read_bytes, store_errors, write_bytes

TAIL_BYTES = 1 << 16  # longer than any row


def read_rows(uri: str) -> list[dict[str, Any]]:
    """All whole rows; none if there is no file."""
    fs, path = open_store(uri)
    try:
        if not fs.exists(path):
            return []
    except store_errors() as error:
        raise DataError(f"{uri}: cannot be read ({error}); check the store") from error
    return [json.loads(line) for line in read_bytes(uri).split(b"\n")[:-1] if line]


def write_rows(uri: str, rows: list[dict[str, Any]]) -> None:
    """Replace the file by these rows, at once."""
    write_bytes(uri, _lines(rows))


def append_rows(uri: str, rows: list[dict[str, Any]]) -> None:
    """Append rows; an object store, which cannot append, gets the whole object anew."""
    fs, path = open_store(uri)
    if not is_local(fs):
        write_rows(uri, read_rows(uri) + rows)
        return
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "ab+") as file:
            end = file.seek(0, os.SEEK_END)
            tail = file.seek(max(0, end - TAIL_BYTES))
            file.truncate(tail + file.read().rfind(b"\n") + 1)
            file.write(_lines(rows))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(f"{path}: cannot append ({error.strerror}); free space or choose another "
                        "run.dir") from error


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps({key: _finite(value) for key, value in row.items()}) + "\n"
                   for row in rows).encode()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
