"""withdraw: people who left a study leave archives and feeds, at once and in full.

Lists (lists.py) become pseudonyms by the site's key.  First the tombstone: the event is logged,
and the tables are committed without the people, so whoever opens the archive or the feed from then
on does not find them.  Then the purge: records, voxels and labels are deleted, the shards that hold
them are rewritten without, and the end is logged.  Running it again finishes what was interrupted.

Archive: the rows stay without facts (status rejected, reason withdrawn), and ``prepare`` leaves the
people out for good, also those who had no scan yet.  The content hash of their scans stays, so that
the same voxels do not come back under another id (reason ``withdrawn_content``).

Trained models are not touched; ``runs`` names the checkpoints that saw the people.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.archive import check_reachable, commit_tables, open_archive, remove_volume
from data_prep.pack import placed_table, remove_shards_except, source_of, write_tar
from data_prep.rows import WITHDRAWN, WITHDRAWN_CONTENT, Status
from data_prep.withdrawal.audit import Event, append_event, read_events, unfinished
from data_prep.withdrawal.lineage import checkpoints_that_saw
from data_prep.withdrawal.lists import WithdrawalList, read_lists
from neurojepa.errors import DataError
from neurojepa.feed.format import Feed, commit_feed, open_feed
from neurojepa.storage import exists, join, list_names, read_bytes, remove, write_bytes

Remover = Callable[[str, set[str], list[WithdrawalList]], tuple[int, str]]
_KEPT = ("scan_id", "cohort", "participant", "family", "session", "modality", "split")


def withdraw(lists: Sequence[str], *, targets: Sequence[str], key: bytes, cohort: str | None = None,
             runs: Sequence[str] = ()) -> None:
    """Take the people of lists out of archives and feeds; prints what was removed.

    Parameters
    ----------
    lists
        Files, or folders of them.
    cohort
        The cohort of lists that do not name one.
    runs
        Run directories and exported models: those that saw a person are printed and logged.

    Raises
    ------
    DataError
        A list is empty, damaged, or older than one already applied, or a target is neither a feed
        nor an archive.  Nothing has been changed then.
    ConfigError
        A list needs ``cohort``.
    """
    newest = read_lists(lists, cohort)
    people = set().union(*(each.pseudonyms(key) for each in newest))
    removers = {}
    for target in targets:
        check_reachable(target)
        removers[target] = _remover(target)
        _refuse_stale(target, newest)
    for target, remover in removers.items():
        num_scans, head = remover(target, people, newest)
        print(f"{target}: {num_scans} scans of {len(people)} listed people removed"
              + (f"; audit log ends with {head[:16]}" if head else ""))
    if runs:
        _tell_checkpoints(runs, [target for target in targets if removers[target] is _from_feed])


def _remover(target: str) -> Remover:
    for name, remover in (("feed.json", _from_feed), ("archive.json", _from_archive)):
        if exists(join(target, name)):
            return remover
    raise DataError(f"{target}: neither feed.json nor archive.json is there; name a finished feed "
                    "or archive")


def _refuse_stale(target: str, lists: list[WithdrawalList]) -> None:
    applied = [record for event in read_events(target) for record in event.get("lists", [])]
    for each in lists:
        dates = [record["date"] for record in applied if record["study"] == each.study]
        if dates and each.date < max(dates):
            raise DataError(f"{each.path}: is of {each.date}, but {target} already had the list of "
                            f"{max(dates)}; get the newest one")


def _log_begin(uri: str, people: set[str], lists: list[WithdrawalList], had: bool,
               facts: Event) -> bool:
    """Log a withdrawal unless it is logged already; returns whether there is something to do."""
    events = read_events(uri)
    known = {record["sha256"] for event in events for record in event.get("lists", [])}
    pending = bool(unfinished(events))
    if (had and not pending) or {each.sha256 for each in lists} - known:
        append_event(uri, {"event": "withdrawn", "people": sorted(people),
                           "lists": [each.record() for each in lists], **facts})
        return True
    return pending


# ---- archive -------------------------------------------------------------------------------------

def _from_archive(uri: str, people: set[str], lists: list[WithdrawalList]) -> tuple[int, str]:
    archive = open_archive(uri)
    names = pa.array(sorted(people), pa.string())
    scans = archive.scans
    mine = pc.is_in(scans["participant"], names)
    live = pc.and_(mine, pc.fill_null(pc.not_equal(scans["reason"], WITHDRAWN), True))
    num_scans = pc.sum(live).as_py() or 0
    if not _log_begin(uri, people, lists, num_scans > 0, {"scans": num_scans}):
        return 0, ""
    if num_scans:
        review = archive.review
        for column in ("participant_a", "participant_b"):
            if column in review.column_names:
                review = review.filter(pc.invert(pc.is_in(review[column], names)))
        commit_tables(uri, scans=_tombstones(scans, mine), labels=archive.labels.filter(
            pc.invert(pc.is_in(archive.labels["participant"], names))), review=review)
    for name in list_names(join(uri, "results")):
        if name.rpartition("-")[0] in people:
            remove(join(uri, "results", name))
    for person in sorted(people):
        remove_volume(uri, person)
    return num_scans, append_event(uri, {"event": "purged", "scans": num_scans})


def _tombstones(scans: pa.Table, mine: pa.ChunkedArray) -> pa.Table:
    """The table with the facts of some rows gone, and copies of their content ruled out."""
    ids = scans["scan_id"].filter(mine)
    fixed = {"status": Status.REJECTED.value, "reason": WITHDRAWN}
    columns = []
    for field in scans.schema:
        column = scans[field.name]
        if field.name not in _KEPT:
            value = pa.scalar(fixed.get(field.name), field.type)
            column = pc.if_else(mine, value, column)
        columns.append(column)
    table = pa.table(columns, schema=scans.schema)
    copies = pc.and_(pc.is_in(scans["scan_id"], ids.combine_chunks().drop_null()),
                     pc.invert(mine))
    for name, value in WITHDRAWN_CONTENT.items():
        position = table.column_names.index(name)
        table = table.set_column(position, table.schema.field(name), pc.if_else(
            copies, pa.scalar(value, pa.string()), table[name]))
    return table


# ---- feed ----------------------------------------------------------------------------------------

def _from_feed(uri: str, people: set[str], lists: list[WithdrawalList]) -> tuple[int, str]:
    feed = open_feed(uri)
    mine = pc.is_in(feed.index["participant"], pa.array(sorted(people), pa.string()))
    gone = feed.index.filter(mine)
    seen = gone.select(["participant", "cohort", "modality", "split"]).group_by(
        ["participant", "cohort", "modality", "split"]).aggregate([]).to_pylist()
    if not _log_begin(uri, people, lists, len(gone) > 0, {
            "scans": len(gone), "fingerprint": feed.fingerprint, "samples": seen,
            "shards": sorted(set(gone["shard"].to_pylist()))}):
        return 0, ""
    rows = feed.index.filter(pc.invert(mine))
    labels = feed.labels()
    labels = labels.filter(pc.invert(pc.is_in(labels["participant"], pa.array(
        sorted(people), pa.string()))))
    if len(gone):  # from here on no reader finds them
        commit_feed(uri, feed.grid, rows=rows, labels=labels, source=source_of(uri))
    shards = {shard for event in unfinished(read_events(uri)) for shard in event["shards"]}
    if shards:
        rows = _rewritten(feed, rows, shards)
        commit_feed(uri, feed.grid, rows=rows, labels=labels, source=source_of(uri))
    remove_shards_except(uri, set(pc.unique(rows["shard"]).to_pylist()))
    return len(gone), append_event(uri, {"event": "purged", "scans": len(gone)})


def _rewritten(feed: Feed, rows: pa.Table, shards: set[str]) -> pa.Table:
    """The rows, with those of some shards moved to new tars that hold nothing else."""
    touched = pc.is_in(rows["shard"], pa.array(sorted(shards), pa.string()))
    tables = [rows.filter(pc.invert(touched))]
    for shard, own in groupby(sorted(rows.filter(touched).to_pylist(), key=itemgetter("shard")),
                              key=itemgetter("shard")):
        data = read_bytes(join(feed.uri, shard))
        samples = [
            (row, data[row["offset"]:row["offset"] + row["length"]],
             None if row["label_length"] is None else
             data[row["label_offset"]:row["label_offset"] + row["label_length"]])
            for row in own]
        name = shard.removesuffix(".tar") + "-w.tar"
        tar, placed = write_tar(samples)
        write_bytes(join(feed.uri, name), tar)
        tables.append(placed_table(placed, name))
    return pa.concat_tables(tables)


# ---- models --------------------------------------------------------------------------------------

def _tell_checkpoints(runs: Sequence[str], feeds: list[str]) -> None:
    events = {feed: read_events(feed) for feed in feeds}
    saw = checkpoints_that_saw(runs, events)
    for name, people in saw.items():
        what = ("may have seen any of them: its feed is not known here" if people is None else
                f"saw {len(people)} withdrawn people")
        print(f"{name}: {what}")
    print(f"{len(saw)} checkpoints and exports saw withdrawn people")
    for feed in feeds:
        append_event(feed, {"event": "seen_by", "checkpoints": {
            name: sorted(people) if people is not None else None for name, people in saw.items()}})
