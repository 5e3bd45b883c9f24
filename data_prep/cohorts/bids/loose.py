"""A folder of loose files to Scans: files named *_T1w, *_T2w, *_FLAIR, *_pet or *_bold.

    sub-07_ses-2_run-1_T1w      participant 07, session 2
    002_S_0295_T1w              participant 002_S_0295, session 1
    p07_baseline_T1w            participant p07_baseline: what is no entity of BIDS is the person's

A name is never cut: all of it that is no entity of BIDS is the participant.  A session may also
be a folder ses-X.  Files of one name in two folders could be one person or two, and are rejected.
A sidecar of the same name is read; participants.tsv and the tables given tell age, sex, site and
labels.  BIDS datasets inside such a folder are left alone and reported.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

from data_prep.cohorts.bids.derived import Taken
from data_prep.cohorts.bids.forms import join_pairs, rule_out_other_forms
from data_prep.cohorts.bids.names import (
    DESCRIPTION,
    MODALITIES,
    SERIES,
    VOLUMES,
    Image,
    habits,
    parse_name,
    scan_key,
)
from data_prep.cohorts.bids.scan import Reader
from data_prep.cohorts.bids.tables import PersonTables
from data_prep.cohorts.source import Findings, Found, Source
from data_prep.filenames import other_file, stem

AMBIGUOUS = "ambiguous_name"


def read_loose(source: Source, cohort: str) -> Iterator[Findings]:
    """People of a folder of loose files.

    Raises
    ------
    DataError
        A table is damaged or has no column of participants, or a given one is about nobody here.
    """
    own = [found.uri for found in source.listing()[0] if found.name == "participants.tsv"]
    tables = PersonTables(source, people=[*own, *source.tables], given=source.tables)
    reader = Reader(source, cohort)
    found = sorted(_images(source), key=lambda one: (one.participant, one.image.found.path))
    folders: dict[object, set[str]] = defaultdict(set)
    for one in found:
        folders[one.identity].add(one.image.found.folder)
    _tell(source, {one.participant for one in found})
    for participant, group in groupby(found, key=lambda one: one.participant):
        taken = [_take(reader, one, several=len(folders[one.identity]) > 1) for one in group]
        rule_out_other_forms([one for one in taken if one.reason != AMBIGUOUS], source.notes)
        yield reader.findings(tables.person(participant, {}), participant, taken)
    tables.finish()


@dataclass(frozen=True, slots=True)
class _Loose:
    """A file, whose it is by its name, and its sidecar."""

    image: Image
    participant: str
    sidecar: Found | None

    @property
    def identity(self) -> object:
        """What two files of one scan would have in common."""
        return (self.participant, self.image.name.entities.get("ses", "1"),
                scan_key(self.image.found.name))


def _images(source: Source, folder: str = "") -> Iterator[_Loose]:
    files, folders = source.listing(folder)
    if any(found.name == DESCRIPTION for found in files):
        source.notes[f"BIDS dataset inside, not entered: {folder}"] += 1
        return
    sidecars = {stem(found.name): found for found in files if found.name.endswith(".json")}
    for found in join_pairs(files, source.notes):
        name = parse_name(found.name)
        if name.extension not in (*VOLUMES, SERIES):
            if name.extension not in ("json", "tsv"):
                source.notes[f"not taken: {other_file(found.name)}"] += 1
        elif name.suffix not in MODALITIES or "_" not in found.name:
            source.notes["not taken: file without a _T1w, _T2w, _FLAIR, _pet or _bold ending"] += 1
        elif not (participant := participant_of(found.name)):
            source.notes["not taken: name without a participant"] += 1
        else:
            visit = re.search(r"(?:^|/)ses-([A-Za-z0-9]+)(?:/|$)", found.folder)
            entities = {key: value for key, value in name.entities.items()
                        if key in habits()["entities"]}
            if visit:
                entities.setdefault("ses", visit[1])
            yield _Loose(Image(found, replace(name, entities=entities)), participant,
                         sidecars.get(found.name[:-len(name.extension) - 1]))
    for inner in folders:
        yield from _images(source, f"{folder}/{inner}" if folder else inner)


def participant_of(file_name: str) -> str:
    """All of a name that is neither entity of BIDS nor suffix, in its order.

    >>> participant_of("002_S_0295_run-1_T1w.nii"), participant_of("sub-07_ses-2_T1w.nii.gz")
    ('002_S_0295', '07')
    """
    whose = []
    for part in file_name.split("_")[:-1]:
        key, _, value = part.partition("-")
        if key == "sub" and value:
            whose.append(value)
        elif not value or key not in habits()["entities"]:
            whose.append(part)
    return "_".join(whose)


def _tell(source: Source, people: set[str]) -> None:
    """Note people who may be visits of one another: p07_baseline and p07_month6."""
    alike = Counter(person.split("_")[0] for person in people)
    if several := sum("_" in person and alike[person.split("_")[0]] > 1 for person in people):
        source.notes["people whose names begin alike, taken as different people: where they are "
                     "visits of one, name the files sub-X_ses-Y"] += several


def _take(reader: Reader, one: _Loose, *, several: bool) -> Taken:
    taken = reader.take(one.image, reader.load(one.sidecar) if one.sidecar else {})
    if several and not taken.reason:
        taken.reason = AMBIGUOUS
        reader.notes["rejected: one name in two folders is one person or two; give each file a "
                     "name of its own, or list the files in a table (--cohort files)"] += 1
    return taken
