"""What ABCD's tables say of a person: age, sex, site, scanner, family, and what is excluded.

Tables of all releases may lie side by side: ids and events come in several spellings, and one
column has several names (abcd.yaml).
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from data_prep.cohorts.source import Source
from data_prep.tables import as_float
from data_prep.wide import read_columns

_ID = re.compile(r"(?:sub-)?(?:NDAR_?INV)?([A-Z0-9]{8})$", re.IGNORECASE)
_SAME_AGE_YEARS = 0.2  # one table has months, another years
_OF_PERSON = ("sex", "family")


def participant_of(text: str) -> str | None:
    """The eight characters of an id in any spelling; None where it is no id.

    >>> participant_of("NDAR_INV0A1B2C3D"), participant_of("sub-0A1B2C3D")
    ('0A1B2C3D', '0A1B2C3D')
    """
    match = _ID.match(text)
    return match[1].upper() if match else None


def session_of(text: str, table: dict[str, Any]) -> str:
    """00A, 02A ... of an event or session in any spelling; an unknown one stays as it is."""
    plain = re.sub(r"[^a-z0-9]", "", text.removeprefix("ses-").lower())
    return str(table["sessions"].get(plain, text.removeprefix("ses-")))


class AbcdTables:
    """Facts of all participants, gathered from the tables that were added."""

    def __init__(self, table: dict[str, Any], source: Source) -> None:
        self.table, self.notes, self._source = table, source.notes, source
        self._names = {column: name for name, columns in table["columns"].items()
                       for column in columns}
        self._flags = {column for rule in table["exclusion"] for column in rule["columns"]}
        self._facts: dict[tuple[str, str, str], str | None] = {}  # participant, session, name
        self._excluded: set[tuple[str, str, str]] = set()  # participant, session, column
        self._known: set[str] = set()
        self._families: dict[str, set[str]] = defaultdict(set)

    def add(self, uri: str) -> bool:
        """Read a table; false where it is about nobody.  Raises DataError where it is damaged."""
        used = False
        told = self._source.columns.setdefault(uri.rsplit("/", 1)[-1], {})

        def wanted(column: str) -> bool:
            name = self._names.get(column.lower())
            if name or column.lower() in self._flags:
                told[column] = name or "exclusion"
            return column in told

        for row in read_columns(uri, wanted, self.notes):
            # NDA's tables have a row of descriptions below the header
            if participant := participant_of(self._facts_of(row).get("participant", "")):
                used = True
                self.add_row(participant, row)
        if not used:
            self.notes["table without participants: not used"] += 1
        return used

    def _facts_of(self, row: dict[str, str | None]) -> dict[str, str]:
        facts: dict[str, str] = {}
        for column, value in row.items():
            if value is not None and (name := self._names.get(column.lower())):
                facts[name] = value
        return facts

    def add_row(self, participant: str, row: dict[str, str | None]) -> None:
        """Take in what a row tells of a participant; what contradicts itself becomes unknown."""
        self._known.add(participant)
        facts = self._facts_of(row)
        facts.pop("participant", None)
        session = session_of(facts.pop("session", ""), self.table)
        self._excluded |= {(participant, session, column.lower()) for column, value in row.items()
                           if column.lower() in self._flags and as_float(value) == 0}
        months = as_float(facts.pop("age_months", None))
        if months is not None:
            facts.setdefault("age_years", str(round(months / 12, 3)))
        if family := facts.pop("family", None):
            # ids drift between visits and releases, so all of them tie
            self._families[participant].add(family.removesuffix(".0"))
        for name, value in facts.items():
            key = participant, "" if name in _OF_PERSON else session, name
            value = self.table["sexes"].get(value.lower(), value) if name == "sex" else value
            known = self._facts.setdefault(key, value)
            if known is not None and not _same(name, known, value):
                self._facts[key] = None
                self.notes[f"contradictory {name.removesuffix('_years')}: unknown"] += 1

    # ---- of one person

    def known(self, participant: str) -> bool:
        return participant in self._known

    def ties(self, participant: str) -> list[str]:
        return [f"family:{family}" for family in sorted(self._families[participant])]

    def age(self, participant: str, session: str) -> float | None:
        value = self._get(participant, session, "age_years")
        age = as_float(value)
        if value is not None and not 0 < (age or 0) < 120:
            self.notes["age is not a number of years: unknown"] += 1
            return None
        return age

    def sex(self, participant: str) -> str | None:
        value = self._get(participant, "", "sex")
        if value and value not in self.table["sexes"].values():
            self.notes["sex is neither F nor M: unknown"] += 1
            return None
        return value

    def site(self, participant: str, session: str) -> str | None:
        return self._get(participant, session, "site")

    def serial(self, participant: str, session: str) -> str | None:
        """Serial number of the scanner, as the tables have it."""
        return self._get(participant, session, "serial")

    def excluded(self, participant: str, session: str, *, modality: str, task: str) -> bool:
        """Whether the cohort's own quality control rules the scan out."""
        return any((participant, session, column) in self._excluded
                   for rule in self.table["exclusion"]
                   if rule["modality"] == modality and rule.get("task", task) == task
                   for column in rule["columns"])

    def _get(self, participant: str, session: str, name: str) -> str | None:
        for place in (session, ""):
            if (participant, place, name) in self._facts:
                return self._facts[participant, place, name]
        return None


def _same(name: str, one: str, other: str) -> bool:
    if name != "age_years":
        return one == other or (as_float(one) is not None and as_float(one) == as_float(other))
    ages = as_float(one), as_float(other)
    return one == other or (ages[0] is not None and ages[1] is not None
                            and abs(ages[0] - ages[1]) < _SAME_AGE_YEARS)
