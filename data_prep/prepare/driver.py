"""prepare: manifests -> the archive, as Ray tasks, one per person.

A task prepares all scans of a person, writes their voxels, and commits a record
``results/<participant>-<hash of inputs and preset>.json`` last.  The driver starts tasks only for
persons without a record, and then merges: rows of earlier manifests stay, a person's rows are
replaced by the newest.  So a run can be killed anywhere and repeated, and another manifest adds to
the archive.  A store that fails stops the run.

The work itself is done in a watched child of the Ray worker (child.py).  A person whose work dies
is tried scan by scan; the scans that die alone are quarantined with reason worker_crashed,
worker_timeout, worker_memory or worker_failed, the others are prepared without them, and the record
is committed: the next run tries again only if told to.  A person whose Ray worker or node kept
dying has no record (reason ``worker_lost``) and is tried by the next run.

The driver holds the manifest and the archive's table in Arrow, and Python objects only for the
people at work.  Measured with 100,000 scans of 40,000 people and 50 figures a scan: 25 s of CPU
beside the tasks, and 0.8 GB at most; both grow with the number of scans.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.archive import (
    archive_table,
    check_reachable,
    commit_tables,
    list_slots,
    read_many,
    remove_volume,
    slot,
)
from data_prep.pool import Task, run_tasks
from data_prep.prepare.merge import merge, scan_rows
from data_prep.prepare.person import (
    DIED,
    Limits,
    PersonTask,
    PrepareOne,
    record_name,
    run_person_task,
)
from data_prep.prepare.turns import read_turns, with_turns
from data_prep.rows import (
    ArchiveRow,
    Outcome,
    Status,
    archive_rows,
    rejected_outcome,
    usable,
)
from data_prep.scan import Scan, read_manifest
from data_prep.splits import check as check_splits
from data_prep.tables import dicts, read_table
from data_prep.withdrawal.audit import withdrawn_people
from neurojepa.errors import DataError
from neurojepa.storage import join, list_names, remove

if TYPE_CHECKING:
    from data_prep.volumes.preset import Preset

# Reasons that ask the user a question: the run did what it could.
DOUBTFUL = {"orientation_doubtful", "left_right_doubtful"}
_PEOPLE_AT_ONCE = 2000  # whose records are in memory
_DEFAULT_LIMITS = Limits()


def prepare(manifests: Sequence[str], *, out: str, preset: Preset, workers: int | None = None,
            ray_address: str | None = None, prepare_one: PrepareOne | None = None,
            limits: Limits = _DEFAULT_LIMITS, retry_quarantined: bool = False,
            turns: str | None = None) -> Counter[str]:
    """Prepare the scans of manifests into an archive; returns its number of scans by status.

    Parameters
    ----------
    workers
        People prepared at once; by default as many as the machine or the cluster has CPUs.
    prepare_one
        Turns the scans of one person into volumes; ``volumes.pipeline.prepare_person`` if None.
    retry_quarantined
        Try the people again of whom an earlier run had to give up a scan.
    turns
        Table of the scans whose axes the user names, see turns.py.

    Raises
    ------
    ConfigError
        A row of ``turns`` cannot be used.
    DataError
        A manifest or a store cannot be read or written, people are in two splits, or no scan of
        the archive is usable.
    """
    for uri in (*manifests, out):
        check_reachable(uri)
    scans, labels = _read(manifests, withdrawn_people(out))
    if turns:
        scans = with_turns(scans, read_turns(turns), turns)
    people = ScansByPerson(scans, preset)
    run = _Run(out, people, preset, workers, ray_address, prepare_one, limits)
    todo = run.without_record()
    if retry_quarantined:
        todo |= set(_given_up(out, people, people.records.keys() - todo))
    lost = run.tasks(todo)
    table = _merge(out, people, lost)
    slots = list_slots(out)
    if gone := _without_voxels(table, slots) & people.records.keys():
        # removed behind our back, or of a duplicate whose original is gone
        lost |= run.tasks(gone)
        table = _merge(out, people, lost)
        slots = list_slots(out)
    counts = _commit(out, table, labels, people)
    _sweep(out, table, slots, people)
    return _checked(out, table, counts)


# ---- what there is to do -------------------------------------------------------------------------

class ScansByPerson:
    """The scans of manifests by person: in Arrow, and as objects for one person at a time.

    Parameters
    ----------
    table
        Of SCAN_SCHEMA, ordered by participant.

    Attributes
    ----------
    names : pa.Array of the participants
    records : participant -> name of the record; only of people with a scan that is to be read
    num_scans : participant -> number of scans that are to be read
    """

    def __init__(self, table: pa.Table, preset: Preset) -> None:
        self._table = table
        self._rows: dict[str, tuple[int, int]] = {}
        self.records: dict[str, str] = {}
        self.num_scans: dict[str, int] = {}
        start = 0
        for name, rows in groupby(dicts(table), key=lambda row: row["participant"]):
            scans = [Scan(**row) for row in rows]
            self._rows[name] = start, len(scans)
            start += len(scans)
            if readable := [scan for scan in scans if scan.reason is None]:
                self.records[name] = record_name(readable, preset)
                self.num_scans[name] = len(readable)
        self.names = pa.array(self._rows, pa.string())

    def scans(self, name: str) -> list[Scan]:
        return [Scan(**row) for row in self._table.slice(*self._rows[name]).to_pylist()]

    def chunks(self) -> Iterator[list[str]]:
        """All names, ``_PEOPLE_AT_ONCE`` at a time."""
        names = iter(self._rows)
        while chunk := list(islice(names, _PEOPLE_AT_ONCE)):
            yield chunk


@dataclass(frozen=True)
class _Run:
    """One call of ``prepare``, as its tasks need to know it."""

    out: str
    people: ScansByPerson
    preset: Preset
    workers: int | None
    ray_address: str | None
    prepare_one: PrepareOne | None
    limits: Limits

    def without_record(self) -> set[str]:
        there = set(list_names(join(self.out, "results")))
        return {name for name, record in self.people.records.items() if record not in there}

    def tasks(self, names: set[str]) -> dict[str, str]:
        """Prepare people; returns a message for each one who was lost with a worker."""
        if not names:
            return {}
        known = defaultdict(list)
        for record in list_names(join(self.out, "results")):
            known[_person_of(record)].append(record)
        num_scans = self.people.num_scans
        # people with most scans first, so that all workers end at about the same time
        tasks = (Task(name, self._task(name, known[name]), num_scans[name])
                 for name in sorted(names, key=lambda name: (-num_scans[name], name)))
        return run_tasks(run_person_task, tasks, num_scans=sum(num_scans[name] for name in names),
                         workers=self.workers, ray_address=self.ray_address)

    def _task(self, name: str, stale: list[str]) -> PersonTask:
        scans = [scan for scan in self.people.scans(name) if scan.reason is None]
        return PersonTask(out=self.out, scans=scans, record=self.people.records[name], stale=stale,
                          preset=self.preset, limits=self.limits, prepare_one=self.prepare_one)


def _read(manifests: Sequence[str], gone: set[str]) -> tuple[pa.Table, pa.Table]:
    """Scans of all manifests by person, the last row of a scan counting, and labels."""
    read = [read_manifest(manifest) for manifest in manifests]
    scans = pa.concat_tables([table for table, _ in read])
    numbered = scans.select(["uri", "member"]).append_column("row", pa.array(range(len(scans))))
    last = numbered.group_by(["uri", "member"]).aggregate([("row", "max")])["row_max"]
    scans = scans.take(last).sort_by([(name, "ascending") for name in (
        "participant", "session", "uri", "member")])
    withdrawn = pc.is_in(scans["participant"], pa.array(gone, pa.string()))
    if num_people := pc.count_distinct(scans["participant"].filter(withdrawn)).as_py():
        print(f"{num_people} withdrawn people left out")
    labels = pa.concat_tables([table for _, table in read])
    return scans.filter(pc.invert(withdrawn)).combine_chunks(), labels


# ---- records -------------------------------------------------------------------------------------

def _person_of(record: str) -> str:
    return record.rpartition("-")[0]


def _results(out: str, people: ScansByPerson, names: Iterable[str]) -> dict[str, list[Outcome]]:
    """What the records of people say."""
    uris = {name: join(out, "results", people.records[name]) for name in names}
    results = {}
    for (name, uri), content in zip(uris.items(), read_many(uris.values()), strict=True):
        try:
            results[name] = json.loads(content)
        except ValueError as error:
            raise DataError(f"{uri}: not JSON ({error}); remove it and run prepare again") from None
    return results


def _given_up(out: str, people: ScansByPerson, names: set[str]) -> Iterator[str]:
    for chunk in people.chunks():
        for name, rows in _results(out, people, (n for n in chunk if n in names)).items():
            if any(row["reason"] in DIED for row in rows):
                yield name


# ---- the archive's tables ------------------------------------------------------------------------

def _merge(out: str, people: ScansByPerson, lost: dict[str, str]) -> pa.Table:
    """All rows of the archive: earlier ones of other people, and these people's newest."""
    there = archive_table(out, "scans", ["participant"])
    old = None
    if there is not None and not pc.all(pc.is_in(there["participant"], people.names)).as_py():
        old = read_table(join(out, "scans.parquet"))
        old = old.filter(pc.invert(pc.is_in(old["participant"], people.names)))
    return merge(old, (_new_rows(out, people, chunk, lost) for chunk in people.chunks()))


