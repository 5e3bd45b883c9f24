"""index: a cohort's tree -> a manifest of Scans with pseudonyms and splits, and its labels.

    MANIFEST.parquet          one row per scan (SCAN_SCHEMA); written last
    MANIFEST.labels.parquet   participant, session, name, value

No voxels are read.  Whatever was seen and not used is counted and printed.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from dataclasses import asdict, replace

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.cohorts import bids
from data_prep.cohorts.base import CohortTables
from data_prep.identity import pseudonym
from data_prep.scan import SCAN_SCHEMA, Scan
from data_prep.splits import SPLIT_BELOW, group_people, split_of
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import LABELS_SCHEMA, open_store, read_bytes, write_bytes

READERS = {"bids": bids.read_cohort}


def build_manifest(tables: CohortTables, cohort: str, key: bytes) -> tuple[pa.Table, pa.Table]:
    """Scans and labels with pseudonyms, families and splits in place of the source's ids.

    Returns
    -------
    scans, labels
        Tables of SCAN_SCHEMA and LABELS_SCHEMA, sorted, so equal sources give equal bytes.
    """
    people = {scan.participant for scan in tables.scans}
    groups = group_people(people, tables.ties)
    names = {person: pseudonym(key, cohort, person) for person in people}
    scans = []
    for scan in tables.scans:
        group = groups[scan.participant]
        alone = group == f"person:{scan.participant}"
        scans.append(asdict(replace(
            scan, participant=names[scan.participant], split=split_of(key, cohort, group),
            family=names[scan.participant] if alone else pseudonym(key, cohort, group))))
    scans.sort(key=lambda row: (row["participant"], row["session"], row["uri"]))
    labels = sorted((names[person], *rest) for person, *rest in tables.labels if person in names)
    return (pa.Table.from_pylist(scans, schema=SCAN_SCHEMA),
            pa.Table.from_pylist([dict(zip(LABELS_SCHEMA.names, row, strict=True))
                                  for row in labels], schema=LABELS_SCHEMA))


def index(cohort: str, source: str, out: str, key: bytes, name: str | None = None) -> None:
    """Index a source and write its manifest; prints what was found."""
    labels_path(out)
    folder = open_store(source)[1].rstrip("/").rsplit("/", 1)[-1]
    name = name or re.sub(r"[^A-Za-z0-9]+", "-", folder).strip("-")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"--name {name!r}: use letters, digits, dots and dashes")
    tables = READERS[cohort](source, name)
    scans, labels = build_manifest(tables, name, key)
    write_table(labels_path(out), labels)
    write_table(out, scans)
    people = {row["participant"]: row for row in scans.to_pylist()}.values()
    groups = {row["family"]: row["split"] for row in people}.values()
    kinds = Counter(scans["modality"].to_pylist())
    print(f"{name}: {scans.num_rows} scans ({', '.join(f'{n} {k}' for k, n in kinds.items())}) of "
          f"{len(people)} people in {len(groups)} groups -> {out}")
    in_split = Counter(row["split"] for row in people)
    for split, _ in SPLIT_BELOW:
        print(f"  {split}: {in_split[split]} people, {Counter(groups)[split]} groups")
    for note, count in sorted(tables.notes.items()):
        print(f"  noted {count} x {note}")


def labels_path(manifest: str) -> str:
    """Where the labels of a manifest lie: X.labels.parquet beside X.parquet."""
    if not manifest.endswith(".parquet"):
        raise ConfigError(f"{manifest}: a manifest's name must end in .parquet")
    return manifest.removesuffix(".parquet") + ".labels.parquet"


def read_manifest(path: str) -> tuple[list[Scan], pa.Table]:
    """The scans and labels of a manifest.

    Raises
    ------
    DataError
        It is missing, not Parquet, or lacks columns.
    """
    scans, labels = read_table(path), read_table(labels_path(path))
    if missing := set(SCAN_SCHEMA.names) - set(scans.column_names):
        raise DataError(f"{path}: lacks the columns {', '.join(sorted(missing))}; it is not a "
                        "manifest of this version; run index again")
    return [Scan(**row) for row in scans.select(SCAN_SCHEMA.names).to_pylist()], labels


def read_table(path: str) -> pa.Table:
    """A Parquet table, or DataError naming the file."""
    data = read_bytes(path)
    try:
        return pq.read_table(io.BytesIO(data))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a Parquet table ({str(error).splitlines()[0]}); make it "
                        "again") from error


def write_table(path: str, table: pa.Table) -> bytes:
    """Write a Parquet table as a whole; returns its bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_bytes(path, buffer.getvalue())
    return buffer.getvalue()
