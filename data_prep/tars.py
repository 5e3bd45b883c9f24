"""pack: the archive -> WebDataset tars at a training grid, and the index that addresses them.

Per scan: boxes of the training grid average the archive's brain voxels (so no edge darkens), mask
codes go by majority, labels by the nearest voxel.  Accepted and flagged scans go in, rejected ones
do not.  Tars hold one cohort each and are equal byte for byte when made again.  New shards are
written beside the old, the commit record is replaced, then the old ones are removed: a reader
always finds a whole feed.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data_prep.store import IMAGE_SCALE, Archive, check_reachable, open_archive, read_volume, slot
from neurojepa.errors import DataError
from neurojepa.feed.format import (
    AIR,
    ARCHIVE_GRID,
    NOT_SCANNED,
    Grid,
    commit_feed,
    encode_array,
    join,
    open_feed,
    open_store,
    quantise,
    read_bytes,
    sha256,
    write_bytes,
)

Row = dict[str, Any]
_COPIED = ("scan_id", "participant", "family", "session", "cohort", "modality", "site", "split")
_READ_THREADS = 4


def pack(archive_uri: str, out: str, grid: Grid, max_shard_bytes: int) -> None:
    """Pack an archive into a feed; does nothing where the feed is already of this archive.

    Raises
    ------
    DataError
        The archive is unfinished or damaged, or the feed cannot be written.
    """
    check_reachable(archive_uri)
    check_reachable(out)
    archive = open_archive(archive_uri)
    source = sha256(f"{archive.fingerprint} {grid} {max_shard_bytes}".encode())[:16]
    if _is_packed(out, source):
        print(f"{out}: already packed from this archive")
        return
    rows = [row for row in archive.rows if row["status"] != "rejected"]
    if not rows:
        raise DataError(f"{archive_uri}: no accepted or flagged scan to pack")
    samples: list[Row] = []
    for cohort in sorted({row["cohort"] for row in rows}):
        own = [row for row in rows if row["cohort"] == cohort]
        shards = _shards(_encoded(archive, own, grid), max_shard_bytes)
        for number, members in enumerate(shards):
            shard = f"shards/{cohort}-{source[:8]}-{number:05d}.tar"
            data, placed = write_tar(members)
            write_bytes(join(out, shard), data)
            samples += [row | {"shard": shard} for row in placed]
            print(f"{shard}: {len(placed)} scans, {len(data) / 2**20:.1f} MiB; "
                  f"{len(samples)}/{len(rows)}", flush=True)
    sessions = {(row["participant"], row["session"]) for row in samples}
    labels = [row for row in archive.labels.to_pylist()
              if (row["participant"], row["session"]) in sessions]
    fingerprint = commit_feed(out, grid, samples, archive.labels.from_pylist(
        labels, schema=archive.labels.schema), source=source)
    remove_shards_except(out, {row["shard"] for row in samples})
    print(f"{out}: {len(samples)} scans at {grid.name}, fingerprint {fingerprint}")


def resample(image: np.ndarray, mask: np.ndarray, label: np.ndarray | None,
             grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A scan from the archive grid onto a coarser concentric grid.

    Parameters
    ----------
    image, mask, label
        [X, Y, Z] on ARCHIVE_GRID: 0..1, codes 0 air, 1 brain, 2 not scanned, label codes.

    Returns
    -------
    image, mask, label
        On ``grid``: the mean over the brain within each voxel, the code that fills most of it,
        the label at its centre.
    """
    brain = (mask == 1).astype(np.float32)
    share = _average(brain, grid)
    total = _average(image.astype(np.float32) * brain, grid)
    unseen = _average((mask == 2).astype(np.float32), grid)
    air = 1.0 - share - unseen
    codes = np.where((share >= air) & (share >= unseen), 1, np.where(unseen > air, 2, 0))
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
    return np.floor((edges[1:] + edges[:-1]) / 2).astype(int)


def _encoded(archive: Archive, rows: list[Row],
             grid: Grid) -> Iterator[tuple[Row, bytes, bytes | None]]:
    """Index row, image bytes and label bytes of each scan, in order, a few read ahead."""
    def encode(row: Row) -> tuple[Row, bytes, bytes | None]:
        arrays = read_volume(archive.uri, slot(row["participant"], row["scan_id"]))
        image, mask, label = resample(arrays["image"] * np.float32(IMAGE_SCALE), arrays["mask"],
                                      arrays.get("label"), grid)
        codes = quantise(image, mask)
        sample = {name: row[name] for name in _COPIED}
        sample["num_foreground"] = int(((codes != AIR) & (codes != NOT_SCANNED)).sum())
        return sample, encode_array(codes), None if label is None else encode_array(label)

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for first in range(0, len(rows), 4 * _READ_THREADS):  # bounds what waits in memory
            yield from pool.map(encode, rows[first:first + 4 * _READ_THREADS])


def _shards(samples: Iterator[tuple[Row, bytes, bytes | None]],
            max_bytes: int) -> Iterator[list[tuple[Row, bytes, bytes | None]]]:
    """Consecutive samples in lists of at most ``max_bytes``, but at least one sample."""
    shard: list[tuple[Row, bytes, bytes | None]] = []
    size = 0
    for sample in samples:
        length = sum(len(data) + 1024 for data in sample[1:] if data is not None)
        if shard and size + length > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(sample)
        size += length
    if shard:
        yield shard


def write_tar(samples: list[tuple[Row, bytes, bytes | None]]) -> tuple[bytes, list[Row]]:
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
    return json.loads(read_bytes(join(uri, "feed.json"))).get("source")


def _is_packed(uri: str, source: str) -> bool:
    """Whether a whole feed of this source is there; a damaged one is packed anew."""
    try:
        shards = set(open_feed(uri).index["shard"].to_pylist())
    except DataError:
        return False
    fs, root = open_store(uri)
    there = {path[len(root.rstrip("/")) + 1:] for path in fs.find(root)}
    return source_of(uri) == source and shards <= there


def remove_shards_except(out: str, kept: set[str]) -> None:
    """Delete the shards that the committed index no longer names."""
    fs, root = open_store(join(out, "shards"))
    for path in fs.find(root):
        if f"shards/{path.rsplit('/', 1)[-1]}" not in kept:
            fs.rm_file(path)
