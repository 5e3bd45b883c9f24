"""The page of an event: who has it sooner, beside what else tells that."""

from __future__ import annotations

from typing import Any

import numpy as np

from neurojepa.downstream.output import Figures, bootstrap, gains_table, how_done, new_plot
from neurojepa.downstream.scoring import gains_record, known, scores_record
from neurojepa.downstream.survival import kaplan_meier
from neurojepa.downstream.survive import ALONE, VOLUMES, WITH, WITHOUT, Survival
from neurojepa.report import (
    BLUE,
    GREY,
    ORANGE,
    WINE,
    grid,
    page,
    paragraph,
    section,
    table,
    tiles,
)

THIRDS = (("lowest third of risk", BLUE, "-"), ("middle third", ORANGE, "--"),
          ("highest third of risk", WINE, ":"))
BINS = 5  # of predicted against observed shares


def survive_page(found: Survival, record: dict[str, Any], figures: Figures) -> str:
    """results.json's content as a page that needs no network."""
    followed, time = found.followed, record["time"]
    lead = (f"{record['embeddings']}, {record['modality']}; {time} and {record['event']} of "
            f"{record['labels']}; {record['cv']} nested cross-validation by person and family")
    told = [(f"{found.rows[name].scores['c_index'].value:.2f}", f"C-index, {name}", "")
            for name in (ALONE, VOLUMES, WITHOUT, record["reference"]) if name in found.rows]
    facts = [*told, (str(int(followed.event.sum())), "events", ""),
             (str(int((~followed.event).sum())), "censored", "")]
    names = list(found.rows[ALONE].scores)
    rows = [[name, *map(str, row.scores.values()), row.scores["c_index"].num_people]
            for name, row in found.rows.items()]
    parts = [tiles(facts)]  # type: ignore[arg-type]
    parts.append(section(
        f"Time to {record['event']}",
        *(paragraph(f"Look out: {each}.") for each in found.warnings),
        table(["from", *map(_name, names), "tested"], rows),
        paragraph("Mean over repeats [95 % interval over families and people]. C-index, AUC: 0.5 "
                  "tells nobody apart. Brier score: mean over horizons of the squared error of the "
                  "share without the event, of which 0 is perfect; the row nobody told apart is "
                  f"what the Kaplan-Meier curve alone gives. The AUC is told at these {time}. "
                  f"Covariates: {', '.join(found.covariates)}."),
        *gains_table(record["gains"], "C-index")))
    parts.append(section("Figures", grid(_figures(found, record, figures))))
    parts.append(how_done(record, found.notes))
    return page(f"When {record['event']} happens, told from embeddings", lead, parts)


def _name(score: str) -> str:
    return {"c_index": "C-index", "brier": "Brier score"}.get(score, score.replace(
        "auc_at_", "AUC at "))


