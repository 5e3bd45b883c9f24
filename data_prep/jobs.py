"""prepare: manifests -> the archive, as Ray tasks, one per person.

A task prepares all scans of a person, writes their voxels, and commits a record
``results/<participant>-<hash of inputs and preset>.json`` last.  The driver starts tasks only for
persons without a record, and then merges: rows of earlier manifests stay, a person's rows are
replaced by the newest.  So a run can be killed anywhere and repeated, and another manifest adds to
the archive.  A person whose task fails becomes rows with reason ``worker_failed`` and is tried
again by the next run; a store that fails stops the run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from data_prep.index import read_manifest, read_table
from data_prep.pool import Failure, run_tasks
from data_prep.scan import Scan
from data_prep.splits import check as check_splits
from data_prep.store import (
    WITHDRAWN,
    archive_rows,
    check_reachable,
    commit_archive,
    list_slots,
    remove_volume,
    slot,
    write_volume,
)
from neurojepa.errors import DataError
from neurojepa.feed.format import join, open_store, read_bytes, sha256, write_bytes

if TYPE_CHECKING:
    from data_prep.volumes.pipeline import Prepared, Rejected
    from data_prep.volumes.preset import Preset

PrepareOne = Callable[[list[Scan], "Preset"], "Sequence[Prepared | Rejected]"]
Row = dict[str, Any]
_INPUTS = ("uri", "member", "size_bytes", "modified", "mask_uri", "label_uri", "modality",
           "session", "reason", "tracer", "processing", "transform_uri", "confounds_uri",
           "surface_uri", "facts")


def prepare(manifests: Sequence[str], out: str, preset: Preset, workers: int,
            ray_address: str | None = None, prepare_one: PrepareOne | None = None) -> Counter[str]:
    """Prepare the scans of manifests into an archive; returns its number of scans by status.

    Parameters
    ----------
    prepare_one
        Turns the scans of one person into volumes; ``volumes.pipeline.prepare_person`` if None.

    Raises
    ------
    DataError
        A manifest or a store cannot be read or written, people are in two splits, or no scan of
        the archive is usable.
    """
    for uri in (*manifests, out):
        check_reachable(uri)
    read = [read_manifest(manifest) for manifest in manifests]
    labels = pa.concat_tables([table for _, table in read])
    people: dict[str, list[Scan]] = defaultdict(list)
    for scan in {(scan.uri, scan.member): scan for scans, _ in read for scan in scans}.values():
        people[scan.participant].append(scan)
    for name in {row["participant"] for row in archive_rows(out) if row["reason"] == WITHDRAWN}:
        if people.pop(name, None):
            print(f"{name}: withdrawn, left out")
    records = {name: record_name(own, preset) for name, own in people.items()}
    done = _committed(out)
    failed = _run(out, {name: own for name, own in people.items() if records[name] not in done},
                  records, preset, workers, ray_address, prepare_one)
    rows = _merge(out, people, records, failed)
    slots = list_slots(out)
    lost = {row["participant"] for row in rows if row["status"] != "rejected"
            and slot(row["participant"], row["scan_id"]) not in slots} & people.keys()
    if lost:  # voxels removed behind our back, or of a duplicate whose original is gone
        failed |= _run(out, {name: people[name] for name in lost}, records, preset, workers,
                       ray_address, prepare_one)
        rows = _merge(out, people, records, failed)
    return _commit(out, rows, labels, people.keys())


def record_name(scans: list[Scan], preset: Preset) -> str:
    """Name of the record of a person's scans: equal inputs and parameters, equal name."""
    inputs = [[getattr(scan, name) for name in _INPUTS] for scan in scans]
    text = json.dumps([scans[0].cohort, inputs, asdict(preset)], sort_keys=True)
    return f"{scans[0].participant}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


# ---- in the worker -------------------------------------------------------------------------------

def prepare_and_write(out: str, record: str, scans: list[Scan], preset: Preset,
                      prepare_one: PrepareOne | None) -> Failure | None:
    """Prepare one person, write the voxels, then commit the record.

    A failure of the preparation is returned; a failure of a store is raised.
    """
    from data_prep.volumes.pipeline import Rejected, prepare_person

    try:
        results = (prepare_one or prepare_person)(scans, preset)
        rows = {(result.scan.uri, result.scan.member): _row(result, preset) for result in results}
        missing = [scan.uri for scan in scans if (scan.uri, scan.member) not in rows]
        if missing:
            raise RuntimeError(f"{missing[0]}: the preparation gave no result")
    except DataError:
        raise  # the store, not this person: it would fail for all
    except Exception as error:  # whatever one person's scans do must not end the job
        return Failure(f"{type(error).__name__}: {error}".splitlines()[0])
    seen: dict[str, str] = {}
    for result in results:
        if isinstance(result, Rejected):
            continue
        row = rows[result.scan.uri, result.scan.member]
        path = slot(result.scan.participant, result.scan_id)
        if result.scan_id in seen:
            _mark_duplicate(row, path, seen[result.scan_id])
            continue
        seen[result.scan_id] = result.scan.uri
        row["voxels_sha256"] = write_volume(out, path, result.image, result.mask, result.label)
    write_bytes(join(out, "results", record),
                json.dumps(list(rows.values()), indent=1, allow_nan=False).encode())
    return None


