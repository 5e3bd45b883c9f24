"""pack: the archive -> WebDataset tars at a training grid, and the index that addresses them.

Per scan: boxes of the training grid average the archive's brain voxels (so no edge darkens), mask
codes go by majority, labels by the nearest voxel.  Accepted and flagged scans go in, whatever
their notes, rejected ones do not.  Tars hold one cohort each and are equal byte for byte when made
again, by any number of workers.  New shards are written beside the old, each with a record of its
rows, the commit record is replaced, then the old ones are removed: a reader always finds a whole
feed.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.archive import IMAGE_SCALE, check_reachable, open_archive, read_volume, slot
from data_prep.rows import Status, usable
from data_prep.tables import read_table
from neurojepa.errors import DataError
from neurojepa.feed.format import (
    ARCHIVE_GRID,
    INDEX_SCHEMA,
    Grid,
    MaskCode,
    commit_feed,
    encode_array,
    is_brain,
    open_feed,
    quantise,
)
from neurojepa.storage import (
    join,
    list_names,
    parquet_bytes,
    read_bytes,
    remove,
    sha256,
    walk,
    write_bytes,
)

IndexRow = dict[str, Any]  # of INDEX_SCHEMA, or as much of it as is known
_COPIED = ("scan_id", "participant", "family", "session", "cohort", "modality", "site", "split")
_READ_THREADS = 4
_MEASURED = 4  # scans whose size fixes how many go into a shard
_RECORDS = "packing"  # folder of the records of shards, until the feed is committed


def pack(archive_uri: str, *, out: str, grid: Grid, shard_bytes: int, workers: int | None = None,
         ray_address: str | None = None) -> None:
    """Pack an archive into a feed; does nothing where the feed is already of this archive.

    Stopped and run again, it goes on after the last whole shard.

    Parameters
    ----------
    shard_bytes
        About how large a tar becomes: its number of scans is fixed by the size of a few.
    workers, ray_address
        With more than one worker or a cluster ($RAY_ADDRESS too), shards are Ray tasks, as many
        at once as a cluster has CPUs by default; else they are packed here one after the other.

    Raises
    ------
    DataError
        The archive is unfinished or damaged, or the feed cannot be written.
    """
    check_reachable(archive_uri)
    check_reachable(out)
    archive = open_archive(archive_uri)
    source = sha256(f"{archive.fingerprint} {grid} {shard_bytes}".encode())[:16]
    if _is_packed(out, source):
        print(f"{out}: already packed from this archive")
        return
    scans = archive.scans.select([*_COPIED, "status"])
    scans = scans.filter(usable(scans)).sort_by("cohort")
    num_flagged = pc.sum(pc.equal(scans["status"], Status.FLAGGED.value)).as_py()
    if not scans.num_rows:
        raise DataError(f"{archive_uri}: no accepted or flagged scan to pack")
    shards = list(_plan(archive_uri, scans, out, grid, source, shard_bytes))
    _pack_shards(shards, out, workers, ray_address)
    rows = pa.concat_tables(read_table(shard.record) for shard in shards)
    fingerprint = commit_feed(out, grid, rows=rows, labels=_labels_of(rows, archive.labels),
                              source=source)
    remove_shards_except(out, {shard.name for shard in shards})
    remove(join(out, _RECORDS))
    print(f"{out}: {rows.num_rows} scans ({num_flagged} of them flagged) at {grid.name}, "
          f"fingerprint {fingerprint}")


@dataclass(frozen=True)
class Shard:
    """A tar to be made: the task of a worker."""

    archive: str
    out: str
    grid: Grid
    name: str  # path below the feed
    scans: pa.Table  # columns _COPIED, in the tar's order

    @property
    def record(self) -> str:
        """URI of its rows of the index, written once the tar is there."""
        stem = self.name.rpartition("/")[2].removesuffix(".tar")
        return join(self.out, f"{_RECORDS}/{stem}.parquet")


def _plan(archive: str, scans: pa.Table, out: str, grid: Grid, source: str,
          shard_bytes: int) -> Iterator[Shard]:
    """Consecutive scans of a cohort, as many in a shard as a few samples' size allows."""
    for cohort in pc.unique(scans["cohort"]).to_pylist():
        own = scans.filter(pc.equal(scans["cohort"], cohort))
        some = own.take(np.linspace(0, own.num_rows - 1, _MEASURED, dtype=int)).to_pylist()
        size = sum(len(data) + 1024 for sample in _encoded(archive, some, grid)
                   for data in sample[1:] if data is not None) / len(some)
        count = max(1, int(shard_bytes / size))
        for number, first in enumerate(range(0, own.num_rows, count)):
            yield Shard(archive, out, grid, f"shards/{cohort}-{source[:8]}-{number:05d}.tar",
                        own.slice(first, count))


