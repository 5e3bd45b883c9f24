"""feed: what bringing volumes to the device costs the host, ours beside the official way.

Ours: range reads from the feed's tars, hash check, decoding to uint8 batches; augmentation, masks
and patches are the device's work.  The official way: MONAI's PersistentDataset (one cached float32
.pt a scan), augmentation and Python masks on the host.  Beside them: stock webdataset on our tars,
plain range reads of the same bytes, plain copies of files, all from local disk and from an S3
server on loopback; and how fast an archive is packed, by type and compression.
"""

from __future__ import annotations

import io
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import zstandard

from neurojepa.config import validate
from neurojepa.feed.format import TRAINING_GRIDS, Feed, open_feed
from neurojepa.feed.loader import Loader
from neurojepa.storage import join, open_store
from tools.bench.common import Spent, best, brains, clock, machine, print_table
from tools.bench.official import OFFICIAL_SCALES, official_modules
from tools.store import serve_s3

READ_THREADS = 8


def run(quick: bool, official: str | None) -> dict[str, Any]:
    """Measure; returns ratio_vs_official_loader and share_of_raw_read among others."""
    count = 16 if quick else 64
    print(machine())
    with tempfile.TemporaryDirectory(prefix="bench-feed-") as name:
        folder = Path(name)
        packing = _pack(folder, count)
        with serve_s3(folder / "s3") as environment:
            os.environ.update(environment)
            open_store("s3://bench")[0].mkdir("bench")
            local = str(folder / "feed")
            remote = "s3://bench/feed"
            for path in sorted(Path(local).rglob("*")):
                if path.is_file():
                    open_store(remote)[0].put_file(
                        str(path), join(remote, str(path.relative_to(local))))
            rows = [_reading(place, uri, 1 if quick else 3)
                    for place, uri in (("local disk", local), ("S3 on loopback", remote))]
            loaders = [("this feed", place, _ours(uri, count)) for place, uri in
                       (("local disk", local), ("S3 on loopback", remote))]
        peers = [("stock webdataset on our tars", "local disk", _webdataset(local, count)),
                 *_official(folder, official, count)]
        loaders += peers
    print("\nHost work per volume delivered (1.5 mm uint8 here, 1.75 mm float32 there)")
    print_table(("loader", "from", "CPU ms/volume", "wall ms/volume"),
                [(what, where, 1e3 * spent.cpu_s / count, 1e3 * spent.wall_s / count)
                 for what, where, spent in loaders])
    print(f"\nReading the feed against plain range reads of the same bytes, {READ_THREADS} threads")
    print_table(("from", "plain MB/s", "feed MB/s (hash, decode)", "share"), rows)
    ours, theirs = loaders[0][2], loaders[-1][2]
    ratio = theirs.cpu_s / ours.cpu_s
    return {"ratio_vs_official_loader": ratio if official else None,
            "ratio_vs_stand_in": None if official else ratio,
            "share_of_raw_read": rows[1][3], "share_of_raw_read_local": rows[0][3], **packing}


# ---- packing -------------------------------------------------------------------------------------

def _pack(folder: Path, count: int) -> dict[str, Any]:
    """An archive of ``count`` scans, packed; and what other types and compressions would cost."""
    writing, packing = pack_brains(folder, count, "1.5mm")
    _codecs()
    print(f"\nArchive: {1e3 * writing.cpu_s / count:.0f} CPU ms a scan written; pack: "
          f"{1e3 * packing.cpu_s / count:.0f} CPU ms, {count / packing.wall_s:.1f} scans/s")
    return {"pack_scans_per_s": count / packing.wall_s,
            "archive_write_cpu_s": writing.cpu_s / count}


