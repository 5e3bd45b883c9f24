"""A BIDS tree, or a folder of loose NIfTI files, to Scans.

BIDS: a folder with dataset_description.json.  Entities may come in any order, sessions are
optional, JSON sidecars are inherited from the levels above, participants.tsv and sessions.tsv give
age, sex, site and labels.  Below derivatives/, ``*_dseg`` becomes a scan's label map and
``*_desc-brain_mask`` its brain mask, but only where it lies in the scan's own space.  The columns
``family_id`` and ``split_group`` of participants.tsv tie people to one split.

Loose files: without dataset_description.json, files named *_T1w, *_T2w or *_FLAIR are taken; the
participant is the name before the first underscore and nothing else is known about them.  BIDS
datasets inside such a folder are left alone and reported.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from data_prep.cohorts.base import CohortTables, Found, as_float, read_tsv, walk
from data_prep.scan import Scan
from neurojepa.errors import DataError
from neurojepa.feed.format import join, read_bytes

TAKEN = ("T1w", "T2w", "FLAIR")
TIES = ("family_id", "split_group")
SEXES = {"f": "F", "female": "F", "w": "F", "m": "M", "male": "M"}
_NIFTI = re.compile(r"\.nii(\.gz)?$")
_ENTITY = re.compile(r"^([A-Za-z0-9]+)-(.+)$")
# entities by which a derivative may differ from the scan it belongs to
_DERIVED = {"space", "desc", "label", "seg", "atlas", "res", "den"}
Table = dict[str, dict[str, str | None]]


@dataclass(frozen=True)
class Name:
    """A BIDS file name taken apart: entities in any order, and the suffix."""

    entities: dict[str, str]
    suffix: str


def parse_name(name: str) -> Name:
    """Entities and suffix of a file name, its extension removed.

    >>> parse_name("sub-1_T1w.nii.gz")
    Name(entities={'sub': '1'}, suffix='T1w')
    """
    *parts, suffix = re.sub(r"\.(nii\.gz|nii|json)$", "", name).split("_")
    matches = [match for part in parts if (match := _ENTITY.match(part))]
    return Name({match[1]: match[2] for match in matches}, suffix)


def read_cohort(source: str, cohort: str) -> CohortTables:
    """Walk a BIDS tree or a folder of loose files, local or on an object store.

    Raises
    ------
    DataError
        The source is missing, holds no scan that is taken, or one of its tables is damaged.
    """
    files = walk(source)
    is_bids = any(found.path == "dataset_description.json" for found in files)
    tables = _Bids(source, cohort, files).read() if is_bids else _read_loose(cohort, files)
    if not tables.scans:
        seen = "; ".join(f"{count} {note}" for note, count in sorted(tables.notes.items()))
        raise DataError(f"{source}: no {', '.join(TAKEN)} scan found ({seen or 'no NIfTI file'}); "
                        "name a BIDS dataset or a folder of *_T1w.nii.gz files")
    return tables


def _read_loose(cohort: str, files: list[Found]) -> CohortTables:
    datasets = {found.folder for found in files if found.name == "dataset_description.json"}
    tables = CohortTables()
    outermost = [one for one in sorted(datasets)
                 if not any(one.startswith(other + "/") for other in datasets)]
    for dataset in outermost:
        tables.notes[f"BIDS dataset inside, not entered: {dataset}"] += 1
    for found in files:
        if any(found.path.startswith(dataset + "/") for dataset in outermost):
            continue
        if not _NIFTI.search(found.name):
            continue
        name = parse_name(found.name)
        if name.suffix not in TAKEN or "_" not in found.name:
            tables.notes["not taken: file without a _T1w, _T2w or _FLAIR ending"] += 1
            continue
        participant = found.name.split("_")[0].removeprefix("sub-")
        tables.scans.append(_scan(found, cohort, participant, name))
    return tables


def _scan(found: Found, cohort: str, participant: str, name: Name) -> Scan:
    return Scan(uri=found.uri, cohort=cohort, participant=participant, family="", split="",
                session=name.entities.get("ses", "1"), modality=name.suffix,
                size_bytes=found.size_bytes, modified=found.modified)


class _Bids:
    """One reading of a BIDS tree."""

    def __init__(self, source: str, cohort: str, files: list[Found]) -> None:
        self.source, self.cohort = source, cohort
        self.tables = CohortTables()
        self.notes: Counter[str] = self.tables.notes
        self.raw = [f for f in files if re.match(r"sub-[^/]+/", f.path)]
        self.derived = [f for f in files if f.path.startswith("derivatives/")
                        and _NIFTI.search(f.name)]
        self.paths = {found.path for found in files}
        self.sidecars: dict[tuple[str, str], list[tuple[Name, Found]]] = defaultdict(list)
        for found in files:
            if found.name.endswith(".json") and not found.path.startswith("derivatives/"):
                name = parse_name(found.name)
                self.sidecars[found.folder, name.suffix].append((name, found))
        self._json: dict[str, dict[str, object]] = {}

    def read(self) -> CohortTables:
        people = self._table("participants.tsv", "participant_id", "sub-")
        found_scans = [pair for found in self.raw if (pair := self._take(found))]
        self._match_derivatives(found_scans)
        for participant in sorted({scan.participant for scan, _ in found_scans}):
            own = [(scan, name) for scan, name in found_scans if scan.participant == participant]
            self._describe(participant, people.get(participant), own)
        if missing := set(people) - {scan.participant for scan, _ in found_scans}:
            self.notes["participants.tsv rows without a scan that is taken"] += len(missing)
        return self.tables

    # ---- files

    def _take(self, found: Found) -> tuple[Scan, Name] | None:
        """The scan of a raw file, or None with a note."""
        if not _NIFTI.search(found.name):
            return None
        name = parse_name(found.name)
        subject = found.path.split("/")[0].removeprefix("sub-")
        if name.suffix not in TAKEN:
            self.notes[f"not taken: suffix {name.suffix}"] += 1
            return None
        if name.entities.get("part", "mag") != "mag":
            self.notes["not taken: phase, real or imaginary part"] += 1
            return None
        if name.entities.get("sub") != subject:
            self.notes["not taken: file name and folder name different people"] += 1
            return None
        scan = _scan(found, self.cohort, subject, name)
        facts = self._sidecar(found, name)
        field_strength = as_float(facts.get("MagneticFieldStrength"))  # type: ignore[arg-type]
        scanner = " ".join(str(facts[part]) for part in ("Manufacturer", "ManufacturersModelName")
                           if facts.get(part))
        return replace(scan, field_strength=field_strength, scanner=scanner or None,
                       site=str(facts["InstitutionName"]) if facts.get("InstitutionName")
                       else None), name

    def _sidecar(self, found: Found, name: Name) -> dict[str, object]:
        """JSON facts of a file: merged from the dataset's root downward, nearer ones win."""
        merged: dict[str, object] = {}
        parts = found.folder.split("/")
        for depth in range(len(parts) + 1):
            folder = "/".join(parts[:depth])
            applicable = [(other, path) for other, path in self.sidecars[folder, name.suffix]
                          if other.entities.items() <= name.entities.items()]
            for _, path in sorted(applicable, key=lambda pair: len(pair[0].entities)):
                merged.update(self._load_json(path.uri))
        return merged

    def _load_json(self, uri: str) -> dict[str, object]:
        if uri not in self._json:
            try:
                content = json.loads(read_bytes(uri).decode("utf-8-sig"))
            except (ValueError, DataError):
                content = None
            if not isinstance(content, dict):
                self.notes["JSON sidecar unreadable, its facts are unknown"] += 1
                content = {}
            self._json[uri] = content
        return self._json[uri]

    def _match_derivatives(self, scans: list[tuple[Scan, Name]]) -> None:
        """Give label maps and masks to the scans in whose space they lie; changes ``scans``."""
        places: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        for place, (scan, _) in enumerate(scans):
            places[scan.participant, scan.session, scan.modality].append(place)
        for found in self.derived:
            name = parse_name(found.name)
            target = {"dseg": "label_uri", "mask": "mask_uri"}.get(name.suffix)
            if not target or (target == "mask_uri" and name.entities.get("desc") != "brain"):
                self.notes[f"derivative not used: {name.suffix}"] += 1
                continue
            space = name.entities.get("space", "orig")
            modality = "T1w" if space == "orig" else space  # BIDS: no space, that of the T1w
            if modality not in TAKEN:
                self.notes[f"derivative not used: in the space {space}, not in a scan's"] += 1
                continue
            key = name.entities.get("sub", ""), name.entities.get("ses", "1"), modality
            own = {(k, v) for k, v in name.entities.items() if k not in _DERIVED}
            fitting = [place for place in places[key]
                       if own <= scans[place][1].entities.items()]
            if len(fitting) != 1:
                self.notes[f"derivative not used: fits {'several scans' if fitting else 'no scan'}"
                           ] += 1
                continue
            scan, scan_name = scans[fitting[0]]
            if getattr(scan, target):
                self.notes[f"derivative not used: the scan has another {name.suffix}"] += 1
                continue
            changes: dict[str, str] = {target: found.uri}
            scans[fitting[0]] = replace(scan, **changes), scan_name  # type: ignore[arg-type]

    # ---- tables

    def _table(self, path: str, column: str, prefix: str) -> Table:
        """Rows of a table of the source by id without prefix; empty where there is no table."""
        if path not in self.paths:
            return {}
        uri = join(self.source, path)
        table: Table = {}
        for row in read_tsv(uri):
            if column not in row:
                raise DataError(f"{uri}: has no column {column}; add it or remove the table")
            identity = (row[column] or "").removeprefix(prefix)
            if identity in table:
                self.notes[f"{path.rsplit('/', 1)[-1]}: repeated row, the first is used"] += 1
            else:
                table[identity] = row
        return table

    def _describe(self, participant: str, person: dict[str, str | None] | None,
                  scans: Iterable[tuple[Scan, Name]]) -> None:
        """Add a person's scans with age, sex and site, their labels and ties."""
        folder = f"sub-{participant}"
        sessions = self._table(f"{folder}/{folder}_sessions.tsv", "session_id", "ses-")
        if person is None:
            self.notes["people without a row in participants.tsv"] += 1
            person = {}
        for column in TIES:
            if value := person.get(column):
                self.tables.ties.append((participant, f"{column}:{value}"))
        labelled: set[str] = set()
        for scan, _ in scans:
            facts = {**person, **{name: value for name, value in sessions.get(
                scan.session, {}).items() if value is not None}}
            age, sex = self._age(facts), self._sex(facts)
            site = facts.get("site") or facts.get("site_id") or scan.site
            self.tables.scans.append(replace(scan, age_at_scan=age, sex=sex, site=site))
            if scan.session in labelled:
                continue
            labelled.add(scan.session)
            for name, value in _labels(facts, age, sex).items():
                self.tables.labels.append((participant, scan.session, name, value))

    def _age(self, facts: dict[str, str | None]) -> float | None:
        age = as_float(facts.get("age"))
        if facts.get("age") is not None and (age is None or not 0 <= age <= 120):
            self.notes["age is not a number of years (such as 89+): unknown"] += 1
            return None
        return age

    def _sex(self, facts: dict[str, str | None]) -> str | None:
        value = facts.get("sex") or facts.get("gender")
        sex = SEXES.get((value or "").lower())
        if value and not sex:
            self.notes["sex is neither F nor M: unknown"] += 1
        return sex


def _labels(facts: dict[str, str | None], age: float | None, sex: str | None) -> dict[str, str]:
    """Labels of one session: age, sex, diagnosis, and every column that holds a number.

    Free text stays out: it may name people.
    """
    labels = {name: str(value) for name, value in (("age", age), ("sex", sex)) if value is not None}
    for name, value in facts.items():
        skip = name in ("participant_id", "session_id", "age", "sex", "gender", *TIES)
        known = name in ("diagnosis", "group", "dx")
        if value is not None and not skip and (known or as_float(value) is not None):
            labels[name] = value
    return labels
