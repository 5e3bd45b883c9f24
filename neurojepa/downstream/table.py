"""Embeddings as tables: one row a scan, a session, a person or a region.

    embeddings.parquet   a scan: pseudonyms, site, age, brain volume, flags, vector
    sessions.parquet     a person's session and modality: the mean over its scans
    people.parquet       a person and modality: the mean over all scans
    regions.parquet      a scan and region, with --regions
    scans.csv            what became of every scan found, under the user's own ids (mode 0600)

The first four hold pseudonyms alone.  ``probe`` joins them with labels under the user's own ids
through the key.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from neurojepa.downstream.embed import Embeddings
from neurojepa.downstream.regions import Regions
from neurojepa.downstream.scans import Scans
from neurojepa.errors import DataError
from neurojepa.feed.format import Feed
from neurojepa.storage import join, parquet_bytes, parquet_table, read_bytes, write_bytes

# columns of the feed's index, and of the archive where the scans were prepared here
_OF_FEED = ("scan_id", "participant", "family", "session", "cohort", "modality", "site", "split")
_OF_ARCHIVE = {"status": "status", "flags": "flags", "age_at_scan": "age", "sex": "sex",
               "scanner": "scanner", "field_strength": "field_strength"}
_TOLD = ("status", "reason", "flags", "notes", "message", "scan_id")  # of each scan that was found
_TYPES = {"age": pa.float64(), "field_strength": pa.float64()}


def embedding_table(found: Embeddings, feed: Feed, rows: np.ndarray,
                    seen: Sequence[bool | None], scans: Scans | None = None) -> pa.Table:
    """One row a scan, in the order of ``rows``; what only the archive knows is null without it.

    ``seen`` [n] says whether the scan's person was in the pretraining of the weights; None where
    it is not known.
    """
    columns = {name: feed.index[name].take(rows).combine_chunks() for name in _OF_FEED}
    columns["brain_ml"] = pa.array(feed.index["num_foreground"].to_numpy()[rows]
                                   * feed.grid.spacing_mm**3 / 1000)
    columns["seen"] = pa.array(seen, pa.bool_())
    known = {row["scan_id"]: row for row in scans.about.select(
        ["scan_id", *_OF_ARCHIVE]).to_pylist()} if scans else {}
    for name, told in _OF_ARCHIVE.items():
        columns[told] = pa.array([known.get(each, {}).get(name) for each in found.scan_id.tolist()],
                                 _TYPES.get(told, pa.string()))
    return pa.table({**columns, "embedding": _vectors(found.values)})


def region_table(found: Embeddings, regions: Regions) -> pa.Table:
    """One row for each scan and region of which something was seen."""
    assert found.regions is not None and found.region_patches is not None
    scan, region = np.nonzero(found.region_patches > 0)
    return pa.table({
        "scan_id": found.scan_id[scan].tolist(), "participant": found.participant[scan].tolist(),
        "session": found.session[scan].tolist(), "modality": found.modality[scan].tolist(),
        "region": [regions.names[number] for number in region],
        "patches": found.region_patches[scan, region],
        "embedding": _vectors(found.regions[scan, region])})


def mean_table(table: pa.Table, by: Sequence[str]) -> pa.Table:
    """Mean vectors of an embedding table's scans with equal columns ``by``, in order."""
    keys = list(zip(*(table[name].to_pylist() for name in by), strict=True))
    values = vectors(table)
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, each in enumerate(keys):
        groups.setdefault(each, []).append(number)
    names = sorted(groups)
    columns = dict(zip(by, map(list, zip(*names, strict=True)), strict=True))
    return pa.table({**columns, "scans": [len(groups[name]) for name in names],
                     "embedding": _vectors(np.stack([values[groups[name]].mean(0)
                                                     for name in names]))})


def write_tables(out: str, table: pa.Table) -> None:
    """Write the tables of scans, sessions and people."""
    by = ("participant", "family", "cohort", "modality")
    for name, each in (("people", mean_table(table, by)),
                       ("sessions", mean_table(table, (*by, "session"))), ("embeddings", table)):
        write_bytes(join(out, f"{name}.parquet"), parquet_bytes(each))


def write_scans_csv(out: str, scans: Scans, embedded: Sequence[str]) -> None:
    """Write what became of every scan, with the user's own ids and files."""
    text, done = io.StringIO(), set(embedded)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["participant_id", "session_id", "modality", "file", *_TOLD, "embedded"])
    for row in scans.about.to_pylist():
        file = row["uri"]
        if os.path.islink(file.rstrip("/")):  # one of the links of scans.py
            file = os.path.realpath(file)
        if row["member"]:
            file = f"{file}::{row['member']}"
        writer.writerow([scans.ids[row["participant"]], row["session"], row["modality"], file,
                         *(row[name] for name in _TOLD),
                         "yes" if row["scan_id"] in done and row["status"] != "rejected" else "no"])
    write_bytes(join(out, "scans.csv"), text.getvalue().encode(), private=True)


def read_embeddings(out: str) -> pa.Table:
    """The table of scans that ``embed`` wrote.

    Raises
    ------
    DataError
        There is none, or an earlier version wrote it.
    """
    uri = join(out, "embeddings.parquet")
    try:
        table = parquet_table(read_bytes(uri))
    except (DataError, pa.ArrowInvalid) as error:
        raise DataError(f"{uri}: no embeddings here ({error}); make them with: neurojepa embed "
                        "SCANS --weights W --out OUT") from error
    if missing := {*_OF_FEED, "brain_ml", "embedding"} - set(table.column_names):
        raise DataError(f"{uri}: lacks {', '.join(sorted(missing))}; an earlier version wrote it: "
                        "embed again")
    return table


def vectors(table: pa.Table) -> np.ndarray:
    """float32 [n, D] of a table's column embedding."""
    return np.stack(table["embedding"].to_numpy(zero_copy_only=False)).astype(np.float32)


def _vectors(values: np.ndarray) -> pa.Array:
    return pa.array(list(values.astype(np.float32)), pa.list_(pa.float32()))
