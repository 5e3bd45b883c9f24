"""What ADNI's tables say: images, visits and diagnoses, and the readers' quality.

A table is known by its columns: names of files carry dates and change.  adni.yaml lists the
spellings.  Dates stay in here: what leaves are ages, days and codes of visits.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from datetime import date, datetime
from pathlib import Path
from typing import Any

import yaml

from data_prep.cohorts.source import Source
from data_prep.tables import Cells, as_float
from data_prep.wide import read_columns

RULES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("adni.yaml").read_text("utf-8"))
PTID = re.compile(r"\d{3}_S_(\d{4,5})")
DAYS_A_YEAR = 365.25


@dataclass(slots=True)
class Listed:
    """What tables say of one image; None where they do not."""

    description: str | None = None
    modality: str | None = None
    type: str | None = None
    series: str | None = None
    visit: str | None = None
    day: date | None = None
    age: float | None = None  # at the scan, years
    field_strength: float | None = None
    scanner: str | None = None


@dataclass(slots=True)
class Visit:
    """One coded visit of a person."""

    day: date | None = None
    diagnoses: set[str] = field(default_factory=set)
    numbers: dict[str, str] = field(default_factory=dict)

    @property
    def diagnosis(self) -> str | None:
        """CN, MCI or AD; None where tables disagree or are silent."""
        return next(iter(self.diagnoses)) if len(self.diagnoses) == 1 else None


@dataclass
class AdniPerson:
    """One participant over all tables."""

    visits: dict[str, Visit] = field(default_factory=dict)  # by code: bl, m06, ...
    sexes: set[str] = field(default_factory=set)
    ages: set[float] = field(default_factory=set)  # at baseline

    def visit_of(self, day: date | None, told: str | None) -> str | None:
        """Code of the visit nearest to a day, else the code that a table gives a scan."""
        if day is not None:
            near = sorted((abs((visit.day - day).days), code)
                          for code, visit in self.visits.items() if visit.day)
            if near and near[0][0] <= RULES["visit_window_days"]:
                return near[0][1]
            if near:
                return None  # an unscheduled scan, whatever code it was filed under
        return visit_code(told)

    @property
    def baseline(self) -> date | None:
        return self.visits["bl"].day if "bl" in self.visits else None

    def age(self, day: date | None, code: str | None) -> float | None:
        """Years at a day, or at a visit where the day is unknown: baseline and time elapsed."""
        if len(self.ages) != 1:
            return None
        if day and self.baseline:
            return next(iter(self.ages)) + (day - self.baseline).days / DAYS_A_YEAR
        return next(iter(self.ages)) + months(code) / 12 if code else None

    def progression(self, code: str) -> str | None:
        """sMCI or pMCI for a visit with MCI (Moradi 2014, counted from that visit), else None.

        sMCI: MCI at every visit, the last one at least the horizon later.  pMCI: AD within the
        horizon; between no visit without impairment, after it none without AD.
        """
        known = sorted((months(other), visit.diagnosis) for other, visit in self.visits.items()
                       if visit.diagnosis)
        start, horizon = months(code), RULES["progression_months"]
        later = [(month - start, diagnosis) for month, diagnosis in known if month >= start]
        if not later or later[0] != (0, "MCI"):
            return None
        if all(diagnosis == "MCI" for _, diagnosis in known):
            return "sMCI" if later[-1][0] >= horizon else None
        first = next((place for place, (_, diagnosis) in enumerate(later) if diagnosis == "AD"),
                     None)
        if first is None or later[first][0] > horizon:
            return None
        steady = (all(diagnosis == "MCI" for _, diagnosis in later[:first])
                  and all(diagnosis == "AD" for _, diagnosis in later[first:]))
        return "pMCI" if steady else None


class AdniTables:
    """All tables of a source, by image number and by the number of a person (RID)."""

    def __init__(self, source: Source) -> None:
        self.notes, self._source = source.notes, source
        self.images: defaultdict[str, Listed] = defaultdict(Listed)
        self.collected: set[str] = set()  # images of a download's own list
        self.people: defaultdict[str, AdniPerson] = defaultdict(AdniPerson)
        self._of_series: defaultdict[str, list[str]] = defaultdict(list)
        self._failed: set[str] = set()  # I and an image number, or S and a series number
        self._graded: dict[str, float] = {}
        self._selected: set[str] = set()

    def add(self, uri: str) -> bool:
        """Read a table; false, and counted, where it is of no known kind.

        Raises
        ------
        DataError
            It is damaged.
        """
        header = {name.lower(): name for name in _header(uri)}
        roles = {role: found for role, spellings in RULES["columns"].items()
                 if (found := next((header[name.lower()] for name in spellings
                                    if name.lower() in header), None))}
        kind = next((kind for kind, needs in RULES["kinds"].items()
                     if all(role in roles for role in needs)), None)
        if kind is None:
            self.notes["table of no known kind: not used"] += 1
            return False
        labels = {*RULES["labels"]} & {*header.values()} if kind == "visits" else set()
        self._source.columns[uri.rsplit("/", 1)[-1]] = {
            **dict.fromkeys(sorted(labels), "label, numbers"),
            **{name: role for role, name in roles.items()}}
        for cells in read_columns(uri, {*roles.values(), *labels}.__contains__, self.notes):
            present = {name: None if value in RULES["missing"] else value
                       for name, value in cells.items()}
            getattr(self, f"_add_{kind}")({role: present[name] for role, name in roles.items()}
                                          | {"cells": present})
        return True

    # ---- kinds of tables: rows by the roles of their columns

    def _add_images(self, row: dict[str, Any]) -> None:
        image = number(row["image"])
        if image is None:
            return
        protocol = row.get("protocol") or ""
        makers = [match[1].strip() for pattern in RULES["scanner"]
                  if (match := re.search(pattern, protocol))]
        strength = re.search(RULES["field_strength"], protocol)
        told = Listed(
            row["description"], row.get("modality"), row.get("type"), number(row.get("series")),
            row.get("visit"), self._day(row.get("date")), as_float(row.get("age")),
            as_float(row.get("field_strength")) or as_float(strength[1] if strength else None),
            " ".join(makers) or None)
        known = self.images[image]
        for one in fields(Listed):  # the download's own list over the lists of all images
            value = getattr(told, one.name)
            if value is not None and ("collected" in row or getattr(known, one.name) is None):
                setattr(known, one.name, value)
        if "collected" in row:
            self.collected.add(image)
        if person := rid(row):
            self.people[person].sexes |= self._sex(row.get("sex"))
        if told.series:
            self._of_series[told.series].append(image)

    def _add_visits(self, row: dict[str, Any]) -> None:
        person = self.people[rid(row)]
        person.sexes |= self._sex(row.get("sex"))
        if (age := as_float(row.get("age"))) is not None:
            person.ages.add(age)
        self._add_diagnoses(row)
        if visit := person.visits.get(visit_code(row["visit"]) or ""):
            for name in RULES["labels"]:
                value = row["cells"].get(name)
                if as_float(value) is not None:
                    visit.numbers[name] = value
                elif value is not None:
                    self.notes[f"{name} that is no number: unknown"] += 1

    def _add_diagnoses(self, row: dict[str, Any]) -> None:
        value = str(row.get("diagnosis") or "").removesuffix(".0").lower().rpartition(" to ")[2]
        self._see(row, RULES["diagnoses"].get(value), value)

    def _add_changes(self, row: dict[str, Any]) -> None:
        value = str(row["change"] or "").removesuffix(".0")
        self._see(row, RULES["changes"].get(value), value)

    def _see(self, row: dict[str, Any], diagnosis: str | None, told: str) -> None:
        code = visit_code(row["visit"])
        if code is None:
            if row["visit"]:
                self.notes["rows of visits without a place in time (f, uns1): not used"] += 1
            return
        visit = self.people[rid(row)].visits.setdefault(code, Visit())
        day = self._day(row.get("date"))
        if day and (visit.day is None or row["visit"] == code):  # baseline itself over screening
            visit.day = day
        if diagnosis:
            visit.diagnoses.add(diagnosis)
        elif told:
            self.notes["diagnosis that is none of CN, MCI and AD: unknown"] += 1

    def _add_quality(self, row: dict[str, Any]) -> None:
        key = f"I{number(row['image'])}"
        grade = as_float(row["quality"])  # -1 (not done) has become None
        if grade is not None:
            self._graded[key] = max(grade, self._graded.get(key, grade))
        if as_float(row.get("selected")) == 1:
            self._selected.add(key)

    def _add_passed(self, row: dict[str, Any]) -> None:
        verdict = RULES["passed"].get(str(row["passed"] or "").removesuffix(".0").lower())
        if verdict is False and row["loni"]:
            self._failed.add(row["loni"].upper())

    # ---- answers

    def rejected(self, images: Iterable[str], series: str | None) -> bool:
        """Whether readers rejected an acquisition, under the number of any of its images."""
        keys = {f"I{image}" for image in (*images, *self._of_series.get(series or "", ()))}
        if keys & self._failed or f"S{series}" in self._failed:
            return True
        worst = max((self._graded[key] for key in keys if key in self._graded), default=0.0)
        return worst >= RULES["rejected_from"] and not keys & self._selected

    def check(self) -> None:
        """Clear and count what tables contradict each other in; once, when all are read."""
        odd_ages = odd_sexes = odd_visits = 0
        for person in self.people.values():
            if person.ages and max(person.ages) - min(person.ages) > RULES["age_tolerance_years"]:
                person.ages = set()
                odd_ages += 1
            if len(person.sexes) > 1:
                person.sexes = set()
                odd_sexes += 1
            person.ages = set(sorted(person.ages)[:1])
            odd_visits += sum(len(visit.diagnoses) > 1 for visit in person.visits.values())
        for what, count in (("people whose age at baseline", odd_ages),
                            ("people whose sex", odd_sexes),
                            ("visits whose diagnosis", odd_visits)):
            if count:
                self.notes[f"{what} differs between rows or tables: unknown"] += count

    def _day(self, text: str | None) -> date | None:
        day = parse_day(text)
        if text and day is None:
            self.notes["date that cannot be read: unknown"] += 1
        return day

    def _sex(self, text: str | None) -> set[str]:
        if not text:
            return set()
        sex = RULES["sexes"].get(text.lower().removesuffix(".0"))
        if sex is None:
            self.notes["sex is neither F nor M: unknown"] += 1
        return {sex} - {None}


def _header(uri: str) -> set[str]:
    names = set()

    def note(name: str) -> bool:
        names.add(name)
        return False

    next(read_columns(uri, note), None)
    return names


def number(text: str | None) -> str | None:
    """Digits of an image or series number, with or without its letter."""
    match = re.fullmatch(r"[ISD]?0*(\d+)(\.0)?", text or "")
    return match[1] if match else None


def rid(row: Cells) -> str:
    """A person's number, without leading zeros: of the RID, else of the PTID."""
    match = PTID.fullmatch(row.get("ptid") or "")
    return str(int(match[1])) if match else (row.get("rid") or "").removesuffix(".0").lstrip("0")


def visit_code(text: str | None) -> str | None:
    """bl or mNN, or None for what is no such code (names of visits, f, uns1)."""
    code = RULES["visit_synonyms"].get((text or "").lower(), (text or "").lower())
    return code if re.match(RULES["visit_code"], code) else None


def months(code: str) -> int:
    return int(code[1:]) if code != "bl" else 0


def parse_day(text: str | None) -> date | None:
    """A date as ADNI writes it: 2011-06-02, 6/2/2011, 20110602.0, with or without a time."""
    plain = re.split(r"[ T_]", (text or "").strip())[0].removesuffix(".0")
    for form in RULES["date_formats"]:
        try:
            return datetime.strptime(plain, form).date()
        except ValueError:
            continue
    return None
