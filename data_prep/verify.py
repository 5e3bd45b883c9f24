"""verify: read everything in a feed or an archive and list what is wrong.

Feed: every member of every tar against the hash, place and voxel count in the index; nothing
missing, nothing besides.  Archive: every row's voxels against the hash taken when they were
written, their codes and range; no slot without a row, no two rows of equal content; near-duplicates
under review are of rows that exist.  Both: no person and no family in two splits, nobody who
withdrew is left anywhere, no withdrawal half done, an unbroken audit log.

Tars are streamed and volumes read one by one: the memory taken is that of one sample and the index.
"""

from __future__ import annotations

import tarfile
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.archive import (
    check_reachable,
    list_slots,
    open_archive,
    read_volume,
    slot,
    voxel_hash,
)
from data_prep.pack import IndexRow
from data_prep.rows import WITHDRAWN, ArchiveRow, Status, archive_rows, usable
from data_prep.splits import check as check_splits
from data_prep.tables import dicts
from data_prep.withdrawal.audit import audit_problems, read_events, unfinished, withdrawn_people
from neurojepa.errors import DataError
from neurojepa.feed.format import Feed, MaskCode, decode_array, is_brain, open_feed
from neurojepa.storage import exists, join, list_names, open_store, sha256, store_errors, walk

_SHOWN = 20
_REPORT_EVERY_S = 5.0


def verify(target: str) -> int:
    """Check a feed or an archive; prints what is wrong and returns 0 or 1.

    Raises
    ------
    DataError
        ``target`` is neither, or its commit record is damaged.
    """
    check_reachable(target)
    if exists(join(target, "feed.json")):
        kind, problems = "feed", _feed_problems(open_feed(target))
    elif exists(join(target, "archive.json")):
        kind, problems = "archive", _archive_problems(target)
    else:
        raise DataError(f"{target}: neither feed.json nor archive.json is there; name a finished "
                        "feed or archive")
    found = 0
    for found, problem in enumerate(problems, 1):
        if found <= _SHOWN:
            print(f"wrong: {problem}", flush=True)
    if found:
        cure = ("remove feed.json and run pack again" if kind == "feed" else
                "remove the folders named and run prepare again")
        print(f"{target}: {found} problems ({min(found, _SHOWN)} shown); {cure}")
        return 1
    print(f"{target}: this {kind} is whole")
    return 0


