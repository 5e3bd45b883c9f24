"""A row of the archive: a scan as its manifest tells it, what became of it, and its figures.

``prepare`` writes Outcomes into the records of people (results/*.json); with the columns of the
Scan they are the ArchiveRows of scans.parquet.  There every figure is a column of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.flags import joined
from data_prep.scan import SCAN_SCHEMA, Scan
from data_prep.tables import dicts

Figures = dict[str, float | str | None]  # by name; None where it is not known


class Status(StrEnum):
    """What became of a scan.  Accepted and flagged ones have voxels and go into feeds."""

    ACCEPTED = "accepted"
    FLAGGED = "flagged"
    REJECTED = "rejected"


class Verdict(TypedDict):
    """Why a scan cannot be used."""

    status: Status
    reason: str
    message: str
    voxels_sha256: None


class Outcome(TypedDict):
    """What preparation says of a scan, or of one of the maps of a series."""

    uri: str
    member: str | None
    modality: str
    figures: Figures
    provenance: str | None  # JSON: software, parameters, hash of the input; None if never read
    scan_id: str | None  # hash of voxels and affine; None where there are none
    status: Status
    reason: str | None  # why it has this status: code of a rejection, or the flags
    flags: str | None  # what may be wrong with it, joined by ";"; of rejected scans, too
    notes: str | None  # how it was made, joined by ";"
    message: str | None  # one line that says more about a rejection
    voxels_sha256: NotRequired[str | None]  # of the stored arrays


class ArchiveRow(Outcome):
    """An Outcome with the other columns of its Scan, see there."""

    cohort: str
    participant: str
    family: str
    session: str
    split: str
    age_at_scan: float | None
    sex: str | None
    site: str | None
    scanner: str | None
    field_strength: float | None
    tracer: str | None
    processing: str | None
    mask_uri: str | None
    label_uri: str | None
    transform_uri: str | None
    confounds_uri: str | None
    surface_uri: str | None
    facts: str | None
    size_bytes: int | None
    modified: float | None


WITHDRAWN = "withdrawn"  # the reason of a row whose person has left; prepare skips the person
WITHDRAWN_CONTENT: Verdict = {
    "status": Status.REJECTED, "reason": "withdrawn_content", "voxels_sha256": None,
    "message": "same voxels and affine as a scan of a person who withdrew"}
_ADDED = ("scan_id", "status", "reason", "flags", "notes", "message", "voxels_sha256",
          "provenance")  # to a Scan's
FIXED_SCHEMA = pa.schema([*SCAN_SCHEMA, *(pa.field(name, pa.string()) for name in _ADDED
                                          if name not in SCAN_SCHEMA.names)])


class Judged(TypedDict):
    """What flags make of a scan that is kept."""

    status: Status
    reason: str | None
    flags: str | None


def judged_by(flags: Iterable[str]) -> Judged:
    """Columns of a scan that is kept: flagged where there are flags, else accepted."""
    told = joined(flags)
    return {"status": Status.FLAGGED if told else Status.ACCEPTED, "reason": told, "flags": told}


def flags_of(row: ArchiveRow) -> list[str]:
    """Flags of a row; of one that was made before they had a column, from its reason."""
    told = row.get("flags")
    if told is None and row["status"] == Status.FLAGGED:
        told = row["reason"]
    return told.split(";") if told else []


def rejected_outcome(scan: Scan, *, reason: str, message: str, provenance: str | None = None,
                     flags: Iterable[str] = ()) -> Outcome:
    """A scan that cannot be used: no voxels, no figures."""
    return {"uri": scan.uri, "member": scan.member, "modality": scan.modality, "figures": {},
            "provenance": provenance, "scan_id": None, "status": Status.REJECTED,
            "reason": reason, "flags": joined(flags), "notes": None, "message": message}


def duplicate_of(place: str, *, same_person: bool) -> Verdict:
    """What a row says whose content is already in the slot ``place``, of this person or another."""
    what = ("the same person has this scan twice; remove one copy, or leave it" if same_person else
            "if the two participants are one person, tie them by split_group in participants.tsv; "
            "else find out whose scan it is")
    return {"status": Status.REJECTED, "reason": f"duplicate_of:{place}", "voxels_sha256": None,
            "message": f"same voxels and affine as {place}: {what}"}


def scan_table(rows: Sequence[ArchiveRow]) -> pa.Table:
    """Rows in Arrow: FIXED_SCHEMA, and a column for every figure that occurs.

    A figure is a number, or a text where one of the rows has a text.
    """
    names = sorted({name for row in rows for name in row["figures"]})
    text = {name for name in names
            if any(isinstance(row["figures"].get(name), str) for row in rows)}
    flat: list[dict[str, Any]] = [
        {**row, **{name: str(value) if name in text and value is not None else value
                   for name, value in row["figures"].items()}} for row in rows]
    return pa.Table.from_pylist(flat, schema=pa.schema(
        [*FIXED_SCHEMA, *(pa.field(name, pa.string() if name in text else pa.float64())
                          for name in names)]))


def archive_rows(table: pa.Table) -> Iterator[ArchiveRow]:
    """Rows of scans.parquet, figures apart again; of some of its columns, rows with only these."""
    fixed = [name for name in table.column_names if name in FIXED_SCHEMA.names]
    figures = [name for name in table.column_names if name not in FIXED_SCHEMA.names]
    for row in dicts(table):
        yield cast(ArchiveRow, {name: row[name] for name in fixed}
                   | {"figures": {name: row[name] for name in figures}})


def usable(table: pa.Table) -> np.ndarray:
    """[rows] bool: accepted or flagged."""
    return np.asarray(pc.not_equal(table["status"], Status.REJECTED.value))