def _new_rows(out: str, people: ScansByPerson, names: list[str],
              lost: dict[str, str]) -> list[ArchiveRow]:
    results = _results(out, people, (name for name in names
                                     if name in people.records and name not in lost))
    rows: list[ArchiveRow] = []
    for name in names:
        found: defaultdict[tuple[str, str | None], list[Outcome]] = defaultdict(list)
        for row in results.get(name, []):
            found[row["uri"], row["member"]].append(row)
        for scan in people.scans(name):
            if scan.reason is not None:
                own = [rejected_outcome(scan, reason=scan.reason,
                                        message="ruled out by the cohort's own tables or layout")]
            elif name in lost:
                own = [rejected_outcome(scan, reason="worker_lost", message=lost[name])]
            else:
                own = found[scan.uri, scan.member]
            rows += scan_rows(scan, own)
    return rows


def _without_voxels(table: pa.Table, slots: set[str]) -> set[str]:
    """People with a usable row whose slot is not there."""
    return {path.partition("/")[0] for path in _used_slots(table) - slots}


def _used_slots(table: pa.Table) -> set[str]:
    own = table.select(["participant", "scan_id"]).filter(usable(table))
    return {slot(*pair) for pair in zip(own["participant"].to_pylist(),
                                        own["scan_id"].to_pylist(), strict=True)}