def _figures(found: Survival, record: dict[str, Any], figures: Figures) -> list[str]:
    predicted = found.rows[ALONE].predicted
    whom = known(predicted)
    mean, followed = predicted[whom].mean(1), found.followed
    time, event = followed.time[whom], followed.event[whom]
    people = int(whom.sum())
    horizon = float(found.shown[len(found.shown) // 2])
    column = 1 + int(np.searchsorted(found.horizons, horizon))
    return [
        figures.show("kaplan-meier", _curves(time, event, mean[:, 0], record["time"]),
                     f"Kaplan-Meier curves of {people} people in thirds of the risk that the "
                     "embedding tells, each by models that were taught on others, with 95 % "
                     "intervals; below them how many are still followed."),
        figures.show("calibration", _calibration(time, event, mean[:, column], horizon), (
            f"Share without the event at {record['time']} {horizon:g}, as predicted and as the "
            "Kaplan-Meier curve has it, in fifths of the prediction with 95 % intervals."))]


def _curves(time: np.ndarray, event: np.ndarray, risk: np.ndarray, name: str) -> Any:
    plot, axis = new_plot(5.2, 4.6)
    third = np.searchsorted(np.quantile(risk, [1 / 3, 2 / 3]), risk, side="right")
    ticks = np.linspace(0, time.max(), 5)
    for number, (label, colour, style) in enumerate(THIRDS):
        here = third == number
        if not here.any():
            continue
        curve = kaplan_meier(time[here], event[here])
        at = np.concatenate([[0.0], curve.times, [time[here].max()]])
        axis.step(at, curve.at(at), style, where="post", color=colour, label=label)
        axis.fill_between(curve.times, curve.low, curve.high, step="post", color=colour, alpha=0.15)
        for tick in ticks:
            axis.annotate(str(int((time[here] >= tick).sum())), (tick, 0),
                          xycoords=("data", "axes fraction"), xytext=(0, -48 - 11 * number),
                          textcoords="offset points", ha="center", color=colour, fontsize=8)
    axis.set(ylabel="share without the event", ylim=(0, 1.02), xlim=(0, time.max()))
    axis.set_xlabel(name)
    axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8)
    return plot


def _calibration(time: np.ndarray, event: np.ndarray, share: np.ndarray, horizon: float) -> Any:
    plot, axis = new_plot()
    axis.plot([0, 1], [0, 1], color=GREY, zorder=0)
    for part in np.array_split(np.argsort(share, kind="stable"), BINS):
        if not len(part):
            continue
        curve = kaplan_meier(time[part], event[part])
        seen, place = curve.at(np.array([horizon]))[0], np.searchsorted(
            curve.times, horizon, side="right") - 1
        if place >= 0:
            axis.plot([share[part].mean()] * 2, [curve.low[place], curve.high[place]], color=BLUE)
        axis.plot(share[part].mean(), seen, "o", color=BLUE)
    axis.set(xlabel="predicted", ylabel="observed", xlim=(0, 1), ylim=(0, 1.02))
    return plot


def record_of(found: Survival) -> dict[str, Any]:
    """What results.json says of it."""
    event = found.followed.event
    return {"people": len(event), "events": int(event.sum()), "censored": int((~event).sum()),
            "covariates": list(found.covariates), "horizons": found.horizons.tolist(),
            "scores": scores_record(found.rows), "gains": gains_record(found.gains),
            "warnings": found.warnings, "left_out": found.notes}


def predictions_of(found: Survival, time: str, event: str) -> list[list[str]]:
    """Rows of predictions.csv, with a header: means over repeats, under the user's own ids."""
    lines = [["participant_id", time, event, "log_hazard",
              *(f"without_event_at_{horizon:g}" for horizon in found.horizons)]]
    predicted = found.rows[ALONE].predicted
    for number in np.flatnonzero(known(predicted)):
        lines.append([str(found.followed.people.ids[number]), f"{found.followed.time[number]:g}",
                      str(int(found.followed.event[number])),
                      *(f"{value:.5g}" for value in predicted[number].mean(0))])
    return lines


def methods(found: Survival, record: dict[str, Any]) -> str:
    """A paragraph for the methods section."""
    rows = [name for name in (VOLUMES, WITHOUT, WITH) if name in found.rows]
    return (
        f"Frozen embeddings of {record['modality']} scans (neurojepa {record['version']}) were "
        "related to the time to the event by Cox's proportional hazards model with an L2 penalty "
        "and Efron's treatment of ties, and by a logistic model of discrete time. Performance was "
        f"estimated by {record['cv']} (repeats x folds) nested cross-validation in which members "
        "of a family shared a fold; within each outer fold features were standardised and the "
        "penalty was chosen by the cross-validated (partial) likelihood of the other folds alone. "
        "Reported are Harrell's C-index, the "
        "cumulative/dynamic AUC and the Brier score at deciles of event times, the latter two "
        "weighted by the inverse probability of censoring. Treated alike were "
        f"{', '.join(rows)} ({', '.join(found.covariates)}). {bootstrap()}")
