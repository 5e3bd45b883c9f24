"""Tables: our own in Parquet, and those that cohorts deliver as text or Parquet.

    read_table, write_table, dicts    our manifests, archives and feeds, in Arrow
    read_columns                      a cohort's wide table, in bounded memory: some columns of it
    read_tsv, parse_table             a cohort's small table of delimited text, as a whole

Every value of a cohort's table is a string or None, so ids keep their zeros.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from neurojepa.errors import DataError
from neurojepa.storage import open_store, parquet_bytes, read_bytes, store_errors, write_bytes

Cells = dict[str, str | None]  # a row of a cohort's table: column -> value, None where missing
MISSING = {"", "n/a", "na", "nan", "none", "null"}
TABLE_ENDINGS = (".csv", ".tsv", ".txt", ".dat", ".parquet")
_BLOCK_BYTES = 4 << 20  # holds the longest row: 20,000 columns have about 300 kB
_ROWS = 4096
_ROWS_AT_ONCE = 10_000


# ---- our own tables ------------------------------------------------------------------------------

def read_table(path: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet table, or those columns of it.

    Raises
    ------
    DataError
        It is missing, not Parquet, or lacks one of the columns.
    """
    data = read_bytes(path)
    try:
        # Arrow's threads must need no interpreter, or one that still runs when the process exits
        # aborts it (github.com/apache/arrow/issues/34314): no pq.read_table, no Python file
        file = pq.ParquetFile(pa.BufferReader(data))
        if columns and (missing := set(columns) - set(file.schema_arrow.names)):
            raise DataError(f"{path}: lacks the columns {', '.join(sorted(missing))}; it is not a "
                            "manifest of this version; delete it and run index again")
        return file.read(columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a Parquet table ({str(error).splitlines()[0]}); make it "
                        "again") from error


def write_table(path: str, table: pa.Table) -> bytes:
    """Write a Parquet table as a whole; returns its bytes."""
    data = parquet_bytes(table)
    write_bytes(path, data)
    return data


def dicts(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows as dicts, of which a few thousand are held at a time."""
    for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
        yield from batch.to_pylist()


# ---- a cohort's wide table -----------------------------------------------------------------------


def read_columns(uri: str, wanted: Callable[[str], bool]) -> Iterator[Cells]:
    """The rows of a table as {column: value} of the wanted columns; what is missing is None.

    A byte-order mark and Latin-1 are understood; nothing is yielded where no column is wanted.

    Raises
    ------
    DataError
        The table cannot be read, or a row has more or fewer cells than the header.
    """
    fs, path = open_store(uri)
    try:
        with fs.open(path, "rb") as file:
            parquet = file.read(4) == b"PAR1"
            file.seek(0)
            for batch in (_parquet if parquet else _text)(file, wanted):
                columns = [[_value(cell) for cell in column.to_pylist()] for column in batch]
                for cells in zip(*columns, strict=True):
                    yield dict(zip(batch.schema.names, cells, strict=True))
    except FileNotFoundError as error:
        raise DataError(f"{uri}: no such table") from error
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{uri}: not a table ({str(error).splitlines()[0]}); fix or remove it"
                        ) from error
    except store_errors() as error:
        raise DataError(f"{uri}: cannot be read ({error}); check the store") from error


def _parquet(file: IO[bytes], wanted: Callable[[str], bool]) -> Iterator[pa.RecordBatch]:
    table = pq.ParquetFile(file, pre_buffer=False)
    names = [name for name in table.schema_arrow.names if wanted(name)]
    if names:
        # an Arrow thread that holds a Python file can abort the interpreter at exit
        yield from table.iter_batches(_ROWS, columns=names, use_threads=False)


def _text(file: IO[bytes], wanted: Callable[[str], bool]) -> Iterator[pa.RecordBatch]:
    line = _decoded(file.readline())
    file.seek(0)
    delimiter = next((mark for mark in "\t, " if mark in line), ",")
    header = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
    names = [name for name in header if wanted(name)]
    if names:
        # bytes, because a block that is not UTF-8 would fail as a whole
        yield from pyarrow.csv.open_csv(
            file, pyarrow.csv.ReadOptions(column_names=header, skip_rows=1,
                                          block_size=_BLOCK_BYTES),
            pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            pyarrow.csv.ConvertOptions(include_columns=names,
                                       column_types=dict.fromkeys(names, pa.binary())))


def _value(cell: Any) -> str | None:
    if cell is None:
        return None
    text = (_decoded(cell) if isinstance(cell, bytes) else str(cell)).strip()
    return None if text.lower() in MISSING else text


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


# ---- a cohort's small table ----------------------------------------------------------------------

def read_tsv(uri: str, delimiter: str = "\t") -> list[Cells]:
    """Rows of a delimited table as strings; a byte-order mark and ``n/a`` are understood.

    Raises
    ------
    DataError
        The table cannot be read or a row has more cells than the header.
    """
    return parse_table(read_bytes(uri), uri, delimiter)


def parse_table(data: bytes, uri: str, delimiter: str = "\t") -> list[Cells]:
    """As ``read_tsv``, of bytes already read; text that is not UTF-8 counts as Latin-1."""
    lines = csv.reader(io.StringIO(_decoded(data), newline=""), delimiter=delimiter)
    header = [name.strip() for name in next(lines, [])]
    rows = []
    for number, cells in enumerate(lines, 2):
        if any(cells[len(header):]):
            raise DataError(f"{uri} line {number}: more cells than the header has; fix the row")
        values = [None if value.strip().lower() in MISSING else value.strip()
                  for value in cells[:len(header)]]
        if any(values):
            values += [None] * (len(header) - len(values))
            rows.append(dict(zip(header, values, strict=True)))
    return rows


def as_float(value: object) -> float | None:
    """A finite number, or None."""
    try:
        number = float(value) if value is not None else None  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if number is not None and abs(number) < float("inf") else None
