"""Tables of a BIDS dataset: participants, sessions and phenotypes to age, sex, site and labels.

Ids are strings; where a spreadsheet has taken leading zeros away, the one participant that fits
is meant.  What contradicts itself is unknown, and counted.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.cohorts.columns import PEOPLE, TIES, Columns
from data_prep.cohorts.sidecars import load_json
from data_prep.cohorts.source import Source
from data_prep.tables import Cells, as_float, parse_table
from neurojepa.errors import DataError
from neurojepa.storage import read_bytes, read_if_there

_AGE_SLACK = 1.0  # years by which a visit may seem to precede the person's own age
_CONTRADICTORY = "contradictory"
_WHOLE = re.compile(r"^(\d+)\.0$")  # what spreadsheets make of a number
Rows = dict[str, Cells]  # of a participant, by session; "" holds for all


@dataclass(frozen=True)
class Description:
    """What the tables tell of one session."""

    age: float | None
    sex: str | None
    site: str | None
    labels: dict[str, str]


def dictionary_of(uri: str, notes: Counter[str]) -> dict[str, Any]:
    """The data dictionary beside a table: X.json of X.tsv; empty where there is none."""
    data = read_if_there(f"{uri.rpartition('.')[0]}.json")
    return {} if data is None else parse_dictionary(data, notes)


def parse_dictionary(data: bytes, notes: Counter[str]) -> dict[str, Any]:
    """Of a data dictionary's bytes; empty, with a note, where they are no JSON object."""
    content, mended = load_json(data)
    if content is None:
        notes["data dictionary unreadable, units and levels of its table are unknown"] += 1
    notes.update(f"data dictionary: {note}" for note in mended)
    return content or {}


class PersonTable:
    """Rows by participant and session ("" where a row holds for all sessions).

    Raises
    ------
    DataError
        It cannot be read, or ``needed`` and it has no column of participants.
    """

    def __init__(self, uri: str, source: Source, needed: bool = True, given: bool = False) -> None:
        self.uri, self.name, notes = uri, uri.rsplit("/", 1)[-1], source.notes
        self._rows: dict[str, Rows] = defaultdict(dict)
        self._short: dict[str, list[str]] = defaultdict(list)
        self.matched = False
        rows = parse_table(read_bytes(uri), uri, notes)
        if not rows and given:
            raise DataError(f"{uri}: has no row; fill it or leave it out")
        columns = Columns(rows, dictionary_of(uri, notes), name=self.name, source=source,
                          bare_id=given)
        if rows and "participant_id" not in columns.roles:
            if needed:
                raise DataError(f"{uri}: has no column participant_id (it has "
                                f"{', '.join(list(rows[0])[:8])}); add it or remove the table")
            notes[f"{self.name}: no column participant_id, not used"] += 1
            source.columns.pop(self.name)
            rows = []
        for row in map(columns.tidy, rows):
            person = _WHOLE.sub(r"\1", (row["participant_id"] or "").removeprefix("sub-"))
            add_row(self._rows[person], row, self.name, notes)
        self.unused = set(self._rows)
        for person in self._rows:
            self._short[person.lstrip("0")].append(person)

    def rows(self, participant: str, notes: Counter[str]) -> Rows:
        """Rows of a participant by session; empty where there are none."""
        if not self._rows:
            return {}
        if participant not in self._rows:
            same = self._short.get(participant.lstrip("0"), [])
            if len(same) != 1 or same[0] not in self.unused:
                return {}
            notes[f"{self.name}: id without its leading zeros, matched"] += 1
            participant = same[0]
        self.matched = True
        self.unused.discard(participant)
        return self._rows[participant]


def add_row(rows: Rows, row: Cells, table: str, notes: Counter[str]) -> None:
    """Add a participant's row; of a repeated one only what contradicts the first is kept.

    Age and sex are marked then; None alone would mean not told.
    """
    session = (row.get("session_id") or "").removeprefix("ses-")
    first = rows.setdefault(session, row)
    if first is row:
        return
    notes[f"{table}: repeated row, the first is used"] += 1
    for column in ("age", "sex"):
        one, two = first.get(column), row.get(column)
        if one and two and one != two and (as_float(one) is None or as_float(one) != as_float(two)):
            first[column] = _CONTRADICTORY


