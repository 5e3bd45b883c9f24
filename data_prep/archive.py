"""The archive: prepared volumes on the 1 mm grid, on local disks or an object store.

    archive.json            format, grid, counts, hashes; written last
    scans.parquet           one row per indexed scan (rows.py)
    labels.parquet          participant, session, name, value
    review.parquet          pairs of scans that a person should look at: near-duplicates
    audit.jsonl             withdrawals so far (withdrawal/audit.py)
    results/*.json          one record per prepared person, committed after that person's voxels
    volumes.zarr/<participant>/<scan_id>/{image, mask, label, parcels}

A scan's slot lies below its person, so that no two persons ever write the same object and a
person's voxels can be removed at one place.  Each array is one shard (one object) of inner chunks
that can be read alone.  An image is int16 with attribute ``scale``: stored value times scale gives
0..1; the mask holds MaskCode (0 air, 1 brain, 2 not scanned).  ``parcels`` float32 [P, T] are the
mean series of cortical parcels of a CIFTI scan.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.rows import ArchiveRow, archive_rows
from data_prep.tables import read_table, write_table
from neurojepa.errors import DataError
from neurojepa.feed.format import ARCHIVE_GRID
from neurojepa.storage import (
    exists,
    is_local,
    join,
    open_store,
    read_bytes,
    remove,
    sha256,
    walk,
    write_bytes,
)

ARCHIVE_FORMAT = 2
IMAGE_SCALE = 1.0 / 32767
_CHUNK = (60, 72, 60)  # 27 of them in a shard: a crop reads a part
ARRAYS = {"image": np.int16, "mask": np.uint8, "label": np.int16, "parcels": np.float32}
TABLES = ("scans", "labels", "review")
_THREADS = 16  # requests to a store in flight


@dataclass(frozen=True)
class Archive:
    """A committed archive: one row per scan, and labels."""

    uri: str
    scans: pa.Table
    labels: pa.Table
    review: pa.Table
    fingerprint: str

    @cached_property
    def rows(self) -> list[ArchiveRow]:
        """``scans`` as dicts: about 6 kB each, so for large cohorts take columns instead."""
        return list(archive_rows(self.scans))


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
    tables = {}
    for name in TABLES:
        if sha256(read_bytes(join(uri, f"{name}.parquet"))) != record[f"{name}_sha256"]:
            raise DataError(f"{uri}/{name}.parquet: does not match archive.json; a run was "
                            "interrupted or the table was changed; run prepare again")
        tables[name] = read_table(join(uri, f"{name}.parquet"))
    fingerprint = sha256((record["scans_sha256"] + record["labels_sha256"]).encode())[:16]
    return Archive(uri, **tables, fingerprint=fingerprint)


def archive_table(uri: str, name: str, columns: list[str] | None = None) -> pa.Table | None:
    """scans, labels or review of an archive, committed or not; None where it is not there yet."""
    if not exists(join(uri, f"{name}.parquet")):
        return None
    return read_table(join(uri, f"{name}.parquet"), columns)


def commit_tables(uri: str, *, scans: pa.Table, labels: pa.Table, review: pa.Table) -> None:
    """Write the tables and, last, archive.json."""
    labels = labels.sort_by([(name, "ascending") for name in ("participant", "session", "name")])
    tables = {"scans": scans, "labels": labels, "review": review}
    hashes = {f"{name}_sha256": sha256(write_table(join(uri, f"{name}.parquet"),
                                                   tables[name].combine_chunks()))
              for name in reversed(TABLES)}
    counts = {row["values"]: row["counts"] for row in pc.value_counts(scans["status"]).to_pylist()}
    write_bytes(join(uri, "archive.json"), json.dumps({
        "format": ARCHIVE_FORMAT, "grid": asdict(ARCHIVE_GRID),
        "counts": dict(sorted(counts.items())), **hashes}, indent=1).encode())


def slot(participant: str, scan_id: str) -> str:
    """A scan's path below volumes.zarr."""
    return f"{participant}/{scan_id}"


