"""ADNI as the LONI archive delivers it, to Scans.

    [ADNI/]PTID/SERIES/DATE/I123/ADNI_PTID_MR_..._S45_I123.nii       one NIfTI file
    [ADNI/]PTID/SERIES/DATE/I123/ADNI_PTID_MR_..._7_S45_I123.dcm     a slice of a DICOM series

or the same in the zips of a download; older trees have S45 for the folder I123.  Images are joined
to tables by the number after the last I, and by nothing else.  Tables (CSV) lie anywhere outside
the participants' folders.  adni.yaml says which images are taken.

One acquisition may be there in several versions and levels: one is taken, the others are counted.
The session is the visit's code; without one, the days since baseline or since the first scan.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

from data_prep.cohorts.adni.images import Image, Place, survey, unpacked, zipped
from data_prep.cohorts.adni.tables import PTID, RULES, AdniPerson, AdniTables, Listed, parse_day
from data_prep.cohorts.source import Findings, Found, Source
from data_prep.scan import Scan


def read_cohort(source: Source, cohort: str) -> Iterator[Findings]:
    """Scans, ages, sexes, sites and diagnoses of ADNI participants.

    Raises
    ------
    DataError
        The source cannot be listed, or one of its tables is damaged.
    """
    place = Place()
    survey(source, "", place)
    tables = AdniTables(source)
    for uri in [*place.tables, *source.tables]:
        if not tables.add(uri) and uri in source.tables:  # a download's dictionaries are among them
            source.notes[f"--table {uri.rsplit('/', 1)[-1]}: of no known kind, not used"] += 1
    tables.check()
    packed = zipped(source, place.zips)
    seen: set[str] = set()
    for ptid in sorted(place.people.keys() | packed.keys()):
        images = [image for folder in place.people.get(ptid, ())
                  for image in unpacked(source, folder)] + packed.pop(ptid, [])
        person = _Participant(ptid, cohort, tables, source)
        yield person.read(images)
        seen |= person.seen
    if absent := len(tables.collected - seen):
        source.notes["images of the download's list that are not in the source"] += absent


@dataclass
class _Candidate:
    """An image that may be taken, with what is known of it."""

    image: Image
    number: str | None
    series: str
    text: str  # its description, plain
    listed: Listed
    day: date | None
    modality: str = ""
    form: str = ""  # version of an MR image, level of a PET
    tracer: str | None = None
    code: str | None = None
    session: str = ""


class _Participant:
    """One reading of a participant's images."""

    def __init__(self, ptid: str, cohort: str, tables: AdniTables, source: Source) -> None:
        self.ptid, self.cohort, self.tables = ptid, cohort, tables
        self.source, self.notes = source, source.notes
        match = PTID.fullmatch(ptid)
        self.person = tables.people.get(str(int(match[1])) if match else "", AdniPerson())
        self.seen: set[str] = set()
        self.numbers: defaultdict[str, list[str]] = defaultdict(list)  # of images, by series

    def read(self, images: list[Image]) -> Findings:
        """Scans and labels; what is not taken is counted."""
        found = [one for image in images if (one := self._known(image))]
        found = self._one_version(self._corrected([one for one in found if one.modality != "PET"])
                                  ) + [one for one in found if one.modality == "PET"]
        self._give_sessions(found)
        found = self._one_level(found)
        findings = Findings(self.ptid)
        sex = next(iter(self.person.sexes), None)
        for one in sorted(found, key=lambda one: (one.session, one.image.path)):
            findings.scans.append(self._scan(one, sex))
        findings.labels = self._labels(found, findings.scans)
        return findings

    def _known(self, image: Image) -> _Candidate | None:
        """An image with its tables' row, or None where it is not taken."""
        number, series = image.numbers
        _, folder, stamp = image.parts
        if number and number in self.seen:
            self.notes["not taken: second copy of an image"] += 1
            return None
        if number:
            self.seen.add(number)
        listed = self.tables.images.get(number or "")
        if listed is None:
            listed = Listed()
            self.notes["images that no table lists: known by their folders"] += 1
        series = series or listed.series or stamp or image.path
        self.numbers[series].append(number or "")
        one = _Candidate(image, number, series, plain(listed.description or folder), listed,
                         parse_day(stamp) or listed.day)
        for kind, pattern in RULES["exclude"].items():
            if re.search(pattern, one.text):
                self.notes[f"not taken: {kind}"] += 1
                return None
        if not self._judge(one):
            self.notes["not taken: description of no modality that is used"] += 1
            return None
        return one

    def _judge(self, one: _Candidate) -> bool:
        """Set modality, form and tracer; False where the description names none."""
        level = next((level["name"] for level in RULES["levels"]
                      if re.search(level["pattern"], one.text)), None)
        kind = (one.listed.type or "").lower()
        processed = re.search(RULES["processed_type"], kind)
        if level or (one.listed.modality or "").lower() in RULES["pet_modalities"]:
            if not level and processed:
                return False  # a level that nobody here knows
            one.modality, one.form = "PET", level or "raw"
            unnamed = RULES["unnamed_tracer"]
            named = [name for name, pattern in RULES["tracers"].items()
                     if re.search(pattern, one.text)]
            if not named and level and re.search(unnamed["pattern"], one.text):
                named = [unnamed["tracer"]]
            one.tracer = named[0] if len(named) == 1 else None
            return True
        one.modality = next((name for name, pattern in RULES["modalities"].items()
                             if re.search(pattern, one.text)), "")
        words = [name for name, pattern in RULES["version_words"].items()
                 if re.search(pattern, one.text)]
        if re.search(RULES["original_type"], kind):
            one.form = "original"
        elif words:
            one.form = words[-1]
        else:
            one.form = "processed" if processed else "original"
        return bool(one.modality)

    # ---- one of several

    def _corrected(self, found: list[_Candidate]) -> list[_Candidate]:
        """Without the uncorrected twins (_ND) of images of the same day."""
        there = {(one.day, one.text) for one in found}
        kept = [one for one in found
                if not re.search(RULES["undistorted"], one.text)
                or (one.day, re.sub(RULES["undistorted"], "", one.text)) not in there]
        self._count("uncorrected twin of an image", len(found) - len(kept))
        return kept

    def _one_version(self, found: list[_Candidate]) -> list[_Candidate]:
        best: dict[tuple[str, str], _Candidate] = {}
        for one in found:
            key = one.modality, one.series
            if key not in best or self._rank(one) < self._rank(best[key]):
                best[key] = one
        self._count("another version of an acquisition", len(found) - len(best))
        return list(best.values())

    def _one_level(self, found: list[_Candidate]) -> list[_Candidate]:
        """Of PET one level for each session and tracer, and one image for each acquisition."""
        pets: defaultdict[tuple[str, str | None], list[_Candidate]] = defaultdict(list)
        for one in found:
            if one.modality == "PET":
                pets[one.session, one.tracer].append(one)
        kept = [one for one in found if one.modality != "PET"]
        for group in pets.values():
            best = min(self._rank(one)[0] for one in group)
            level = [one for one in group if self._rank(one)[0] == best]
            self._count("another level of a PET", len(group) - len(level))
            kept += self._one_version(level)
        return kept

    def _rank(self, one: _Candidate) -> tuple[int, int]:
        """Place of a version or level in the order of preference; the latest of equals."""
        order = ([level["name"] for level in RULES["levels"]] if one.modality == "PET"
                 else RULES["versions"])
        return order.index(one.form), -int(one.number or 0)

    def _count(self, what: str, count: int) -> None:
        if count:
            self.notes[f"not taken: {what}"] += count

    # ---- what is told of it

    def _give_sessions(self, found: list[_Candidate]) -> None:
        """The visit's code, or days since baseline, else since the first scan; one for a day."""
        origin = self.person.baseline or min((one.day for one in found if one.day), default=None)
        codes: dict[date, str] = {}
        for one in found:
            one.code = self.person.visit_of(one.day, one.listed.visit)
            if one.day and one.code:
                codes.setdefault(one.day, one.code)
        for one in found:
            one.code = codes.get(one.day) if one.day else one.code
            days = f"day{(one.day - origin).days}" if one.day and origin else "1"
            one.session = one.code or days

    def _scan(self, one: _Candidate, sex: str | None) -> Scan:
        image, listed = one.image, one.listed
        reason = None
        if re.match(RULES["withdrawn"], self.ptid) or self.tables.rejected(
                self.numbers[one.series], one.series):
            reason = "cohort_excluded"
        elif image.missing:
            reason = "not_downloaded"
        header = {}
        if image.slice and not reason and not (listed.scanner and listed.field_strength):
            header = self.source.opened(image.slice, _scanner_of)
        return Scan(
            uri=image.uri, member=image.member, cohort=self.cohort, participant=self.ptid,
            family="", split="", session=one.session, modality=one.modality, reason=reason,
            age_at_scan=self._age(one), sex=sex, site=self.ptid[:3],
            scanner=listed.scanner or header.get("scanner"),
            field_strength=listed.field_strength or header.get("field_strength"), tracer=one.tracer,
            processing=None if one.form in ("original", "raw") else one.form,
            size_bytes=image.size_bytes, modified=image.modified)

    def _age(self, one: _Candidate) -> float | None:
        """Years at the scan; None where tables contradict each other."""
        age, listed = self.person.age(one.day, one.code), one.listed.age
        if age is None or listed is None:
            return listed if age is None else round(age, 2)
        if abs(age - listed) > RULES["age_tolerance_years"]:
            self.notes["age at a scan differs between tables: unknown"] += 1
            return None
        return round(age, 2)

    def _labels(self, found: list[_Candidate], scans: list[Scan]) -> list[tuple[str, str, str]]:
        labels: list[tuple[str, str, str]] = []
        for session in sorted({one.session for one in found}):
            code = next((one.code for one in found if one.session == session and one.code), None)
            days = [one.day for one in found if one.session == session and one.day]
            ages = [scan.age_at_scan for scan in scans
                    if scan.session == session and scan.age_at_scan is not None]
            values: dict[str, object] = {"age": min(ages, default=None),
                                         "sex": next(iter(self.person.sexes), None)}
            if days and self.person.baseline:
                values["days_since_baseline"] = (min(days) - self.person.baseline).days
            if code and (visit := self.person.visits.get(code)):
                values |= {"diagnosis": visit.diagnosis, **visit.numbers}
                if progression := self.person.progression(code):
                    values |= {"progression": progression,
                               "progression_horizon_months": RULES["progression_months"]}
            labels += [(session, name, str(value)) for name, value in values.items()
                       if value is not None]
        return labels


def _scanner_of(found: Found) -> dict[str, Any]:
    from data_prep.volumes.reading.dicom import scanner_of

    return scanner_of(found.uri)


def plain(text: str) -> str:
    """A description as adni.yaml's patterns meet it: lower case, one space between words."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower().replace("*", " star ")).strip()