class PersonTables:
    """All tables of people, asked person by person.

    Parameters
    ----------
    people
        URIs of tables whose columns are the person's own: participants.tsv.
    measured
        Of tables whose columns are labels TABLE.COLUMN: phenotypes, and what ``given`` names.
    given
        Of the tables that the user named, every one of which has to be of use.
    """

    def __init__(self, source: Source, *, people: Sequence[str], measured: Sequence[str] = (),
                 given: Sequence[str] = ()) -> None:
        self._notes, self._source = source.notes, source
        self._given = set(given)
        self._people = [PersonTable(uri, source, given=uri in given) for uri in people]
        self._measured = [PersonTable(uri, source, needed=uri in given, given=uri in given)
                          for uri in measured]
        for table in self._measured:
            if table.uri not in self._given:  # ages and sexes at the time of a questionnaire
                for column, told in source.columns.get(table.name, {}).items():
                    if told.startswith(("age", "sex", "site")):
                        source.columns[table.name][column] = f"{told}: not used"

    def person(self, participant: str, sessions: Rows) -> Person:
        """What is known of a participant; ``sessions`` are the rows of their sessions.tsv."""
        own = [table.rows(participant, self._notes) for table in self._people]
        if self._people and not any(own):
            names = " and ".join(table.name for table in self._people)
            self._notes[f"people without a row in {names}"] += 1
        measured = [(table, table.rows(participant, self._notes)) for table in self._measured]
        return Person([*(rows for table, rows in measured if table.uri in self._given), *own],
                      [*(("", rows) for rows in own),
                       *((f"{table.name.split('.')[0]}.", rows) for table, rows in measured)],
                      sessions=sessions, notes=self._notes)

    def finish(self) -> None:
        """Count the rows that nobody asked for.

        Raises
        ------
        DataError
            A table that the user named is about nobody who has a scan.
        """
        for table in [*self._people, *self._measured]:
            if table.unused:
                self._notes[f"{table.name} rows without a scan that is taken"] += len(table.unused)
            if table.uri in self._given and not table.matched:
                raise DataError(f"{table.uri}: none of its {len(table.unused)} participants has a "
                                "scan here; write its ids as file names and folders have them")


class Person:
    """The rows of one participant by session, from several tables and their sessions.tsv.

    Parameters
    ----------
    facts
        Rows of the tables that tell age, sex, site and relatives; later ones win.
    labels
        Rows of the tables that give labels, with what their names begin with.
    """

    def __init__(self, facts: Sequence[Rows], labels: Sequence[tuple[str, Rows]], *,
                 sessions: Rows, notes: Counter[str]) -> None:
        self._facts, self._labels, self._sessions = facts, labels, sessions
        self._notes = notes
        self._asked: set[int] = set()  # rows that a session was described by

    def ties(self) -> list[str]:
        """Tags shared with relatives."""
        return sorted({f"{column}:{value}" for rows in self._facts for row in rows.values()
                       for column in TIES if (value := row.get(column))})

    def describe(self, session: str) -> Description:
        """Age, sex, site and labels at a session; the row nearest to the session wins."""
        layers = [row for rows in self._facts if (row := rows.get(""))]
        layers += [row for rows in (*self._facts, self._sessions)
                   if (row := self._visit(rows, session))]
        age, sex = self._age(layers), self._sex(layers)
        labels = {name: str(value) for name, value in (("age", age), ("sex", sex))
                  if value is not None}
        labels |= self._given(session) | _labels(self._visit(self._sessions, session))
        site = [row["site"] for row in layers if row.get("site")]
        return Description(age, sex, site[-1] if site else None, labels)

    def count_unused(self) -> None:
        """Count rows of visits that nobody asked for; once, when all sessions are described."""
        rows = {id(row): row for table in (*self._facts, *(rows for _, rows in self._labels),
                                           self._sessions)
                for session, row in table.items() if session}
        if unused := len(rows.keys() - self._asked):
            self._notes["rows of visits without a scan that is taken: not used"] += unused

    def _visit(self, rows: Rows, session: str) -> Cells | None:
        """The row of a visit, spelt with or without zeros; without visits, the person's only."""
        known = [row for name, row in rows.items()
                 if name and (name == session or name.lstrip("0") == session.lstrip("0"))]
        if not known and session == "1" and len(rows) == 1 and "" not in rows:
            known = list(rows.values())  # "1" is the session of a tree without that level
        if len(known) > 1:
            known = [rows[session]] if session in rows else []
        self._asked |= {id(row) for row in known}
        return known[0] if known else None

    def _given(self, session: str) -> dict[str, str]:
        """Labels of all tables; one that two tables tell differently is left out."""
        labels: dict[str, str] = {}
        odd = set()
        for start, rows in self._labels:
            own = {start + name: value for name, value in
                   {**_labels(rows.get("")), **_labels(self._visit(rows, session))}.items()}
            odd |= {name for name in own.keys() & labels.keys() if own[name] != labels[name]}
            labels |= own
        if odd:
            self._notes["label that two tables tell differently: left out"] += len(odd)
        return {name: value for name, value in labels.items() if name not in odd}

    def _age(self, layers: list[Cells]) -> float | None:
        told = [age for row in layers if (age := row.get("age"))]
        ages = [as_float(age) for age in told]
        if _CONTRADICTORY in told or (
                ages and ages[0] is not None and ages[-1] is not None
                and ages[-1] < ages[0] - _AGE_SLACK):
            self._notes["contradictory age: unknown"] += 1
            return None
        return ages[-1] if ages else None

    def _sex(self, layers: list[Cells]) -> str | None:
        told = {sex for row in layers if (sex := row.get("sex"))}
        sexes = told & {"F", "M"}
        if _CONTRADICTORY in told or len(sexes) > 1:
            self._notes["contradictory sex: unknown"] += 1
            return None
        if codes := {sex for sex in told - sexes if as_float(sex) is not None}:
            self._notes[f"sex is a code ({min(codes)}) that no Levels of a data dictionary "
                        "explain: unknown"] += 1
        elif told - sexes:
            self._notes["sex is neither F nor M: unknown"] += 1
        return next(iter(sexes), None)


def _labels(row: Cells | None) -> dict[str, str]:
    return {name: value for name, value in (row or {}).items()
            if name not in PEOPLE and value is not None}