def _pack_shards(shards: list[Shard], out: str, workers: int | None,
                 ray_address: str | None) -> None:
    """Make the shards that have no record yet."""
    done = set(list_names(join(out, _RECORDS)))
    todo = [shard for shard in shards if shard.record.rsplit("/", 1)[-1] not in done]
    if done:
        print(f"{out}: {len(shards) - len(todo)} of {len(shards)} shards are there already")
    if (workers or 1) > 1 or ray_address or os.environ.get("RAY_ADDRESS"):
        from data_prep.pool import Task, run_tasks

        tasks = (Task(shard.name, shard, shard.scans.num_rows) for shard in todo)
        lost = run_tasks(pack_shard, tasks, num_scans=sum(shard.scans.num_rows for shard in todo),
                         workers=workers, ray_address=ray_address, verb="pack")
        if lost:
            raise DataError("; ".join(f"{name}: {message}" for name, message in lost.items()))
        return
    for number, shard in enumerate(todo, 1):
        pack_shard(shard)
        print(f"{shard.name}: {shard.scans.num_rows} scans; {number}/{len(todo)}", flush=True)


def pack_shard(shard: Shard) -> int:
    """Write one tar and then its record; returns how many scans it gave up: none."""
    data, placed = write_tar(list(_encoded(shard.archive, shard.scans.to_pylist(), shard.grid)))
    write_bytes(join(shard.out, shard.name), data)
    write_bytes(shard.record, parquet_bytes(placed_table(placed, shard.name)))
    return 0


def placed_table(rows: list[IndexRow], shard: str) -> pa.Table:
    """Rows of ``write_tar`` as rows of the index."""
    return pa.Table.from_pylist([row | {"shard": shard} for row in rows], schema=INDEX_SCHEMA)


def _labels_of(rows: pa.Table, labels: pa.Table) -> pa.Table:
    """The labels of the sessions that have a row."""
    def key(table: pa.Table) -> pa.ChunkedArray:
        return pc.binary_join_element_wise(table["participant"], table["session"], "/")

    return labels.filter(pc.is_in(key(labels), pc.unique(key(rows))))


