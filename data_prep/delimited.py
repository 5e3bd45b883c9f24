"""Delimited text as people have it: encodings, delimiters, and quotes that close or do not.

    decoded     bytes -> text: UTF-8, UTF-16 with or without its mark, else Windows-1252 or Latin-1
    delimiter   of a header: tab, semicolon, comma, bar or spaces
    records     lines -> rows of cells; a stray quote is a character and swallows no row

A quoted cell may hold delimiters and line breaks, as REDCap and pandas write it.  Its quote ends
it only before a delimiter or the end of a line.  Where quotes do not close, or where every line
they would swallow is a whole row by itself, they are characters of their cells.  The csv module,
pandas and Arrow read on to the next quote instead, over any number of rows, so they get the lines
whose quotes close and no others.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

_LONGEST_CELL = 200  # lines of one quoted cell
_SNIFFED = 1 << 12  # bytes in which UTF-16 shows by its zeros
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"),
          (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def wide_encoding(data: bytes) -> str | None:
    """utf-16 or utf-32 where the beginning of a text says so, else None."""
    marked = next((name for mark, name in _MARKS if data.startswith(mark)), "")
    if marked.startswith(("utf-16", "utf-32")):
        return marked
    start = data[:_SNIFFED]
    for zeros, name in ((start[1::2], "utf-16-le"), (start[::2], "utf-16-be")):
        if len(start) >= 4 and zeros.count(0) > 0.6 * len(zeros):
            return name
    return None


def decoded(data: bytes) -> tuple[str, str]:
    """The text, and the encoding it was in: utf-8, utf-16, windows-1252 or latin-1.

    "damaged utf-16" where some of it is none: there the text has U+FFFD.
    """
    if wide := wide_encoding(data):
        text = data.decode(wide, "replace").removeprefix("\ufeff")
        return text, "damaged " * ("\ufffd" in text) + wide[:6]
    for name in ("utf-8-sig", "windows-1252"):
        try:
            return data.decode(name), name.removesuffix("-sig")
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1"), "latin-1"


def delimiter(header: str, file_name: str) -> str:
    """What parts the names of a header; where it has one name alone, what the ending promises."""
    outside = re.sub(r"\([^)]*\)|\[[^]]*\]", "", "".join(header.split('"')[::2]))
    if "\t" in outside:
        return "\t"
    counts = {mark: outside.count(mark) for mark in ",;|"}
    best = max(counts, key=lambda mark: counts[mark])
    if counts[best]:
        return best
    usual = "\t" if file_name.lower().endswith((".tsv", ".tab")) else ","
    return " " if len(outside.split()) > 1 else usual


@dataclass(frozen=True, slots=True)
class Record:
    """A row: where it begins, its cells, and whether quotes were taken as characters."""

    line: int
    cells: list[str]
    stray: bool = False


def records(lines: Iterable[str], mark: str, width: int, first: int = 1) -> Iterator[Record]:
    """Rows of lines (without their ends), blank ones left out; ``first`` is the first's number.

    ``width``: cells of the header.  Rows may have fewer or more: that is the caller's to judge.
    """
    rest = iter(lines)
    ahead: deque[str] = deque()
    number = first - 1
    while ahead or (ahead := deque(islice(rest, 1))):
        number += 1
        line = ahead.popleft()
        if not line.strip():
            continue
        if '"' not in line:
            yield Record(number, _literal(line, mark))
            continue
        cells = _quoted([line], mark)
        if cells is not None:
            literal = _literal(line, mark)
            odd = len(cells) != width and len(literal) == width
            yield Record(number, literal if odd else cells, odd)
            continue
        ahead.extend(islice(rest, _LONGEST_CELL - len(ahead)))
        found = _several(line, ahead, mark, width)
        if found is None:
            yield Record(number, _literal(line, mark), stray=True)
            continue
        cells, used = found
        yield Record(number, cells)
        number += used
        for _ in range(used):
            ahead.popleft()


def header_cells(line: str, mark: str) -> list[str]:
    """The names of a header."""
    cells = _quoted([line], mark) if '"' in line else None
    return [cell.strip() for cell in (_literal(line, mark) if cells is None else cells)]


def _several(line: str, ahead: deque[str], mark: str, width: int) -> tuple[list[str], int] | None:
    """A row whose quoted cell goes on in the next lines, and how many of them it takes."""
    for used, following in enumerate(ahead, 1):
        if '"' not in following:
            continue
        taken = [line, *islice(ahead, used)]
        cells = _quoted(taken, mark)
        if cells is not None:
            if len(cells) > width or all(_is_whole(one, mark, width) for one in taken):
                return None
            return cells, used
    return None


def _is_whole(line: str, mark: str, width: int) -> bool:
    return len(_literal(line, mark)) == width or len(_quoted([line], mark) or ()) == width


def _literal(line: str, mark: str) -> list[str]:
    return line.split() if mark == " " else line.split(mark)


def _quoted(lines: list[str], mark: str) -> list[str] | None:
    """Cells of a row in these lines; None where a quote is left open."""
    text = "\n".join(lines)
    if len(lines) == 1 and len(text) < csv.field_size_limit():  # the common case, at C's speed
        try:
            return next(csv.reader([text], delimiter=mark, strict=True,
                                   skipinitialspace=mark == " "))
        except csv.Error:
            pass
    cells, at = [], 0
    while True:
        if text.startswith('"', at):
            end = _closing(text, at + 1, mark)
            if end is None:
                return None
            cells.append(text[at + 1:end].replace('""', '"'))
            at = end + 1
        else:
            end = text.find(mark, at)
            end = len(text) if end < 0 else end
            cells.append(text[at:end])
            at = end
        if at >= len(text):
            return cells
        at += 1  # the delimiter


def _closing(text: str, start: int, mark: str) -> int | None:
    """Where a quoted cell ends: at a quote, not a doubled one, before a delimiter or the end."""
    at = text.find('"', start)
    while at >= 0:
        if text.startswith('""', at):
            at = text.find('"', at + 2)
        elif at + 1 == len(text) or text[at + 1] in (mark, "\n"):
            return at
        else:
            at = text.find('"', at + 1)
    return None
