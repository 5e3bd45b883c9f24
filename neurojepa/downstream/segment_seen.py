"""Whom a segmentation model learnt from, so that nobody of them is a test."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import basename

import numpy as np

from neurojepa.downstream.images import Image
from neurojepa.downstream.segment_labels import entities_of
from neurojepa.storage import sha256


def learnt_from(scan: Image) -> dict[str, str]:
    """How a scan is known again: by its file's name, and by its voxels however they are stored."""
    return {"name": basename(scan.name.rstrip("/")),
            "sha256": sha256(np.ascontiguousarray(scan.data, np.float32).tobytes())}


def why_seen(scan: Image, learnt: Sequence[dict[str, str]]) -> str | None:
    """Why a scan is no test for a model that learnt from these; None where it is one.

    The same voxels and the same ``sub-`` are the same person.
    """
    own, person = learnt_from(scan)["sha256"], entities_of(scan.name).get("sub")
    for each in learnt:
        if each["sha256"] == own:
            return f"{scan.name}: the model learnt from this scan ({each['name']})"
        if person is not None and entities_of(each["name"]).get("sub") == person:
            return f"{scan.name}: the model learnt from sub-{person} ({each['name']})"
    return None
