"""ABCD to Scans: the BIDS tree of releases 6 and 7, and the packages of the NDA releases.

A source holds any of ``rawdata/``, ``derivatives/{mproc,freesurfer,*xcp_d*}/`` and ``sourcedata/``
(BIDS names, sessions ses-00A, ses-02A ...), packages NDARINV..._EVENT_ABCD-KIND_STAMP.tgz, and
tables.  Packages are read as they are: of each, the beginning up to the first image's name.

Ids and events are brought to one spelling (eight characters; 00A), so a participant or a session
that is spelt in two ways is one.  A scan that is delivered in several forms is taken once, in the
order of abcd.yaml.  A person's files are held at a time.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from data_prep.cohorts.abcd.files import Delivered, Tree, first_image, inside, is_slice
from data_prep.cohorts.abcd.tables import AbcdTables, participant_of, session_of
from data_prep.cohorts.bids.derived import Companions, Taken, cleaned_series
from data_prep.cohorts.bids.names import (
    MODALITIES,
    SERIES,
    VOLUMES,
    Image,
    Name,
    parse_name,
)
from data_prep.cohorts.bids.scan import Reader
from data_prep.cohorts.bids.visits import is_ruled_out, judged_rows, person_rows
from data_prep.cohorts.source import Findings, Found, Source
from data_prep.scan import Scan, split_member


def read_cohort(source: Source, cohort: str) -> Iterator[Findings]:
    """Scans, ages, sexes, sites and families of ABCD participants.

    Raises
    ------
    DataError
        The source cannot be listed, or one of its tables is damaged.
    """
    table = yaml.safe_load(Path(__file__).with_name("abcd.yaml").read_text())
    reader, tree = Reader(source, cohort), Tree(source, table)
    people = AbcdTables(table, source)
    for uri in [*source.tables, *tree.tables]:
        source.used(uri, people.add(uri), "a column of participants: participant_id, "
                    "src_subject_id or subjectkey")
    for participant in sorted(tree.spellings):
        person = _PersonFiles(reader, table, participant)
        for pipeline, folder in tree.folders.pop(participant, []):
            person.add_folder(pipeline, folder, people)
        packages = tree.packages.pop(participant, [])
        source.open_ahead([found for match, found in packages if match[3] in table["packages"]],
                          first_image)
        for match, found in packages:
            person.add_package(match, found)
        yield person.findings(people)


@dataclass
class _PersonFiles:
    """The files of one participant, sorted out."""

    reader: Reader
    table: dict[str, Any]
    participant: str
    nifti: list[Delivered] = field(default_factory=list)
    dicom: list[Delivered] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)  # masks and label maps
    labels: list[tuple[str, str]] = field(default_factory=list)  # FreeSurfer's: session, URI
    others: list[Image] = field(default_factory=list)  # surfaces, motion
    unusable: set[object] = field(default_factory=set)  # scans, by ``_scan_key``

    def __post_init__(self) -> None:
        self.source, self.notes = self.reader.source, self.reader.notes

    # ---- files

    def add_folder(self, pipeline: str, folder: str, people: AbcdTables) -> None:
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
            name = parse_name(found.name)
            if participant_of(name.entities.get("sub", "")) not in (None, self.participant):
                self.notes["not taken: file name and folder name different people"] += 1
                continue
            name = self._named(name)
            stem = found.path[:-len(name.extension) - 1]
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

    def _add_table(self, found: Found, people: AbcdTables) -> None:
        rows = person_rows(self.source, found)
        if found.name.endswith("_sessions.tsv"):
            for row in rows:
                people.add_row(self.participant, row)
        else:
            self.unusable |= {self._scan_key(row.get("filename") or "")
                              for row in judged_rows(rows, {}) if is_ruled_out(row)}

    def _scan_key(self, path: str) -> object:
        """What names a scan in any spelling of participant and session."""
        name = parse_name(path.rsplit("/", 1)[-1].rsplit("\\", 1)[-1])
        return name.suffix.lower(), self._named(name).without()

    def _add_freesurfer(self, found: Found) -> None:
        session = re.search(r"ses-([A-Za-z0-9]+)", found.path)
        if found.path.endswith("/mri/aseg.mgz"):
            self.labels.append((session_of(session[1], self.table) if session else "1", found.uri))
        else:
            self.notes["derivative not used: file of FreeSurfer"] += 1

    def _add_image(self, pipeline: str, image: Image, sidecar: Found | None) -> None:
        name = image.name
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
            self.notes[f"not taken: {pipeline}, suffix {name.suffix}"] += 1
        elif name.entities.get("part", "mag") != "mag":
            self.notes["not taken: phase, real or imaginary part"] += 1
        else:
            gone = self.source.not_downloaded(image.found)
            self.nifti.append(Delivered(
                Taken(Image(image.found, name), modality, reason="not_downloaded" if gone else None,
                      processing=None if form in ("raw", "normalised") else pipeline),
                form, name.entities.get("task", "").lower(), sidecar))

    def add_package(self, match: re.Match[str], found: Found) -> None:
        """Sort in a package of the NDA releases, by its name and its first image's."""
        kind = self.table["packages"].get(match[3])
        if not kind:
            self.notes[f"not taken: package of {match[3]}"] += 1
            return
        name = Name({"ses": match[2], **({"task": kind["task"]} if "task" in kind else {})},
                    "", "tgz")
        if kind.get("dicom"):
            self._add_dicom(found, self._named(name), kind["modality"],
                            list(self.table["packages"]).index(match[3]))
            return
        member, fault = self._peek(found, dicom=False)
        entities = parse_name((member or "").rsplit("/", 1)[-1]).entities
        name = self._named(replace(name, entities={**entities, **name.entities},
                                   extension="nii" if member else "tgz"))
        self.nifti.append(Delivered(
            Taken(Image(inside(found, member), name), kind["modality"], reason=fault,
                  processing="mproc"), "mproc", kind.get("task", "").lower()))

    def _add_dicom(self, found: Found, name: Name, modality: str, kind: int) -> None:
        member, fault = self._peek(found, dicom=True)
        folder = f"{member.rpartition('/')[0]}/" if member else None
        self.dicom.append(Delivered(
            Taken(Image(inside(found, folder), name), modality, reason=fault), "dicom",
            name.entities.get("task", "").lower(), kind=kind))

    def _peek(self, found: Found, dicom: bool) -> tuple[str | None, str | None]:
        """The first image in a package, or the code of why there is none of the kind."""
        member, fault = self.source.opened(found, first_image)
        if member and is_slice(member) != dicom:
            return None, "missing_member"
        return member, fault

    # ---- scans

    def findings(self, people: AbcdTables) -> Findings:
        """The participant's scans, each once, with what the tables tell."""
        notes, participant = self.notes, self.participant
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
        chosen.sort(key=lambda one: (one.taken.session, one.taken.image.found.uri))
        for session, own in groupby(chosen, key=lambda one: one.taken.session):
            age, sex = people.age(participant, session), people.sex(participant)
            person.scans += [self._scan(one, people, age, sex) for one in own]
            person.labels += [(session, name, str(value)) for name, value in
                              (("age", age), ("sex", sex)) if value is not None]
        return person

    def _give_labels(self, chosen: list[Delivered]) -> None:
        """FreeSurfer ran on the mproc T1w, which lies elsewhere than the raw one."""
        for session, uri in self.labels:
            fitting = [one.taken for one in chosen if one.form == "mproc"
                       and (one.taken.session, one.taken.modality) == (session, "T1w")]
            if len(fitting) == 1:
                fitting[0].label_uri = uri
            else:
                self.notes["derivative not used: FreeSurfer labels without the one mproc "
                                  "T1w they lie on"] += 1

    def _chosen(self) -> list[Delivered]:
        """One form of each scan; DICOM where a session has no NIfTI of its kind."""
        self.source.fetch([one.sidecar for one in self.nifti if one.sidecar])
        groups: dict[tuple[Any, ...], list[Delivered]] = defaultdict(list)
        # Of equal forms the later stamp comes first.
        for one in sorted(self.nifti, key=lambda one: one.taken.image.found.uri, reverse=True):
            if self._scan_key(one.taken.image.found.name) in self.unusable:
                one.taken.reason = "cohort_unusable"
            groups[one.scan_key].append(one)
        chosen = [self._best(group) for group in groups.values()]
        return chosen + self._series({one.kind_key for one in chosen})

    def _best(self, group: list[Delivered]) -> Delivered:
        """The preferred form of a scan, with what the sidecars of all forms say."""
        forms: list[str] = self.table["forms"]
        best, *others = sorted(group, key=lambda one: (one.taken.reason is not None,
                                                       forms.index(one.form)))
        for one in (best, *others):
            facts = self.reader.load(one.sidecar) if one.sidecar else {}
            best.taken.facts = {**facts, **best.taken.facts}
        for other in others:
            self.notes[f"not taken: the scan is taken in another form than {other.form}"
                       if other.form != best.form else
                       f"not taken: second copy of a scan ({other.form})"] += 1
        raw = {one.taken.reason for one in group if one.form in ("raw", "normalised")}
        if not best.taken.reason and best.form not in ("raw", "normalised"):
            # scans.tsv judges the raw file, and what is derived from it is no better
            best.taken.reason = "cohort_unusable" if raw == {"cohort_unusable"} else None
        return best

    def _series(self, as_nifti: set[tuple[str, str, str]]) -> list[Delivered]:
        """DICOM packages of the preferred kind, of what is not there as NIfTI."""
        groups: dict[tuple[str, str, str], list[Delivered]] = defaultdict(list)
        for one in self.dicom:
            if one.kind_key in as_nifti:
                self.notes["not taken: DICOM of a scan that is there as NIfTI"] += 1
            else:
                groups[one.kind_key].append(one)
        chosen = []
        for group in groups.values():
            best = min(one.kind for one in group)
            chosen += [one for one in group if one.kind == best]
            if others := sum(one.kind != best for one in group):
                self.notes["not taken: DICOM of another form of the scan"] += others
        return chosen

    def _scan(self, one: Delivered, people: AbcdTables, age: float | None, sex: str | None) -> Scan:
        taken, participant = one.taken, self.participant
        if not taken.reason and people.excluded(participant, taken.session, modality=taken.modality,
                                                task=one.task):
            taken.reason = "cohort_excluded"
        scan = self.reader.scan(taken, participant, age=age, sex=sex,
                                site=people.site(participant, taken.session))
        uri, member = split_member(scan.uri)
        return replace(scan, uri=uri, member=member, scanner=self._scanner(
            taken.facts, people.serial(participant, taken.session)))

    def _scanner(self, facts: dict[str, Any], serial: str | None) -> str | None:
        """Maker, model and serial number; the tables' serial where the sidecar has another."""
        own = facts.get("DeviceSerialNumber")
        if own and serial and str(own) != serial:
            self.notes["scanner serial differs between sidecar and table: the table's"] += 1
        parts = [facts.get("Manufacturer"), facts.get("ManufacturersModelName"), serial or own]
        return " ".join(str(part) for part in parts if part) or None
