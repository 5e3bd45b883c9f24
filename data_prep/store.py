"""The archive: prepared volumes on the 1 mm grid, on local disks or an object store.

    archive.json            format, grid, counts, hashes; written last
    scans.parquet           one row per indexed scan: Scan, scan_id, status, reason, figures, ...
    labels.parquet          participant, session, name, value
    results/*.json          one record per prepared person, committed after that person's voxels
    volumes.zarr/<participant>/<scan_id>/{image, mask, label}

A scan's slot lies below its person, so that no two persons ever write the same object and a
person's voxels can be removed at one place.  Each array is one shard (one object) of inner chunks
that can be read alone.  An image is int16 with attribute ``scale``: stored value times scale gives
0..1; the mask holds 0 air, 1 brain, 2 not scanned.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from data_prep.index import read_table, write_table
from data_prep.scan import SCAN_SCHEMA
from neurojepa.errors import DataError
from neurojepa.feed.format import (
    ARCHIVE_GRID,
    LABELS_SCHEMA,
    is_local,
    join,
    open_store,
    read_bytes,
    sha256,
    store_errors,
    write_bytes,
)

ARCHIVE_FORMAT = 1
IMAGE_SCALE = 1.0 / 32767
_CHUNK = (60, 72, 60)  # 27 of them in a shard: a crop reads a part
ROW_FIELDS = ("scan_id", "status", "reason", "message", "voxels_sha256", "provenance")
WITHDRAWN = "withdrawn"  # the reason of a row whose person has left; prepare skips the person
Row = dict[str, Any]
ARRAYS = {"image": np.int16, "mask": np.uint8, "label": np.int16}


@dataclass(frozen=True)
class Archive:
    """A committed archive: one row per scan, and labels."""

    uri: str
    rows: list[Row]
    labels: pa.Table
    fingerprint: str


def check_reachable(uri: str, tries: int = 3) -> None:
    """Fail in seconds, with one clear line, where an S3 endpoint does not answer.

    Raises
    ------
    DataError
        Nothing listens at AWS_ENDPOINT_URL.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not uri.startswith("s3:") or not endpoint:
        return
    parts = urlsplit(endpoint)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    for attempt in range(tries):
        try:
            socket.create_connection((parts.hostname or "", port), timeout=5).close()
            return
        except OSError as error:
            if attempt == tries - 1:
                raise DataError(f"{uri}: the object store at {endpoint} does not answer ({error}); "
                                "start it or correct AWS_ENDPOINT_URL") from error
            time.sleep(1)


def open_archive(uri: str) -> Archive:
    """Open a committed archive; no voxels are read.

    Raises
    ------
    DataError
        There is no archive.json, or the tables do not match it.
    """
    try:
        record = json.loads(read_bytes(join(uri, "archive.json")))
    except DataError as error:
        raise DataError(f"{uri}: no finished archive here ({error}); run: "
                        "python -m data_prep prepare --manifest MANIFEST --out ARCHIVE") from error
    except ValueError as error:
        raise DataError(f"{uri}/archive.json: not JSON; run prepare again") from error
    if record.get("format") != ARCHIVE_FORMAT:
        raise DataError(f"{uri}: archive format {record.get('format')}, this version reads "
                        f"{ARCHIVE_FORMAT}; prepare it again")
    for name in ("scans", "labels"):
        if sha256(read_bytes(join(uri, f"{name}.parquet"))) != record[f"{name}_sha256"]:
            raise DataError(f"{uri}/{name}.parquet: does not match archive.json; a run was "
                            "interrupted or the table was changed; run prepare again")
    fingerprint = sha256((record["scans_sha256"] + record["labels_sha256"]).encode())[:16]
    return Archive(uri, read_table(join(uri, "scans.parquet")).to_pylist(),
                   read_table(join(uri, "labels.parquet")), fingerprint)


def archive_rows(uri: str) -> list[Row]:
    """Rows of scans.parquet, committed or not; none where there is no table yet."""
    fs, path = open_store(join(uri, "scans.parquet"))
    return read_table(join(uri, "scans.parquet")).to_pylist() if fs.exists(path) else []


