"""A table that lists files, one scan a row, to Scans: for scans that follow no cohort's layout.

    file,participant_id,session_id,modality,age,sex,diagnosis,mask,labels
    old/p07.nii.gz,p07,1,T1w,63,F,AD,old/p07_mask.nii.gz,
    dicom/p08/,p08,1,T2w,71,M,CN,,

``file`` is a path below the source: a NIfTI, MGZ or CIFTI file, or a folder of DICOM slices (it
ends in "/").  A JSON sidecar of the same name is read.  Needed are file, participant_id and
modality; ``mask`` and ``labels`` name a brain mask and a label map of the scan, ``tracer`` that of
a PET; age, sex, site, family_id, split_group, diagnosis and other numbers are as in a
participants.tsv.  Give the table, or several, as ``--table``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from itertools import groupby

from data_prep.cohorts import words
from data_prep.cohorts.bids.derived import Taken
from data_prep.cohorts.bids.forms import join_pairs
from data_prep.cohorts.bids.names import MODALITIES, Image, Name
from data_prep.cohorts.bids.scan import Reader
from data_prep.cohorts.bids.tables import Person, dictionary_of
from data_prep.cohorts.columns import Columns
from data_prep.cohorts.source import Findings, Found, Source
from data_prep.filenames import image_ending, is_partner, stem
from data_prep.tables import Cells, parse_table
from neurojepa.errors import ConfigError, DataError
from neurojepa.storage import read_bytes

_NEEDED = ("file", "participant_id", "modality")
_FILES = ("file", "mask", "labels")  # columns that hold a path
_OWN = {*_FILES, "modality", "tracer"}  # of the scan, not of the person
_CIFTI = re.compile(r"\.(d(tseries|scalar|label)\.nii)$", re.IGNORECASE)
_SUFFIXES = {modality: suffix for suffix, modality in MODALITIES.items()}
Line = tuple[str, Cells]  # where it stands, for errors


def read_cohort(source: Source, cohort: str) -> Iterator[Findings]:
    """The scans that the tables list, person by person.

    Raises
    ------
    ConfigError
        No table was given.
    DataError
        A table cannot be read, lacks a column, or a row names no modality, no person, a file that
        is not there or one that another row names.
    """
    if not source.tables:
        raise ConfigError("--cohort files reads the files that a table lists; give it as "
                          f"--table, with columns {', '.join(_NEEDED)}")
    lines = [line for uri in source.tables for line in _lines(uri, source)]
    seen: dict[str | None, str] = {}
    for where, row in lines:
        if row["file"] in seen:
            raise DataError(f"{where}: file {row['file']!r} stands in {seen[row['file']]} too; "
                            "keep one of the rows")
        seen[row["file"]] = where
    files = _find(source, {row[column] or "" for _, row in lines for column in _FILES
                           if row.get(column)})
    reader = Reader(source, cohort)
    lines.sort(key=lambda line: line[1]["participant_id"] or "")
    for participant, own in groupby(lines, key=lambda line: line[1]["participant_id"]):
        yield _person(reader, str(participant), list(own), files)


def _lines(uri: str, source: Source) -> Iterator[Line]:
    rows = parse_table(read_bytes(uri), uri, source.notes)
    for number, row in enumerate(rows):
        rows[number] = {plain if (plain := words.plain(name)) in _OWN else name: value
                        for name, value in row.items()}
    about = [{name: value for name, value in row.items() if name not in _OWN} for row in rows]
    columns = Columns(about, dictionary_of(uri, source.notes), name=uri.rsplit("/", 1)[-1],
                      source=source, bare_id=True)
    there = {*(rows[0] if rows else ()), *columns.roles}
    if missing := [name for name in _NEEDED if rows and name not in there]:
        raise DataError(f"{uri}: has no column {', '.join(missing)}; add it")
    for number, (own, told) in enumerate(zip(rows, map(columns.tidy, about), strict=True), 1):
        row = {name: own[name] for name in _OWN if name in own} | told
        where = f"{uri} row {number}"
        for name in _NEEDED:
            if not row[name]:
                raise DataError(f"{where}: {name} is empty; fill it in or remove the row")
        if row["modality"] not in _SUFFIXES:
            raise DataError(f"{where}: modality {row['modality']!r} is none of "
                            f"{', '.join(_SUFFIXES)}")
        row["participant_id"] = (row["participant_id"] or "").removeprefix("sub-")
        row["session_id"] = (row.get("session_id") or "1").removeprefix("ses-")
        yield where, row


def _find(source: Source, wanted: set[str]) -> dict[str, Found]:
    """The wanted files and folders of slices, and JSON sidecars, by path as the tables spell it.

    An umlaut may be one character in a table and two in a file's name, or the other way round.
    """
    wanted = wanted | {_sidecar(path) for path in wanted}
    spelt = {unicodedata.normalize("NFC", path): path for path in sorted(wanted)}
    files: dict[str, Found] = {}
    voxels: list[Found] = []  # of .hdr/.img pairs

    def as_spelt(path: str) -> str | None:
        return path if path in wanted else spelt.get(unicodedata.normalize("NFC", path))

    for found in source.walk():
        folder = as_spelt(f"{found.folder}/")
        if (path := as_spelt(found.path)) and (path not in files or path == found.path):
            files[path] = found
        elif folder:
            uri = found.uri.removesuffix(found.name)
            others = files.get(folder, Found(f"{found.folder}/", uri, 0, 0.0))
            files[folder] = Found(f"{found.folder}/", uri,
                                  (others.size_bytes or 0) + (found.size_bytes or 0),
                                  max(others.modified or 0.0, found.modified or 0.0))
        elif is_partner(found.name):
            voxels.append(found)
        else:
            source.notes["not taken: file that no table lists"] += 1
    spellings = {found.path: path for path, found in files.items()}
    halves = {path: found for path, found in files.items() if is_partner(found.name)}
    whole = [found for path, found in files.items() if path not in halves]
    return halves | {spellings[found.path]: found
                     for found in join_pairs([*whole, *voxels], source.notes)}


def _sidecar(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{stem(name)}.json"


def _person(reader: Reader, participant: str, lines: list[Line], files: dict[str, Found]
            ) -> Findings:
    people: dict[str, Cells] = {}  # by session: the first row's facts, completed by the others
    for _, row in lines:
        told = {name: value for name, value in row.items() if name not in _OWN and value}
        people[str(row["session_id"])] = {**told, **people.get(str(row["session_id"]), {})}
    person = Person([people], [("", people)], sessions={}, notes=reader.notes)
    return reader.findings(person, participant, [_take(reader, line, files) for line in lines])


def _take(reader: Reader, line: Line, files: dict[str, Found]) -> Taken:
    where, row = line

    def named(column: str) -> Found | None:
        path = row.get(column)
        if not path:
            return None
        if path not in files:
            hint = f"; a folder of slices is written {path}/" if column == "file" else ""
            raise DataError(f"{where}: {column} {path!r} is not below {reader.source.uri}{hint}")
        return files[path]

    found, mask, labels = (named(column) for column in _FILES)
    assert found is not None  # _lines has seen to it
    entities = {"ses": str(row["session_id"]), **({"trc": tracer} if (tracer := row.get("tracer"))
                                                  else {})}
    cifti = _CIFTI.search(found.name)
    name = Name(entities, _SUFFIXES[str(row["modality"])],
                cifti[1].lower() if cifti else image_ending(found.name) or "")
    sidecar = files.get(_sidecar(str(row["file"])))
    taken = reader.take(Image(found, name), reader.load(sidecar) if sidecar else {})
    taken.mask_uri = mask.uri if mask else None
    taken.label_uri = labels.uri if labels else None
    return taken
