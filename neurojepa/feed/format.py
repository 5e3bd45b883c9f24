"""What data_prep and the model must agree on: grids, the sample codec and the feed's index.

A feed is a directory or an object-store prefix:

    feed.json            grid, counts, fingerprint; written last, so a feed without it is incomplete
    index.parquet        one row per sample (INDEX_SCHEMA): where its bytes lie and what it is
    labels.parquet       participant, session, name, value
    shards/*.tar         WebDataset tars: <scan_id>.image.npy.zst (+ <scan_id>.label.npy.zst)

An image is one uint8 array [x, y, z] in RAS on the feed's grid: 0 is air (outside the brain),
255 was not scanned (FeedCode), 1..254 is brain on a linear scale.  So one byte per voxel carries
both the intensity and the mask.  It is stored as a plain .npy compressed with zstd.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard

from neurojepa.errors import DataError
from neurojepa.storage import (
    join,
    parquet_bytes,
    parquet_table,
    read_bytes,
    sha256,
    write_bytes,
)

FORMAT_VERSION = 1
# BOLD is the temporal mean of a series; the maps computed from one count as contrasts of their own.
MODALITIES = ("T1w", "T2w", "FLAIR", "PET", "BOLD", "tSNR", "ALFF", "fALFF")
MNI_CENTRE_MM = (0.0, -17.0, 6.0)  # centre of the MNI152 brain (RAS)


class FeedCode(IntEnum):
    """What a voxel of the feed is where it is not brain; brain is 1..254."""

    AIR = 0
    NOT_SCANNED = 255


class MaskCode(IntEnum):
    """What a voxel of a mask is, in the archive and on the way to it."""

    AIR = 0
    BRAIN = 1
    NOT_SCANNED = 2


@dataclass(frozen=True)
class Grid:
    """A box of cubic voxels in MNI152 space, axes x y z in RAS, centred on the brain."""

    name: str
    shape: tuple[int, int, int]
    spacing_mm: float
    centre_mm: tuple[float, float, float] = MNI_CENTRE_MM

    @property
    def affine(self) -> np.ndarray:
        """[4, 4] float64: voxel index to millimetres."""
        affine = np.diag([self.spacing_mm] * 3 + [1.0])
        affine[:3, 3] = np.array(self.centre_mm) - self.spacing_mm * (np.array(self.shape) - 1) / 2
        return affine


def grid_from_record(record: dict[str, Any]) -> Grid:
    """A grid from ``asdict(grid)`` as JSON has it."""
    return Grid(record["name"], tuple(record["shape"]), record["spacing_mm"],
                tuple(record["centre_mm"]))


ARCHIVE_GRID = Grid("archive", (180, 216, 180), 1.0)
TRAINING_GRIDS = {
    grid.name: grid
    for grid in (
        Grid("1.5mm", (108, 132, 108), 1.5),
        Grid("1.6mm", (96, 108, 96), 1.6),  # what converted official weights expect (convert.py)
        Grid("3mm", (54, 66, 54), 3.0),
        Grid("paper", (96, 108, 96), 1.75),  # the published 8 x 9 x 8 patches of 12 voxels
    )
}

INDEX_SCHEMA = pa.schema([
    ("scan_id", pa.string()),  # hash of decoded voxels and affine
    ("participant", pa.string()),  # keyed pseudonym
    ("family", pa.string()),  # people that must share a split
    ("session", pa.string()),
    ("cohort", pa.string()),
    ("modality", pa.string()),  # one of MODALITIES
    ("site", pa.string()),
    ("split", pa.string()),  # train, val or test
    ("shard", pa.string()),  # path below the feed
    ("offset", pa.int64()),  # of the image's bytes inside the shard
    ("length", pa.int64()),
    ("sha256", pa.string()),
    ("label_offset", pa.int64()),  # null where the scan has no label map
    ("label_length", pa.int64()),
    ("label_sha256", pa.string()),
    ("num_foreground", pa.int64()),  # brain voxels
])
LABELS_SCHEMA = pa.schema([
    ("participant", pa.string()),
    ("session", pa.string()),
    ("name", pa.string()),
    ("value", pa.string()),
])


# ---- sample codec --------------------------------------------------------------------------------

def encode_array(array: np.ndarray) -> bytes:
    """An array as .npy, compressed with zstd.

    At level -1, which leaves values as they are between repeats: brain voxels have next to none, so
    entropy coding would save an eighth of the bytes for three times the decoding (bench feed).
    """
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return zstandard.ZstdCompressor(level=-1).compress(buffer.getvalue())


def decode_array(data: bytes, shape: tuple[int, ...], name: str,
                 out: np.ndarray | None = None) -> np.ndarray:
    """Undo ``encode_array``; never more than ``shape`` asks for is decompressed.

    Parameters
    ----------
    out
        Where to put it, C-contiguous and of the stored type; a new array if None.  Fresh memory
        costs more than decoding, so the loader decodes into its batches.

    Raises
    ------
    DataError
        Not a zstd .npy, of another shape or type, or too short.
    """
    reader = zstandard.ZstdDecompressor().stream_reader(data)
    try:
        if np.lib.format.read_magic(reader) != (1, 0):
            raise ValueError("not of .npy version 1.0")
        stored, fortran, dtype = np.lib.format.read_array_header_1_0(reader)
        if dtype.hasobject or fortran:
            raise ValueError(f"type {dtype}, {'Fortran' if fortran else 'C'} order")
        if stored != tuple(shape):
            raise DataError(f"{name}: has shape {stored}, the feed's grid is {tuple(shape)}")
        array = np.empty(shape, dtype) if out is None else out
        if array.dtype != dtype or array.shape != stored:
            raise DataError(f"{name}: is {dtype} {stored}, {array.dtype} {array.shape} is needed")
        view, done = array.reshape(-1).view(np.uint8).data, 0
        while done < len(view):
            if not (count := reader.readinto(view[done:])):
                raise ValueError(f"ends after {done} of {len(view)} bytes")
            done += count
        if reader.read(1):
            raise ValueError("longer than its header says")
    except (zstandard.ZstdError, ValueError) as error:
        raise DataError(f"{name}: not a compressed array ({error}); run verify") from error
    return array


def quantise(volume: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Intensities in [0, 1] and a mask of MaskCode to the stored uint8."""
    brain = np.clip(np.rint(volume * 253.0), 0, 253).astype(np.uint8) + 1
    outside = np.where(mask == MaskCode.NOT_SCANNED, FeedCode.NOT_SCANNED, FeedCode.AIR)
    return np.where(mask == MaskCode.BRAIN, brain, outside).astype(np.uint8)


