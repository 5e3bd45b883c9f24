"""Where UK Biobank's packages lie, and what is in each: zips listed, folders as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from data_prep.cohorts.source import Found, Source
from data_prep.filenames import is_hidden
from data_prep.members import list_members
from data_prep.scan import ScanError
from data_prep.tables import TABLE_ENDINGS

_PACKAGE = re.compile(r"(\d{7})_(\d{5})_(\d+)_(\d+)(\.zip)?$")  # eid, field, instance, array
_SHARD = re.compile(r"\d{2}$")
_WITHDRAWALS = re.compile(r"w\d+_\d{8}\.csv$")
# What a listing keeps of a zip, whatever ukb.yaml takes: an index remembers it.
_KEPT = re.compile(r"\.(nii|nii\.gz|mgz|mat|par)$")


def survey(source: Source, under: str = "") -> tuple[list[str], list[str]]:
    """Folders that hold packages, directly or below two-digit folders; URIs of tables."""
    files, folders = source.listing(under)
    inside = [name for name in folders if _PACKAGE.match(name) or _SHARD.match(name)]
    holds_packages = bool(inside) or any(_PACKAGE.match(found.name) for found in files)
    roots = [under] if holds_packages else []
    tables = []
    for found in files:
        if _WITHDRAWALS.match(found.name):
            source.notes["withdrawal list: not read here, give it to withdraw"] += 1
        elif found.name.lower().endswith(TABLE_ENDINGS):
            tables.append(found.uri)
        elif not _PACKAGE.match(found.name):
            source.notes["not taken: neither a package nor a table"] += 1
    for name in folders:
        if name not in inside:
            more = survey(source, f"{under}/{name}" if under else name)
            roots, tables = roots + more[0], tables + more[1]
    return roots, tables


def packaged(source: Source, root: str) -> Iterator[tuple[str, re.Match[str], Found]]:
    """Participant, package name and file of each zip, or of each file of an unpacked package."""
    for found in source.walk(root):
        first, *rest = found.path[len(root) + 1 if root else 0:].split("/")
        shard = first if rest and _SHARD.match(first) else ""
        if shard:
            first, *rest = rest
        match = _PACKAGE.match(first)
        if match and bool(rest) != bool(match[5]):
            if shard and not match[1].startswith(shard):
                source.notes["not taken: package in the folder of other participants"] += 1
            else:
                yield match[1], match, found
        elif shard:
            source.notes["not taken: neither a package nor a table"] += 1


# ---- a package -----------------------------------------------------------------------------------

@dataclass
class Package:
    """One zip or unpacked folder, and what lies in it."""

    first: Found  # the zip, or the folder's first file
    unpacked: dict[str, Found] = field(default_factory=dict)  # path inside the folder -> file
    names: list[str] = field(default_factory=list)
    dicom: dict[str, int] = field(default_factory=dict)  # folder inside -> number of files
    fault: str | None = None

    def place(self, member: str) -> tuple[str, str | None]:
        """uri and member of a file, or of a folder ending in "/"."""
        if not self.unpacked:
            return self.first.uri, member
        if member in self.unpacked:
            return self.unpacked[member].uri, None
        inside, file = next(iter(self.unpacked.items()))
        return f"{file.uri.removesuffix(inside)}{member.lstrip('/')}", None

    def find(self, pattern: str) -> str | None:
        return next((name for name in self.names if fnmatchcase(name, pattern)), None)


def listing(found: Found) -> dict[str, Any]:
    """What an index remembers of a zip."""
    try:
        if found.size_bytes is None:
            raise ScanError("not_downloaded", f"{found.uri}: a link that leads nowhere")
        names = [member["name"] for member in list_members(found.uri)]
    except ScanError as error:
        return {"names": [], "dicom": {}, "fault": error.code}
    return {**sorted_out(names), "fault": None}


def sorted_out(names: list[str]) -> dict[str, Any]:
    dicom: dict[str, int] = {}
    names = [name for name in names if not is_hidden(name)]
    for name in names:
        if name.lower().endswith((".dcm", ".dcm.gz")):
            folder = name.rpartition("/")[0] + "/"
            dicom[folder] = dicom.get(folder, 0) + 1
    return {"names": sorted(name for name in names if _KEPT.search(name)), "dicom": dicom}
