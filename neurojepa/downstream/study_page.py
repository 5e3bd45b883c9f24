"""The page of labels studied on embeddings: what was told, beside what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from neurojepa.downstream.labels import People
from neurojepa.downstream.output import (
    Figures,
    bootstrap,
    gains_table,
    how_done,
    new_plot,
    scatter,
)
from neurojepa.downstream.scoring import known
from neurojepa.downstream.study import ALIKE, ALONE, ATTENTIVE, VOLUMES, WITHOUT, Study
from neurojepa.downstream.study_checks import SHUFFLES, corrected, group_metric
from neurojepa.downstream.targets import SENSITIVITY, Target
from neurojepa.report import BLUE, GREY, grid, heading, page, paragraph, section, table, tiles

NAMES = {"auroc": "AUROC", "auprc": "AUPRC", "balanced_accuracy": "balanced accuracy",
         SENSITIVITY: "sensitivity at 90 % specificity", "brier": "Brier score", "r2": "R²",
         "mean_absolute_error": "mean absolute error", "rank_correlation": "rank correlation"}
COLUMNS = {"age": "age, years", "field_strength": "field strength, T"}


def study_page(studies: Sequence[Study], record: dict[str, Any], figures: Figures) -> str:
    """results.json's content as a page that needs no network."""
    lead = (f"{record['embeddings']}, {record['modality']}; labels of {record['labels']}; "
            f"{record['cv']} nested cross-validation by person and family")
    parts = [_label(found, record["results"][found.target.name], figures) for found in studies]
    parts.append(how_done(record))
    return page("What embeddings tell of " + ", ".join(each.target.name for each in studies), lead,
                parts)


def _label(found: Study, record: dict[str, Any], figures: Figures) -> str:
    target, metric = found.target, found.metric
    header = ["from", *(NAMES[name] for name in found.rows[ALONE].scores), "tested"]
    rows = [[name, *(str(score) if score.num_people else "not told"
                     for score in row.scores.values()),
             next(iter(row.scores.values())).num_people]
            for name, row in found.rows.items()]
    counts = [(str(int((target.truth == k).sum())), name, "")
              for k, name in enumerate(target.classes)]
    told = [(f"{found.rows[row].scores[metric].value:.2f}", f"{NAMES[metric]}, {row}", "")
            for row in (ALONE, VOLUMES, WITHOUT) if row in found.rows]
    lines = [tiles([*told, *counts])]  # type: ignore[list-item]
    lines += [paragraph(f"Look out: {each}.") for each in found.warnings]
    lines.append(table(header, rows))
    lines.append(paragraph(
        "Mean over repeats [95 % interval over families and people]; of shuffled labels the least "
        f"and the most. Covariates: {', '.join(found.covariates)}." + (
            "" if VOLUMES in found.rows else " Region volumes are not compared with: not every "
            "scan has them in volumes.csv, which embed writes for T1w, T2w and FLAIR.")))
    lines += gains_table(record["gains"], NAMES[metric])
    if found.site_told:
        alike = f"; after ComBat {found.site_told_alike}" if found.site_told_alike else ""
        lines.append(paragraph(f"The site, one of {found.num_sites}, is told from the embedding "
                               f"with a balanced accuracy of {found.site_told}{alike}. Chance is "
                               f"{1 / found.num_sites:.2f}."))
    lines += [paragraph(f"Left out: {'; '.join(found.notes)}.")] if found.notes else []
    lines += [heading("Predictions"), grid(prediction_figures(
        target, found.people, found.rows[ALONE].predicted, record["calibration"], figures))]
    lines += _groups(found)
    kind = f"{target.classes[1]} against {target.classes[0]}" if target.kind == "binary" else (
        target.kind)
    return section(f"{target.name}: {kind}", *lines)


def _groups(found: Study) -> list[str]:
    if not found.groups:
        return []
    metric = NAMES[group_metric(found.target.kind)]
    rows = [[COLUMNS.get(group.column, group.column), group.name,
             str(group.score) if group.score else "too few people", group.people]
            for group in found.groups]
    return [heading("Groups of people"), table(["by", "group", metric, "people"], rows),
            paragraph("Scores of the embedding among people of one group, by models that were "
                      "taught on all. Intervals of groups are not corrected for their number.")]


# ---- figures -------------------------------------------------------------------------------------

