"""Withdrawal lists as studies deliver them, to the pseudonyms of the people on them.

    w12345_20250131.csv     UK Biobank: one id a line, no header (an "eid" line is allowed)
    anything.csv            columns cohort and participant, original ids

Lists are cumulative: of those of one study the newest counts, by the date in the name, else by the
file's time.  A study is the name without its date.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from data_prep.delimited import decoded, delimiter, header_cells, records
from data_prep.identity import pseudonym
from neurojepa.errors import ConfigError, DataError
from neurojepa.storage import sha256

_DATED = re.compile(r"^(?P<study>.*?)[_-]?(?P<date>\d{4}-?\d{2}-?\d{2})$")
_HEADERS = {"eid", "id", "participant", "participant_id"}


@dataclass(frozen=True)
class WithdrawalList:
    """One list: whose, of when, and who is on it (cohort, original id)."""

    path: str
    study: str
    date: str  # YYYYMMDD, followed by the time of day where it is the file's own time
    sha256: str
    people: list[tuple[str, str]]
    bare: bool  # without the column cohort

    def record(self) -> dict[str, str | int]:
        """What an audit log says about it."""
        return {"study": self.study, "date": self.date, "sha256": self.sha256,
                "num_people": len(self.people)}

    def pseudonyms(self, key: bytes) -> set[str]:
        return {pseudonym(key, cohort, name) for cohort, name in self.people}


def read_lists(paths: Sequence[str], cohort: str | None = None) -> list[WithdrawalList]:
    """The newest list of each study among files and folders of ``*.csv``; prints which.

    Parameters
    ----------
    cohort
        Name of the cohort that lists without that column are about.

    Raises
    ------
    DataError
        A list cannot be read, names nobody, or a line lacks an id.
    ConfigError
        A list needs ``cohort``, or lists of two studies share one.
    """
    files = [file for path in paths for file in _files(Path(path))]
    newest: dict[str, tuple[str, Path]] = {}
    for file in files:
        study, date = _study_and_date(file)
        if study not in newest or date > newest[study][0]:
            newest[study] = date, file
    lists = [_read(file, study, date, cohort) for study, (date, file) in sorted(newest.items())]
    bare = [each.study for each in lists if each.bare]
    if len(bare) > 1:  # ids of one application mean other people in another
        raise ConfigError(f"--list: {' and '.join(bare)} are lists of different studies, but "
                          f"both would be about {cohort}; withdraw them one by one")
    for each in lists:
        print(f"list {each.study} of {each.date[:8]}: {len(each.people)} people")
    if older := len(files) - len(lists):
        print(f"{older} older lists not used")
    return lists


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if not (files := sorted(path.glob("*.csv"))):
        raise DataError(f"{path}: no *.csv in this folder; name a withdrawal list")
    return files


def _study_and_date(file: Path) -> tuple[str, str]:
    if match := _DATED.match(file.stem):
        date = match["date"].replace("-", "")
        try:
            datetime.strptime(date, "%Y%m%d")
            return match["study"], date
        except ValueError:
            pass  # eight digits that are no date
    try:
        modified = file.stat().st_mtime
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    return file.stem, datetime.fromtimestamp(modified, UTC).strftime("%Y%m%dT%H%M%S")


def _read(file: Path, study: str, date: str, cohort: str | None) -> WithdrawalList:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    text, encoding = decoded(data)
    if encoding.startswith("damaged"):
        raise DataError(f"{file}: is {encoding}; fetch it again, or save it as UTF-8")
    lines = re.split(r"\r\n|\n|\r", text)
    top = next(filter(str.strip, lines), "")
    mark = delimiter(top, file.name)
    rows = [(record.line, [cell.strip() for cell in record.cells])
            for record in records(lines, mark, len(header_cells(top, mark)))
            if any(record.cells)]
    header = rows[0][1] if rows else []
    if bare := "cohort" not in header:
        people = _bare(file, [row for row in rows if row[1] != header
                              or header[0].lower() not in _HEADERS], cohort)
    else:
        people = _with_columns(file, header, rows[1:])
    if not people:
        raise DataError(f"{file}: names nobody; an empty withdrawal list is most likely a "
                        "failed download")
    return WithdrawalList(str(file), study, date, sha256(data), people, bare)


def _with_columns(file: Path, header: list[str],
                  rows: list[tuple[int, list[str]]]) -> list[tuple[str, str]]:
    people = []
    for number, row in rows:
        cells = dict(zip(header, row, strict=False))
        if not cells.get("cohort") or not cells.get("participant"):
            raise DataError(f"{file} line {number}: needs the columns cohort and participant, "
                            "both filled")
        people.append((cells["cohort"], cells["participant"].removeprefix("sub-")))
    return people


def _bare(file: Path, rows: list[tuple[int, list[str]]],
          cohort: str | None) -> list[tuple[str, str]]:
    people = []
    for number, row in rows:
        if len(row) != 1:
            raise DataError(f"{file} line {number}: {len(row)} cells; a list has one id a line, or "
                            "the columns cohort and participant")
        if cohort is None:
            raise ConfigError(f"{file}: does not say of which cohort; name it by --cohort, as "
                              "index did by --name")
        people.append((cohort, row[0].removeprefix("sub-")))
    return people
