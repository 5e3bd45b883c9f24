"""What every cohort reader gives to ``index``, and how a source is walked.

A reader looks at names and tables only; no voxels are decoded.  It speaks the source's own ids;
``index`` replaces them by pseudonyms and adds the splits.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from data_prep.scan import Scan
from neurojepa.errors import DataError
from neurojepa.feed.format import is_local, join, open_store, read_bytes, store_errors

MISSING = {"", "n/a", "na", "nan", "none", "null"}
T = TypeVar("T")


@dataclass
class Findings:
    """Scans of one participant, by the source's own id; a participant may come up several times.

    ``scans`` have empty ``family`` and ``split``.  ``ties`` are tags: people with a common tag must
    share a split.  ``labels`` are (session, name, value).
    """

    participant: str
    scans: list[Scan] = field(default_factory=list)
    ties: list[str] = field(default_factory=list)
    labels: list[tuple[str, str, str]] = field(default_factory=list)


class Source:
    """A source being indexed: its files in order, its tables, and what an earlier index knew.

    A reader is ``read_cohort(source: Source, cohort: str) -> Iterator[Findings]``: it yields people
    while it walks, and counts in ``source.notes`` whatever it saw and did not use.
    """

    def __init__(self, uri: str, remembered: dict[str, tuple[int | None, float | None, Any]]
                 | None = None) -> None:
        self.uri = uri
        self.notes: Counter[str] = Counter()
        self._remembered = remembered or {}
        self.seen: dict[str, tuple[int | None, float | None, Any]] = {}

    def walk(self, under: str = "") -> Iterator[Found]:
        """Every file below ``under``, ordered by path; paths are relative to the source.

        Raises DataError where the source is missing, no folder, or cannot be listed.
        """
        prefix = f"{under.rstrip('/')}/" if under else ""
        yield from (Found(prefix + found.path, found.uri, found.size_bytes, found.modified)
                    for found in walk(join(self.uri, under) if under else self.uri))

    def opened(self, found: Found, make: Callable[[Found], T]) -> T:
        """``make(found)``, or its value from the earlier index where the file has not changed.

        For what needs a file to be opened: listings of archives, sidecars, DICOM headers.  The
        value is plain JSON (lists, dicts with string keys, strings, numbers, None).
        """
        old = self._remembered.get(found.uri)
        if old is not None and old[:2] == (found.size_bytes, found.modified):
            value = old[2]
        else:
            value = make(found)
        self.seen[found.uri] = (found.size_bytes, found.modified, value)
        return value


@dataclass
class CohortTables:
    """A source as found; participants by the source's own ids.  (Being replaced by Findings.)"""

    scans: list[Scan] = field(default_factory=list)
    ties: list[tuple[str, str]] = field(default_factory=list)
    labels: list[tuple[str, str, str, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Found:
    """A file of a source: path below the source, full URI, and what the store tells about it."""

    path: str
    uri: str
    size_bytes: int | None
    modified: float | None

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0]


def walk(source: str) -> list[Found]:
    """Every file below a local folder or an object-store prefix, by path.

    Raises
    ------
    DataError
        The source is missing, not a folder, or cannot be listed.
    """
    fs, root = open_store(source)
    try:
        files = list(_walk_local(os.path.abspath(root)) if is_local(fs) else _walk_remote(fs, root))
    except (NotADirectoryError, FileNotFoundError) as error:
        raise DataError(f"{source}: no such folder; check --source") from error
    except store_errors() as error:
        raise DataError(f"{source}: cannot be listed ({error}); check access to it") from error
    if not files:
        raise DataError(f"{source}: no files there; check --source")
    return sorted(files, key=lambda found: found.path)


def _walk_local(root: str) -> Iterator[Found]:
    """Depth first with scandir: one system call a folder, also with millions of files."""
    seen: set[tuple[int, int]] = set()
    pending = [root]
    while pending:
        folder = pending.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back up the tree
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    if not entry.name.startswith("."):
                        pending.append(entry.path)
                    continue
                # a dangling link (git-annex without content) is passed on; prepare rejects it
                info = entry.stat(follow_symlinks=os.path.exists(entry.path))
                yield Found(os.path.relpath(entry.path, root), entry.path, info.st_size,
                            info.st_mtime)


def _walk_remote(fs, root: str) -> Iterator[Found]:  # type: ignore[no-untyped-def]
    for path, info in fs.find(root, detail=True).items():
        modified = info.get("LastModified") or info.get("mtime")
        yield Found(path[len(root.rstrip("/")) + 1:], fs.unstrip_protocol(path), info.get("size"),
                    modified.timestamp() if hasattr(modified, "timestamp") else modified)


def read_tsv(uri: str) -> list[dict[str, str | None]]:
    """Rows of a tab-separated table as strings; a byte-order mark and ``n/a`` are understood.

    Raises
    ------
    DataError
        The table cannot be decoded or a row has more cells than the header.
    """
    data = read_bytes(uri)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    rows = []
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t")
    for number, row in enumerate(reader, 2):
        if None in row:
            raise DataError(f"{uri} line {number}: more cells than the header has; fix the row")
        cells = {name.strip(): (value or "").strip() for name, value in row.items()}
        if any(cells.values()):
            rows.append({name: None if value.lower() in MISSING else value
                         for name, value in cells.items()})
    return rows


def as_float(value: str | float | None) -> float | None:
    """A finite number, or None."""
    try:
        number = float(value) if value is not None else None
    except (TypeError, ValueError):
        return None
    return number if number is not None and abs(number) < float("inf") else None
