"""index: a cohort's tree -> a manifest of Scans with pseudonyms and splits, and its labels.

    MANIFEST.parquet          one row per scan (SCAN_SCHEMA); written last
    MANIFEST.labels.parquet   participant, session, name, value
    MANIFEST.seen.parquet     what had to be opened, so that the next index opens only what changed

No voxels are read.  Rows are spooled to disk as people come, so memory holds people, not files;
splits are known once all ties are, and are filled in at the end.  An earlier manifest at the same
place is compared with: its people keep their splits.  Whatever was seen and not used is counted
and printed.
"""

from __future__ import annotations

import importlib
import io
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.cohorts.seen import Seen
from data_prep.cohorts.source import Findings, Source
from data_prep.identity import pseudonym
from data_prep.scan import SCAN_SCHEMA, Scan, labels_path
from data_prep.splits import LINK, SPLIT_BELOW, group_people, scope, settle
from data_prep.tables import read_table, read_tsv
from data_prep.told import tell_columns, tell_labels
from data_prep.withdrawal.lists import read_lists
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import LABELS_SCHEMA
from neurojepa.storage import exists, open_store, parquet_bytes, write_bytes

# the module of each kind of source: its ``read_cohort`` yields Findings
READERS = {"ukb": "data_prep.cohorts.ukb.reader", "abcd": "data_prep.cohorts.abcd.reader",
           "adni": "data_prep.cohorts.adni.reader", "bids": "data_prep.cohorts.bids.reader",
           "files": "data_prep.cohorts.files"}
_ROW_GROUP = 20_000
_IDENTITY, _STATE = ("uri", "member", "modality"), ("size_bytes", "modified")


def index(cohort: str, source: str, *, out: str, key: bytes, name: str | None = None,
          tables: Sequence[str] = (), links: str | None = None,
          beside: Sequence[str] = (), withdrawn: Sequence[str] = ()) -> dict[str, str]:
    """Index a source and write its manifest; prints what was found.

    Returns the pseudonym of each of the source's own ids; only who has the source may see them.

    Parameters
    ----------
    cohort
        Module of data_prep.cohorts that reads the source.
    tables
        URIs of tables that lie outside the source.
    links
        CSV (cohort, participant, person) of the same people in several cohorts.
    beside
        Manifests of those other cohorts, made with the same links: their people's splits hold.
    withdrawn
        Withdrawal lists, as ``withdraw`` takes them: the people on them are left out.

    Raises
    ------
    DataError
        The source or a table cannot be read, no scan is found in it, or the manifest at ``out`` is
        of other people.
    """
    labels_path(out)
    for table in [*tables, *filter(None, [links])]:
        fs, path = open_store(table)
        if fs.isdir(path):
            raise DataError(f"{table}: is a folder; name the table in it, one --table for each"
                            if table != links else f"{table}: is a folder; name the table in it")
    name = _cohort_name(source, name)
    seen_at = out.removesuffix(".parquet") + ".seen.parquet"
    earlier = _Earlier(out)
    seen = Seen()
    walked = Source(source, remembered=Seen.load(seen_at, cohort), tables=tables, seen=seen)
    others = _Linked(name, key, links, beside)
    with tempfile.TemporaryDirectory() as folder:
        spool = f"{folder}/scans.parquet"
        people = _Roster(name, key, {left for each in read_lists(withdrawn, name)
                                     for left in each.pseudonyms(key)})
        reader = importlib.import_module(READERS[cohort])
        _spool(spool, people.take(reader.read_cohort(walked, name)))
        if not people.names:
            told = "; ".join(f"{count} x {note}" for note, count in sorted(walked.notes.items()))
            raise DataError(f"{source}: no scan found ({told or 'no file of a kind that is taken'})"
                            "; check --cohort and --source")
        if earlier.splits and earlier.splits.keys().isdisjoint(people.names.values()):
            raise DataError(f"{out}: has none of these people, so it was made with another key, "
                            "--name or source; choose another --out, or delete it")
        families, splits = people.settle(others, earlier.splits, walked.notes)
        if people.num_left_out:
            walked.notes["scans of people who withdrew"] = people.num_left_out
        seen.save(seen_at, cohort)
        labels = people.label_table(walked.notes)
        write_bytes(labels_path(out), parquet_bytes(labels))
        scans, states = _with_splits(spool, families, splits)
        write_bytes(out, scans)
    _tell(name, out, scans, walked.notes)
    tell_columns(walked.columns)
    tell_labels(labels)
    earlier.compare(states)
    return people.names


