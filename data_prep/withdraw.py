"""withdraw: people who left a study leave archives and feeds, at once and in full.

A list (CSV with the columns cohort and participant, original ids) becomes pseudonyms by the site's
key.  Archive: the person's rows stay as tombstones without facts, and the labels, records and
voxels are deleted; ``prepare`` leaves a tombstoned person out for good.  Feed: the shards that hold
the person are rewritten without, the new index is committed, the old shards are deleted.
Checkpoints trained earlier are not touched.  Running it again finishes what was interrupted.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pyarrow as pa

from data_prep.identity import pseudonym
from data_prep.scan import SCAN_SCHEMA
from data_prep.store import (
    ROW_FIELDS,
    WITHDRAWN,
    Row,
    check_reachable,
    commit_archive,
    open_archive,
    remove_volume,
)
from data_prep.tars import remove_shards_except, source_of, write_tar
from neurojepa.errors import DataError
from neurojepa.feed.format import (
    commit_feed,
    join,
    open_feed,
    open_store,
    read_bytes,
    write_bytes,
)

_KEPT = ("uri", "cohort", "participant", "family", "session", "modality", "split")


def withdraw(listing: str, targets: list[str], key: bytes) -> None:
    """Take the people of a list out of archives and feeds; prints what was removed.

    Raises
    ------
    DataError
        The list is empty or lacks a column, or a target is neither a feed nor an archive.
    """
    people = read_list(listing, key)
    for target in targets:
        check_reachable(target)
        fs, path = open_store(target)
        if fs.exists(join(path, "feed.json")):
            num_scans = _from_feed(target, people)
        elif fs.exists(join(path, "archive.json")):
            num_scans = _from_archive(target, people)
        else:
            raise DataError(f"{target}: neither feed.json nor archive.json is there; name a "
                            "finished feed or archive")
        print(f"{target}: {num_scans} scans of {len(people)} listed people removed")


def read_list(listing: str, key: bytes) -> set[str]:
    """Pseudonyms of the people of a withdrawal list."""
    try:
        text = Path(listing).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listing}: cannot be read ({error})") from error
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows:
        raise DataError(f"{listing}: names nobody; an empty withdrawal list is most likely a "
                        "failed download")
    people = set()
    for number, row in enumerate(rows, 2):
        cohort, participant = ((row.get(name) or "").strip() for name in ("cohort", "participant"))
        if not cohort or not participant:
            raise DataError(f"{listing} line {number}: needs the columns cohort and participant, "
                            "both filled")
        people.add(pseudonym(key, cohort, participant.removeprefix("sub-")))
    return people


def _from_archive(uri: str, people: set[str]) -> int:
    """Tombstones first, so that no reader finds the person; then the deletions."""
    archive = open_archive(uri)
    names = [*SCAN_SCHEMA.names, *ROW_FIELDS]
    rows: list[Row] = []
    num_removed = 0
    for row in archive.rows:
        if row["participant"] in people:
            num_removed += row["reason"] != WITHDRAWN
            row = {name: row[name] if name in _KEPT else None for name in names} | {
                "status": "rejected", "reason": WITHDRAWN}
        rows.append(row)
    if num_removed:
        commit_archive(uri, rows, [row for row in archive.labels.to_pylist()
                                   if row["participant"] not in people])
    fs, root = open_store(join(uri, "results"))
    for path in fs.find(root):
        if path.rsplit("/", 1)[-1].split("-")[0] in people:
            fs.rm_file(path)
    for person in people:
        remove_volume(uri, person)
    return num_removed


def _from_feed(uri: str, people: set[str]) -> int:
    feed = open_feed(uri)
    rows = feed.index.to_pylist()
    touched = {row["shard"] for row in rows if row["participant"] in people}
    kept = [row for row in rows if row["shard"] not in touched]
    for shard in sorted(touched):
        data = read_bytes(join(uri, shard))
        samples = [
            (row, data[row["offset"]:row["offset"] + row["length"]],
             None if row["label_length"] is None else
             data[row["label_offset"]:row["label_offset"] + row["label_length"]])
            for row in rows if row["shard"] == shard and row["participant"] not in people]
        if samples:
            name = shard.removesuffix(".tar") + "-w.tar"
            tar, placed = write_tar(samples)
            write_bytes(join(uri, name), tar)
            kept += [row | {"shard": name} for row in placed]
    if touched:
        labels = [row for row in feed.labels().to_pylist() if row["participant"] not in people]
        commit_feed(uri, feed.grid, kept, pa.Table.from_pylist(labels, feed.labels().schema),
                    source=source_of(uri))
    remove_shards_except(uri, {row["shard"] for row in kept})
    return len(rows) - len(kept)