class _Progress:
    """A line every few seconds while many samples are read."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.begin = self.last = time.monotonic()

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.last > _REPORT_EVERY_S or self.done == self.total:
            self.last = now
            left = (now - self.begin) / self.done * (self.total - self.done) / 60
            print(f"{self.done}/{self.total} scans read, about {left:.1f} minutes left", flush=True)


# ---- what feed and archive share -----------------------------------------------------------------

def _people_problems(uri: str, rows: pa.Table, labels: pa.Table) -> Iterator[str]:
    """Splits, withdrawals and the log of them; ``rows`` are those whose person must be allowed."""
    yield from check_splits(dicts(rows.select(["participant", "family", "split"])))
    if broken := list(audit_problems(uri)):
        yield from broken
        return
    gone = pa.array(sorted(withdrawn_people(uri)), pa.string())
    for name, table in (("rows", rows), ("labels", labels)):
        left = pc.unique(table["participant"].filter(pc.is_in(table["participant"], gone)))
        for person in left.to_pylist():
            yield f"{person} withdrew, but still has {name}; run withdraw again"
    if unfinished(read_events(uri)):
        yield f"{uri}: a withdrawal did not come to its end; run withdraw with the same list again"


def _repeated(scan_ids: pa.ChunkedArray) -> Iterator[str]:
    for each in pc.value_counts(scan_ids).to_pylist():
        if each["counts"] > 1:
            yield (f"scan {each['values']} occurs {each['counts']} times; one content may have one "
                   "row")


# ---- feed ----------------------------------------------------------------------------------------

def _feed_problems(feed: Feed) -> Iterator[str]:
    index = feed.index
    yield from _people_problems(feed.uri, index, feed.labels())
    yield from _repeated(index["scan_id"])
    shards = sorted(pc.unique(index["shard"]).to_pylist())
    for name in walk(join(feed.uri, "shards")):
        if f"shards/{name}" not in shards:
            yield f"{join(feed.uri, 'shards', name)}: a shard that the index does not know"
    progress = _Progress(index.num_rows)
    for shard in shards:
        own = index.filter(pc.equal(index["shard"], shard)).to_pylist()
        yield from _shard_problems(feed, shard, own, progress)


def _shard_problems(feed: Feed, shard: str, rows: list[IndexRow],
                    progress: _Progress) -> Iterator[str]:
    uri = join(feed.uri, shard)
    if len(cohorts := {row["cohort"] for row in rows}) > 1:
        yield f"{uri}: holds the cohorts {', '.join(sorted(cohorts))}; a shard must be of one"
    expected = {f"{row['scan_id']}.{kind}.npy.zst": (row, kind, prefix)
                for row in rows for kind, prefix in (("image", ""), ("label", "label_"))
                if row[prefix + "length"] is not None}
    fs, path = open_store(uri)
    try:
        with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                if (known := expected.pop(member.name, None)) is None:
                    yield f"{uri}: {member.name} is not in the index"
                    continue
                yield from _member_problems(feed, tar, member, f"{uri}: {member.name}", *known)
                if known[1] == "image":
                    progress.step()
    except FileNotFoundError:
        yield f"{uri}: not found; pack the feed again"
        return
    except tarfile.TarError as error:
        yield f"{uri}: not a whole tar ({error}); pack the feed again"
    except store_errors() as error:
        yield f"{uri}: cannot be read ({error}); check the store"
    for name in expected:
        yield f"{uri}: {name}: not in the tar"


def _member_problems(feed: Feed, tar: tarfile.TarFile, member: tarfile.TarInfo, where: str,
                     row: IndexRow, kind: str, prefix: str) -> Iterator[str]:
    offset, length = row[prefix + "offset"], row[prefix + "length"]
    if (member.offset_data, member.size) != (offset, length):
        yield f"{where}: at {member.offset_data}+{member.size}, the index says {offset}+{length}"
    file = tar.extractfile(member)
    sample = b"" if file is None else file.read(length)
    if sha256(sample) != row[prefix + "sha256"]:
        yield f"{where}: content differs from its hash in the index"
        return
    try:
        array = decode_array(sample, feed.grid.shape, where)
    except DataError as error:
        yield str(error)
        return
    brain = int(is_brain(array).sum())
    if kind == "image" and brain != row["num_foreground"]:
        yield f"{where}: {brain} brain voxels, the index says {row['num_foreground']}"


# ---- archive -------------------------------------------------------------------------------------

def _archive_problems(uri: str) -> Iterator[str]:
    archive = open_archive(uri)
    scans = archive.scans
    tombs = pc.fill_null(pc.equal(scans["reason"], WITHDRAWN), False)
    yield from _people_problems(uri, scans.filter(pc.invert(tombs)), archive.labels)
    used = usable(scans)
    kept = scans.filter(used).select(["participant", "scan_id", "status", "voxels_sha256"])
    yield from _repeated(kept["scan_id"])
    slots = list_slots(uri)
    progress = _Progress(kept.num_rows)
    for row in archive_rows(kept):
        path = slot(row["participant"], str(row["scan_id"]))
        if row["status"] not in (Status.ACCEPTED, Status.FLAGGED):
            yield f"{path}: status {row['status']} is unknown"
        if path in slots:
            yield from _volume_problems(uri, path, row)
        else:
            yield f"{path}: accepted, but its voxels are not in the archive"
        slots.discard(path)
        progress.step()
    for path in sorted(slots):
        yield f"{path}: voxels without an accepted row"
    rejected = scans.filter(np.invert(used)).select(["participant", "modality", "reason"])
    for row in archive_rows(rejected):
        if not row["reason"]:
            yield f"{row['participant']}: a {row['modality']} is rejected without a reason"
    yield from _record_problems(uri)
    yield from _review_problems(archive.review, kept)


def _record_problems(uri: str) -> Iterator[str]:
    gone = withdrawn_people(uri) if not list(audit_problems(uri)) else set()
    for name in list_names(join(uri, "results")):
        if name.rpartition("-")[0] in gone:
            yield (f"{join(uri, 'results', name)}: a record of somebody who withdrew; run withdraw "
                   "again")


def _review_problems(review: pa.Table, kept: pa.Table) -> Iterator[str]:
    for side in ("scan_id_a", "scan_id_b"):
        if side in review.column_names:
            known = pc.is_in(review[side], kept["scan_id"].combine_chunks())
            for scan_id in pc.unique(review[side].filter(pc.invert(known))).to_pylist():
                yield f"review.parquet: scan {scan_id} is no usable row; run prepare again"


def _volume_problems(uri: str, path: str, row: ArchiveRow) -> Iterator[str]:
    try:
        arrays = read_volume(uri, path)
    except DataError as error:
        yield str(error)
        return
    if voxel_hash(arrays) != row.get("voxels_sha256"):
        yield f"{path}: voxels differ from their hash in scans.parquet"
    image, mask = arrays["image"], arrays["mask"]
    if mask.max() > max(MaskCode):
        yield f"{path}: mask code {mask.max()}; only 0, 1 and 2 are known"
    brain = image[mask == MaskCode.BRAIN]
    if brain.size == 0 or brain.min() == brain.max():
        yield f"{path}: no brain, or a constant one"
    if image.min() < 0 or image[mask != MaskCode.BRAIN].any():
        yield f"{path}: intensities below 0 or outside the brain"
