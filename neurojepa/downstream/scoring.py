"""Predictions of one set of features, scored, and paired differences between sets.

Every score is a mean over repeats, with an interval that resamples families, then people.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from neurojepa.downstream.crossval import Plan, Read, moved, predict
from neurojepa.downstream.features import Features
from neurojepa.downstream.labels import People
from neurojepa.downstream.stats import Score, difference, holm, of_people
from neurojepa.downstream.targets import Target, scorers


@dataclass(frozen=True)
class Row:
    """Predictions of one set of features, and their scores."""

    predicted: np.ndarray  # [n, R] or [n, R, K], nan where a person was not tested
    scores: dict[str, Score]


@dataclass(frozen=True)
class Gain:
    """By how much the first score of one row is better than that of another, paired."""

    row: str
    over: str
    score: Score
    p: float  # two-sided, of no difference

    def as_dict(self) -> dict[str, object]:
        return {"row": self.row, "over": self.over, **self.score.as_dict(), "p": self.p}


def scores_record(rows: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """What results.json says of rows, of any task."""
    return {name: {score: value.as_dict() for score, value in row.scores.items()}
            for name, row in rows.items()}


def gains_record(gains: Sequence[Gain]) -> list[dict[str, object]]:
    """What results.json says of paired differences that stand on one page."""
    return [{**gain.as_dict(), "p_holm": p}
            for gain, p in zip(gains, holm([gain.p for gain in gains]), strict=True)]


class Runner:
    """Predicts and scores; with ``site``, scores are means over sites of those within each."""

    def __init__(self, target: Target, people: People, plan: Plan,
                 site: np.ndarray | None = None) -> None:
        self.target, self.people, self.plan, self.site = target, people, plan, site

    def __call__(self, features: Features, model: Read | None = None) -> Row:
        predicted = predict(self.target, features, self.plan, self.people.family, model)
        whom = np.flatnonzero(known(predicted))
        return Row(predicted, {name: self.score(partial(self.value, name, predicted), whom)
                               for name in scorers(self.target.kind)})

    def gains(self, rows: dict[str, Row], pairs: Sequence[tuple[str, str]]) -> list[Gain]:
        """Differences of the first score, of those pairs of rows that are there."""
        found, metric = [], next(iter(scorers(self.target.kind)))
        for row, over in pairs:
            if row in rows and over in rows:
                one, other = rows[row].predicted, rows[over].predicted

                def better(drawn: np.ndarray, one: np.ndarray = one,
                           other: np.ndarray = other) -> float:
                    return self.value(metric, one, drawn) - self.value(metric, other, drawn)

                found.append(Gain(row, over, *difference(
                    better, np.flatnonzero(known(one) & known(other)), self.people.participant,
                    self.people.family)))
        return found

    def score(self, value: Callable[[np.ndarray], float], whom: np.ndarray) -> Score:
        """``value(indices)`` of the people ``whom``, with its interval."""
        return of_people(value, whom, self.people.participant, self.people.family)

    def value(self, metric: str, predicted: np.ndarray, drawn: np.ndarray) -> float:
        """A score of the people drawn (indices)."""
        truth, scores, weights = self.target.truth, [], []
        site = np.zeros(len(truth)) if self.site is None else self.site
        for name in np.unique(site[drawn]):
            part = drawn[site[drawn] == name]
            if varies(truth[part]):
                found = predicted[part]
                if metric == "balanced_accuracy":  # at the threshold that predictions are made for
                    taught = truth if self.site is None else truth[site != name]
                    found = moved(self.target, found, taught, truth[part])
                scores.append(scorers(self.target.kind)[metric](truth[part], found))
                weights.append(len(part))
        return float(np.average(scores, weights=weights)) if scores else float("nan")


def varies(truth: np.ndarray) -> bool:
    return len(truth) > 1 and np.ptp(truth) > 0


def known(predicted: np.ndarray) -> np.ndarray:
    """[n] bool: whom every repeat predicted."""
    return np.isfinite(predicted).all(axis=tuple(range(1, predicted.ndim)))