class _Roster:
    """The people met so far: pseudonyms, ties and labels."""

    def __init__(self, cohort: str, key: bytes, withdrawn: set[str]) -> None:
        self.cohort, self.key, self.withdrawn = cohort, key, withdrawn
        self.num_left_out = 0
        self.names: dict[str, str] = {}  # pseudonyms, of people with a scan
        self.ties: list[tuple[str, str]] = []
        self._labels: list[tuple[str, str, str, str]] = []
        self._label_tables = [LABELS_SCHEMA.empty_table()]

    def take(self, findings: Iterator[Findings]) -> Iterator[tuple[Scan, str]]:
        """Each scan with its person's pseudonym; ties and labels are kept."""
        for found in findings:
            name = pseudonym(self.key, self.cohort, found.participant)
            if name in self.withdrawn:
                self.num_left_out += len(found.scans)
                continue
            self.ties += [(found.participant, tag) for tag in found.ties]
            self._labels += [(name, *label) for label in found.labels]
            if len(self._labels) >= _ROW_GROUP:
                self._pack_labels()
            for scan in found.scans:
                self.names[found.participant] = name
                yield scan, name

    def settle(self, others: _Linked, earlier: dict[str, str],
               notes: Counter[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Family and split by pseudonym."""
        groups = group_people([*self.names, *others.splits], self.ties + others.ties)
        had = {person: earlier[name] for person, name in self.names.items() if name in earlier}
        settled = settle(self.key, self.cohort, groups=groups, earlier={**others.splits, **had})
        moved = sum(settled[groups[person]] != split for person, split in had.items())
        if moved:
            notes["people moved to another split: a new tie unites groups of two splits"] = moved
        families, splits = {}, {}
        for person, name in self.names.items():
            group = groups[person]
            families[name] = (name if group == f"person:{person}" else
                              pseudonym(self.key, scope(self.cohort, group), group))
            splits[name] = settled[group]
        return families, splits

    def label_table(self, notes: Counter[str]) -> pa.Table:
        """Labels of people with a scan, sorted; one that has two values is left out."""
        self._pack_labels()
        table = pa.concat_tables(self._label_tables)
        known = pa.array(sorted(self.names.values()), pa.string())
        table = table.filter(pa.compute.is_in(table["participant"], value_set=known))
        keys = LABELS_SCHEMA.names[:3]
        table = table.group_by(keys).aggregate([("value", "min"), ("value", "count_distinct")])
        alone = pa.compute.equal(table["value_count_distinct"], 1)
        if doubtful := table.num_rows - (pa.compute.sum(alone).as_py() or 0):
            notes["labels with two values for one session: left out"] = doubtful
        table = table.filter(alone).rename_columns({"value_min": "value"})
        return table.select(LABELS_SCHEMA.names).sort_by([(name, "ascending") for name in keys])

    def _pack_labels(self) -> None:
        columns = zip(*self._labels, strict=True) if self._labels else [()] * 4
        self._label_tables.append(pa.table([pa.array(column, pa.string()) for column in columns],
                                           schema=LABELS_SCHEMA))
        self._labels.clear()


class _Linked:
    """People of other cohorts who are linked to some of this one, as further people of its groups.

    Their families count too: whoever is linked to one relative is grouped with the other.
    """

    def __init__(self, cohort: str, key: bytes, links: str | None, beside: Sequence[str]) -> None:
        self.ties: list[tuple[str, str]] = []
        self.splits: dict[str, str] = {}
        rows = read_tsv(links) if links else []
        if links and (not rows or {"cohort", "participant", "person"} - rows[0].keys()):
            raise DataError(f"{links}: needs the columns cohort, participant, person and a row")
        known = {row["participant"]: row for manifest in beside for row in read_table(
            manifest, ["participant", "family", "split"]).to_pylist()}
        for row in rows:
            there, participant, person = (row[name] or "" for name in ("cohort", "participant",
                                                                      "person"))
            other = known.get(pseudonym(key, there, participant))
            if there == cohort:
                self.ties.append((participant, LINK + person))
            elif other:
                node = f"{other['participant']} of {there}"
                self.ties += [(node, LINK + person), (node, f"family beside:{other['family']}")]
                self.splits[node] = other["split"]


class _Earlier:
    """The manifest that an index replaces: splits of its people, state of its files."""

    def __init__(self, path: str) -> None:
        self.splits: dict[str, str] = {}
        self._states = np.empty((0, 2), np.int64)
        self._exists = exists(path)
        if not self._exists:
            return
        needed = ["participant", "split", *_IDENTITY, *_STATE]
        table = read_table(path, needed)
        self.splits = dict(zip(table["participant"].to_pylist(), table["split"].to_pylist(),
                               strict=True))
        self._states = np.concatenate([self._states, *map(_states, table.to_batches(_ROW_GROUP))])

    def compare(self, states: np.ndarray) -> None:
        """Print how many scans are new, changed, gone and as before."""
        if not self._exists:
            return
        both, before, now = np.intersect1d(self._states[:, 0], states[:, 0], return_indices=True)
        same = int((self._states[before, 1] == states[now, 1]).sum())
        print(f"  against the earlier manifest: {len(states) - len(both)} new, {len(both) - same} "
              f"changed, {len(self._states) - len(both)} gone, {same} unchanged")


def _states(batch: pa.RecordBatch) -> np.ndarray:
    """[scans, 2] int64: a hash of which scan it is, and one of its file's size and time."""
    columns = [list(zip(*(batch.column(name).to_pylist() for name in names), strict=True))
               for names in (_IDENTITY, _STATE)]
    return np.array([[hash(value) for value in column] for column in columns], np.int64).T


def _spool(path: str, scans: Iterator[tuple[Scan, str]]) -> None:
    """Write scans in row groups, family and split still empty."""
    with pq.ParquetWriter(path, SCAN_SCHEMA) as writer:
        group: list[tuple[Scan, str]] = []
        for pair in scans:
            group.append(pair)
            if len(group) == _ROW_GROUP:
                writer.write_batch(_batch(group))
                group = []
        if group:
            writer.write_batch(_batch(group))


def _batch(scans: list[tuple[Scan, str]]) -> pa.RecordBatch:
    columns = {name: [getattr(scan, name) for scan, _ in scans] for name in SCAN_SCHEMA.names}
    columns["participant"] = [pseudonym for _, pseudonym in scans]
    return pa.record_batch(columns, schema=SCAN_SCHEMA)


def _with_splits(spool: str, families: dict[str, str],
                 splits: dict[str, str]) -> tuple[bytes, np.ndarray]:
    """The manifest's bytes, and the ``_states`` of its scans."""
    out, states = io.BytesIO(), []
    with pq.ParquetWriter(out, SCAN_SCHEMA) as writer:
        for batch in pq.ParquetFile(spool).iter_batches(_ROW_GROUP):
            people = batch.column("participant").to_pylist()
            for name, values in (("family", families), ("split", splits)):
                batch = batch.set_column(SCAN_SCHEMA.get_field_index(name), SCAN_SCHEMA.field(name),
                                         pa.array([values[person] for person in people]))
            states.append(_states(batch))
            writer.write_batch(batch)
    return out.getvalue(), np.concatenate(states)


def _cohort_name(source: str, name: str | None) -> str:
    folder = open_store(source)[1].rstrip("/").rsplit("/", 1)[-1]
    name = name or re.sub(r"[^A-Za-z0-9]+", "-", folder).strip("-")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"--name {name!r}: use letters, digits, dots and dashes")
    return name


def _tell(name: str, out: str, manifest: bytes, notes: Counter[str]) -> None:
    table = pq.ParquetFile(pa.BufferReader(manifest)).read(["participant", "family", "split",
                                                       "modality"])
    kinds = Counter(table["modality"].to_pylist())
    splits = table["split"].to_pylist()
    in_split = {kind: Counter(dict(zip(table[kind].to_pylist(), splits, strict=True)).values())
                for kind in ("participant", "family")}
    print(f"{name}: {table.num_rows} scans ({', '.join(f'{n} {k}' for k, n in kinds.items())}) of "
          f"{in_split['participant'].total()} people in {in_split['family'].total()} groups -> "
          f"{out}")
    for split, _ in SPLIT_BELOW:
        print(f"  {split}: {in_split['participant'][split]} people, {in_split['family'][split]} "
              "groups")
    for note, count in sorted(notes.items()):
        print(f"  noted {count} x {note}")
