"""A cohort's wide table, in bounded memory: some columns of many rows of text or Parquet.

Text goes through Arrow by blocks of whole lines for as long as every quote closes in its line;
from the first that does not, row by row (delimited.py).
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.csv

from data_prep.delimited import Record, delimiter, header_cells, records, wide_encoding
from data_prep.tables import Cells, line_text, parquet_rows, rows_of, stray_note, value_of
from neurojepa.errors import DataError
from neurojepa.storage import open_store, store_errors

_BLOCK_BYTES = 4 << 20  # more than the longest row: 20,000 columns have about 300 kB


def read_columns(uri: str, wanted: Callable[[str], bool],
                 notes: Counter[str] | None = None) -> Iterator[Cells]:
    """The rows of a table as {column: value} of the wanted columns; what is missing is None.

    Encodings, delimiters and quotes are as delimited.py has them; nothing is yielded where no
    column is wanted.  ``notes`` count the rows whose quotes were taken as characters.

    Raises
    ------
    DataError
        The table cannot be read, has a wanted column twice, or a row has more or fewer cells than
        the header.
    """
    fs, path = open_store(uri)
    try:
        with fs.open(path, "rb") as file:
            parquet = file.read(4) == b"PAR1"
            file.seek(0)
            yield from parquet_rows(file, wanted) if parquet else _text(file, uri, wanted, notes)
    except FileNotFoundError as error:
        raise DataError(f"{uri}: no such table") from error
    except IsADirectoryError as error:
        raise DataError(f"{uri}: is a folder; name the table in it") from error
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{uri}: not a table ({str(error).splitlines()[0]}); fix or remove it"
                        ) from error
    except store_errors() as error:
        raise DataError(f"{uri}: cannot be read ({error}); check the store") from error


def _text(file: IO[bytes], uri: str, wanted: Callable[[str], bool],
          notes: Counter[str] | None) -> Iterator[Cells]:
    """By blocks of whole lines at Arrow's speed, as long as every quote closes in its line."""
    blocks = _line_blocks(file)
    first = next(blocks, b"")
    number, top, rest = _top(first)
    mark = delimiter(top, uri)
    header = header_cells(top, mark)
    places = {place: name for place, name in enumerate(header) if wanted(name)}
    twice = {name for name, count in Counter(places.values()).items() if count > 1}
    if twice:
        raise ValueError(f"has two columns {sorted(twice)[0]!r}: rename or remove one")
    if not places:
        return
    for block in chain([rest], blocks):
        rows = _arrow(block, header, places, mark)
        if rows is not None:
            yield from rows_of(rows)
            number += block.count(b"\n")
            continue
        lines = (line_text(line) for line in _split(chain([block], blocks)))
        for record in records(lines, mark, len(header), number + 1):
            yield _row(record, places, header, uri, notes)


def _row(record: Record, places: dict[int, str], header: list[str], uri: str,
         notes: Counter[str] | None) -> Cells:
    cells = record.cells
    if len(cells) < len(header) or any(cell.strip() for cell in cells[len(header):]):
        raise ValueError(f"line {record.line} has {len(cells)} cells, the header {len(header)}: "
                         "put a cell that holds the delimiter in quotes, fill in what is missing")
    if record.stray and notes is not None:
        notes[stray_note(uri)] += 1
    return {name: value_of(cells[place]) for place, name in places.items()}


def _line_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """The text in UTF-8 (or a one-byte encoding), in blocks that end where a line does."""
    start = file.read(_BLOCK_BYTES)
    wide = wide_encoding(start)
    recode = getincrementaldecoder(wide)() if wide else None  # damage is a UnicodeDecodeError
    unix = b"\n" in start or b"\r" not in start  # lone \r: as old Macs and Excel on them write
    left, data = b"", start
    while data:
        if recode:
            data = recode.decode(data).removeprefix("\ufeff").encode()
        data = left + (data if unix else data.replace(b"\r", b"\n"))
        whole, end, left = data.rpartition(b"\n")
        if end:
            yield whole + end
        data = file.read(_BLOCK_BYTES)
    if recode:
        recode.decode(b"", final=True)  # half a character
    if left.strip():
        yield left


def _top(block: bytes) -> tuple[int, str, bytes]:
    """Number and text of the header, and what follows it; Excel's ``sep=`` and blank lines go."""
    number, rest = 0, block
    while rest:
        line, _, rest = rest.partition(b"\n")
        number += 1
        text = line_text(line).strip("\r\n ")
        if text and not text.lower().startswith("sep="):
            return number, text, rest
    return number, "", b""


def _split(blocks: Iterable[bytes]) -> Iterator[bytes]:
    for block in blocks:
        lines = block.split(b"\n")
        yield from (line.removesuffix(b"\r") for line in (lines if lines[-1] else lines[:-1]))


def _arrow(block: bytes, header: list[str], places: dict[int, str], mark: str) -> pa.Table | None:
    """The wanted cells of a block as bytes; None where a quote stays open, or a row is ragged."""
    if b'"' in block and not _quotes_close(np.frombuffer(block, np.uint8), mark):
        return None
    if not block.strip():
        return pa.table({name: pa.array([], pa.binary()) for name in places.values()})
    names = [str(place) for place in range(len(header))]
    chosen = [str(place) for place in places]
    try:
        # bytes, because a block that is not UTF-8 would fail as a whole
        table = pyarrow.csv.read_csv(
            pa.BufferReader(block),
            pyarrow.csv.ReadOptions(column_names=names, block_size=len(block) + 1),
            pyarrow.csv.ParseOptions(delimiter=mark),
            pyarrow.csv.ConvertOptions(include_columns=chosen,
                                       column_types=dict.fromkeys(chosen, pa.binary())))
    except pa.ArrowInvalid:
        return None
    return table.rename_columns(list(places.values()))


def _quotes_close(data: np.ndarray, mark: str) -> bool:
    """Whether every line of a text (uint8) has pairs of quotes, each at an edge of its cell."""
    quotes = np.flatnonzero(data == ord('"'))
    in_line = np.searchsorted(quotes, np.flatnonzero(data == ord("\n")))
    if (np.append(in_line, quotes.size) % 2).any():
        return False
    edge = np.zeros(256, bool)
    edge[np.frombuffer(f'{mark}"\r\n'.encode(), np.uint8)] = True
    before = edge[data[quotes - 1]] | (quotes == 0)
    return bool((before | edge[data[np.minimum(quotes + 1, data.size - 1)]]).all())
