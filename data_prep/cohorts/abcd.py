"""ABCD to Scans: the BIDS tree of releases 6 and 7, and the packages of the NDA releases.

A source holds any of ``rawdata/``, ``derivatives/{mproc,freesurfer,*xcp_d*}/`` and ``sourcedata/``
(BIDS names, sessions ses-00A, ses-02A ...), packages NDARINV..._EVENT_ABCD-KIND_STAMP.tgz, and
tables.  Packages are read as they are: of each, the beginning up to the first image's name.

Ids and events are brought to one spelling (eight characters; 00A), so a participant or a session
that is spelt in two ways is one.  A scan that is delivered in several forms is taken once, in the
order of abcd.yaml.  A person's files are held at a time.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from data_prep.cohorts.abcd_tables import People, participant_of, session_of
from data_prep.cohorts.archive import first_member
from data_prep.cohorts.base import Findings, Found, Source, as_float, parse_table
from data_prep.cohorts.bids_derived import Companions, Taken, cleaned_series
from data_prep.cohorts.bids_names import (
    MODALITIES,
    SERIES,
    VOLUMES,
    Image,
    Name,
    habits,
    parse_name,
)
from data_prep.cohorts.tables import TABLE_ENDINGS
from data_prep.scan import FACTS, Scan, ScanError, split_member

_PACKAGE = re.compile(r"(NDAR_?INV\w{8})_([A-Za-z0-9]+)_ABCD-(.+)_(\d{14})\.tgz$")
_SIDECAR = {*FACTS, "MagneticFieldStrength", "Manufacturer", "ManufacturersModelName",
            "DeviceSerialNumber"}
_IMAGES = (".nii", ".nii.gz", ".dcm")
_FORM = ("space", "desc", "res", "den")  # entities in which forms of one scan differ


def read_cohort(source: Source, cohort: str) -> Iterator[Findings]:
    """Scans, ages, sexes, sites and families of ABCD participants.

    Raises
    ------
    DataError
        The source cannot be listed, or one of its tables is damaged.
    """
    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    tree = _Tree(source, table)
    people = People(table, source.notes)
    for uri in [*source.tables, *tree.tables]:
        people.add(uri)
    for participant in sorted(tree.spellings):
        person = _Person(source, table, participant)
        for pipeline, folder in tree.folders.pop(participant, []):
            person.add_folder(pipeline, folder, people)
        packages = tree.packages.pop(participant, [])
        source.open_ahead([found for match, found in packages if match[3] in table["packages"]],
                          _first_image)
        for match, found in packages:
            person.add_package(match, found)
        yield person.findings(cohort, people)


class _Tree:
    """Where the files of each participant lie, and the tables."""

    def __init__(self, source: Source, table: dict[str, Any]) -> None:
        self.source, self.table = source, table
        self.folders: dict[str, list[tuple[str, str]]] = defaultdict(list)  # pipeline, folder
        self.packages: dict[str, list[tuple[re.Match[str], Found]]] = defaultdict(list)
        self.tables: list[str] = []
        self.spellings: dict[str, set[str]] = defaultdict(set)
        self._look("")
        aliases = sum(len(spellings) > 1 for spellings in self.spellings.values())
        if aliases:
            source.notes["participants with ids in two spellings, taken as one"] = aliases

    def _look(self, under: str) -> None:
        pipeline = self._pipeline(under)
        if pipeline is None:
            self.source.notes[f"derivatives not used: {under.rsplit('/', 1)[-1]}"] += 1
            return
        files, folders = self.source.listing(under)
        for found in files:
            if match := _PACKAGE.match(found.name):
                self._add(match[1], self.packages, (match, found))
            elif found.name.lower().endswith(TABLE_ENDINGS):
                self.tables.append(found.uri)
            elif found.name.endswith((".tgz", ".nii", ".nii.gz")):
                self.source.notes["not taken: name of neither a package nor a participant"] += 1
        for name in folders:
            inner = f"{under}/{name}" if under else name
            if not name.startswith("sub-"):
                self._look(inner)
            elif participant_of(name.split("_")[0]):
                self._add(name.split("_")[0], self.folders, (pipeline, inner))
            else:
                self.source.notes["not taken: folder of no participant"] += 1

    def _add(self, spelling: str, places: dict[str, list[Any]], place: Any) -> None:
        participant = participant_of(spelling) or ""
        places[participant].append(place)
        self.spellings[participant].add(spelling.removeprefix("sub-"))

    def _pipeline(self, under: str) -> str | None:
        """raw, sourcedata, or the kind of a folder below derivatives/; None: of no use."""
        parts = [*self.source.uri.rstrip("/").split("/")[-2:], *filter(None, under.split("/"))]
        if "derivatives" not in parts[:-1]:
            return "sourcedata" if "sourcedata" in parts else "raw"
        name = parts[parts.index("derivatives") + 1]
        return next((kind for pattern, kind in self.table["pipelines"].items()
                     if re.fullmatch(pattern, name)), None)


@dataclass
class _Delivered:
    """A scan in one of its forms."""

    taken: Taken
    form: str
    task: str
    sidecar: Found | None = None
    kind: int = 0  # order of preference among DICOM packages

    @property
    def scan_key(self) -> tuple[Any, ...]:
        """What the forms of one scan have in common."""
        run = self.taken.image.name.entities.get("run", "1")
        others = self.taken.image.name.without(*_FORM, "run", "task")
        return self.taken.modality, self.task, int(run) if run.isdigit() else run, others

    @property
    def kind_key(self) -> tuple[str, str, str]:
        return self.taken.session, self.taken.modality, self.task


@dataclass
class _Person:
    """The files of one participant, sorted out."""

    source: Source
    table: dict[str, Any]
    participant: str
    nifti: list[_Delivered] = field(default_factory=list)
    dicom: list[_Delivered] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)  # masks and label maps
    labels: list[tuple[str, str]] = field(default_factory=list)  # FreeSurfer's: session, URI
    others: list[Image] = field(default_factory=list)  # surfaces, motion
    unusable: set[str] = field(default_factory=set)  # paths

    # ---- files

    def add_folder(self, pipeline: str, folder: str, people: People) -> None:
        """Sort the files of the participant's folder in rawdata, or below derivatives/X."""
        files = list(self.source.walk(folder))
        sidecars = {found.path.removesuffix(".json"): found for found in files
                    if found.name.endswith(".json")}
        tables = [found for found in files
                  if found.name.endswith(("_scans.tsv", "_sessions.tsv"))]
        self.source.fetch(tables)
        for found in tables:
            self._add_table(found, people)
        for found in files:
            if pipeline == "freesurfer":
                self._add_freesurfer(found)
                continue
            name = self._named(parse_name(found.name))
            stem = found.path.removesuffix(f".{name.extension}")
            if name.extension in (*VOLUMES, SERIES):
                self._add_image(pipeline, Image(found, name), sidecars.get(stem))
            elif name.extension in ("tgz", "tar.gz") and name.suffix in MODALITIES:
                self._add_dicom(found, name, MODALITIES[name.suffix], 0)
            elif name.extension.endswith((".gii", "tsv")):
                self.others.append(Image(found, name))

    def _named(self, name: Name) -> Name:
        """The name with participant and session in their one spelling."""
        entities = {**name.entities, "sub": self.participant}
        if "ses" in entities:
            entities["ses"] = session_of(entities["ses"], self.table)
        return replace(name, entities=entities)

    def _add_table(self, found: Found, people: People) -> None:
        rows = self.source.opened(found, lambda one: [
            {name: value for name, value in row.items() if name != "acq_time"}
            for row in parse_table(self.source.read(one), one.uri)])
        for row in rows:
            if found.name.endswith("_sessions.tsv"):
                people.add_row(self.participant, row)
            elif any((row.get(column) or "").lower() in values
                     for column, values in habits()["unusable"].items()):
                self.unusable.add(f"{found.folder}/{row.get('filename')}")

    def _add_freesurfer(self, found: Found) -> None:
        session = re.search(r"ses-([A-Za-z0-9]+)", found.path)
        if found.path.endswith("/mri/aseg.mgz"):
            self.labels.append((session_of(session[1], self.table) if session else "1", found.uri))
        else:
            self.source.notes["derivative not used: file of FreeSurfer"] += 1

    def _add_image(self, pipeline: str, image: Image, sidecar: Found | None) -> None:
        name, notes = image.name, self.source.notes
        modality = MODALITIES.get(name.suffix)
        form = pipeline
        if pipeline == "xcp_d":
            form = ("xcp_d_cifti" if name.extension == SERIES else
                    "xcp_d") if cleaned_series(image) else ""
        elif pipeline == "raw" and any(name.entities.get(entity, "").lower() in values for
                                       entity, values in self.table["normalised"].items()):
            form = "normalised"
            name = replace(name, entities={key: value for key, value in name.entities.items()
                                           if key not in self.table["normalised"]})
        if name.suffix in ("mask", "dseg"):
            self.images.append(image)
        elif not modality or form not in self.table["forms"]:
            notes[f"not taken: {pipeline}, suffix {name.suffix}"] += 1
        elif name.entities.get("part", "mag") != "mag":
            notes["not taken: phase, real or imaginary part"] += 1
        else:
            gone = self.source.not_downloaded(image.found)
            self.nifti.append(_Delivered(
                Taken(Image(image.found, name), modality, reason="not_downloaded" if gone else None,
                      processing=None if form in ("raw", "normalised") else pipeline),
                form, name.entities.get("task", "").lower(), sidecar))

    def add_package(self, match: re.Match[str], found: Found) -> None:
        """Sort in a package of the NDA releases, by its name and its first image's."""
        kind = self.table["packages"].get(match[3])
        if not kind:
            self.source.notes[f"not taken: package of {match[3]}"] += 1
            return
        name = Name({"ses": match[2], **({"task": kind["task"]} if "task" in kind else {})},
                    "", "tgz")
        if kind.get("dicom"):
            self._add_dicom(found, self._named(name), kind["modality"],
                            list(self.table["packages"]).index(match[3]))
            return
        member, fault = self._peek(found, dicom=False)
        entities = parse_name((member or "").rsplit("/", 1)[-1]).entities
        name = self._named(replace(name, entities={**entities, **name.entities}, extension="nii"))
        self.nifti.append(_Delivered(
            Taken(Image(_inside(found, member), name), kind["modality"], reason=fault,
                  processing="mproc"), "mproc", kind.get("task", "").lower()))

    def _add_dicom(self, found: Found, name: Name, modality: str, kind: int) -> None:
        member, fault = self._peek(found, dicom=True)
        folder = f"{member.rpartition('/')[0]}/" if member else None
        self.dicom.append(_Delivered(
            Taken(Image(_inside(found, folder), name), modality, reason=fault), "dicom",
            name.entities.get("task", "").lower(), kind=kind))

    def _peek(self, found: Found, dicom: bool) -> tuple[str | None, str | None]:
        """The first image in a package, or the code of why there is none of the kind."""
        member, fault = self.source.opened(found, _first_image)
        if member and member.lower().endswith(".dcm") != dicom:
            return None, "missing_member"
        return member, fault

    # ---- scans

    def findings(self, cohort: str, people: People) -> Findings:
        """The participant's scans, each once, with what the tables tell."""
        notes, participant = self.source.notes, self.participant
        chosen = self._chosen()
        taken = [one.taken for one in chosen]
        Companions(taken, notes).give(self.images, self.others)
        self._give_labels(chosen)
        ties = people.ties(participant)
        if not people.known(participant):
            notes["people without a row in a table"] += 1
        elif not ties:
            notes["people without a family id: each a group of their own"] += 1
        person = Findings(participant, ties=ties)
        for one in sorted(chosen, key=lambda one: (one.taken.session, one.taken.image.found.uri)):
            person.scans.append(self._scan(one, cohort, people))
        for session in sorted({scan.session for scan in person.scans}):
            facts = {"age": people.age(participant, session), "sex": people.sex(participant)}
            person.labels += [(session, name, str(value)) for name, value in facts.items()
                              if value is not None]
        return person

    def _give_labels(self, chosen: list[_Delivered]) -> None:
        """FreeSurfer ran on the mproc T1w, which lies elsewhere than the raw one."""
        for session, uri in self.labels:
            fitting = [one.taken for one in chosen if one.form == "mproc"
                       and (one.taken.session, one.taken.modality) == (session, "T1w")]
            if len(fitting) == 1:
                fitting[0].label_uri = uri
            else:
                self.source.notes["derivative not used: FreeSurfer labels without the one mproc "
                                  "T1w they lie on"] += 1

    def _chosen(self) -> list[_Delivered]:
        """One form of each scan; DICOM where a session has no NIfTI of its kind."""
        notes, forms = self.source.notes, self.table["forms"]
        self.source.fetch([one.sidecar for one in self.nifti if one.sidecar])
        groups: dict[tuple[Any, ...], list[_Delivered]] = defaultdict(list)
        # Of equal forms the later stamp comes first.
        for one in sorted(self.nifti, key=lambda one: one.taken.image.found.uri, reverse=True):
            groups[one.scan_key].append(one)
        chosen = []
        for group in groups.values():
            group.sort(key=lambda one: (one.taken.reason is not None, forms.index(one.form)))
            for other in group:
                facts = self.source.opened(other.sidecar, self._facts) if other.sidecar else {}
                group[0].taken.facts = {**(facts or {}), **group[0].taken.facts}
            for other in group[1:]:
                notes[f"not taken: the scan is taken in another form than {other.form}"
                      if other.form != group[0].form else
                      f"not taken: second copy of a scan ({other.form})"] += 1
            chosen.append(group[0])
        as_nifti = {one.kind_key for one in chosen}
        series: dict[tuple[str, str, str], list[_Delivered]] = defaultdict(list)
        for one in self.dicom:
            if one.kind_key in as_nifti:
                notes["not taken: DICOM of a scan that is there as NIfTI"] += 1
            else:
                series[one.kind_key].append(one)
        for group in series.values():
            best = min(one.kind for one in group)
            chosen += [one for one in group if one.kind == best]
            if others := sum(one.kind != best for one in group):
                notes["not taken: DICOM of another form of the scan"] += others
        return chosen

    def _facts(self, sidecar: Found) -> dict[str, Any] | None:
        try:
            content = json.loads(self.source.read(sidecar).decode("utf-8-sig"))
        except ValueError:
            content = None
        if not isinstance(content, dict):
            self.source.notes["JSON sidecar unreadable, its facts are unknown"] += 1
            return None
        return {key: value for key, value in content.items()
                if key in _SIDECAR and value is not None}

    def _scan(self, one: _Delivered, cohort: str, people: People) -> Scan:
        taken, participant, facts = one.taken, self.participant, one.taken.facts
        session, found = taken.session, taken.image.found
        reason = taken.reason
        if not reason and found.path in self.unusable:
            reason = "cohort_unusable"
        elif not reason and people.excluded(participant, session, taken.modality, one.task):
            reason = "cohort_excluded"
        uri, member = split_member(found.uri)
        kept = {key: facts[key] for key in FACTS if key in facts}
        return Scan(
            uri=uri, member=member, cohort=cohort, participant=participant, family="", split="",
            session=session, modality=taken.modality, reason=reason,
            age_at_scan=people.age(participant, session), sex=people.sex(participant),
            site=people.site(participant, session),
            scanner=self._scanner(facts, people.serial(participant, session)),
            field_strength=as_float(facts.get("MagneticFieldStrength")),
            processing=taken.processing, mask_uri=taken.mask_uri, label_uri=taken.label_uri,
            confounds_uri=taken.confounds_uri, surface_uri=taken.surface_uri,
            facts=json.dumps(kept, sort_keys=True) if kept else None, size_bytes=found.size_bytes,
            modified=found.modified)

    def _scanner(self, facts: dict[str, Any], serial: str | None) -> str | None:
        """Maker, model and serial number; the tables' serial where the sidecar has another."""
        own = facts.get("DeviceSerialNumber")
        if own and serial and str(own) != serial:
            self.source.notes["scanner serial differs between sidecar and table: the table's"] += 1
        parts = [facts.get("Manufacturer"), facts.get("ManufacturersModelName"), serial or own]
        return " ".join(str(part) for part in parts if part) or None


def _first_image(found: Found) -> list[str | None]:
    """Name of a package's first image and None, or None and the code of why there is none."""
    try:
        if found.size_bytes is None:
            raise ScanError("not_downloaded", f"{found.uri}: a link that leads nowhere")
        member = first_member(found.uri, lambda name: name.lower().endswith(_IMAGES))
    except ScanError as error:
        return [None, error.code]
    return [member, None if member else "missing_member"]


def _inside(found: Found, member: str | None) -> Found:
    """A member of a package as a file; the package itself where there is none."""
    return replace(found, path=f"{found.path}::{member}", uri=f"{found.uri}::{member}"
                   ) if member else found
