"""What an index opened, kept for the next one: MANIFEST.seen.parquet (uri, size, modified, value).

While an index runs, the rows lie in a private temporary database of SQLite, which holds a few MB
in memory and the rest in an unnamed file, however many files there are.
"""

from __future__ import annotations

import io
import json
import sqlite3
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from neurojepa.errors import DataError
from neurojepa.storage import read_if_there, write_bytes

VERSION = b"3"  # to be raised when readers take other things out of the files they open
_SCHEMA = pa.schema([("uri", pa.string()), ("size_bytes", pa.int64()), ("modified", pa.float64()),
                     ("value", pa.string())])
_ROW_GROUP = 20_000


class Seen:
    """A mapping from URI to (size, modification time, JSON value): ``Memory`` of source.py.

    Raises
    ------
    DataError
        ``load`` finds a file that is no such table.
    """

    def __init__(self) -> None:
        self._rows = sqlite3.connect("", isolation_level=None)
        self._rows.execute("CREATE TABLE seen (uri TEXT PRIMARY KEY, size_bytes INTEGER, "
                           "modified REAL, value TEXT) WITHOUT ROWID")
        self._rows.execute("BEGIN")

    def get(self, uri: str) -> tuple[int | None, float | None, Any] | None:
        row = self._rows.execute("SELECT size_bytes, modified, value FROM seen WHERE uri = ?",
                                 (uri,)).fetchone()
        return row and (row[0], row[1], json.loads(row[2]))

    def __setitem__(self, uri: str, known: tuple[int | None, float | None, Any]) -> None:
        self._rows.execute("INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?)",
                           (uri, known[0], known[1], json.dumps(known[2])))

    @classmethod
    def load(cls, path: str, reader: str) -> Seen:
        """What the index at ``path`` knew; nothing if it is missing or of another reader."""
        seen = cls()
        if (data := read_if_there(path)) is None:
            return seen
        try:
            file = pq.ParquetFile(pa.BufferReader(data))
            if (file.schema_arrow.metadata or {}).get(b"reader") == _mark(reader):
                for batch in file.iter_batches(_ROW_GROUP):
                    columns = [batch.column(name).to_pylist() for name in _SCHEMA.names]
                    seen._rows.executemany("INSERT INTO seen VALUES (?, ?, ?, ?)",
                                            zip(*columns, strict=True))
        except (pa.ArrowInvalid, OSError, KeyError) as error:
            raise DataError(f"{path}: not a table of an index ({str(error).splitlines()[0]}); "
                            "delete it, every file will be opened again") from error
        return seen

    def save(self, path: str, reader: str) -> None:
        """Write the table, ordered by URI."""
        buffer = io.BytesIO()
        schema = _SCHEMA.with_metadata({b"reader": _mark(reader)})
        rows = self._rows.execute("SELECT * FROM seen ORDER BY uri")
        with pq.ParquetWriter(buffer, schema) as writer:
            while group := rows.fetchmany(_ROW_GROUP):
                columns = [list(column) for column in zip(*group, strict=True)]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        write_bytes(path, buffer.getvalue())


def _mark(reader: str) -> bytes:
    return reader.encode() + b" " + VERSION
