"""The page of a transfer between modalities: what is told beyond the mean of the group."""

from __future__ import annotations

from typing import Any

import numpy as np

from neurojepa.downstream.output import Figures, bootstrap, gains_table, how_done, new_plot
from neurojepa.downstream.scoring import gains_record, known, scores_record
from neurojepa.downstream.study_checks import SHUFFLES
from neurojepa.downstream.transfer import (
    ALONE,
    LEFT_OUT,
    SHUFFLED,
    VOLUMES,
    WITHOUT,
    Transfer,
    correlation,
)
from neurojepa.report import BLUE, GREY, grid, page, paragraph, section, table, tiles

NAMES = {"r2": "R² beyond the group mean", "correlation": "correlation within people",
         "own_is_nearer": "own truth is nearer"}


def transfer_page(found: Transfer, record: dict[str, Any], figures: Figures) -> str:
    """results.json's content as a page that needs no network."""
    source, target = record["from"], record["to"]
    lead = (f"{record['embeddings']}: {found.features} features of {target} from {source}; "
            f"{record['cv']} nested cross-validation by person and family")
    told = [(f"{found.rows[name].scores['r2'].value:.3f}", f"R² beyond the group mean, {name}", "")
            for name in (ALONE, LEFT_OUT, VOLUMES, WITHOUT, SHUFFLED) if name in found.rows]
    rows = [[name, *map(str, row.scores.values()), row.scores["r2"].num_people]
            for name, row in found.rows.items()]
    people = found.rows[ALONE].scores["r2"].num_people
    parts = [tiles(told), section(  # type: ignore[arg-type]
        f"{target} from {source}",
        *(paragraph(f"Look out: {each}.") for each in found.warnings),
        table(["from", *NAMES.values(), "tested"], rows),
        paragraph("Mean over repeats [95 % interval over families and people]; of people shuffled "
                  "the least and the most. R² is 0 where the "
                  "group's mean tells as much; the correlation is over features, after the mean "
                  "was removed, and 0 by chance; a person's prediction is nearer to the own truth "
                  "than to another person's in half of all cases by chance. Covariates: "
                  f"{', '.join(found.covariates)}."),
        *gains_table(record["gains"], NAMES["r2"])),
        section("Figures", grid([
            figures.show("people", _people(found), (
                "Correlation over features of what the embedding predicts of a person with the "
                f"truth, after the group mean was removed: {people} people in order, and people "
                "shuffled (grey).")),
            figures.show("features", _features(found), (
                "R² of each feature of the target, in order: from the embedding, and from "
                "covariates alone (grey)."))])), *_few(found, figures)]
    parts.append(how_done(record, found.notes))
    return page(f"{target} told from {source}", lead, parts)


def _few(found: Transfer, figures: Figures) -> list[str]:
    """How few people can teach."""
    if not found.shots:
        return []
    rows = [[shot.row, shot.taught, *map(str, shot.scores.values())] for shot in found.shots]
    return [section(
        "How few people can teach",
        grid([figures.show(f"few {name}", _shots(found, name), (
            f"{NAMES[name]} by the number of people who teach, with 95 % intervals: from the "
            "embedding (blue), and from covariates alone (grey).")) for name in (
                "own_is_nearer", "r2")]),
        table(["from", "people who teach", *NAMES.values()], rows),
        paragraph("In each fold so many of those who could teach were drawn, the same for both "
                  "rows. The mean of the group is that of all who could teach: R² is below 0 where "
                  "the few know it less well than the embedding helps them."))]


def _shots(found: Transfer, name: str) -> Any:
    plot, axis = new_plot()
    axis.axhline(0.5 if name == "own_is_nearer" else 0, color="#c5ccd6", zorder=0)
    for row, colour, style in ((ALONE, BLUE, "-"), (WITHOUT, GREY, "--")):
        shots = [shot for shot in found.shots if shot.row == row]
        taught = [shot.taught for shot in shots]
        scores = [shot.scores[name] for shot in shots]
        axis.plot(taught, [score.value for score in scores], "o" + style, color=colour, label=row)
        axis.fill_between(taught, [score.low for score in scores],
                          [score.high for score in scores], color=colour, alpha=0.2, linewidth=0)
    axis.set(xlabel="people who teach", ylabel=NAMES[name], xscale="log")
    axis.set_xticks([shot.taught for shot in found.shots],
                    [str(shot.taught) for shot in found.shots])
    axis.minorticks_off()
    if name == "r2":  # a few outliers of very few people would hide the rest
        axis.set_ylim(bottom=max(axis.get_ylim()[0], -1.5))
    axis.legend(frameon=False)
    return plot