def commit_archive(uri: str, rows: list[Row], labels: list[Row]) -> None:
    """Write labels, rows and, last, archive.json.

    The columns are Scan's, ROW_FIELDS, and then every other name that occurs in a row: figures.
    """
    fixed = [*SCAN_SCHEMA, *(pa.field(name, pa.string()) for name in ROW_FIELDS
                             if name not in SCAN_SCHEMA.names)]
    figures = sorted({name for row in rows for name in row} - {field.name for field in fixed})
    text = {name for name in figures if any(isinstance(row.get(name), str) for row in rows)}
    rows = [row | {name: str(row[name]) for name in text if row.get(name) is not None}
            for row in rows]
    schema = pa.schema(fixed + [pa.field(name, pa.string() if name in text else pa.float64())
                                for name in figures])
    labels = sorted(labels, key=lambda row: (row["participant"], row["session"], row["name"]))
    labels_bytes = write_table(join(uri, "labels.parquet"),
                               pa.Table.from_pylist(labels, schema=LABELS_SCHEMA))
    scans_bytes = write_table(join(uri, "scans.parquet"), pa.Table.from_pylist(rows, schema=schema))
    counts = Counter(row["status"] for row in rows)
    write_bytes(join(uri, "archive.json"), json.dumps({
        "format": ARCHIVE_FORMAT, "grid": asdict(ARCHIVE_GRID),
        "counts": dict(sorted(counts.items())), "scans_sha256": sha256(scans_bytes),
        "labels_sha256": sha256(labels_bytes)}, indent=1).encode())


def slot(participant: str, scan_id: str) -> str:
    """A scan's path below volumes.zarr."""
    return f"{participant}/{scan_id}"


def write_volume(uri: str, path: str, image: np.ndarray, mask: np.ndarray,
                 label: np.ndarray | None) -> str:
    """Write one scan's arrays [X, Y, Z] on the archive grid to its slot, replacing what is there.

    Returns
    -------
    str
        Hash of the stored voxels, for the scan's row.

    Raises
    ------
    DataError
        The store cannot be written (no space, no access).
    """
    import zarr

    arrays = {"image": np.rint(np.clip(image, 0, 1) / IMAGE_SCALE), "mask": mask, "label": label}
    stored = {name: np.ascontiguousarray(array, dtype=ARRAYS[name])
              for name, array in arrays.items() if array is not None}
    place = join(uri, "volumes.zarr", path)
    try:
        remove_volume(uri, path)
        group = zarr.open_group(_zarr_store(place), mode="w", zarr_format=3)
        for name, array in stored.items():
            target = group.create_array(
                name, shape=array.shape, dtype=array.dtype, chunks=_CHUNK, shards=array.shape,
                dimension_names=("x", "y", "z"),
                attributes={"scale": IMAGE_SCALE} if name == "image" else {})
            target[:] = array
    except store_errors() as error:
        raise DataError(f"{place}: cannot be written ({error}); free space or check the "
                        "store") from error
    return voxel_hash(stored)


def read_volume(uri: str, path: str) -> dict[str, np.ndarray]:
    """The stored arrays of a slot, [X, Y, Z] each: image int16, mask uint8, label int16 if any.

    Raises
    ------
    DataError
        The slot is missing or damaged, or its arrays are not of the archive's grid and types.
    """
    import zarr

    place = join(uri, "volumes.zarr", path)
    try:
        group = zarr.open_group(_zarr_store(place), mode="r", zarr_format=3)
        arrays = {name: np.asarray(group[name][...]) for name in ARRAYS  # type: ignore[index]
                  if name in group}
    except Exception as error:  # zarr and its codecs raise many kinds
        raise DataError(f"{place}: cannot be read ({type(error).__name__}: {error}); remove the "
                        "folder and run prepare again") from error
    for name in ("image", "mask"):
        if name not in arrays:
            raise DataError(f"{place}: has no {name}; remove the folder and run prepare again")
    for name, array in arrays.items():
        if array.shape != ARCHIVE_GRID.shape or array.dtype != ARRAYS[name]:
            raise DataError(f"{place}/{name}: is {array.dtype} {array.shape}, not "
                            f"{np.dtype(ARRAYS[name])} {ARCHIVE_GRID.shape}; remove the folder "
                            "and run prepare again")
    return arrays


def remove_volume(uri: str, path: str) -> None:
    """Delete a slot (or a person's folder of slots) if it is there."""
    fs, place = open_store(join(uri, "volumes.zarr", path))
    if fs.exists(place):
        fs.rm(place, recursive=True)


def list_slots(uri: str) -> set[str]:
    """Every slot in the archive, as <participant>/<scan_id>; one listing, no voxels."""
    fs, root = open_store(join(uri, "volumes.zarr"))
    try:
        files = fs.find(root)
    except FileNotFoundError:
        return set()
    parts = [path[len(root.rstrip("/")) + 1:].split("/") for path in files]
    return {slot(*part[:2]) for part in parts if len(part) > 2}


def voxel_hash(arrays: dict[str, np.ndarray]) -> str:
    """sha256 over image, mask and label of a slot, in this order."""
    digest = hashlib.sha256()
    for name in ARRAYS:
        if name in arrays:
            digest.update(name.encode())
            digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _zarr_store(uri: str) -> Any:
    from zarr.storage import FsspecStore, LocalStore

    fs, path = open_store(uri)
    if is_local(fs):
        return LocalStore(path)
    return FsspecStore.from_url(uri, storage_options={"use_listings_cache": False})
