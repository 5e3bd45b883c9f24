"""What UK Biobank's tables say of a person: age, sex, centre, diagnoses, relatives.

Columns come as ``participant.p21003_i2`` or with titles (research platform), as ``21003-2.0``,
``f.21003.2.0`` or ``n_21003_2_0`` (older extracts and their programs), in any number of tables,
with codes or with words.  Dates serve to compute an age and go no further.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from datetime import date
from typing import Any

from data_prep.cohorts.source import Source
from data_prep.tables import as_float
from data_prep.wide import read_columns

_COLUMN = re.compile(r"(?:participant\.)?p(\d+)(?:_i(\d+))?(?:_a\d+)?$|(\d+)-(\d+)\.\d+$"
                     r"|(?:x\.?|f\.)(\d+)[._](\d+)[._]\d+$|(?:[ns]|ts|\w+_f)_?(\d+)_(\d+)_\d+$",
                     re.IGNORECASE)
_TITLE = re.compile(r"(.+?)(?: \| instance (\d+))?(?: \| array \d+)?$")
_EID = ("eid", "participant.eid", "f.eid", "n_eid", "participant id")
_ICD10 = re.compile(r"\b[A-Z]\d[0-9A-Z][0-9A-Z.]*")
Key = tuple[str, str]  # name of columns in the yaml, instance ("" where the field has none)


class UkbTables:
    """Facts of all people that have them, gathered from the tables that were added."""

    def __init__(self, table: dict[str, Any], source: Source) -> None:
        self.table, self.notes, self._source = table, source.notes, source
        self.ties: dict[str, list[str]] = defaultdict(list)
        self._names = {field: name for name, field in table["columns"].items()}
        self._facts: dict[str, dict[Key, str | None]] = {}
        self._diagnosed = False

    def add(self, uri: str) -> bool:
        """Read a table; false where it is about nobody.  Raises DataError where it is damaged."""
        first, second = self.table["pairs"]
        keys: dict[str, Key] = {}
        eids: list[str] = []
        told = self._source.columns.setdefault(uri.rsplit("/", 1)[-1], {})

        def wanted(column: str) -> bool:
            if key := self._key(column):
                keys[column] = key
                told[column] = key[0] + (f" at visit {key[1]}" if key[1] else "")
            elif column.lower() in _EID:
                eids.append(column)
                told[column] = "participant"
            return column in keys or column in eids or column in (first, second)

        used = False
        for row in read_columns(uri, wanted, self.notes):
            eid = next((row[name] for name in eids if row[name]), None)
            used = used or bool(eids) or first in row
            if (one := row.get(first)) and (other := row.get(second)):
                self.ties[one].append(f"kin:{one}:{other}")
                self.ties[other].append(f"kin:{one}:{other}")
            elif eid:
                self._merge(eid.removesuffix(".0"), keys, row)
        if not used:
            self.notes["table without rows or without a column eid: not used"] += 1
        return used

    def _key(self, column: str) -> Key | None:
        match = _COLUMN.match(column)
        if match:
            parts = [part for part in match.groups() if part is not None]
            number, visit = parts[0], parts[1] if len(parts) > 1 else ""
        else:
            title = _TITLE.match(column.lower().removeprefix("participant."))
            number = self.table["titles"].get(title[1], "") if title else ""
            visit = (title and title[2]) or ""
        name = self._names.get(number)
        if not name:
            return None
        return name, visit if name in ("age", "date", "centre") else ""

    def _word(self, name: str, value: str) -> str:
        """A value in the one spelling of its field; numbers without what says nothing."""
        plain = re.sub(r"\.0+$", "", value)
        decoded: str = self.table["words"].get(name, {}).get(plain.lower(), plain)
        return decoded[:10] if name == "date" else decoded

    def _merge(self, eid: str, keys: Mapping[str, Key], row: dict[str, str | None]) -> None:
        """Add a row to what is known of a person; what contradicts itself becomes unknown."""
        if eid.startswith("-"):
            self.notes["table rows of people who withdrew (negative eid): not used"] += 1
            return
        found: dict[Key, str] = {}
        for column, key in keys.items():
            self._diagnosed = self._diagnosed or key[0] == "diagnoses"
            value = row[column]
            if value is None or value.lower() in self.table["null_codes"]:
                continue
            if key[0] != "diagnoses":
                value = self._word(key[0], value)
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
        sex = self._get(eid, "sex")
        if sex and sex not in ("F", "M"):
            sex = None
            self.notes["sex is neither of the known codes: unknown"] += 1
        return sex

    def site(self, eid: str, visit: str) -> str | None:
        return self._get(eid, "centre", visit)

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