def _within(found: Transfer, name: str) -> np.ndarray:
    row = found.rows[name]
    whom = known(row.predicted)
    return np.sort(correlation(row.predicted[whom].mean(1), row.truth[whom].mean(1)))


def _people(found: Transfer) -> Any:
    plot, axis = new_plot()
    axis.axhline(0, color="#c5ccd6", zorder=0)
    for name, colour, style in ((ALONE, BLUE, "-"), (SHUFFLED, GREY, "--")):
        values = _within(found, name)
        axis.plot(np.linspace(0, 1, len(values)), values, style, color=colour, label=name)
    axis.set(xlabel="share of people", ylabel="correlation with the truth")
    axis.legend(frameon=False)
    return plot


def _features(found: Transfer) -> Any:
    plot, axis = new_plot()
    axis.axhline(0, color="#c5ccd6", zorder=0)
    for name, colour, style in ((ALONE, BLUE, "-"), (WITHOUT, GREY, "--")):
        row = found.rows[name]
        whom = known(row.predicted)
        rest, whole = (np.square(each[whom]).sum((0, 1)) for each in (
            row.truth - row.predicted, row.truth))
        values = np.sort(1 - rest / np.maximum(whole, 1e-12))
        axis.plot(np.linspace(0, 1, len(values)), values, style, color=colour, label=name)
    axis.set(xlabel="share of features", ylabel="R² beyond the group mean")
    axis.legend(frameon=False)
    return plot


def record_of(found: Transfer) -> dict[str, Any]:
    """What results.json says of it."""
    return {"people": len(set(found.people.participant.tolist())), "rows": len(found.people.ids),
            "features": found.features, "covariates": list(found.covariates),
            "few": [{"row": shot.row, "taught": shot.taught, "scores": {
                name: score.as_dict() for name, score in shot.scores.items()}}
                for shot in found.shots],
            "scores": scores_record(found.rows), "gains": gains_record(found.gains),
            "warnings": found.warnings, "left_out": found.notes}


def predictions_of(found: Transfer) -> list[list[str]]:
    """Rows of predictions.csv, with a header: how well each person was told, under own ids."""
    row = found.rows[ALONE]
    lines = [["participant_id", "share_of_variance_told"]]
    for number in np.flatnonzero(known(row.predicted)):
        rest = np.square(row.truth[number] - row.predicted[number]).sum()
        lines.append([str(found.people.ids[number]),
                      f"{1 - rest / max(np.square(row.truth[number]).sum(), 1e-12):.5g}"])
    return lines


def methods(found: Transfer, record: dict[str, Any]) -> str:
    """A paragraph for the methods section."""
    volumes = " and automatic region volumes" if VOLUMES in found.rows else ""
    sites = (" Sites were left out one by one, too, so nobody of a tested person's site taught."
             if LEFT_OUT in found.rows else "")
    few = (f" All of it was repeated with {found.shots[0].taught} to {found.shots[-1].taught} of "
           "those who could teach." if found.shots else "")
    return (
        f"Frozen embeddings of {record['to']} scans ({found.features} features, neurojepa "
        f"{record['version']}) were predicted from those of {record['from']} scans of the same "
        f"people by ridge regression with one penalty for all features, in {record['cv']} (repeats "
        "x folds) nested cross-validation in which members of a family shared a fold. Within each "
        "fold the mean of those who taught was removed from the target and its features were "
        "scaled; the penalty was chosen on the other folds alone. Treated alike were covariates "
        f"({', '.join(found.covariates)}){volumes}, and targets shuffled among people, {SHUFFLES} "
        f"times.{sites}{few} {bootstrap()}")
