"""verify: read everything in a feed or an archive and list what is wrong.

Feed: every member of every tar against the hash, place and voxel count in the index; nothing
missing, nothing besides.  Archive: every row's voxels against the hash taken when they were
written, their codes and range; no slot without a row, no two rows of equal content.  Both: no
person and no family in two splits.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from data_prep.splits import check as check_splits
from data_prep.store import (
    check_reachable,
    list_slots,
    open_archive,
    read_volume,
    slot,
    voxel_hash,
)
from data_prep.tars import read_tar
from neurojepa.errors import DataError
from neurojepa.feed.format import (
    AIR,
    NOT_SCANNED,
    Feed,
    decode_array,
    join,
    open_feed,
    open_store,
    read_bytes,
    sha256,
)

Row = dict[str, Any]
_SHOWN = 20


def verify(target: str) -> int:
    """Check a feed or an archive; prints what is wrong and returns 0 or 1.

    Raises
    ------
    DataError
        ``target`` is neither, or its commit record is damaged.
    """
    check_reachable(target)
    fs, path = open_store(target)
    if fs.exists(join(path, "feed.json")):
        kind, problems = "feed", _feed_problems(open_feed(target))
    elif fs.exists(join(path, "archive.json")):
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


def _feed_problems(feed: Feed) -> Iterator[str]:
    rows = feed.index.to_pylist()
    yield from check_splits(rows)
    yield from _repeated(row["scan_id"] for row in rows)
    by_shard: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_shard[row["shard"]].append(row)
    fs, root = open_store(join(feed.uri, "shards"))
    for path in fs.find(root):
        if f"shards/{path.rsplit('/', 1)[-1]}" not in by_shard:
            yield f"{path}: a shard that the index does not know"
    for number, (shard, own) in enumerate(sorted(by_shard.items()), 1):
        yield from _shard_problems(feed, shard, own)
        print(f"{number}/{len(by_shard)} shards read", flush=True)


def _shard_problems(feed: Feed, shard: str, rows: list[Row]) -> Iterator[str]:
    uri = join(feed.uri, shard)
    try:
        data = read_bytes(uri)
        members = {member.name: member for member in read_tar(data, uri)}
    except DataError as error:
        yield str(error)
        return
    if len(cohorts := {row["cohort"] for row in rows}) > 1:
        yield f"{uri}: holds the cohorts {', '.join(sorted(cohorts))}; a shard must be of one"
    for row in rows:
        for kind, prefix in (("image", ""), ("label", "label_")):
            if row[prefix + "length"] is None:
                continue
            name = f"{row['scan_id']}.{kind}.npy.zst"
            where = f"{uri}: {name}"
            member = members.pop(name, None)
            if member is None:
                yield f"{where}: not in the tar"
                continue
            offset, length = row[prefix + "offset"], row[prefix + "length"]
            if (member.offset_data, member.size) != (offset, length):
                yield (f"{where}: at {member.offset_data}+{member.size}, the index says "
                       f"{offset}+{length}")
            sample = data[offset:offset + length]
            if sha256(sample) != row[prefix + "sha256"]:
                yield f"{where}: content differs from its hash in the index"
                continue
            try:
                array = decode_array(sample, feed.grid.shape, where)
            except DataError as error:
                yield str(error)
                continue
            brain = int(((array != AIR) & (array != NOT_SCANNED)).sum())
            if kind == "image" and brain != row["num_foreground"]:
                yield f"{where}: {brain} brain voxels, the index says {row['num_foreground']}"
    for name in members:
        yield f"{uri}: {name} is not in the index"


def _archive_problems(uri: str) -> Iterator[str]:
    rows = open_archive(uri).rows
    yield from check_splits(rows)
    usable = [row for row in rows if row["status"] != "rejected"]
    yield from _repeated(row["scan_id"] for row in usable)
    slots = list_slots(uri)
    for number, row in enumerate(usable, 1):
        path = slot(row["participant"], row["scan_id"])
        if row["status"] not in ("accepted", "flagged"):
            yield f"{path}: status {row['status']} is unknown"
        if path in slots:
            yield from _volume_problems(uri, path, row)
        else:
            yield f"{path}: accepted, but its voxels are not in the archive"
        slots.discard(path)
        if number % 50 == 0 or number == len(usable):
            print(f"{number}/{len(usable)} scans read", flush=True)
    for path in sorted(slots):
        yield f"{path}: voxels without an accepted row"
    for row in rows:
        if row["status"] == "rejected" and not row["reason"]:
            yield f"{row['uri']}: rejected without a reason"


def _volume_problems(uri: str, path: str, row: Row) -> Iterator[str]:
    try:
        arrays = read_volume(uri, path)
    except DataError as error:
        yield str(error)
        return
    if voxel_hash(arrays) != row["voxels_sha256"]:
        yield f"{path}: voxels differ from their hash in scans.parquet"
    image, mask = arrays["image"], arrays["mask"]
    if mask.max() > 2:
        yield f"{path}: mask code {mask.max()}; only 0, 1 and 2 are known"
    brain = image[mask == 1]
    if brain.size == 0 or brain.min() == brain.max():
        yield f"{path}: no brain, or a constant one"
    if image.min() < 0 or image[mask != 1].any():
        yield f"{path}: intensities below 0 or outside the brain"


def _repeated(scan_ids: Any) -> Iterator[str]:
    for scan_id, count in Counter(scan_ids).items():
        if count > 1:
            yield f"scan {scan_id} occurs {count} times; one content may have one row"
