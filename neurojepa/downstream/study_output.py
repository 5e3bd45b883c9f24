"""What a study of labels leaves in a folder: its record and its predictions (output.py)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from neurojepa.downstream.labels import People
from neurojepa.downstream.output import write_task
from neurojepa.downstream.scoring import known, scores_record
from neurojepa.downstream.stats import holm
from neurojepa.downstream.study import ALONE, Study
from neurojepa.downstream.study_checks import calibration, corrected
from neurojepa.downstream.study_page import methods, study_page
from neurojepa.downstream.targets import Target, shares_text

HEADER = ["participant_id", "label", "truth", "predicted", "corrected", "probability"]


def write_studies(out: str, studies: Sequence[Study], record: dict[str, Any]) -> None:
    """Write the results of labels studied together.

    Parameters
    ----------
    record : of the command: embeddings, labels, cv, modality, allow_seen, notes
    """
    results = {each.target.name: record_of(each) for each in studies}
    gains = [gain for each in results.values() for gain in each["gains"]]
    for gain, p in zip(gains, holm([gain["p"] for gain in gains]), strict=True):
        gain["p_holm"] = p
    write_task(out, "probe/1", record | {"results": results},
               methods=partial(methods, studies), page=partial(study_page, studies),
               predictions=predictions_of(studies))


def record_of(found: Study) -> dict[str, Any]:
    """One label of results.json."""
    target, predicted = found.target, found.rows[ALONE].predicted
    told = {name: score.as_dict() if score else None for name, score in (
        ("told_from_embedding", found.site_told), ("told_after_combat", found.site_told_alike))}
    return {
        "kind": target.kind, "classes": list(target.classes),
        "people": len(set(found.people.participant.tolist())), "rows": len(found.people.ids),
        "counts": {name: int((target.truth == k).sum()) for k, name in enumerate(target.classes)},
        "covariates": list(found.covariates), "adjusted_for": list(found.adjust),
        "scores": scores_record(found.rows),
        "gains": [gain.as_dict() for gain in found.gains],
        "calibration": curve_of(target, predicted),
        "groups": [{"column": group.column, "group": group.name, "people": group.people,
                    "score": group.score.as_dict() if group.score else None}
                   for group in found.groups],
        "site": {"number": found.num_sites, **told},
        "warnings": found.warnings, "notes": found.notes}


def curve_of(target: Target, predicted: np.ndarray) -> list[dict[str, float]]:
    """The calibration curve of two classes; empty for other labels."""
    whom = known(predicted)
    if target.kind != "binary" or not whom.any():
        return []
    return [{"predicted": mean, "observed": share, "people": number}
            for mean, share, number in calibration(target.truth[whom], predicted[whom].mean(1))]


def predictions_of(studies: Sequence[Study]) -> list[list[str]]:
    """Rows of predictions.csv, with a header: mean over repeats, under the user's own ids."""
    return [HEADER, *(line for found in studies for line in predictions_in(
        found.target, found.people, found.rows[ALONE].predicted))]


def predictions_in(target: Target, people: People, predicted: np.ndarray) -> list[list[str]]:
    """Rows of predictions.csv of one label, of whom every repeat predicted.

    ``corrected`` is a number's prediction without its pull towards the mean (study_checks.py).
    """
    whom = np.flatnonzero(known(predicted))
    mean = predicted[whom].mean(1)
    if target.kind == "regression":
        upright = corrected(target.truth[whom], mean, people.family[whom])
        told = [[f"{truth:g}", f"{each:g}", "" if np.isnan(right) else f"{right:g}", ""]
                for truth, each, right in zip(target.truth[whom], mean, upright, strict=True)]
    else:
        shares = np.column_stack([1 - mean, mean]) if target.kind == "binary" else mean
        told = [[target.classes[int(truth)], target.classes[int(each.argmax())], "",
                 shares_text(target.classes, each)]
                for truth, each in zip(target.truth[whom], shares, strict=True)]
    return [[str(people.ids[number]), target.name, *row]
            for number, row in zip(whom, told, strict=True)]