def _commit(out: str, table: pa.Table, labels: pa.Table, people: ScansByPerson) -> Counter[str]:
    """Write the archive's tables, with these people's labels replaced; prints the counts."""
    if problems := check_splits(dicts(table.select(["participant", "family", "split"]))):
        raise DataError(f"{out}: {problems[0]}" + (f" (and {len(problems) - 1} more)"
                                                   if len(problems) > 1 else ""))
    labels = labels.filter(pc.is_in(labels["participant"], people.names))
    if (old := archive_table(out, "labels")) is not None:
        others = old.filter(pc.invert(pc.is_in(old["participant"], people.names)))
        labels = pa.concat_tables([others, labels])
    commit_tables(out, scans=table, labels=labels, review=_review(out, table))
    counts = Counter(table["status"].to_pylist())
    print(f"{out}: {', '.join(f'{counts[status]} {status}' for status in Status)} of "
          f"{len(table)} scans")
    reasons = table["reason"].filter(np.invert(usable(table))).to_pylist()
    for reason, count in Counter(reason.split(":")[0] for reason in reasons).most_common():
        print(f"  rejected {count} x {reason}")
    return counts


def _review(out: str, table: pa.Table) -> pa.Table:
    """Near-duplicates to look at; those found before where no volume has changed."""
    from data_prep.prepare.duplicates import SCHEMA, review_table

    names = ["status", "modality", "cohort", "participant", "family", "session", "scan_id"]
    volumes = [*names, "voxels_sha256"]
    old, found = archive_table(out, "scans", volumes), archive_table(out, "review")
    if old is not None and found is not None and old.equals(table.select(volumes)):
        return found
    if "fingerprint" not in table.column_names:
        return SCHEMA.empty_table()
    return review_table(archive_rows(table.select([*names, "fingerprint"]).filter(usable(table))))


def _checked(out: str, table: pa.Table, counts: Counter[str]) -> Counter[str]:
    if not counts[Status.ACCEPTED] + counts[Status.FLAGGED]:
        if len(table) and set(table["reason"].to_pylist()) <= DOUBTFUL:
            print(f"{out}: no scan is usable until someone says how the heads lie: see the "
                  "messages in scans.parquet, and prepare --turn")
            return counts
        example = next(iter(table["message"].to_pylist()), "the manifest is empty")
        raise DataError(f"{out}: none of {len(table)} scans is usable; the first one: {example}")
    return counts


def _sweep(out: str, table: pa.Table, slots: set[str], people: ScansByPerson) -> None:
    """Remove what no row needs: voxels of scans that changed or went, what kills left behind."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda path: remove_volume(out, path), sorted(slots - _used_slots(table))))
    in_run = set(people.names.to_pylist())
    stale = [f"results/{name}" for name in list_names(join(out, "results"))
             if name.endswith(".tmp") or (_person_of(name) in in_run
                                          and name != people.records.get(_person_of(name)))]
    stale += [name for name in list_names(out) if name.endswith(".tmp")]
    for name in stale:
        remove(join(out, name))
