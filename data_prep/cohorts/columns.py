"""A table of people: which column is what, and its rows with ages in years, codes in words.

Columns are found by name without regard to case and spelling (words.py), and a data dictionary
beside the table (participants.json) gives units and levels.  Of the other columns numbers become
labels, and words where they are classes: told by Levels, known as a diagnosis (bids.yaml), or of
few values that people share.  Free text, dates and what may name people stay out.  What was taken
for what is told to the source, for index to print.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from data_prep.cohorts import words
from data_prep.cohorts.source import Source
from data_prep.tables import Cells, as_float

UNREADABLE = "unreadable"  # an age that was told and is not known
TIES = ("family_id", "split_group")
PEOPLE = ("participant_id", "session_id", "age", "sex", "site", *TIES)
CLASSES = {"diagnosis", "group", "dx", "diag", "dx_group", "diagnostic_group", "clinical_group",
           "patient_group", "handedness", "hand"}  # words even where no two people share one
_MOST_CLASSES, _LONGEST_CLASS = 30, 40
_MAY_NAME = {"name", "names", "firstname", "lastname", "surname", "initials", "email", "mail",
             "phone", "telephone", "address", "street", "city", "zip", "zipcode",
             "postcode", "mrn", "ssn", "dob", "birthdate", "birthday", "comment",
             "comments", "note", "notes", "remark", "remarks", "date"}
_DATE = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}.*|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}.*|"
                   r"\d{1,2}[- ][A-Za-z]{3}[- ]\d{2,4}")
# Codes for "missing" that statisticians use; only where no other value is near them.
_CODES_BELOW = {-9.0, -99.0, -999.0, -9999.0, -99999.0, -8.0, -88.0, -888.0, -7.0, -77.0, -777.0}
_CODES_ABOVE = {777.0, 888.0, 999.0, 7777.0, 8888.0, 9999.0, 99999.0, 999999.0}
_NEAR = 5.0  # a code above is this many times the largest other value


class Columns:
    """What the columns of a table are.

    Parameters
    ----------
    rows
        The whole table, or with ``whole`` false some rows of it: a person's own.
    described
        The data dictionary: what it says of each column.
    name
        Of the table, for what is told.
    bare_id
        Whether a column "id" may be the participants'.
    """

    def __init__(self, rows: list[Cells], described: dict[str, Any], *, name: str, source: Source,
                 whole: bool = True, bare_id: bool = False) -> None:
        self.name, self.notes, self._whole = name, source.notes, whole
        self._told = source.columns.setdefault(name, {})
        header = list(rows[0]) if rows else []
        lower = {words.plain(str(key)): value for key, value in described.items()}
        self.roles = words.roles([column for column in header
                                  if bare_id or column.lower() != "id"])
        self._meaning = {column: words.meaning(column, lower.get(words.plain(column)))
                         for column in header}
        self._examples: dict[str, str] = {}
        for role, column in self.roles.items():
            self._told[column] = self._of_role(role, column)
        self._ages_with_sex = "age" in self.roles and any(
            re.fullmatch(r"\d+ ?f", (row[self.roles["age"]] or "").lower()) for row in rows)
        self.labels: dict[str, str] = {}  # name of a label by column
        self._numbers: set[str] = set()
        self._missing: dict[str, set[float]] = {}
        for column in header:
            if column not in self.roles.values():
                self._judge(column, [self._meaning[column].word(row[column]) for row in rows])

    def _of_role(self, role: str, column: str) -> str:
        meaning = self._meaning[column]
        if role == "age":
            unit = meaning.unit
            if unit == "":
                return "age from conception, not from birth: not used"
            return f"age in {unit}" if unit else (
                f"age in {meaning.told_unit!r}, which is no unit of time known here: only values "
                "with a unit of their own are used")
        return role + (", decoded by its levels" if meaning.levels else "")

    def _judge(self, column: str, values: list[str | None]) -> None:
        """Whether a column becomes a label, and of which kind."""
        known = [value for value in values if value is not None]
        if not known:
            return
        plain = words.plain(column)
        numbers = [number for value in known if (number := as_float(value)) is not None]
        levels = self._meaning[column].levels
        taken = {*self._meaning, *self.labels.values()}  # Group beside group keeps its own name
        name = plain if plain in CLASSES - taken else column
        if set(plain.split("_")) & _MAY_NAME and not levels:
            told = "left out: may name people"
        elif 2 * len(numbers) >= len(known):
            told = "label, numbers"
            self.labels[column] = name
            self._numbers.add(column)
            if codes := _codes_for_missing(numbers):
                spelt = ", ".join(f"{code:g}" for code in sorted(codes))
                if self._whole:
                    self._missing[column] = codes
                    told += f" ({spelt} taken as missing)"
                else:  # of one person: too few to tell
                    self.notes[f"{self.name}: {spelt} of {column} taken as a number; if it means "
                               "missing, say so in Levels"] += 1
            if strays := len(known) - len(numbers):
                told += f" ({strays} values that are none left out)"
        elif sum(bool(_DATE.fullmatch(value)) for value in known) * 2 > len(known):
            told = "left out: dates"
        elif levels or plain in CLASSES or (self._whole and _are_classes(known)):
            told = f"label, words ({len(set(known))} classes)" if self._whole else "label, words"
            self.labels[column] = name
        else:
            told = "left out: free text" if self._whole else (
                "left out: words without Levels in a data dictionary")
        before = self._told.get(column)
        if before is None or not before.startswith("label"):
            self._told[column] = told

    def tidy(self, row: Cells) -> Cells:
        """A row by role and by name of label: age in years, sex F or M or as it is, decoded."""
        out: Cells = {}
        for role, column in self.roles.items():
            value = self._meaning[column].word(row[column])
            if value is not None and role == "age":
                value = self._age(column, value)
            elif value is not None and role == "sex":
                value = words.sex(value) or value
            out[role] = value
        for column, name in self.labels.items():
            value = self._meaning[column].word(row[column])
            if column in self._numbers and value is not None:
                number = as_float(value)
                if number is None or number in self._missing.get(column, ()):
                    value = None
                elif "," in value:
                    value = value.replace(",", ".")
            out[name] = value
        return out

    def _age(self, column: str, told: str) -> str:
        unit = self._meaning[column].unit
        if unit == "":
            age, why = None, "counted from conception, not from birth"
        elif self._ages_with_sex and re.fullmatch(r"\d+ ?[mf]", told.lower()):
            age, why = None, "written with a sex (such as 45M)"
        elif unit is None and as_float(told) is not None:
            age, why = None, f"in {self._meaning[column].told_unit!r}, no unit that is known"
        else:
            age, why = words.years(told, unit or "years")
        if age is None:
            if "plausible" in why:
                told = self._examples.setdefault(why, told)
                why += f" (column {column} of {self.name}, such as {told})"
            self.notes[f"age is {why}: unknown"] += 1
            return UNREADABLE
        return str(age) if as_float(told) != age else told


def _are_classes(values: list[str]) -> bool:
    """Whether words are classes: few, short, and shared by at least half of the people."""
    counts = Counter(values)
    shared = sum(count for count in counts.values() if count > 1)
    return (len(counts) <= _MOST_CLASSES and max(map(len, counts)) <= _LONGEST_CLASS
            and 2 * shared >= len(values))


def _codes_for_missing(numbers: list[float]) -> set[float]:
    others = [number for number in numbers if number not in _CODES_BELOW | _CODES_ABOVE]
    below = _CODES_BELOW if min(others, default=0) >= 0 else set()
    above = {code for code in _CODES_ABOVE if others and code > _NEAR * max(others)}
    return (below | above) & set(numbers)
