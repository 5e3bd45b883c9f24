"""Wide tables of a cohort, read in bounded memory: only the wanted columns, row by row.

CSV, TSV, space-separated text and Parquet, local or on an object store.  Every value is a string,
so ids keep their zeros.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from data_prep.cohorts.base import MISSING
from neurojepa.errors import DataError
from neurojepa.storage import open_store, store_errors

TABLE_ENDINGS = (".csv", ".tsv", ".txt", ".dat", ".parquet")
_BLOCK_BYTES = 4 << 20  # holds the longest row: 20,000 columns have about 300 kB
_ROWS = 4096


def read_columns(uri: str, wanted: Callable[[str], bool]) -> Iterator[dict[str, str | None]]:
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
