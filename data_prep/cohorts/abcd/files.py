"""Where the files of ABCD participants lie, and a scan as it is delivered."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from data_prep.cohorts.abcd.tables import participant_of
from data_prep.cohorts.bids.derived import Taken
from data_prep.cohorts.source import Found, Source
from data_prep.filenames import image_ending, is_hidden, other_file
from data_prep.members import first_member
from data_prep.scan import ScanError
from data_prep.tables import TABLE_ENDINGS

_PACKAGE = re.compile(r"(NDAR_?INV\w{8})_([A-Za-z0-9]+)_ABCD-(.+)_(\d{14})\.tgz$")
_SLICES = (".dcm", ".dcm.gz")
_FORM = ("space", "desc", "res", "den")  # entities in which forms of one scan differ


class Tree:
    """Where the files of each participant lie, and the tables."""

    def __init__(self, source: Source, table: dict[str, Any]) -> None:
        self.source, self.table = source, table
        self.folders: dict[str, list[tuple[str, str]]] = defaultdict(list)  # pipeline, folder
        self.packages: dict[str, list[tuple[re.Match[str], Found]]] = defaultdict(list)
        self.tables: list[str] = []
        self.spellings: dict[str, set[str]] = defaultdict(set)
        self._look("")
        aliases = sum(len(spellings) > 1 for spellings in self.spellings.values())
        if aliases:
            source.notes["participants with ids in two spellings, taken as one"] = aliases

    def _look(self, under: str) -> None:
        pipeline = self._pipeline(under)
        if pipeline is None:
            self.source.notes[f"derivatives not used: {under.rsplit('/', 1)[-1]}"] += 1
            return
        files, folders = self.source.listing(under)
        for found in files:
            if match := _PACKAGE.match(found.name):
                self._add(match[1], self.packages, (match, found))
            elif found.name.lower().endswith(TABLE_ENDINGS):
                self.tables.append(found.uri)
            elif found.name.lower().endswith(".tgz") or image_ending(found.name):
                self.source.notes["not taken: name of neither a package nor a participant"] += 1
            elif not found.name.endswith(".json"):
                self.source.notes[f"not taken: {other_file(found.name)}"] += 1
        for name in folders:
            inner = f"{under}/{name}" if under else name
            if not name.startswith("sub-"):
                self._look(inner)
            elif participant_of(name.split("_")[0]):
                self._add(name.split("_")[0], self.folders, (pipeline, inner))
            else:
                self.source.notes["not taken: folder of no participant"] += 1

    def _add(self, spelling: str, places: dict[str, list[Any]], place: Any) -> None:
        participant = participant_of(spelling) or ""
        places[participant].append(place)
        self.spellings[participant].add(spelling.removeprefix("sub-"))

    def _pipeline(self, under: str) -> str | None:
        """raw, sourcedata, or the kind of a folder below derivatives/; None: of no use."""
        parts = [*self.source.uri.rstrip("/").split("/")[-2:], *filter(None, under.split("/"))]
        if "derivatives" not in parts[:-1]:
            return "sourcedata" if "sourcedata" in parts else "raw"
        name = parts[parts.index("derivatives") + 1]
        return next((kind for pattern, kind in self.table["pipelines"].items()
                     if re.fullmatch(pattern, name)), None)


@dataclass
class Delivered:
    """A scan in one of its forms."""

    taken: Taken
    form: str
    task: str
    sidecar: Found | None = None
    kind: int = 0  # order of preference among DICOM packages

    @property
    def scan_key(self) -> tuple[Any, ...]:
        """What the forms of one scan have in common."""
        run = self.taken.image.name.entities.get("run", "1")
        others = self.taken.image.name.without(*_FORM, "run", "task")
        if self.taken.image.name.extension == "tgz":  # a package that does not say what it holds
            return (self.taken.image.found.uri,)
        return self.taken.modality, self.task, int(run) if run.isdigit() else run, others

    @property
    def kind_key(self) -> tuple[str, str, str]:
        return self.taken.session, self.taken.modality, self.task


def is_slice(name: str) -> bool:
    return name.lower().endswith(_SLICES)


def first_image(found: Found) -> list[str | None]:
    """Name of a package's first image and None, or None and the code of why there is none."""
    try:
        if found.size_bytes is None:
            raise ScanError("not_downloaded", f"{found.uri}: a link that leads nowhere")
        member = first_member(found.uri, lambda name: not is_hidden(name) and (
            is_slice(name) or image_ending(name) is not None))
    except ScanError as error:
        return [None, error.code]
    return [member, None if member else "missing_member"]


def inside(found: Found, member: str | None) -> Found:
    """A member of a package as a file; the package itself where there is none."""
    return replace(found, path=f"{found.path}::{member}", uri=f"{found.uri}::{member}"
                   ) if member else found
