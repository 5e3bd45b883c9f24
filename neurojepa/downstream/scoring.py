"""Predictions of one set of features, scored, and paired differences between sets.

Every score is a mean over repeats, with an interval that resamples families, then people.

AUROC and rank correlation compare people with each other, and do so within folds alone; their mean
over folds is told.  Between folds, who is tested in one teaches in the other.  A positive in one
fold raises what people who are like it get in the other, so negatives come before it and chance
lies below a half (Parker et al. 2007, who recommend this mean, and Forman & Scholz 2010).  It is
worst for features of few values, as a site is, whose people tie within a fold but not between them.
Other scores are sums over people, or, as AUPRC, need more people than a fold has: in a few people
it lies far above the share of positives whatever predicts.  These are of all folds of a repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from neurojepa.downstream.crossval import Plan, Read, moved, predict
from neurojepa.downstream.features import Features
from neurojepa.downstream.labels import People
from neurojepa.downstream.stats import Score, difference, holm, of_people
from neurojepa.downstream.targets import Target, scorers

OF_RANKS = ("auroc", "rank_correlation")  # scored within folds


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
    """Predicts and scores by the folds of a plan."""

    def __init__(self, target: Target, people: People, plan: Plan) -> None:
        self.target, self.people, self.plan = target, people, plan
        self.fold = plan.folds(len(target.truth))

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
        scorer = scorers(self.target.kind)[metric]
        for part, repeats, taught in self._parts(metric, drawn):
            if varies(truth[part]):
                found = predicted[part][:, repeats]
                if metric == "balanced_accuracy":  # at the threshold that predictions are made for
                    found = moved(self.target, found, taught, truth[part])
                scores.append(scorer(truth[part], found))
                weights.append(len(part))
        return float(np.average(scores, weights=weights)) if scores else float("nan")

    def _parts(self, metric: str, drawn: np.ndarray
               ) -> Iterator[tuple[np.ndarray, slice, np.ndarray]]:
        """People who are scored together, in which repeats, and labels of the shares of classes
        that their predictions know."""
        truth = self.target.truth
        if self.plan.pooled and metric not in OF_RANKS:
            yield drawn, slice(None), truth
            return
        for r, folds in enumerate(self.plan.repeats):
            fold = self.fold[drawn, r]
            for number, (train, _) in enumerate(folds):
                yield drawn[fold == number], slice(r, r + 1), truth[train]


def varies(truth: np.ndarray) -> bool:
    return len(truth) > 1 and bool((truth != truth[0]).any())


def known(predicted: np.ndarray) -> np.ndarray:
    """[n] bool: whom every repeat predicted."""
    return np.isfinite(predicted).all(axis=tuple(range(1, predicted.ndim)))
