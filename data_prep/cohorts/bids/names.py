"""BIDS file names taken apart, and the habits of bids.yaml."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from data_prep.cohorts.source import Found
from data_prep.filenames import IMAGES

ANATOMICAL = ("T1w", "T2w", "FLAIR")
DESCRIPTION = "dataset_description.json"
# UNIT1: MP2RAGE's uniform image, a T1w by its contrast
MODALITIES = {"UNIT1": "T1w", **{suffix: suffix for suffix in ANATOMICAL}, "pet": "PET",
              "bold": "BOLD"}
VOLUMES = IMAGES
SERIES = "dtseries.nii"  # the one kind of CIFTI file that is a run's
# entities by which a derivative may differ from the scan it belongs to
DERIVED = {"space", "desc", "label", "seg", "atlas", "res", "den", "hemi"}


@dataclass(frozen=True, slots=True)
class Name:
    """Entities of a file name in any order, its suffix, and its extension in lower case, without
    its first dot."""

    entities: dict[str, str]
    suffix: str
    extension: str

    def without(self, *names: str) -> frozenset[tuple[str, str]]:
        """The entities but those named: what files of one run have in common."""
        return frozenset((key, value) for key, value in self.entities.items() if key not in names)


@dataclass(frozen=True, slots=True)
class Image:
    """A file, and its name taken apart."""

    found: Found
    name: Name


def parse_name(name: str) -> Name:
    """Entities, suffix and extension of a file name.

    >>> parse_name("sub-1_T1w.nii.gz")
    Name(entities={'sub': '1'}, suffix='T1w', extension='nii.gz')
    """
    *parts, last = name.split("_")
    suffix, _, extension = last.partition(".")
    entities = {}
    for part in parts:
        key, _, value = part.partition("-")
        if value and key.isalnum():
            entities[key] = value
    return Name(entities, suffix, extension.lower())


def scan_key(path: str, base: Mapping[str, str] | None = None) -> tuple[str, frozenset[
        tuple[str, str]]]:
    """Suffix and entities of a scan's name, whatever its folder, ending and order.

    ``base``: entities that go without saying, as those in the name of a scans.tsv do.

    >>> scan_key("sub-1/anat/sub-1_run-01_T1w.nii.gz") == scan_key("anat\\\\run-1_sub-1_T1w.nii")
    True
    """
    name = parse_name(re.split(r"[/\\]", path.strip())[-1])
    entities = {**(base or {}), **name.entities}
    return name.suffix.lower(), frozenset(
        (key, str(int(value)) if value.isdecimal() and key not in ("sub", "ses") else value)
        for key, value in entities.items())


@cache
def habits() -> dict[str, Any]:
    """The table bids.yaml."""
    table: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("bids.yaml").read_text())
    return table


@cache
def is_phantom(label: str) -> bool:
    """Whether a participant's label stands on the deny list."""
    return any(re.fullmatch(pattern, label.lower()) for pattern in habits()["phantoms"])
