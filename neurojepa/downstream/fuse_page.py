"""The page of images beside tables: what each adds to the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from neurojepa.downstream.fuse import (
    BOTH,
    GAPS,
    IMAGE,
    TABLES,
    Fusion,
    alone,
)
from neurojepa.downstream.output import Figures, bootstrap, gains_table, how_done, new_plot
from neurojepa.downstream.scoring import gains_record, known, scores_record
from neurojepa.downstream.study_checks import SHUFFLES, group_metric
from neurojepa.downstream.study_page import NAMES
from neurojepa.report import BLUE, GREY, ORANGE, heading, page, paragraph, section, table, tiles


def fuse_page(found: Fusion, record: dict[str, Any], figures: Figures) -> str:
    """results.json's content as a page that needs no network."""
    name, metric = found.target.name, found.metric
    lead = (f"{record['embeddings']}, {record['modality']}, beside columns of {record['labels']}; "
            f"{record['cv']} nested cross-validation by person and family")
    told = [(f"{found.rows[row].scores[metric].value:.2f}", f"{NAMES[metric]}, {row}", "")
            for row in (IMAGE, TABLES, BOTH)]
    header = ["from", *(NAMES[each] for each in found.rows[BOTH].scores), "tested"]
    rows = [[row, *map(str, each.scores.values()), next(iter(each.scores.values())).num_people]
            for row, each in found.rows.items()]
    parts = [tiles(told), section(  # type: ignore[arg-type]
        name, *(paragraph(f"Look out: {each}.") for each in found.warnings),
        table(header, rows),
        paragraph("Mean over repeats [95 % interval over families and people]; of shuffled labels "
                  "the least and the most. AUROC and rank correlation are of people of one fold, "
                  f"and then means. Covariates ({', '.join(found.covariates)}) count among "
                  "the tables."),
        *gains_table(record["gains"], NAMES[metric]),
        figures.show("rows", _rows(found), (
            f"{NAMES[metric]} of each row with its 95 % interval: both together (orange), image "
            "and tables (blue), and the others."))),
        section("Who has what", _blocks(found), *_among(found))]
    parts.append(how_done(record, found.notes))
    return page(f"{name} from images and tables", lead, parts)


def _rows(found: Fusion) -> Any:
    plot, axis = new_plot(6.2, 0.4 * len(found.rows) + 1)
    for place, (name, row) in enumerate(reversed(found.rows.items())):
        score = row.scores[found.metric]
        colour = ORANGE if name == BOTH else BLUE if name in (IMAGE, TABLES) else GREY
        axis.plot([score.low, score.high], [place, place], color=colour, linewidth=2)
        axis.plot(score.value, place, "o", color=colour)
    axis.set_yticks(range(len(found.rows)), list(reversed(found.rows)))
    axis.set(xlabel=NAMES[found.metric])
    return plot


def _blocks(found: Fusion) -> str:
    return table(["block", "columns", "have it", "of"], [
        [block.name, ", ".join(block.columns), int(block.known.sum()), len(block.known)]
        for block in found.blocks])


def _among(found: Fusion) -> list[str]:
    if not found.among:
        return []
    metric = NAMES[group_metric(found.target.kind)]
    rows = [[f"{'with' if each.there else 'without'} {each.block}",
             *("too few people" if score is None else str(score)
               for score in each.scores.values()), each.people] for each in found.among]
    return [heading("Those who have a block, and those who lack it"),
            table(["people", *(f"{metric}, {row}" for row in found.among[0].scores), "tested"],
                  rows),
            paragraph("Scores by models that were taught on all.")]


def record_of(found: Fusion) -> dict[str, Any]:
    """What results.json says of it."""
    return {
        "label": found.target.name, "kind": found.target.kind,
        "classes": list(found.target.classes),
        "people": len(set(found.people.participant.tolist())), "rows": len(found.people.ids),
        "covariates": list(found.covariates),
        "blocks": [{"name": block.name, "columns": list(block.columns),
                    "known": int(block.known.sum())} for block in found.blocks],
        "scores": scores_record(found.rows), "gains": gains_record(found.gains),
        "among": [{"block": each.block, "there": each.there, "people": each.people,
                   "scores": {name: score.as_dict() if score else None
                              for name, score in each.scores.items()}} for each in found.among],
        "warnings": found.warnings, "left_out": found.notes}


def predictions_of(found: Fusion) -> list[list[str]]:
    """Rows of predictions.csv, with a header: mean over repeats, under the user's own ids; of
    classes the probability of each."""
    target, named = found.target, (IMAGE, TABLES, BOTH)
    kinds = [""] if target.kind == "regression" else (
        [f" {target.classes[1]}"] if target.kind == "binary" else [f" {k}" for k in target.classes])
    lines = [["participant_id", "truth", *(f"{row}{kind}" for row in named for kind in kinds)]]
    for number in np.flatnonzero(known(found.rows[BOTH].predicted)):
        truth = target.truth[number]
        told = [found.rows[row].predicted[number].mean(0) for row in named]
        lines.append([str(found.people.ids[number]),
                      target.classes[int(truth)] if target.classes else f"{truth:g}",
                      *(f"{value:.5g}" for each in told for value in np.atleast_1d(each))])
    return lines


def methods(found: Fusion, record: dict[str, Any]) -> str:
    """A paragraph for the methods section."""
    model = ("ridge regression" if found.target.kind == "regression"
             else "L2-penalised logistic regression")
    blocks = "; ".join(f"{block.name}: {', '.join(block.columns)}" for block in found.blocks)
    gaps = (f" What was missing alone ({GAPS}) was tested likewise." if GAPS in found.rows else "")
    return (
        f"Frozen embeddings of {record['modality']} scans (neurojepa {record['version']}) and "
        f"blocks of clinical columns ({blocks}) were read out together, and each by itself, by "
        f"{model}, in {record['cv']} (repeats x folds) nested cross-validation in which members of "
        "a family shared a fold. Within each fold columns were standardised, missing values set "
        "to the mean of those who taught, and indicators of what was missing added (Van Ness et "
        "al. 2023); each column weighed as much as the whole embedding. The penalty was chosen by "
        "inner cross-validation. AUROC and rank correlation compared people within a fold and were "
        f"averaged over folds (Parker et al. 2007).{gaps} Covariates "
        f"({', '.join(found.covariates)}) counted among the tables "
        f"({alone('covariates')} is a row of its own). Labels shuffled among people, "
        f"{SHUFFLES} times, show chance. {bootstrap()}")