def _row(result: Prepared | Rejected, preset: Preset) -> Row:
    """What preparation found about one scan, without the Scan's own columns."""
    from data_prep.volumes.pipeline import Rejected

    scan = result.scan
    row: Row = {"uri": scan.uri, "member": scan.member, "figures": {},
                "provenance": json.dumps({
                    "software": f"neurojepa {_version()}", "parameters": asdict(preset),
                    "input_sha256": _input_sha256(scan.uri)}, sort_keys=True)}
    if isinstance(result, Rejected):
        return row | {"scan_id": None, "status": "rejected", "reason": result.reason,
                      "message": result.message}
    return row | {"scan_id": result.scan_id, "status": "flagged" if result.flags else "accepted",
                  "reason": ";".join(result.flags) or None, "message": None,
                  "figures": {name: _plain(value) for name, value in result.figures.items()}}


def _plain(value: Any) -> float | str | None:
    """A figure as JSON can hold it: not finite is unknown."""
    if value is None or isinstance(value, str):
        return value
    return float(value) if math.isfinite(value) else None


def _version() -> str:
    try:
        return metadata.version("neurojepa")
    except metadata.PackageNotFoundError:
        return "from an uninstalled source tree"


def _input_sha256(uri: str) -> str | None:
    try:
        return sha256(read_bytes(uri))
    except DataError:
        return None  # the scan itself is rejected for it, with the reason


def _mark_duplicate(row: Row, path: str, original: str) -> None:
    row |= {"status": "rejected", "reason": f"duplicate_of:{path}", "voxels_sha256": None,
            "message": f"{row['uri']}: same voxels and affine as {original}; if two ids are one "
                       "person, tie them by split_group in participants.tsv"}


# ---- in the driver -------------------------------------------------------------------------------

def _committed(out: str) -> set[str]:
    """Names of the records already there."""
    fs, root = open_store(join(out, "results"))
    try:
        return {path.rsplit("/", 1)[-1] for path in fs.ls(root, detail=False)}
    except FileNotFoundError:
        return set()


def _run(out: str, people: dict[str, list[Scan]], records: dict[str, str], preset: Preset,
         workers: int, ray_address: str | None, prepare_one: PrepareOne | None) -> dict[str, str]:
    """Prepare people; returns a message for each one whose task failed."""
    # people with most scans first, so that all workers end at about the same time
    longest_first = sorted(people.items(), key=lambda item: (-len(item[1]), item[0]))
    arguments = {name: (out, records[name], scans, preset, prepare_one)
                 for name, scans in longest_first}
    return run_tasks(prepare_and_write, arguments, workers, ray_address, unit="people")


def _merge(out: str, people: dict[str, list[Scan]], records: dict[str, str],
           failed: dict[str, str]) -> list[Row]:
    """All rows of the archive: earlier ones of other people, and these people's newest."""
    old = archive_rows(out)
    rows = [dict(row) for row in old if row["participant"] not in people]
    readable = [name for name in people if name not in failed]
    with ThreadPoolExecutor(16) as pool:
        contents = pool.map(lambda name: read_bytes(join(out, "results", records[name])), readable)
        results = {name: json.loads(content)
                   for name, content in zip(readable, contents, strict=True)}
    for name, scans in people.items():
        found = {(row["uri"], row["member"]): row for row in results.get(name, [])}
        for scan in scans:
            row = found.get((scan.uri, scan.member)) or {
                "figures": {}, "status": "rejected", "reason": "worker_failed",
                "message": failed[name]}
            figures = row.pop("figures")
            rows.append(asdict(scan) | row | figures)  # the row's reason is the final one
    rows.sort(key=lambda row: (row["cohort"], row["participant"], row["session"], row["uri"],
                               row["member"] or ""))
    kept = {(row["participant"], row.get("scan_id")) for row in rows}
    for row in old:  # voxels of scans that are no longer in any row
        if row["scan_id"] and (row["participant"], row["scan_id"]) not in kept:
            remove_volume(out, slot(row["participant"], row["scan_id"]))
    _reject_duplicates(out, rows)
    return rows


def _reject_duplicates(out: str, rows: list[Row]) -> None:
    """Across persons, the first row of equal content keeps its slot; later ones lose theirs."""
    owner: dict[str, Row] = {}
    for row in rows:
        if row["status"] == "rejected":
            continue
        first = owner.setdefault(row["scan_id"], row)
        if first is not row:
            _mark_duplicate(row, slot(first["participant"], row["scan_id"]), first["uri"])
            remove_volume(out, slot(row["participant"], row["scan_id"]))


def _commit(out: str, rows: list[Row], labels: pa.Table, people: Container[str]) -> Counter[str]:
    """Write the archive's tables, with these people's labels replaced; prints the counts."""
    if problems := check_splits(rows):
        raise DataError(f"{out}: {problems[0]}" + (f" (and {len(problems) - 1} more)"
                                                   if len(problems) > 1 else ""))
    fs, path = open_store(join(out, "labels.parquet"))
    old = read_table(join(out, "labels.parquet")).to_pylist() if fs.exists(path) else []
    kept = [row for row in old if row["participant"] not in people]
    mine = [row for row in labels.to_pylist() if row["participant"] in people]
    commit_archive(out, rows, kept + mine)
    counts = Counter(row["status"] for row in rows)
    reasons = Counter(row["reason"].split(":")[0] for row in rows if row["status"] == "rejected")
    print(f"{out}: {counts['accepted']} accepted, {counts['flagged']} flagged, "
          f"{counts['rejected']} rejected of {len(rows)} scans")
    for reason, count in reasons.most_common():
        print(f"  rejected {count} x {reason}")
    if not counts["accepted"] + counts["flagged"]:
        example = next((row["message"] for row in rows), "the manifest is empty")
        raise DataError(f"{out}: none of {len(rows)} scans is usable; the first one: {example}")
    return counts
