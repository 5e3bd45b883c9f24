"""A tiny feed for tests, written without preparation (blobs on a small grid), and its configs."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from neurojepa.config import RootConfig, validate
from neurojepa.feed.format import (
    INDEX_SCHEMA,
    LABELS_SCHEMA,
    FeedCode,
    Grid,
    commit_feed,
    encode_array,
    open_feed,
    quantise,
)
from neurojepa.feed.loader import Batch, Loader
from neurojepa.storage import join, sha256, write_bytes

GRID = Grid("tiny", (24, 36, 24), 6.0)
# a row's number and the row -> its split and its labels (session, name, value)
Describe = Callable[[int, dict[str, Any]], tuple[str, list[tuple[str, str, str]]]]


def blob(rng: np.random.Generator) -> np.ndarray:
    """uint8 codes of an ellipsoid with smooth contents."""
    axes = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in GRID.shape), indexing="ij"), -1)
    inside = ((axes / rng.uniform(0.6, 0.9, 3)) ** 2).sum(-1) < 1
    waves = np.sin(axes @ rng.uniform(2, 6, 3) + rng.uniform(0, 6))
    return quantise(np.clip(0.5 + 0.4 * waves, 0, 1), inside.astype(np.uint8))


def write_feed(uri: str, num_samples: int = 24, seed: int = 0,
               modalities: tuple[str, ...] = ("T1w", "T2w"), per_session: int = 1,
               unscanned: Sequence[int] = (),
               alter: Callable[[int, np.ndarray], np.ndarray] = lambda number, codes: codes) -> str:
    """Write a feed of ``num_samples`` scans (split train), of modalities in turn, in two shards.

    The last layers along z of ``unscanned`` ones were not scanned.  ``alter`` makes of a scan's
    number and codes what is stored.
    """
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for shard, numbers in enumerate(np.array_split(np.arange(num_samples), 2)):
        path = f"shards/{shard:05d}.tar"
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for number in numbers:
                codes = alter(number, blob(rng))
                if number in unscanned:
                    codes[..., -6:] = FeedCode.NOT_SCANNED
                data = encode_array(codes)
                scan_id = hashlib.sha256(codes.tobytes()).hexdigest()[:24]
                member = tarfile.TarInfo(f"{scan_id}.image.npy.zst")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                rows.append({
                    "scan_id": scan_id, "participant": f"p{number // per_session}",
                    "family": f"p{number // per_session}", "session": "1", "cohort": "blobs",
                    "modality": modalities[number % len(modalities)], "site": "a",
                    "split": "train", "shard": path, "length": len(data),
                    "offset": buffer.tell() - -(-len(data) // 512) * 512,
                    "sha256": sha256(data), "num_foreground": int(((codes > 0)).sum())})
        write_bytes(join(uri, path), buffer.getvalue())
    commit_feed(uri, GRID, rows=pa.Table.from_pylist(rows, schema=INDEX_SCHEMA),
                labels=LABELS_SCHEMA.empty_table())
    return uri


def relabel(source: Path, target: Path, describe: Describe) -> None:
    """A copy of a feed whose splits and labels a function says by number and row."""
    feed = open_feed(str(source))
    rows = feed.index.to_pylist()
    labels = []
    for number, row in enumerate(rows):
        row["split"], described = describe(number, row)
        labels += [{"participant": row["participant"], "session": session, "name": name,
                    "value": value} for session, name, value in described]
    for path in {row["shard"] for row in rows}:
        write_bytes(str(target / path), (source / path).read_bytes())
    commit_feed(str(target), GRID, rows=pa.Table.from_pylist(rows, schema=INDEX_SCHEMA),
                labels=pa.Table.from_pylist(labels, schema=LABELS_SCHEMA))


def tiny_config(feed: str, run_dir: str | Path, **train: Any) -> RootConfig:
    """A model of a few thousand weights that trains at hundreds of steps a minute."""
    return validate({
        "data": {"feed": feed, "read_threads": 2},
        "model": {"size": "tiny", "patch_voxels": 6, "token_budget": 32},
        "objective": {"masks": {"scales": [[4, 0.0, 0.2], [1, 0.3, 0.5]]},
                      "sparse": {"l1_warmup_steps": 4}},
        "optim": {"warmup_steps": 3, "ema": 0.9, "grad_clip": 0.5},
        "train": {"steps": 8, "global_batch": 4, "micro_batch": 2, "checkpoint_every": 4,
                  "log_every": 3, "dtype": "fp32", **train},
        "run": {"dir": str(run_dir)},
    }, "tests")


def feed_config(feed: str, run_dir: str | Path = "unused", steps: int = 8,
                **data: Any) -> RootConfig:
    """``tiny_config`` with other keys of its section ``data``."""
    tree = tiny_config(feed, run_dir, steps=steps).model_dump()
    return validate({**tree, "data": {**tree["data"], **data}}, "test")


def read_batches(config: RootConfig, rank: int = 0, world: int = 1, first: int = 0) -> list[Batch]:
    """All batches of one rank, read to the end."""
    loader = Loader(open_feed(config.data.feed), config, rank=rank, world=world,
                    first_step=first)
    try:
        return list(loader)
    finally:
        loader.close()


def damage(local: Path, folder: Path, rows: list[int]) -> str:
    """A copy of the feed in which these rows have a flipped bit."""
    feed = open_feed(shutil.copytree(local, folder).as_posix())
    for row in rows:
        shard = folder / feed.index["shard"][row].as_py()
        data = bytearray(shard.read_bytes())
        data[feed.index["offset"][row].as_py() + 20] ^= 1
        shard.write_bytes(data)
    return str(folder)
