"""Trees of files for the readers of cohorts; contents need not be images, for none is opened."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from data_prep.cohorts.bids.reader import read_cohort
from data_prep.cohorts.source import Findings, Source
from data_prep.scan import Scan

KEY = b"0123456789abcdef0123456789abcdef"
DESCRIPTION = json.dumps({"Name": "t", "BIDSVersion": "1.9.0"})


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    """Write files by path below ``root``, which is returned."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


class Read:
    """A BIDS source read through: scans by file name without extension, labels and notes."""

    def __init__(self, source: Path | str, **arguments: object) -> None:
        self.source = Source(str(source), **arguments)  # type: ignore[arg-type]
        self.found: list[Findings] = list(read_cohort(self.source, "c"))
        self.notes = dict(self.source.notes)
        self.labels = [(one.participant, *label) for one in self.found for label in one.labels]
        self.ties = [(one.participant, tag) for one in self.found for tag in one.ties]
        self.scans: dict[str, Scan] = {}
        for one in self.found:
            for scan in one.scans:
                file = scan.uri.rsplit("/", 1)[-1]
                name = file.split(".")[0]
                assert file not in self.scans and scan.participant == one.participant
                self.scans[file if name in self.scans else name] = scan  # another form of a scan


def tree_bytes(root: Path) -> dict[str, bytes]:
    """Every file below a folder, by path."""
    return {str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*")) if path.is_file()}


def read_people(read_cohort: Callable[[Source, str], Iterator[Findings]], cohort: str,
                root: Path | str, **options: object) -> tuple[dict[str, Findings], Source]:
    """A source read through by a reader that names each participant once."""
    source = Source(str(root), **options)  # type: ignore[arg-type]
    people: dict[str, Findings] = {}
    for found in read_cohort(source, cohort):
        assert found.participant not in people
        people[found.participant] = found
    return people, source


def said_of(people: dict[str, Findings], root: Path) -> str:
    """All that was found, but for the root's path and the times of files, which hold any digits."""
    found = [replace(each, scans=[replace(scan, modified=None) for scan in each.scans])
             for each in people.values()]
    return repr(found).replace(str(root), "")
