"""The small tables of one person: sessions.tsv, and scans.tsv by which a cohort rules scans out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from data_prep.cohorts import words
from data_prep.cohorts.bids.derived import UNUSABLE, Taken
from data_prep.cohorts.bids.names import habits, parse_name, scan_key
from data_prep.cohorts.bids.tables import Rows, add_row, parse_dictionary
from data_prep.cohorts.columns import Columns
from data_prep.cohorts.source import Found, Source
from data_prep.tables import Cells, parse_table

TABLES = ("_scans.tsv", "_sessions.tsv")


class Visits:
    """Reads the tables of one person after another; ``top`` are the dataset's files by name."""

    def __init__(self, source: Source, top: Mapping[str, Found]) -> None:
        self.source, self.notes = source, source.notes
        self._described = {kind: self._dictionary(top[f"{kind}.json"])
                           for kind in ("sessions", "scans") if f"{kind}.json" in top}

    def sessions(self, files: list[Found], there: set[str]) -> Rows:
        """Rows of the person's sessions.tsv by session; ``there`` are the sessions with a scan."""
        rows: Rows = {}
        for table in _of_kind(files, "_sessions.tsv"):
            read, described = self._read(table, files)
            columns = Columns(read, described, name="sessions.tsv", source=self.source, whole=False)
            for row in map(columns.tidy, read):
                add_row(rows, row, "sessions.tsv", self.notes)
            told, scanned = ({name.lstrip("0") for name in names} for names in (rows, there))
            if without := len(scanned - told):
                self.notes["session without a row in sessions.tsv"] += without
            if unused := len(told - scanned):
                self.notes["sessions.tsv rows without a scan that is taken"] += unused
        return rows

    def rule_out(self, taken: list[Taken], files: list[Found]) -> None:
        """Set the reason of scans that the cohort rules out in scans.tsv.

        A row's scan is the one with its entities and suffix, whatever its folder and ending.
        """
        for table in _of_kind(files, "_scans.tsv"):
            base = parse_name(table.name).entities
            there = {scan_key(found.name, base) for found in files}
            named = set()
            for row in judged_rows(*self._read(table, files)):
                key, ruled_out = scan_key(row.get("filename") or "", base), is_ruled_out(row)
                named.add(key)
                if key not in there:
                    self.notes["scans.tsv names a file that is not there" + (
                        ", and rules it out" if ruled_out else "")] += 1
                for one in taken:
                    if ruled_out and scan_key(one.image.found.name, base) == key:
                        one.reason = UNUSABLE
            if unnamed := sum(scan_key(one.image.found.name, base) not in named for one in taken
                              if _applies(table, one)):
                self.notes["scan without a row in its scans.tsv"] += unnamed

    def _read(self, table: Found, files: list[Found]) -> tuple[list[Cells], dict[str, Any]]:
        """Rows of a table, and its dictionary: the dataset's own and the one beside it."""
        rows = person_rows(self.source, table)
        described = dict(self._described.get(parse_name(table.name).suffix, {}))
        for found in files:
            if found.path == f"{table.path.removesuffix('.tsv')}.json":
                described |= self._dictionary(found)
        return rows, described

    def _dictionary(self, found: Found) -> dict[str, Any]:
        return {} if found.size_bytes is None else parse_dictionary(self.source.read(found),
                                                                    self.notes)


def person_rows(source: Source, table: Found) -> list[Cells]:
    """Rows of a table of one person, without dates; what had to be mended is noted."""
    def parse(table: Found) -> tuple[list[Cells], dict[str, int]]:
        notes: Counter[str] = Counter()
        rows = parse_table(source.read(table), table.uri, notes)
        kind = f"{parse_name(table.name).suffix}.tsv"  # the table's own name has the person's id
        return ([{name: value for name, value in row.items() if name.lower() != "acq_time"}
                 for row in rows],
                {note.replace(table.name, kind): count for note, count in notes.items()})

    rows, notes = source.opened(table, parse)
    source.notes.update(notes)
    return rows


def _applies(table: Found, one: Taken) -> bool:
    return one.processing is None and one.image.found.path.startswith(f"{table.folder}/")


def _of_kind(files: list[Found], ending: str) -> Iterator[Found]:
    return (found for found in files if found.name.endswith(ending))


def judged_rows(rows: list[Cells], described: dict[str, Any]) -> Iterator[Cells]:
    """Rows of a scans.tsv by plain column names, their codes decoded."""
    lower = {words.plain(str(key)): value for key, value in described.items()}
    for row in rows:
        judged = {(name := words.plain(column)):
                  words.meaning(column, lower.get(name)).word(value)
                  for column, value in row.items()}
        judged.setdefault("filename", judged.get("file_name") or judged.get("file"))
        yield judged


def is_ruled_out(row: Cells) -> bool:
    """Whether a row of a scans.tsv says that its scan is of no use (bids.yaml: unusable)."""
    return any((row.get(column) or "").lower() in values
               for column, values in habits()["unusable"].items())
