"""What UK Biobank's tables say of a person: age, sex, centre, diagnoses, relatives.

Columns come as ``participant.p21003_i2`` (research platform) or ``21003-2.0`` (older extracts), in
any number of tables.  Dates serve to compute an age and go no further.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from datetime import date
from typing import Any

from data_prep.tables import as_float
from data_prep.wide import read_columns

_COLUMN = re.compile(r"(?:participant\.)?p(\d+)(?:_i(\d+))?(?:_a\d+)?$|(\d+)-(\d+)\.\d+$")
_EID = ("eid", "participant.eid")
_ICD10 = re.compile(r"\b[A-Z]\d[0-9A-Z][0-9A-Z.]*")
Key = tuple[str, str]  # name of columns in the yaml, instance ("" where the field has none)


class UkbTables:
    """Facts of all people that have them, gathered from the tables that were added."""

    def __init__(self, table: dict[str, Any], notes: Counter[str]) -> None:
        self.table, self.notes = table, notes
        self.ties: dict[str, list[str]] = defaultdict(list)
        self._names = {field: name for name, field in table["columns"].items()}
        self._facts: dict[str, dict[Key, str | None]] = {}
        self._diagnosed = False

    def add(self, uri: str) -> None:
        """Read a table; raises DataError where it is damaged.  Tables without eids are counted."""
        first, second = self.table["pairs"]
        keys: dict[str, Key] = {}

        def wanted(column: str) -> bool:
            if key := self._key(column):
                keys[column] = key
            return key is not None or column in (*_EID, first, second)

        used = False
        for row in read_columns(uri, wanted):
            used = used or bool(row.keys() & {*_EID, first})
            if (one := row.get(first)) and (other := row.get(second)):
                self.ties[one].append(f"kin:{one}:{other}")
                self.ties[other].append(f"kin:{one}:{other}")
            elif (eid := row.get("eid") or row.get("participant.eid")):
                self._merge(eid, keys, row)
        if not used:
            self.notes["table without rows or without a column eid: not used"] += 1

    def _key(self, column: str) -> Key | None:
        match = _COLUMN.match(column)
        name = self._names.get(match[1] or match[3]) if match else None
        if not match or not name:
            return None
        instanced = name in ("age", "date", "centre")
        return name, (match[2] or match[4] or "") if instanced else ""

    def _merge(self, eid: str, keys: Mapping[str, Key], row: dict[str, str | None]) -> None:
        """Add a row to what is known of a person; what contradicts itself becomes unknown."""
        if eid.startswith("-"):
            self.notes["table rows of people who withdrew (negative eid): not used"] += 1
            return
        found: dict[Key, str] = {}
        for column, key in keys.items():
            self._diagnosed = self._diagnosed or key[0] == "diagnoses"
            value = row[column]
            if value is None or value in self.table["null_codes"]:
                continue
            if key[0] == "diagnoses":  # one column with a list, or one column a code
                found[key] = f"{found.get(key, '')} {value}"
            elif key[1] in ("", *self.table["visits"]):
                found[key] = value
        visits = self.table["visits"].keys()
        if visits & {key[1] for key in keys.values()} and not visits & {key[1] for key in found}:
            self.notes["table rows without an imaging visit: not used"] += 1  # most of the cohort
            return
        facts = self._facts.setdefault(eid, {})
        for key, value in found.items():
            if key[0] == "diagnoses":
                facts[key] = f"{facts.get(key) or ''} {value}".strip()
            elif facts.setdefault(key, value) != value:
                facts[key] = None
                self.notes[f"{key[0]} differs between tables: unknown"] += 1

    # ---- of one person

    def known(self, eid: str) -> bool:
        return eid in self._facts

    def sex(self, eid: str) -> str | None:
        value = self._get(eid, "sex")
        sex: str | None = self.table["sexes"].get((value or "").lower())
        if value and not sex:
            self.notes["sex is neither of the known codes: unknown"] += 1
        return sex

    def site(self, eid: str, visit: str) -> str | None:
        centre = self._get(eid, "centre", visit)
        return self.table["centres"].get(centre, centre) if centre else None

    def age(self, eid: str, visit: str) -> float | None:
        """Years at a visit: as the table has them, else from the month of birth and the date."""
        value = self._get(eid, "age", visit)
        age = as_float(value)
        if value is None:
            year, month = (as_float(self._get(eid, name)) for name in ("birth_year", "birth_month"))
            day = _date(self._get(eid, "date", visit))
            if day and year:
                age = round(day.year + (day.month - (month or 6.5)) / 12 - year, 1)
        if age is not None and 0 < age < 120:
            return age
        if value is not None:
            self.notes["age is not a number of years: unknown"] += 1
        return None

    def labels(self, eid: str) -> dict[str, str]:
        """icd10_NAME -> "1" or "0", for people of a table that has the column of diagnoses."""
        if not self._diagnosed or eid not in self._facts:
            return {}
        codes = _ICD10.findall(self._get(eid, "diagnoses") or "")
        return {f"icd10_{name}": str(int(any(code.startswith(tuple(prefixes)) for code in codes)))
                for name, prefixes in self.table["diagnoses"].items()}

    def related(self, eid: str) -> bool:
        """Whether the table says that the person has relatives among the participants."""
        return (as_float(self._get(eid, "kinship")) or 0) > 0

    def _get(self, eid: str, name: str, visit: str = "") -> str | None:
        return self._facts.get(eid, {}).get((name, visit))


def _date(value: str | None) -> date | None:
    try:
        return date.fromisoformat((value or "")[:10])
    except ValueError:
        return None
