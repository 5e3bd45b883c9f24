"""The page of change between visits: predicted beside true, and what mixed models say."""

from __future__ import annotations

from typing import Any

import numpy as np

from neurojepa.downstream.change import DIFFERENCE, FIRST, VOLUMES, WITHOUT, Change, Slope
from neurojepa.downstream.output import Figures, bootstrap, gains_table, how_done, scatter
from neurojepa.downstream.scoring import Row, gains_record, known, scores_record
from neurojepa.downstream.study_page import NAMES
from neurojepa.report import grid, heading, page, paragraph, section, table, tiles


def change_page(found: Change, record: dict[str, Any], figures: Figures) -> str:
    """results.json's content as a page that needs no network."""
    label, time = record["label"], record["time"]
    lead = (f"{record['embeddings']}, {record['modality']}; {label} of {record['labels']}; "
            f"{record['cv']} nested cross-validation by person and family")
    change = found.target.truth
    told = [(f"{found.rows[name].scores['r2'].value:.2f}", f"R², {name}", "")
            for name in (DIFFERENCE, FIRST, VOLUMES, WITHOUT) if name in found.rows]
    facts = [*told, (f"{len(change)}", "people with two visits", ""),
             (f"{change.mean():+.3g}", f"mean change of {label} in a unit of {time}", "")]
    header = ["from", *(NAMES[name] for name in found.rows[DIFFERENCE].scores), "tested"]
    rows = [[name, *map(str, row.scores.values()), row.scores["r2"].num_people]
            for name, row in found.rows.items()]
    models = [[each.row, *_told(each)] for each in found.slopes]
    parts = [tiles(facts), section(  # type: ignore[arg-type]
        f"Change of {label} in a unit of {time}",
        *(paragraph(f"Look out: {each}.") for each in found.warnings), table(header, rows),
        paragraph("Mean over repeats [95 % interval over families and people]; of shuffled changes "
                  f"the least and the most. Covariates: {', '.join(found.covariates)}."),
        *gains_table(record["gains"], "R²"), heading("Mixed models"),
        table(["prediction from", f"change of {label} for one sd more [95 %]", "p"], models),
        paragraph(f"{label} at all visits by {time} since the first, with an intercept and, "
                  "where people have three visits, a slope of each person at random: by how much "
                  "it changes faster, in a unit of time, for a person whose predicted change is "
                  "one sd larger. Predictions are of people who taught nothing.")),
        section("Figures", grid([
            figures.show(name, _scatter(found, row),
                         f"Predicted against true change of {label}, from {of}: a point is one of "
                         f"{row.scores['r2'].num_people} people.")
            for name, of, row in (("difference", "both scans", found.rows[DIFFERENCE]),
                                  ("first", "the first scan", found.rows[FIRST]))]))]
    parts.append(how_done(record, found.notes))
    return page(f"Change of {label} between visits", lead, parts)


def _told(slope: Slope) -> list[str]:
    if np.isnan(slope.value):
        return ["cannot be fitted", ""]
    return [f"{slope.value:+.3g} [{slope.low:+.3g}, {slope.high:+.3g}]",
            f"{slope.p:.2g}" + ("" if slope.converged else " (did not converge)")]


def _scatter(found: Change, row: Row) -> Any:
    whom = known(row.predicted)
    return scatter(found.target.name, found.target.truth[whom], row.predicted[whom].mean(1))


def record_of(found: Change) -> dict[str, Any]:
    """What results.json says of it."""
    return {"people": len(found.target.truth), "visits": len(found.visits.value),
            "mean_change": float(found.target.truth.mean()), "covariates": list(found.covariates),
            "scores": scores_record(found.rows), "gains": gains_record(found.gains),
            "mixed_models": [vars(each) for each in found.slopes],
            "warnings": found.warnings, "left_out": found.notes}


def predictions_of(found: Change) -> list[list[str]]:
    """Rows of predictions.csv, with a header: means over repeats, under the user's own ids."""
    lines = [["participant_id", "first_visit", "last_visit", "true_change",
              "predicted_from_difference", "predicted_from_first"]]
    people, visits = found.visits.people, found.visits
    both = [found.rows[name].predicted for name in (DIFFERENCE, FIRST)]
    assert people.sessions is not None
    for number in np.flatnonzero(known(both[0]) & known(both[1])):
        first, last = visits.first[number], visits.last[number]
        lines.append([str(people.ids[first]), str(people.sessions[first]),
                      str(people.sessions[last]), f"{found.target.truth[number]:.6g}",
                      *(f"{each[number].mean():.6g}" for each in both)])
    return lines


def methods(found: Change, record: dict[str, Any]) -> str:
    """A paragraph for the methods section."""
    volumes = ", the difference of automatic region volumes" if VOLUMES in found.rows else ""
    return (
        f"The change of {record['label']} between the first and the last visit, in a unit of "
        f"{record['time']}, was predicted by ridge regression from the difference of frozen "
        f"embeddings of {record['modality']} scans (neurojepa {record['version']}) in that time, "
        f"and from the first embedding alone, in {record['cv']} (repeats x folds) nested "
        "cross-validation in which members of a family shared a fold and the penalty was chosen on "
        "the other folds alone. Rank correlation is a mean over folds. Before R² and the error "
        "were taken over the folds of a repeat, the predictions "
        "of each were moved from the mean of those who taught it to that of all people. Treated "
        f"alike were covariates alone "
        f"({', '.join(found.covariates)}){volumes} and shuffled changes. {bootstrap()} "
        "Linear mixed models (restricted maximum likelihood, random intercepts and, where people "
        "had three visits, slopes of people; statsmodels) related all visits to time, the "
        "standardised cross-validated prediction, and their product.")