def is_brain(codes: np.ndarray) -> np.ndarray:
    """bool: which voxels of a feed's image are brain."""
    return (codes != FeedCode.AIR) & (codes != FeedCode.NOT_SCANNED)


# ---- feed ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Feed:
    """A committed feed: its grid and its index.  No voxels are read to open it."""

    uri: str
    grid: Grid
    index: pa.Table
    fingerprint: str

    def labels(self) -> pa.Table:
        """participant, session, name, value; one row per label."""
        return parquet_table(read_bytes(join(self.uri, "labels.parquet")))


def open_feed(uri: str) -> Feed:
    """Open a feed by its commit record and index.

    Raises
    ------
    DataError
        There is no feed.json (never committed), or the index does not match its recorded hash.
    """
    try:
        record = json.loads(read_bytes(join(uri, "feed.json")))
    except DataError as error:
        raise DataError(f"{uri}: no committed feed here ({error}); run: "
                        "python -m data_prep pack --archive ARCHIVE --out FEED") from error
    except ValueError as error:
        raise DataError(f"{join(uri, 'feed.json')}: not JSON; pack the feed again") from error
    if record.get("format") != FORMAT_VERSION:
        raise DataError(f"{uri}: feed format {record.get('format')}, this version reads "
                        f"{FORMAT_VERSION}; pack the archive again")
    data = read_bytes(join(uri, "index.parquet"))
    if sha256(data) != record["index_sha256"]:
        raise DataError(f"{join(uri, 'index.parquet')}: does not match feed.json; it was changed "
                        "after packing; pack the feed again")
    return Feed(uri, grid_from_record(record["grid"]), parquet_table(data),
                record["index_sha256"][:16])


def commit_feed(uri: str, grid: Grid, *, rows: pa.Table, labels: pa.Table,
                source: str | None = None) -> str:
    """Write index, labels and, last, the commit record; returns the fingerprint.

    ``rows`` are of INDEX_SCHEMA; ``source`` identifies what was packed and is kept in the record.
    """
    index = parquet_bytes(rows.cast(INDEX_SCHEMA))
    write_bytes(join(uri, "labels.parquet"), parquet_bytes(labels.cast(LABELS_SCHEMA)))
    write_bytes(join(uri, "index.parquet"), index)
    record = {
        "format": FORMAT_VERSION,
        "grid": asdict(grid),
        "num_samples": rows.num_rows,
        "source": source,
        "index_sha256": sha256(index),
    }
    write_bytes(join(uri, "feed.json"), json.dumps(record, indent=1).encode())
    return sha256(index)[:16]