def coarsen(image: np.ndarray, *, mask: np.ndarray, label: np.ndarray | None,
            grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A scan from the archive grid onto a coarser concentric grid.

    Parameters
    ----------
    image, mask, label
        [X, Y, Z] on ARCHIVE_GRID: 0..1, MaskCode, label codes.

    Returns
    -------
    image, mask, label
        On ``grid``: the mean over the brain within each voxel, the code that fills most of it,
        the label at its centre.
    """
    brain = (mask == MaskCode.BRAIN).astype(np.float32)
    share = _average(brain, grid)
    total = _average(image.astype(np.float32) * brain, grid)
    unseen = _average((mask == MaskCode.NOT_SCANNED).astype(np.float32), grid)
    air = 1.0 - share - unseen
    outside = np.where(unseen > air, MaskCode.NOT_SCANNED, MaskCode.AIR)
    codes = np.where((share >= air) & (share >= unseen), MaskCode.BRAIN, outside)
    mean = np.divide(total, share, out=np.zeros_like(total), where=share > 0)
    if label is not None:
        label = label[np.ix_(*(_nearest(axis, grid) for axis in range(3)))]
    return mean, codes.astype(np.uint8), label


def _edges(axis: int, grid: Grid) -> np.ndarray:
    """Voxel borders of ``grid`` along an axis, in voxels of the archive grid."""
    half = grid.shape[axis] * grid.spacing_mm / 2
    shift = (grid.centre_mm[axis] - ARCHIVE_GRID.centre_mm[axis]) / ARCHIVE_GRID.spacing_mm
    start = ARCHIVE_GRID.shape[axis] / 2 + shift - half / ARCHIVE_GRID.spacing_mm
    return start + np.arange(grid.shape[axis] + 1) * grid.spacing_mm / ARCHIVE_GRID.spacing_mm


def _average(volume: np.ndarray, grid: Grid) -> np.ndarray:
    """Mean of each voxel of ``grid`` by overlap, one axis after the other; float32."""
    for axis in range(3):
        edges = _edges(axis, grid)
        cells = np.arange(volume.shape[axis])
        overlap = (np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells))
        weights = (np.clip(overlap, 0, None) / np.diff(edges)[:, None]).astype(np.float32)
        volume = np.moveaxis(np.tensordot(weights, volume, axes=(1, axis)), 0, axis)
    return volume


def _nearest(axis: int, grid: Grid) -> np.ndarray:
    edges = _edges(axis, grid)
    nearest: np.ndarray = np.floor((edges[1:] + edges[:-1]) / 2).astype(int)
    return nearest


def _encoded(archive: str, rows: list[IndexRow],
             grid: Grid) -> Iterator[tuple[IndexRow, bytes, bytes | None]]:
    """Index row, image bytes and label bytes of each scan, in order, a few read ahead."""
    def encode(row: IndexRow) -> tuple[IndexRow, bytes, bytes | None]:
        arrays = read_volume(archive, slot(row["participant"], row["scan_id"]))
        image, mask, label = coarsen(arrays["image"] * np.float32(IMAGE_SCALE), mask=arrays["mask"],
                                     label=arrays.get("label"), grid=grid)
        codes = quantise(image, mask)
        sample = {name: row[name] for name in _COPIED}
        sample["num_foreground"] = int(is_brain(codes).sum())
        return sample, encode_array(codes), None if label is None else encode_array(label)

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for first in range(0, len(rows), 4 * _READ_THREADS):  # bounds what waits in memory
            yield from pool.map(encode, rows[first:first + 4 * _READ_THREADS])


def write_tar(samples: list[tuple[IndexRow, bytes, bytes | None]]) -> tuple[bytes, list[IndexRow]]:
    """A tar of samples, and their rows with offset, length and hash of the bytes inside it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, image, label in samples:
            for kind, data in (("image", image), ("label", label)):
                if data is not None:
                    member = tarfile.TarInfo(f"{row['scan_id']}.{kind}.npy.zst")
                    member.size = len(data)  # time, owner and mode stay at fixed defaults
                    tar.addfile(member, io.BytesIO(data))
    places = {member.name: member.offset_data for member in read_tar(buffer.getvalue(), "shard")}
    placed = []
    for row, image, label in samples:
        name = row["scan_id"]
        placed.append(row | {
            "offset": places[f"{name}.image.npy.zst"], "length": len(image),
            "sha256": sha256(image), "label_offset": places.get(f"{name}.label.npy.zst"),
            "label_length": None if label is None else len(label),
            "label_sha256": None if label is None else sha256(label)})
    return buffer.getvalue(), placed


def read_tar(data: bytes, name: str) -> list[tarfile.TarInfo]:
    """The members of a tar, or DataError naming it."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            return tar.getmembers()
    except tarfile.TarError as error:
        raise DataError(f"{name}: not a whole tar ({error}); pack the feed again") from error


def source_of(uri: str) -> str | None:
    """What a committed feed was packed from."""
    source: str | None = json.loads(read_bytes(join(uri, "feed.json"))).get("source")
    return source


def _is_packed(uri: str, source: str) -> bool:
    """Whether a whole feed of this source is there; a damaged one is packed anew."""
    try:
        shards = set(open_feed(uri).index["shard"].to_pylist())
    except DataError:
        return False
    return source_of(uri) == source and shards <= set(walk(uri))


def remove_shards_except(out: str, kept: set[str]) -> None:
    """Delete the shards that the committed index no longer names."""
    for name in walk(join(out, "shards")):
        if f"shards/{name}" not in kept:
            remove(join(out, "shards", name))
