"""Tables of a BIDS dataset: participants, sessions and phenotypes to age, sex, site and labels.

Ids are strings; where a spreadsheet has taken leading zeros away, the one participant that fits
is meant.  What contradicts itself is unknown, and counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from data_prep.cohorts.bids.names import habits
from data_prep.cohorts.source import Found, Source
from data_prep.tables import Cells, as_float, parse_table
from neurojepa.errors import DataError
from neurojepa.storage import read_bytes

TIES = ("family_id", "split_group")
SEXES = {"f": "F", "female": "F", "w": "F", "m": "M", "male": "M"}
_NO_LABEL = {"participant_id", "session_id", "age", "sex", "gender", *TIES}
_AGE_SLACK = 1.0  # years by which a visit may seem to precede the person's own age


@dataclass(frozen=True)
class Description:
    """What the tables tell of one session."""

    age: float | None
    sex: str | None
    site: str | None
    labels: dict[str, str]


class _PersonTable:
    """Rows by participant and session ("" where a row holds for all sessions)."""

    def __init__(self, uri: str, data: bytes, notes: Counter[str], needed: bool = True) -> None:
        self.name = uri.rsplit("/", 1)[-1]
        self._rows: dict[str, dict[str, Cells]] = defaultdict(dict)
        self.unused: set[str] = set()
        for row in parse_table(data, uri, notes):
            if "participant_id" not in row:
                if needed:
                    raise DataError(f"{uri}: has no column participant_id; add it or remove the "
                                    "table")
                notes[f"{self.name}: no column participant_id, not used"] += 1
                return
            person = (row["participant_id"] or "").removeprefix("sub-")
            session = (row.get("session_id") or "").removeprefix("ses-")
            if session in self._rows[person]:
                notes[f"{self.name}: repeated row, the first is used"] += 1
                _contradict(self._rows[person][session], row)
            else:
                self._rows[person][session] = row
        self.unused = set(self._rows)
        self._short: dict[str, list[str]] = defaultdict(list)
        for person in self._rows:
            self._short[person.lstrip("0")].append(person)

    def rows(self, participant: str, notes: Counter[str]) -> dict[str, Cells]:
        """Rows of a participant by session; empty where there are none."""
        if not self._rows:
            return {}
        if participant not in self._rows:
            same = self._short.get(participant.lstrip("0"), [])
            if len(same) != 1 or same[0] not in self.unused:
                return {}
            notes[f"{self.name}: id without its leading zeros, matched"] += 1
            participant = same[0]
        self.unused.discard(participant)
        return self._rows[participant]


def _contradict(first: Cells, other: Cells) -> None:
    """Mark age and sex that a repeated row has otherwise; None alone would mean not told."""
    for column in ("age", "sex", "gender"):
        if first.get(column) and other.get(column) and first[column] != other[column]:
            first[column] = "contradictory"


class BidsTables:
    """All tables of a dataset, asked person by person."""

    def __init__(self, source: Source, participants: Found | None,
                 phenotypes: list[str]) -> None:
        self._notes = source.notes
        self._people = _PersonTable(participants.uri, read_bytes(participants.uri), source.notes
                             ) if participants else None
        self._phenotypes = [_PersonTable(uri, read_bytes(uri), source.notes, needed=False)
                            for uri in phenotypes]

    def person(self, participant: str, sessions: dict[str, Cells]) -> BidsPerson:
        """What is known of a participant; ``sessions`` are the rows of their sessions.tsv."""
        rows = self._people.rows(participant, self._notes) if self._people else {}
        if not rows:
            self._notes["people without a row in participants.tsv"] += 1
        measured = [(table.name.split(".")[0], table.rows(participant, self._notes))
                    for table in self._phenotypes]
        return BidsPerson(rows, sessions=sessions, measured=measured, notes=self._notes)

    def finish(self) -> None:
        """Count the rows that nobody asked for."""
        for table in [self._people, *self._phenotypes]:
            if table and table.unused:
                self._notes[f"{table.name} rows without a scan that is taken"] += len(table.unused)


class BidsPerson:
    """The rows of one participant, from participants.tsv, sessions.tsv and phenotype tables."""

    def __init__(self, rows: dict[str, Cells], *, sessions: dict[str, Cells],
                 measured: list[tuple[str, dict[str, Cells]]], notes: Counter[str]) -> None:
        self._rows, self._sessions, self._measured = rows, sessions, measured
        self._notes = notes

    def ties(self) -> list[str]:
        """Tags shared with relatives."""
        return sorted({f"{column}:{value}" for row in self._rows.values() for column in TIES
                       if (value := row.get(column))})

    def describe(self, session: str) -> Description:
        """Age, sex, site and labels at a session; the row nearest to the session wins."""
        layers = [row for row in (self._rows.get(""), self._rows.get(session),
                                  self._sessions.get(session)) if row]
        facts = {name: value for row in layers for name, value in row.items() if value is not None}
        age, sex = self._age(layers), self._sex(layers)
        labels = {name: str(value) for name, value in (("age", age), ("sex", sex))
                  if value is not None}
        for name, value in facts.items():  # free text stays out: it may name people
            if name not in _NO_LABEL and (name in habits()["diagnosis"]
                                          or as_float(value) is not None):
                labels[name] = value
        for stem, rows in self._measured:
            for row in (rows.get(""), rows.get(session)):
                labels.update({f"{stem}.{name}": value for name, value in (row or {}).items()
                               if name not in _NO_LABEL and value and as_float(value) is not None})
        return Description(age, sex, facts.get("site") or facts.get("site_id"), labels)

    def _age(self, layers: list[Cells]) -> float | None:
        told = [row["age"] for row in layers if row.get("age")]
        ages = [as_float(age) for age in told]
        if "contradictory" in told or (
                ages and ages[0] is not None and ages[-1] is not None
                and ages[-1] < ages[0] - _AGE_SLACK):
            self._notes["contradictory age: unknown"] += 1
            return None
        age = ages[-1] if ages else None
        if told and (age is None or not 0 <= age <= 120):
            self._notes["age is not a number of years (such as 89+): unknown"] += 1
            return None
        return age

    def _sex(self, layers: list[Cells]) -> str | None:
        told = [value.lower() for row in layers if (value := row.get("sex") or row.get("gender"))]
        sexes = {SEXES.get(value) for value in told}
        if "contradictory" in told or len(sexes - {None}) > 1:
            self._notes["contradictory sex: unknown"] += 1
            return None
        if None in sexes:
            self._notes["sex is neither F nor M: unknown"] += 1
        return next(iter(sexes - {None}), None)