def write_volume(uri: str, path: str, *, image: np.ndarray, mask: np.ndarray,
                 label: np.ndarray | None, parcels: np.ndarray | None = None) -> str:
    """Write one scan's arrays [X, Y, Z] on the archive grid (parcels [P, T]) to its slot.

    What else the slot held is removed.  Every object appears whole, and two writers of equal
    arrays, one of them given up for dead, do no harm to each other.

    Returns
    -------
    str
        Hash of the stored voxels, for the scan's row.

    Raises
    ------
    DataError
        The store cannot be written (no space, no access).
    """
    arrays = {"image": np.rint(np.clip(image, 0, 1) / IMAGE_SCALE), "mask": mask, "label": label,
              "parcels": parcels}
    stored = {name: np.ascontiguousarray(array, dtype=ARRAYS[name])
              for name, array in arrays.items() if array is not None}
    place = join(uri, "volumes.zarr", path)
    objects = _zarr_objects(stored)
    for name, data in objects.items():
        write_bytes(join(place, name), data)
    for name in walk(place):
        if name not in objects:
            remove(join(place, name))
    return voxel_hash(stored)


def _zarr_objects(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    """A zarr group of arrays, made in memory: the bytes of each object by its name."""
    import zarr

    objects: dict[str, Any] = {}
    group = zarr.open_group(zarr.storage.MemoryStore(objects), mode="w", zarr_format=3)
    for name, array in arrays.items():
        volume = name != "parcels"
        target = group.create_array(
            name, shape=array.shape, dtype=array.dtype,
            chunks=_CHUNK if volume else array.shape, shards=array.shape if volume else None,
            dimension_names=("x", "y", "z") if volume else ("parcel", "time"),
            attributes={"scale": IMAGE_SCALE} if name == "image" else {})
        target[:] = array
    return {name: objects[name].to_bytes() for name in sorted(objects)}


def read_volume(uri: str, path: str) -> dict[str, np.ndarray]:
    """The stored arrays of a slot, as ARRAYS types them: image and mask, label and parcels if any.

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
        shape = array.shape if name == "parcels" else ARCHIVE_GRID.shape
        if array.shape != shape or array.dtype != ARRAYS[name]:
            raise DataError(f"{place}/{name}: is {array.dtype} {array.shape}, not "
                            f"{np.dtype(ARRAYS[name])} {ARCHIVE_GRID.shape}; remove the folder "
                            "and run prepare again")
    return arrays


def remove_volume(uri: str, path: str) -> None:
    """Delete a slot (or a person's folder of slots) if it is there."""
    remove(join(uri, "volumes.zarr", path))


def list_slots(uri: str) -> set[str]:
    """Every slot in the archive, as <participant>/<scan_id>; listed person by person, no voxels."""
    fs, root = open_store(join(uri, "volumes.zarr"))

    # objects, as a store may list folders whose objects are gone; locally folders: 20 times fewer
    listed, least = (fs.ls, 2) if is_local(fs) else (fs.find, 3)

    def below(person: str) -> set[str]:
        try:
            paths = listed(person, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return set()
        start = len(person.rstrip("/").rpartition("/")[0]) + 1
        parts = [path[start:].split("/") for path in paths]
        return {slot(*part[:2]) for part in parts if len(part) >= least}

    try:
        people = fs.ls(root, detail=False)
    except FileNotFoundError:
        return set()
    with ThreadPoolExecutor(_THREADS) as pool:
        return {path for paths in pool.map(below, people) for path in paths}


def read_many(uris: Iterable[str]) -> Iterator[bytes]:
    """The contents of many small objects, in order, several requests in flight."""
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(read_bytes, uris)


def voxel_hash(arrays: dict[str, np.ndarray]) -> str:
    """sha256 over the arrays of a slot, in the order of ARRAYS."""
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
