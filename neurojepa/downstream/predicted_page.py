"""The page of a fine-tuned model that was applied, and its predictions.csv."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import numpy as np

from neurojepa.downstream.output import Figures, how_done, new_plot, write_task
from neurojepa.downstream.predicted import Predicted
from neurojepa.report import BLUE, grid, page, paragraph, section, table, tiles

HEADER = ("participant_id", "session_id", "scans", "predicted", "probability", "taught", "why_not")
SHOWN = 200  # rows on the page


def write_predicted(out: str, found: Predicted, about: dict[str, Any]) -> None:
    """Write predictions.csv, results.json and report.html (output.py); ``about`` stands in the
    record."""
    there = [row for row in found.rows if not row["why_not"]]
    record = {**about, "label": found.task.label, "kind": found.task.kind,
              "classes": list(found.task.classes), "predicted": len(there),
              "taught": sum(row["taught"] == "yes" for row in there),
              "without_prediction": dict(Counter(
                  row["why_not"] for row in found.rows if row["why_not"])),
              "skipped": found.skipped, "counts": dict(Counter(
                  row["predicted"] for row in there)) if found.task.classes else None,
              "notes": [f"{number} {name} scans are not read: the label was learnt without"
                        for name, number in found.skipped.items()]}
    write_task(out, "finetune-apply/1", record, methods=partial(_methods, found),
               page=partial(_page, found), predictions=[
                   HEADER, *([row[name] for name in HEADER] for row in found.rows)])


def _methods(found: Predicted, record: dict[str, Any]) -> str:
    return (f"{found.task.label} was predicted from "
            f"{'visits' if found.task.by_session else 'people'} by the fine-tuned model "
            f"{record['model']} (neurojepa {record['version']}). Scans of several modalities "
            "were read together; missing ones had no part in it."
            + (" Probabilities stand for the shares of classes among those who taught."
               if found.task.classes else ""))


def _page(found: Predicted, record: dict[str, Any], figures: Figures) -> str:
    lines = [tiles([(str(record["predicted"]), "predicted", ""),
                    (str(len(found.rows) - record["predicted"]), "without a prediction", ""),
                    *((str(number), name, "") for name, number in (
                        record["counts"] or {}).items())])]
    if record["taught"]:
        lines.append(paragraph(f"Look out: {record['taught']} of them taught this model, or "
                               "were in its pretraining. Their predictions say nothing of how "
                               "good it is."))
    if len(found.values):
        caption = f"Predictions of {found.task.label}" + (
            f": the probability of {found.task.classes[1]}." if found.task.kind == "binary"
            else ".")
        lines.append(section("Predictions", grid(
            [figures.show("predictions", _histogram(found), caption)])))
    shown = [[row[name] or "-" for name in HEADER if name != "participant_id"]
             for row in found.rows[:SHOWN]]
    lines.append(section("One by one", table(
        ["visit", "scans", "predicted", "probability", "taught", "why not"], shown), paragraph(
            f"The first {len(shown)} of {len(found.rows)}, in the order of predictions.csv, "
            "which has the ids.")))
    return page(f"{found.task.label} predicted", str(record["model"]), [
        *lines, how_done(record)])


def _histogram(found: Predicted) -> Any:
    plot, axis = new_plot()
    if found.task.kind in ("binary", "regression"):
        axis.hist(found.values, bins=20, color=BLUE)
        axis.set(xlabel=found.task.label if found.task.kind == "regression"
                 else f"probability of {found.task.classes[1]}", ylabel="number")
    else:
        chosen = np.bincount(found.values.argmax(1), minlength=len(found.task.classes))
        axis.bar(found.task.classes, chosen, color=BLUE)
        axis.set(ylabel="number")
    return plot
