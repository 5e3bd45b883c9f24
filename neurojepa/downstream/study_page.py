"""The page of labels studied on embeddings: what was told, beside what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from neurojepa.downstream.stats import auroc
from neurojepa.downstream.study import ALONE, SHUFFLES, WITHOUT, Study
from neurojepa.report import BLUE, figure, heading, page, paragraph, section, table, tiles

NAMES = {"auroc": "AUROC", "auprc": "AUPRC", "balanced_accuracy": "balanced accuracy",
         "brier": "Brier score", "r2": "R²", "mean_absolute_error": "mean absolute error",
         "rank_correlation": "rank correlation"}


def study_page(studies: Sequence[Study], record: dict[str, Any]) -> str:
    """results.json's content as a page that needs no network."""
    lead = (f"{record['embeddings']}, {record['modality']}; labels of {record['labels']}; "
            f"{record['cv']} nested cross-validation by person and family")
    parts = [_label(found) for found in studies]
    parts.append(section("How it was done", paragraph(methods(studies, record)), *(
        [paragraph("From the table and the embeddings: " + "; ".join(record["notes"]) + ".")]
        if record["notes"] else [])))
    return page("What embeddings tell of " + ", ".join(each.target.name for each in studies), lead,
                parts)


def _label(found: Study) -> str:
    target, metric = found.target, found.metric
    header = ["from", *(NAMES[name] for name in found.rows[ALONE].scores), "tested"]
    rows = [[name, *map(str, row.scores.values()), next(iter(row.scores.values())).num_people]
            for name, row in found.rows.items()]
    counts = [(str(int((target.truth == k).sum())), name, "")
              for k, name in enumerate(target.classes)]
    told = [(f"{found.rows[ALONE].scores[metric].value:.2f}", f"{NAMES[metric]}, embedding", ""),
            (f"{found.rows[WITHOUT].scores[metric].value:.2f}",
             f"{NAMES[metric]}, covariates alone", "")]
    lines = [tiles([*told, *counts])]  # type: ignore[list-item]
    lines += [paragraph(f"Look out: {each}.") for each in found.warnings]
    lines.append(table(header, rows))
    lines.append(paragraph(
        "Mean over repeats [95 % interval over families and people]; of shuffled labels the least "
        f"and the most. Covariates: {', '.join(found.covariates)}."))
    if found.gain:
        lines.append(paragraph(f"The embedding beside the covariates changes {NAMES[metric]} by "
                               f"{found.gain} (paired)."))
    if found.site_told:
        lines.append(paragraph(f"The site, one of {found.num_sites}, is told from the embedding "
                               f"with a balanced accuracy of {found.site_told}."))
    lines += [paragraph(f"Left out: {'; '.join(found.notes)}.")] if found.notes else []
    lines += [heading("Predictions"), figure(_figure(found), _caption(found))]
    kind = f"{target.classes[1]} against {target.classes[0]}" if target.kind == "binary" else (
        target.kind)
    return section(f"{target.name}: {kind}", *lines)


def _caption(found: Study) -> str:
    people = found.rows[ALONE].scores[found.metric].num_people
    if found.target.kind == "regression":
        return f"Predicted against true {found.target.name}: a point is one of {people} people."
    return (f"How often those of each class of {found.target.name} are told from all others, as "
            f"the threshold moves: ROC curves of {people} people.")


def _figure(found: Study) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    target, predicted = found.target, found.rows[ALONE].predicted
    known = np.isfinite(predicted).all(axis=tuple(range(1, predicted.ndim)))
    truth, mean = target.truth[known], predicted[known].mean(1)
    plot, axis = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
    if target.kind == "regression":
        low, high = truth.min(), truth.max()
        axis.plot([low, high], [low, high], color="#c5ccd6", zorder=0)
        axis.scatter(truth, mean, s=16, color=BLUE, alpha=0.75)
        axis.set(xlabel=f"true {target.name}", ylabel=f"predicted {target.name}")
    else:
        axis.plot([0, 1], [0, 1], color="#c5ccd6", zorder=0)
        each = {1: mean} if target.kind == "binary" else dict(enumerate(mean.T))
        for (number, score), style in zip(each.items(), ("-", "--", ":", "-.") * 5, strict=False):
            positive = truth == number
            order = np.argsort(-score)
            axis.plot(np.r_[0, np.cumsum(~positive[order]) / max((~positive).sum(), 1)],
                      np.r_[0, np.cumsum(positive[order]) / max(positive.sum(), 1)], style,
                      color=BLUE, label=f"{target.classes[number]} "
                      f"{auroc(positive.astype(float), score):.2f}")
        axis.set(xlabel="1 - specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.01))
        axis.legend(frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    return plot


def methods(studies: Sequence[Study], record: dict[str, Any]) -> str:
    """A paragraph for the methods section."""
    kinds = {each.target.kind for each in studies}
    models = " and ".join(name for kind, name in (
        ("regression", "ridge regression"), ("classes", "L2-penalised logistic regression"))
        if kind in kinds or (kind == "classes" and kinds - {"regression"}))
    several = (f" {len(studies)} labels were studied; intervals are not corrected for that."
               if len(studies) > 1 else "")
    return (
        f"Frozen embeddings of {record['modality']} scans (neurojepa {record['version']}) were "
        f"read out by {models}. Performance was estimated by {record['cv']} (repeats x folds) "
        "nested cross-validation in which members of a family shared a fold. Within each outer "
        "fold, features were standardised and the penalty was chosen by inner cross-validation on "
        "the other folds alone. Before the folds of a repeat were scored together, the predictions "
        "of each were moved from the class shares (or mean) of those who taught it to those of all "
        "people. Intervals are 95 % percentile intervals of a bootstrap over "
        f"families and people. Covariates alone ({', '.join(studies[0].covariates)}) were treated "
        f"alike, and so were labels shuffled among people, {SHUFFLES} times." + several)