def pack_brains(folder: Path, count: int, grid: str) -> tuple[Spent, Spent]:
    """Make folder/feed of ``count`` brains; what writing their archive took, and packing."""
    import pyarrow as pa

    from data_prep.archive import commit_tables, slot, write_volume
    from data_prep.pack import pack
    from data_prep.rows import Status, scan_table
    from neurojepa.feed.format import LABELS_SCHEMA

    archive, rows = str(folder / "archive"), []
    writing = Spent()
    for number, (image, mask) in enumerate(brains(count)):
        scan_id, person = f"{number:024x}", f"{number:016x}"
        with clock() as spent:
            digest = write_volume(archive, slot(person, scan_id), image=image, mask=mask,
                                  label=None)
        writing.wall_s, writing.cpu_s = writing.wall_s + spent.wall_s, writing.cpu_s + spent.cpu_s
        rows.append({"uri": f"{number}.nii.gz", "cohort": "bench", "participant": person,
                     "family": person, "session": "1", "modality": "T1w", "split": "train",
                     "scan_id": scan_id, "status": Status.ACCEPTED, "voxels_sha256": digest,
                     "figures": {}})
    commit_tables(archive, scans=scan_table(rows), labels=LABELS_SCHEMA.empty_table(),
                  review=pa.table({}))
    with clock() as packing:
        pack(archive, out=str(folder / "feed"), grid=TRAINING_GRIDS[grid], shard_bytes=256 << 20)
    return writing, packing


def _codecs() -> None:
    """The training type and compression: bytes and CPU time of the alternatives."""
    from data_prep.pack import coarsen
    from neurojepa.feed.format import quantise

    image, mask = next(brains(1, seed=1))
    image, mask, _ = coarsen(image, mask=mask, label=None, grid=TRAINING_GRIDS["1.5mm"])
    arrays = {"uint8, mask inside": quantise(image, mask), "float16": image.astype(np.float16),
              "int16": np.rint(image * 32767).astype(np.int16), "float32": image}
    table = []
    for kind, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        raw = buffer.getvalue()
        for level in (None, -1, 1, 3, 9) if kind.startswith("uint8") else (3,):
            packed = raw if level is None else zstandard.ZstdCompressor(level).compress(raw)
            coded = best(3, lambda level=level, raw=raw: zstandard.ZstdCompressor(
                level or 1).compress(raw))
            decoded = best(5, lambda packed=packed, level=level: np.load(io.BytesIO(
                packed if level is None else zstandard.ZstdDecompressor().decompress(packed))))
            table.append((kind, "none" if level is None else f"zstd {level}", len(packed) / 1e6,
                          0.0 if level is None else 1e3 * coded.cpu_s, 1e3 * decoded.cpu_s))
    print("\nOne volume at 1.5 mm by type and compression")
    print_table(("type", "compression", "MB", "write CPU ms", "read CPU ms"), table)


# ---- reading -------------------------------------------------------------------------------------