def prediction_figures(target: Target, people: People, predicted: np.ndarray,
                       curve: Sequence[dict[str, float]], figures: Figures) -> list[str]:
    """Predictions [n, R, ...] against the truth; of two classes their calibration curve, too."""
    whom = known(predicted)
    truth, mean = target.truth[whom], predicted[whom].mean(1)
    number = len(set(people.participant[whom].tolist()))
    if target.kind == "regression":
        upright = corrected(truth, mean, people.family[whom])
        return [figures.show(
            f"{target.name} predicted", scatter(target.name, truth, mean),
            f"Predicted against true {target.name}: a point is one of {number} people."),
            figures.show(
                f"{target.name} gap", _gap(target.name, truth, mean, upright),
                f"Predicted less true {target.name} against the truth: predictions are pulled "
                "towards the mean (grey). A line fitted on the people of other families takes that "
                "out (blue, the column corrected of predictions.csv); as it uses the truth, no "
                "score here does.")]
    parts = [figures.show(f"{target.name} roc", _roc(target, truth, mean), (
        f"How often those of each class of {target.name} are told from all others, as the "
        f"threshold moves: ROC curves of {number} people, all folds together."))]
    if curve:
        parts.append(figures.show(f"{target.name} calibration", _calibration(curve), (
            f"How often people were {target.classes[1]}, by the probability that was predicted: "
            f"calibration of {number} people in {len(curve)} bins of equal "
            "number. On the line, probabilities can be taken at their word.")))
    return parts


def _gap(name: str, truth: np.ndarray, mean: np.ndarray, upright: np.ndarray) -> Any:
    plot, axis = new_plot()
    axis.axhline(0, color=GREY, zorder=0)
    axis.scatter(truth, mean - truth, s=16, color=GREY, marker="x", label="as predicted")
    axis.scatter(truth, upright - truth, s=16, color=BLUE, alpha=0.75, label="corrected")
    axis.set(xlabel=f"true {name}", ylabel=f"predicted less true {name}")
    axis.legend(frameon=False)
    return plot


def _roc(target: Target, truth: np.ndarray, mean: np.ndarray) -> Any:
    plot, axis = new_plot()
    axis.plot([0, 1], [0, 1], color=GREY, zorder=0)
    each = {1: mean} if target.kind == "binary" else dict(enumerate(mean.T))
    for (number, score), style in zip(each.items(), ("-", "--", ":", "-.") * 5, strict=False):
        positive = truth == number
        order = np.argsort(-score)
        axis.plot(np.r_[0, np.cumsum(~positive[order]) / max((~positive).sum(), 1)],
                  np.r_[0, np.cumsum(positive[order]) / max(positive.sum(), 1)], style,
                  color=BLUE, label=target.classes[number])
    axis.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.01))
    axis.legend(frameon=False, loc="lower right")
    return plot


def _calibration(curve: Sequence[dict[str, float]]) -> Any:
    plot, axis = new_plot()
    axis.plot([0, 1], [0, 1], color=GREY, zorder=0)
    axis.plot([each["predicted"] for each in curve], [each["observed"] for each in curve], "o-",
              color=BLUE)
    axis.set(xlabel="predicted probability", ylabel="share observed", xlim=(0, 1), ylim=(0, 1))
    return plot


# ---- words ---------------------------------------------------------------------------------------

def methods(studies: Sequence[Study], record: dict[str, Any]) -> str:
    """A paragraph for the methods section."""
    kinds = {each.target.kind for each in studies}
    models = " and ".join(name for kind, name in (
        ("regression", "ridge regression"), ("classes", "L2-penalised logistic regression"))
        if kind in kinds or (kind == "classes" and kinds - {"regression"}))
    rows = {name for each in studies for name in each.rows}
    several = (f" {len(studies)} labels were studied; intervals are not corrected for that."
               if len(studies) > 1 else "")
    return (
        f"Frozen embeddings of {record['modality']} scans (neurojepa {record['version']}) were "
        f"read out by {models}, and by the mean of nearest neighbours. Performance was estimated "
        f"by {record['cv']} (repeats x folds) "
        "nested cross-validation in which members of a family shared a fold. Within each outer "
        "fold, features were standardised and the penalty, or the number of neighbours, was chosen "
        "by inner cross-validation on "
        "the other folds alone. AUROC and rank correlation compared people within a fold and were "
        "averaged over folds, as pooled folds put chance below a half (Parker et al. 2007). Before "
        "other scores were taken over the folds of a repeat, the predictions "
        "of each were moved from the class shares (or mean) of those who taught it to those of all "
        f"people. Covariates alone ({', '.join(studies[0].covariates)}) were treated "
        + ("alike, and so were automatic volumes of fluid, grey and white matter by region, "
           if VOLUMES in rows else "alike, ")
        + f"and so were labels shuffled among people, {SHUFFLES} times."
        + (" Sites were harmonised by ComBat (Johnson et al. 2007, Fortin et al. 2018), fitted "
           "within each fold on those who taught." if ALIKE in rows else "")
        + (" An attentive readout pooled the tokens of a scan by learnt queries. It began at the "
           "linear model; a fifth of those who taught chose its penalty and number of epochs."
           if ATTENTIVE in rows else "")
        + f" {bootstrap()}" + several)
