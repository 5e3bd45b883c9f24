"""What every cohort reader gives to ``index``, and how a source is walked.

A reader looks at names and tables only; no voxels are decoded.  It speaks the source's own ids;
``index`` replaces them by pseudonyms and adds the splits.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from data_prep.cohorts.left_out import LeftOut, first_hidden
from data_prep.scan import Scan
from data_prep.tables import POINTERS
from neurojepa.errors import DataError
from neurojepa.storage import is_local, join, open_store, read_bytes, store_errors

POINTER_BYTES = range(20, 1000)  # an LFS pointer has about 130 bytes, one of git-annex 60 to 300
REQUESTS = 16  # under way at once, of files whose opening costs several each
T = TypeVar("T")
Known = tuple[int | None, float | None, Any]  # size, modification time, value


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


@dataclass(frozen=True, slots=True)
class Found:
    """A file of a source: path below the source, full URI, and what the store tells about it."""

    path: str
    uri: str
    size_bytes: int | None  # None: a link that leads nowhere, as git-annex leaves without content
    modified: float | None  # seconds since the epoch

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0]


class Memory(Protocol):
    """What an index knows of opened files by URI: a dict, or the table of seen.py."""

    def get(self, uri: str, /) -> Known | None: ...
    def __setitem__(self, uri: str, known: Known, /) -> None: ...


class Source:
    """A source being indexed: its files in order, its tables, and what an earlier index knew.

    A reader is ``read_cohort(source: Source, cohort: str) -> Iterator[Findings]``: it yields people
    while it walks, and counts in ``source.notes`` whatever it saw and did not use.  ``tables`` are
    URIs of tables that lie elsewhere; ``columns`` tell, by table, what each column was taken for.
    """

    def __init__(self, uri: str, *, remembered: Memory | None = None, tables: Sequence[str] = (),
                 seen: Memory | None = None) -> None:
        self.uri = uri
        self.tables = list(tables)
        self.notes: Counter[str] = Counter()
        self.columns: dict[str, dict[str, str]] = {}
        self.seen: Memory = {} if seen is None else seen
        self._remembered: Memory = {} if remembered is None else remembered
        self._fetched: dict[str, bytes] = {}
        self._made: dict[str, Any] = {}
        self._pool = ThreadPoolExecutor(REQUESTS)
        self.left_out = LeftOut(self.notes)
        self._fs, root = open_store(uri)
        self._local = is_local(self._fs)
        self._root = os.path.abspath(root) if self._local else root.rstrip("/")

    def used(self, uri: str, was_used: bool, needed: str) -> None:
        """DataError where a table that the user named is of no use; one of the source's is noted.

        ``needed``: what a table must have.
        """
        if not was_used:
            self.columns.pop(uri.rsplit("/", 1)[-1], None)
            if uri in self.tables:
                raise DataError(f"--table {uri}: has no row or lacks {needed}, so it would not be "
                                "used; correct its header or leave it out")

    def walk(self, under: str = "", starting: str = "") -> Iterator[Found]:
        """Every file below the folder ``under``; paths are relative to the source.

        Files of a folder come together, names in order with a folder sorted as NAME/ (an object
        store's own order may differ where a file and a folder share the beginning of a name).
        What is hidden or ignored is left out and counted.  ``starting``: only what begins so
        directly below ``under``.

        Raises
        ------
        DataError
            The folder is missing, holds no file, or cannot be listed.
        """
        empty = True
        with _naming_errors(join(self.uri, under) if under else self.uri):
            for found in (self._walk_local if self._local else self._walk_remote)(under, starting):
                empty = False
                if self.left_out.looks_at(found.path):
                    yield found
        if empty and not under and not starting:
            raise DataError(f"{self.uri}: no files there; check --source")

    def listing(self, under: str = "") -> tuple[list[Found], list[str]]:
        """Files and names of folders directly in the folder ``under``, in order.

        What is hidden or ignored is left out, and counted the first time.

        Raises
        ------
        DataError
            The folder is missing or cannot be listed.
        """
        prefix = f"{under}/" if under else ""
        with _naming_errors(self.uri + "/" + under):
            if self._local:
                entries = _entries(f"{self._root}/{under}")
                files = [self._found(entry) for entry in entries if not entry.is_dir()]
                folders = [entry.name for entry in entries if entry.is_dir()]
            else:
                infos = [(info["name"][len(self._root) + 1:].rstrip("/"), info) for info in
                         self._fs.ls(f"{self._root}/{under}".rstrip("/"), detail=True)]
                infos.sort(key=lambda pair: pair[0])
                files = [self._object(path, info) for path, info in infos
                         if info["type"] == "file" and len(path) > len(prefix)]
                folders = [path[len(prefix):] for path, info in infos
                           if info["type"] == "directory"]
        files = [found for found in files if self.left_out.looks_at(found.path)]
        folders = [name for name in folders
                   if self.left_out.looks_at(f"{prefix}{name}", is_folder=True)]
        self.left_out.has_listed(under)
        return files, folders

    def _walk_local(self, under: str, starting: str) -> Iterator[Found]:
        """Depth first with scandir; the entries of the open folders are all that is held."""
        pending = [_Folder(f"{self._root}/{under}" if under else self._root)]
        while pending:
            entry = next(pending[-1].entries, None)
            if entry is None:
                pending.pop()
            elif len(pending) == 1 and not entry.name.startswith(starting):
                continue
            elif not entry.is_dir():
                yield self._found(entry)
            elif self.left_out.looks_at(entry.path[len(self._root) + 1:], is_folder=True):
                folder = _Folder(entry.path)
                if all(folder.identity != above.identity for above in pending):  # a link back up
                    pending.append(folder)

    def _found(self, entry: os.DirEntry[str]) -> Found:
        path = entry.path[len(self._root) + 1:]
        try:
            status = entry.stat()
        except FileNotFoundError:
            return Found(path, entry.path, None, None)
        return Found(path, entry.path, status.st_size, status.st_mtime)

    def _walk_remote(self, under: str, starting: str) -> Iterator[Found]:
        """Flat listings, a page at a time: a request for 1,000 files, whatever the folders."""
        folder = f"{self._root}/{under}" if under else self._root
        bucket, _, prefix = f"{folder}/{starting}".partition("/")
        passing = ""  # the hidden folder that the listing is in
        page = {"IsTruncated": True}
        while page["IsTruncated"]:
            token = page.get("NextContinuationToken")
            page = self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix,
                                    **({"ContinuationToken": token} if token else {}))
            for info in page.get("Contents", []):
                path = f"{bucket}/{info['Key']}"[len(self._root) + 1:]
                *folders, name = path.split("/")
                if (hidden := first_hidden(folders)) and hidden != passing:
                    passing = hidden
                    self.left_out.looks_at(hidden, is_folder=True)
                if name and not hidden:
                    yield self._object(path, info)

    def _object(self, path: str, info: dict[str, Any]) -> Found:
        modified = info.get("LastModified")
        return Found(path, self._fs.unstrip_protocol(f"{self._root}/{path}"),
                     info.get("Size", info.get("size")), modified.timestamp() if modified else None)

    # ---- contents --------------------------------------------------------------------------------

    def opened(self, found: Found, make: Callable[[Found], T]) -> T:
        """``make(found)``, or its value from the earlier index where the file has not changed.

        For what needs a file to be opened: listings of archives, sidecars, DICOM headers.  The
        value is plain JSON (lists, dicts with string keys, strings, numbers, None).
        """
        old = self._remembered.get(found.uri)
        if old is not None and old[:2] == (found.size_bytes, found.modified):
            value: T = old[2]
        elif found.uri in self._made:
            value = self._made[found.uri]
        else:
            value = make(found)
        self.seen[found.uri] = (found.size_bytes, found.modified, value)
        return value

    def open_ahead(self, files: Sequence[Found], make: Callable[[Found], Any]) -> None:
        """Open what ``opened`` will ask for, many at once where each costs requests.

        What was opened ahead before is dropped.
        """
        self._made.clear()
        if not self._local:
            wanted = [found for found in files if not self._is_known(found)]
            made = self._pool.map(make, wanted)
            self._made = {found.uri: value for found, value in zip(wanted, made, strict=True)}

    def _is_known(self, found: Found) -> bool:
        old = self._remembered.get(found.uri)
        return old is not None and old[:2] == (found.size_bytes, found.modified)

    def fetch(self, files: Sequence[Found]) -> None:
        """Read small files that ``opened`` will ask for, all at once where each costs a request.

        What was fetched before is dropped.
        """
        self._fetched.clear()
        wanted = [found.uri for found in files if not self._is_known(found)]
        if not self._local and wanted:
            with _naming_errors(self.uri):
                contents = self._fs.cat_ranges(wanted, None, None)
            self._fetched = {uri: data for uri, data in zip(wanted, contents, strict=True)
                             if isinstance(data, bytes)}

    def read(self, found: Found) -> bytes:
        """The whole of a small file, or DataError naming it."""
        if found.uri in self._fetched:
            return self._fetched[found.uri]
        if not self._local:
            return read_bytes(found.uri)
        try:
            with open(found.uri, "rb", buffering=0) as file:
                return file.readall()
        except OSError as error:
            raise DataError(f"{found.uri}: cannot be read ({error.strerror})") from error

    def not_downloaded(self, found: Found) -> bool:
        """Whether git-annex or Git LFS left a dangling link or a few bytes of text in its place."""
        if found.size_bytes is None:
            return True
        return found.size_bytes in POINTER_BYTES and self.opened(found, self._is_pointer)

    def _is_pointer(self, found: Found) -> bool:
        return self.read(found).startswith(POINTERS)


class _Folder:
    """A local folder being walked: its entries in order, and what it is (a link may lead up)."""

    def __init__(self, path: str) -> None:
        status = os.stat(path)
        self.identity = (status.st_dev, status.st_ino)
        self.entries = iter(_entries(path))


def _entries(path: str) -> list[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        return sorted(entries, key=lambda entry: f"{entry.name}/" if entry.is_dir() else entry.name)


@contextmanager
def _naming_errors(uri: str) -> Iterator[None]:
    """Turns what a store raises while it is listed into a DataError naming the place."""
    try:
        yield
    except (NotADirectoryError, FileNotFoundError) as error:
        raise DataError(f"{uri}: no such folder; check --source") from error
    except store_errors() as error:
        raise DataError(f"{uri}: cannot be listed ({error}); check access to it") from error