def _ours(uri: str, count: int) -> Spent:
    config = validate({"data": {"feed": uri, "read_threads": READ_THREADS, "prefetch_batches": 4},
                       "train": {"steps": count // 8, "global_batch": 8, "micro_batch": 8},
                       "run": {"dir": "unused"}}, "bench")

    def read() -> None:
        loader = Loader(open_feed(uri), config, rank=0, world=1, first_step=0)
        try:
            delivered = sum(len(batch.scan_ids) for batch in loader)
        finally:
            loader.close()
        assert delivered == count

    return best(3, read)


def _reading(place: str, uri: str, repeats: int) -> tuple[str, float, float, float]:
    """Plain range reads and reads of samples, the same bytes by as many threads."""
    from neurojepa.feed.loader import SampleReader

    feed = open_feed(uri)
    reader = SampleReader(feed)
    columns = feed.index.to_pydict()
    total = sum(columns["length"])

    def plain(row: int) -> bytes:
        start = columns["offset"][row]
        return reader.fs.cat_file(join(reader.root, columns["shard"][row]), start=start,
                                  end=start + columns["length"][row])

    def through(read: Callable[[int], Any]) -> float:
        def work() -> None:
            with ThreadPoolExecutor(READ_THREADS) as pool:
                for _ in pool.map(read, range(feed.index.num_rows)):
                    pass
        return total / best(repeats + 1, work).wall_s / 1e6

    memory = threading.local()  # as the loader, which decodes into its batches

    def sample(row: int) -> None:
        if not hasattr(memory, "voxels"):
            memory.voxels = np.empty(feed.grid.shape, np.uint8)
        reader.image(row, memory.voxels)

    raw, whole = through(plain), through(sample)
    return place, raw, whole, whole / raw


def _webdataset(uri: str, count: int) -> Spent:
    """Stock webdataset over the same tars, decoding in this process."""
    import webdataset

    from neurojepa.feed.format import decode_array

    feed: Feed = open_feed(uri)
    shards = sorted({join(uri, shard) for shard in feed.index["shard"].to_pylist()})

    def read() -> None:
        stream = webdataset.WebDataset(shards, shardshuffle=False)
        assert sum(decode_array(sample["image.npy.zst"], feed.grid.shape, "bench").size > 0
                   for sample in stream) == count

    return best(3, read)


# ---- the official way ----------------------------------------------------------------------------

def _official(folder: Path, official: str | None, count: int) -> list[tuple[str, str, Spent]]:
    """Cached volumes, augmented and masked on the host, by the official code or a stand-in."""
    import torch
    from monai.data import PersistentDataset
    from scipy import ndimage

    count_cached = min(count, 16)
    paths = []
    for number, (image, _) in enumerate(brains(count_cached)):
        zoomed = ndimage.zoom(image, (100 / 180, 120 / 216, 100 / 180), order=1)
        path = folder / f"cached-{number}.npy"
        np.save(path, zoomed[None].astype(np.float32))
        paths.append(str(path))
    augment, collate, name = _host_work(official)
    cache = PersistentDataset([{"image": path} for path in paths],
                              transform=_load, cache_dir=folder / "cache")
    for index in range(count_cached):
        cache[index]

    def read() -> None:
        for first in range(0, count, 8):
            batch = [(augment(dict(cache[index % count_cached]))["image"], torch.tensor(-1))
                     for index in range(first, first + 8)]
            collate(batch)

    def only_cached() -> None:
        for index in range(count):
            cache[index % count_cached]

    return [("MONAI PersistentDataset, reading alone", "local disk", best(2, only_cached)),
            (name, "local disk", best(2, read))]


def _load(item: dict[str, str]) -> dict[str, Any]:
    import torch

    return {"image": torch.from_numpy(np.load(item["image"]))}


def _host_work(official: str | None) -> tuple[Callable[..., Any], Callable[..., Any], str]:
    """The augmentation and the collation with masks that the host does there."""
    if official:
        transforms, masking = official_modules(official, "neurojepa.data.transforms",
                                               "neurojepa.masks.masking")
        config = SimpleNamespace(data=SimpleNamespace(img_size=(96, 108, 96)))
        return (transforms.jepa3d_transforms(config),
                masking.MaskCollator(OFFICIAL_SCALES, (96, 108, 96), (12, 12, 12),
                                     foreground_aware=True),
                "official: cache, augmentation, masks")
    from monai import transforms as monai
    from torch.utils.data import default_collate

    keys = ["image"]
    return monai.Compose([
        monai.CenterSpatialCropd(keys, (96, 108, 96)),
        *(monai.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)),
        monai.RandBiasFieldd(keys, prob=0.5, coeff_range=(0.0, 0.1), degree=3),
        monai.RandAdjustContrastd(keys, gamma=(0.6, 1.5), prob=0.5),
        monai.RandGaussianNoised(keys, std=0.1, prob=0.5),
        monai.RandShiftIntensityd(keys, offsets=0.1, prob=0.5),
    ]), default_collate, "stand-in: MONAI cache and augmentation, no masks"
