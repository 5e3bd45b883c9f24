"""What a fine-tuned model tells of scans, under the user's own ids where these are known.

Who has no usable scan is listed without a prediction, and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neurojepa.downstream.attentive import Head
from neurojepa.downstream.finetuned import Task, outputs_of
from neurojepa.downstream.scans import Scans
from neurojepa.downstream.targets import shares_text
from neurojepa.errors import DataError
from neurojepa.feed.format import MODALITIES, Feed
from neurojepa.weights import Weights, hashed


@dataclass(frozen=True)
class Predicted:
    """A row for each person or visit: ``rows`` have the columns of predicted_page.HEADER."""

    task: Task
    rows: list[dict[str, str]]
    values: np.ndarray  # float64, of the rows that have a prediction: as Task.predictions
    skipped: dict[str, int]  # scans of modalities that tell nothing, by modality


def predict(weights: Weights, head: Head, task: Task, feed: Feed, rows: np.ndarray,
            skipped: dict[str, int], scans: Scans | None) -> Predicted:
    """Predictions of all people, or visits, of these rows of a feed.

    Parameters
    ----------
    scans : what became of raw scans, with the ids that the user knows; None of a feed

    Raises
    ------
    DataError
        No scan is of a modality that the label was learnt from.
    """
    assert weights.places is not None
    known = [MODALITIES[m] for m in head.modalities]
    names = np.array(feed.index["modality"].to_pylist())[rows]
    skipped = {**skipped, **Counter(names[~np.isin(names, known)].tolist())}
    kept = rows[np.isin(names, known)]
    if not len(kept):
        raise DataError(f"{feed.uri}: no scan is of {', '.join(known)}, from which {task.label} "
                        f"was learnt; it has {', '.join(sorted(set(names.tolist())))}")
    columns = {name: feed.index[name].to_pylist() for name in (
        "participant", "session", "modality", "scan_id")}
    units: dict[tuple[str, str], list[int]] = {}
    for row in kept.tolist():
        key = columns["participant"][row], columns["session"][row] if task.by_session else ""
        units.setdefault(key, []).append(row)
    values = task.predictions(outputs_of(weights.model, weights.config, feed,
                                         list(units.values()), weights.places, head))
    found = []
    for (person, session), of_unit, value in zip(units, units.values(), values, strict=True):
        found.append({
            "participant_id": scans.ids[person] if scans else person, "session_id": session,
            "scans": " ".join(sorted(columns["modality"][row] for row in of_unit)),
            "taught": _taught(weights, person, [columns["scan_id"][row] for row in of_unit]),
            "why_not": "", **_said(task, value)})
    found += _without(task, scans, set(units), known)
    return Predicted(task, found, values, skipped)


def _said(task: Task, value: Any) -> dict[str, str]:
    if task.kind == "regression":
        return {"predicted": f"{value:g}", "probability": ""}
    shares = np.array([1 - value, value]) if task.kind == "binary" else value
    return {"predicted": task.classes[int(shares.argmax())],
            "probability": shares_text(task.classes, shares)}


def _taught(weights: Weights, person: str, scans: Sequence[str]) -> str:
    if weights.seen is None:
        return "not known"
    return "no" if weights.seen.isdisjoint({hashed(person), *map(hashed, scans)}) else "yes"


def _without(task: Task, scans: Scans | None, told: set[tuple[str, str]],
             known: Sequence[str]) -> list[dict[str, str]]:
    """Rows of those whose scans were found, and of whom none can be used."""
    if scans is None:
        return []
    reasons: dict[tuple[str, str], str] = {}
    about = scans.about.to_pylist()
    for row in about:
        key = row["participant"], row["session"] if task.by_session else ""
        if key not in told:
            why = (f"{row['modality']} rejected: {row['reason']}" if row["status"] == "rejected"
                   else f"{row['modality']} was not asked for" if row["modality"] in known
                   else f"no {' or '.join(known)}")
            reasons.setdefault(key, why)
    for person in sorted(scans.ids.keys() - {row["participant"] for row in about}):
        reasons[person, ""] = "no scan was prepared"  # of PET and BOLD alone, see unasked.py
    return [{"participant_id": scans.ids[person], "session_id": session, "scans": "",
             "predicted": "", "probability": "", "taught": "", "why_not": why}
            for (person, session), why in reasons.items()]
