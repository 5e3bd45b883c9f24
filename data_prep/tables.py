"""Tables: our own in Parquet, and those that cohorts deliver as text or Parquet.

    read_table, write_table, dicts    our manifests, archives and feeds, in Arrow
    read_tsv, parse_table             a cohort's small table of delimited text, as a whole

Wide tables are read by wide.py.  Every value of a cohort's table is a string or None, so ids keep
their zeros.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.delimited import decoded, delimiter, header_cells, records
from neurojepa.errors import DataError
from neurojepa.storage import parquet_bytes, read_bytes, write_bytes

Cells = dict[str, str | None]  # a row of a cohort's table: column -> value, None where missing
MISSING = {"", "n/a", "na", "nan", "none", "null", "n.a.", "#n/a", "<na>", "#null!", ".", "-", "--",
           "?", "unknown", "missing", "not available"}
TABLE_ENDINGS = (".csv", ".tsv", ".txt", ".dat", ".parquet")
_ROWS = 4096
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f]")
POINTERS = (b"version https://git-lfs", b"/annex/objects/")  # how the text in a file's place begins
_ROWS_AT_ONCE = 10_000
_SIGNED = r"[+-]?"
_THOUSANDS = re.compile(_SIGNED + r"[1-9]\d{0,2}(,\d{3})+(\.\d+)?")
_DECIMAL = re.compile(_SIGNED + r"(\d*|[1-9]\d{0,2}(\.\d{3})+),\d+")
_COMMAS = re.compile(f"{_THOUSANDS.pattern}|{_DECIMAL.pattern}")
_ONE_COMMA = re.compile(_SIGNED + r"(\d*,(\d{1,2}|\d{4,})|0,\d+)")


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


# ---- a cohort's table ----------------------------------------------------------------------------

def read_tsv(uri: str, notes: Counter[str] | None = None) -> list[Cells]:
    """Rows of a delimited table as strings, see ``parse_table``.

    Raises
    ------
    DataError
        The table cannot be read, or as ``parse_table`` says.
    """
    return parse_table(read_bytes(uri), uri, notes)


def parse_table(data: bytes, uri: str, notes: Counter[str] | None = None) -> list[Cells]:
    """Rows of a delimited table, or of Parquet, as strings; what is missing is None.

    Encoding, delimiter and quotes are as delimited.py has them.  Rows may end early.  Columns
    without a name are left out; numbers with decimal commas or thousands get points.  ``notes``
    count what had to be mended.

    Raises
    ------
    DataError
        A row has more cells than the header, two columns of one name differ, the Parquet is
        damaged, or the bytes are a pointer of git-annex or git-lfs.
    """
    if data.startswith(b"PAR1"):
        try:
            return list(parquet_rows(io.BytesIO(data), lambda name: True))
        except pa.ArrowException as error:
            raise DataError(f"{uri}: not a table ({str(error).splitlines()[0]}); fix or remove it"
                            ) from error
    if data.startswith(POINTERS):
        raise DataError(f"{uri}: a pointer of git-annex or git-lfs, not the table; download its "
                        "content first")
    said: Counter[str] = Counter() if notes is None else notes
    name = uri.rsplit("/", 1)[-1]
    if not data.strip():
        said[f"{name}: is empty"] += 1
    text, encoding = decoded(data)
    if encoding != "utf-8":
        said[f"{name}: is {encoding}, not UTF-8: decoded"] += 1
    if _CONTROLS.search(text):
        said[f"{name}: control characters: removed"] += 1
        text = _CONTROLS.sub("", text)
    lines = re.split(r"\r\n|\n|\r", text)
    top = next((place for place, line in enumerate(lines)
                if line.strip() and not line.lower().startswith("sep=")), len(lines))
    mark = delimiter(lines[top], name) if top < len(lines) else ","
    header = header_cells(lines[top], mark) if top < len(lines) else []
    rows = []
    for record in records(lines[top + 1:], mark, len(header), top + 2):
        if any(cell.strip() for cell in record.cells[len(header):]):
            raise DataError(
                f"{uri} line {record.line}: more cells ({len(record.cells)}) than the header has "
                f"({len(header)}); put a cell that holds the delimiter in quotes, or name the "
                "column")
        if record.stray:
            said[stray_note(uri)] += 1
        values = [value_of(cell) for cell in record.cells[:len(header)]]
        if any(values) and len(values) < len(header):
            said[f"{name}: row with fewer cells than the header: the last are unknown"] += 1
        if any(values):
            rows.append(_named(header, values, f"{uri} line {record.line}"))
    _plain_numbers(rows, name, said, mark)
    return rows


def _named(header: list[str], values: list[str | None], where: str) -> Cells:
    row: Cells = {}
    for column, value in zip_longest(header, values):
        if column and (old := row.get(column)) is not None and value not in (None, old):
            raise DataError(f"{where}: two columns {column!r} hold {old!r} and {value!r}; rename "
                            "or remove one")
        if column:
            row[column] = row.get(column) if value is None else value
    return row


def _plain_numbers(rows: list[Cells], name: str, notes: Counter[str], mark: str) -> None:
    """Decimal commas and thousands to points, where a whole column agrees on what they mean."""
    for column in rows[0] if rows else ():
        cells = [(row, value) for row in rows if (value := row[column]) and "," in value]
        if not cells or not all(_COMMAS.fullmatch(value) for _, value in cells):
            continue
        thousands = all(_THOUSANDS.fullmatch(value) for _, value in cells)
        if thousands and mark == ";" and not any("." in (row[column] or "") for row in rows):
            thousands = False  # where semicolons part the cells, commas are decimal
        if not thousands and any(not _DECIMAL.fullmatch(value) for _, value in cells):
            continue
        for row, value in cells:
            row[column] = (value.replace(",", "") if thousands else
                           value.replace(".", "").replace(",", "."))
        notes[f"{name}: column {column}: {'thousands' if thousands else 'decimal'} commas, read "
              "as such"] += len(cells)


def as_float(value: object) -> float | None:
    """A finite number, or None.  A comma is a decimal point where it can be nothing else."""
    if isinstance(value, str) and _ONE_COMMA.fullmatch(value.strip()):
        value = value.replace(",", ".")
    try:
        number = float(value) if value is not None else None  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    if number is None or abs(number) == float("inf") or number != number:
        return None
    return None if isinstance(value, str) and "_" in value else number


def parquet_rows(file: IO[bytes], wanted: Callable[[str], bool]) -> Iterator[Cells]:
    table = pq.ParquetFile(file, pre_buffer=False)
    names = [name for name in table.schema_arrow.names if wanted(name)]
    if names:
        # an Arrow thread that holds a Python file can abort the interpreter at exit
        for batch in table.iter_batches(_ROWS, columns=names, use_threads=False):
            yield from rows_of(batch)


def rows_of(batch: pa.RecordBatch | pa.Table) -> Iterator[Cells]:
    columns = [[value_of(cell) for cell in column.to_pylist()] for column in batch.itercolumns()]
    for cells in zip(*columns, strict=True):
        yield dict(zip(batch.column_names, cells, strict=True))


def stray_note(uri: str) -> str:
    return f"{uri.rsplit('/', 1)[-1]}: row with a stray quote, taken as a character"


def value_of(cell: Any) -> str | None:
    """A cell as text, or None where it says that nothing is known."""
    if cell is None:
        return None
    text = (line_text(cell) if isinstance(cell, bytes) else str(cell)).strip()
    return None if text.lower() in MISSING else text


def line_text(line: bytes) -> str:
    """A line or a cell of a text that is no UTF-16."""
    for name in ("utf-8-sig", "windows-1252"):
        try:
            return line.decode(name)
        except UnicodeDecodeError:
            continue
    return line.decode("latin-1")
