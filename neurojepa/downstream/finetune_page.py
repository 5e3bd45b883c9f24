"""The page of a fine-tuning: how well people are told who taught nothing, beside a linear probe of
the same people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neurojepa.downstream.crossval import Plan
from neurojepa.downstream.features import plain
from neurojepa.downstream.finetune import BATCH, RANK, RATE
from neurojepa.downstream.labels import People
from neurojepa.downstream.output import (
    Figures,
    bootstrap,
    gains_table,
    how_done,
    new_plot,
)
from neurojepa.downstream.scoring import Gain, Row, Runner, gains_record, known, scores_record
from neurojepa.downstream.study_output import HEADER, curve_of, predictions_in
from neurojepa.downstream.study_page import NAMES, prediction_figures
from neurojepa.downstream.targets import Target, scorers
from neurojepa.report import BLUE, GREY, grid, page, paragraph, section, table, tiles

TUNED, PROBE = "fine-tuned", "linear probe"


@dataclass(frozen=True)
class Finding:
    """A fine-tuning, tested; n people have the label."""

    target: Target
    people: People  # their values are the features that the probe read
    parts: np.ndarray  # str [n]: train, val or test
    rows: dict[str, Row]
    gains: list[Gain]
    history: list[dict[str, float]]
    best_epoch: int
    modalities: dict[str, int]  # people of each
    complete: int  # people with all of them
    warnings: list[str]
    notes: list[str]


def scored(target: Target, people: People, parts: np.ndarray,
           predicted: np.ndarray) -> tuple[dict[str, Row], list[Gain]]:
    """Scores on part test, and of the linear probe that train and val teach.

    Parameters
    ----------
    predicted : [n, 1] or [n, 1, K], nan where a person was not tested
    """
    test = np.flatnonzero(parts == "test")
    run = Runner(target, people, Plan([[(np.flatnonzero(parts != "test"), test)]], pooled=False))

    def score(name: str) -> Any:
        return run.score(lambda drawn: run.value(name, predicted, drawn), test)

    rows = {TUNED: Row(predicted, {name: score(name) for name in scorers(target.kind)}),
            PROBE: run(plain(people.values))}
    return rows, run.gains(rows, [(TUNED, PROBE)])


def record_of(found: Finding) -> dict[str, Any]:
    """results.json, but for what the command says."""
    target, test = found.target, found.parts == "test"
    return {
        "kind": target.kind, "classes": list(target.classes),
        "people": {part: int((found.parts == part).sum()) for part in ("train", "val", "test")},
        "counts": {name: {part: int((target.truth[found.parts == part] == k).sum())
                          for part in ("train", "val", "test")}
                   for k, name in enumerate(target.classes)},
        "modalities": found.modalities, "complete": found.complete,
        "scores": scores_record(found.rows), "gains": gains_record(found.gains),
        "calibration": curve_of(target, found.rows[TUNED].predicted),
        "history": found.history, "best_epoch": found.best_epoch,
        "tested": int((test & known(found.rows[TUNED].predicted)).sum()),
        "warnings": found.warnings, "left_out": found.notes}


def predictions_of(found: Finding) -> list[list[str]]:
    """Rows of predictions.csv, with a header."""
    return [HEADER, *predictions_in(found.target, found.people, found.rows[TUNED].predicted)]


def finetune_page(found: Finding, record: dict[str, Any], figures: Figures) -> str:
    """results.json's content as a page that needs no network."""
    target, metric = found.target, next(iter(scorers(found.target.kind)))
    parts = record["people"]
    told = [(f"{found.rows[row].scores[metric].value:.2f}", f"{NAMES[metric]}, {row}", "")
            for row in (TUNED, PROBE)]
    counts = [(str(parts[part]), text, "") for part, text in (
        ("train", "taught"), ("val", "said when to stop"), ("test", "tested"))]
    rows = [[name, *map(str, row.scores.values())] for name, row in found.rows.items()]
    lines = [tiles([*told, *counts]),  # type: ignore[list-item]
             section(f"{target.name} of people who taught nothing",
                     *(paragraph(f"Look out: {each}.") for each in found.warnings),
                     table(["from", *(NAMES[name] for name in found.rows[TUNED].scores)], rows),
                     paragraph(_what(found)), *gains_table(record["gains"], NAMES[metric])),
             section("Predictions", grid(prediction_figures(
                 target, found.people, found.rows[TUNED].predicted, record["calibration"],
                 figures))),
             section("Training", grid([figures.show("epochs", _epochs(found), (
                 "Loss of those who taught (grey; none at epoch 0, which is the probe) and of "
                 "those who said when to stop (blue), by epoch. Epoch "
                 f"{found.best_epoch} was kept."))])),
             how_done(record, found.notes)]
    return page(f"{target.name}, fine-tuned", f"{record['input']}, weights {record['weights']}; "
                f"labels of {record['labels']}", lines)


def _what(found: Finding) -> str:
    kept = (f"Epoch {found.best_epoch} was the best on val." if found.best_epoch else
            "No epoch was better on val than the probe that it began at, so the encoder stayed as "
            "it was.")
    classes = (f" Positive is {found.target.classes[1]}." if found.target.kind == "binary" else "")
    several = ""
    if len(found.modalities) > 1:
        several = (" People with each modality: " + ", ".join(
            f"{name} {number}" for name, number in found.modalities.items())
            + f"; with all of them {found.complete}.")
    return (f"Scores [95 % interval over families and people]. {kept} The linear probe was taught "
            f"by the people of train and val, and tested on the same people.{classes}{several}")


def _epochs(found: Finding) -> Any:
    plot, axis = new_plot()
    numbers = range(len(found.history))
    axis.plot(numbers[1:], [each["train"] for each in found.history[1:]], "x--", color=GREY,
              label="train")
    axis.plot(numbers, [each["val"] for each in found.history], "o-", color=BLUE, label="val")
    axis.axvline(found.best_epoch, color="#c5ccd6", zorder=0)
    axis.set(xlabel="epoch", ylabel="loss")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False)
    return plot


def methods(found: Finding, record: dict[str, Any]) -> str:
    """A paragraph for the methods section."""
    parts = record["people"]
    loss = ("squared error of the standardised label" if found.target.kind == "regression" else
            "cross-entropy, in which classes weighed alike")
    return (
        f"The encoder (neurojepa {record['version']}, {record['weights']}) was fine-tuned by "
        f"low-rank adapters of rank {RANK} in all linear layers of its blocks (LoRA, Hu et al. "
        f"2021), with a head of attentive pooling over the tokens of {_listed(found.modalities)} "
        "scans; the tokens of missing scans had no part in it. The head began as a linear probe. "
        f"Loss: {loss}. AdamW, rate {RATE:g}, {BATCH} people a step, no augmentation. "
        f"Families shared a part: {parts['train']} people taught, the loss of "
        f"{parts['val']} others said when to stop (epoch {found.best_epoch} of "
        f"{len(found.history) - 1}), {parts['test']} were tested once." + (
            " Probabilities were moved back to the classes' shares of those who taught."
            if found.target.classes else "") + f" {bootstrap()}")


def _listed(names: Sequence[str] | dict[str, int]) -> str:
    return " and ".join(names)
