"""What is known of each PET tracer (pet.yaml), under the names that cohorts give it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.scan import ScanError


@dataclass(frozen=True)
class Region:
    """A reference region, by codes of a FreeSurfer label map or by place and tissue."""

    labels: tuple[int, ...]
    grey: bool  # grey matter alone, where it comes from the template
    lower_half: bool = False  # the part below its median height: away from occipital spill


@dataclass(frozen=True)
class Tracer:
    """What an SUVR of a tracer needs."""

    region: str
    window_min: tuple[float, float]  # minutes after injection
    suvr_max: float  # maps to 1
    names: tuple[str, ...]


TABLE: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("pet.yaml").read_text("utf-8"))
REGIONS = {name: Region(**{**row, "labels": tuple(row["labels"])})
           for name, row in TABLE["regions"].items()}
PET_TRACERS = {name: Tracer(row["region"], tuple(row["window_min"]), row["suvr_max"],
                            tuple(row["names"])) for name, row in TABLE["tracers"].items()}


def tracer_name(text: str | None) -> str | None:
    """The key of PET_TRACERS that a cohort's spelling means ("18F-AV-45"), or None."""
    plain = re.sub(r"[^a-z0-9]", "", (text or "").lower())
    plain = re.sub(r"^(18f|f18|11c|c11)(?=.)", "", plain)
    return next((name for name, tracer in PET_TRACERS.items()
                 if plain in (name.lower(), *tracer.names)), None)


def known_tracer(text: str | None, name: str) -> Tracer:
    """A tracer by any of its spellings; ``name`` is the scan's.  ScanError: unknown_tracer."""
    found = tracer_name(text)
    if found is None:
        raise ScanError("unknown_tracer", f"{name}: tracer {text!r} is none of "
                        f"{', '.join(PET_TRACERS)}; no ratio without its reference region: add it "
                        "to pet.yaml")
    return PET_TRACERS[found]
