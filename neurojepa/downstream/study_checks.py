"""What may explain a score other than the label: chance, the site, one group of people; and how far
probabilities and numbers can be taken at their word."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from neurojepa.downstream.crossval import plan_folds, predict
from neurojepa.downstream.features import Features, plain
from neurojepa.downstream.labels import People
from neurojepa.downstream.scoring import Row, Runner, known, varies
from neurojepa.downstream.stats import Score
from neurojepa.downstream.targets import Kind, Target, classes_of, scorers
from neurojepa.feed.labels import as_numbers

SHUFFLES = 5
GROUPS = ("sex", "age", "site", "scanner", "manufacturer", "field_strength")
BANDS = (18, 40, 60, 75)  # years
LEAST_OF_GROUP = 10  # people; and half as many of each of two classes
MOST_GROUPS = 30
BINS = 8  # of a calibration curve at most
LEAST_OF_BIN = 5


@dataclass(frozen=True)
class Group:
    """A score of the embedding among people of one value of a column."""

    column: str
    name: str
    people: int
    score: Score | None  # None: too few people


def shuffled(target: Target, people: People, folds: int, tested: np.ndarray) -> Row:
    """Labels that were dealt out anew, a few times over: mean, least and most of their scores."""
    rng, parts = np.random.default_rng(0), list[tuple[Runner, np.ndarray]]()
    one_each = np.arange(len(people.ids)).astype(str)  # dealt labels know no families
    for _ in range(SHUFFLES):
        dealt = replace(target, truth=rng.permutation(target.truth))
        plan = plan_folds(dealt, one_each, folds, 1).testing(tested)
        parts.append((Runner(dealt, people, plan),
                      predict(dealt, plain(people.values), plan, one_each)))
    scores = {}
    for name in scorers(target.kind):
        told = [run.value(name, part, np.flatnonzero(known(part))) for run, part in parts]
        values = [value for value in told if np.isfinite(value)]
        scores[name] = Score(float(np.mean(values)) if values else np.nan,
                             min(values, default=np.nan), max(values, default=np.nan),
                             len(target.truth), len(set(people.participant.tolist())))
    return Row(parts[0][1], scores)


def large_sites(people: People, site: np.ndarray, folds: int) -> list[str]:
    """Sites of enough families to be told apart."""
    return [name for name in np.unique(site).tolist()
            if len(set(people.family[site == name])) >= folds]


def site_told(people: People, site: np.ndarray, features: Features, folds: int) -> Score | None:
    """Balanced accuracy of telling the large sites from features; None for fewer than two."""
    large = large_sites(people, site, folds)
    if len(large) < 2:
        return None
    some = np.flatnonzero(np.isin(site, large))
    target = classes_of("site", site[some])
    plan = plan_folds(target, people.family[some], folds, 1)

    def of_some(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return features(some[train], some[test])

    return Runner(target, people.take(some), plan)(of_some).scores["balanced_accuracy"]


# ---- groups --------------------------------------------------------------------------------------

def groups_of(run: Runner, predicted: np.ndarray, columns: list[str]) -> list[Group]:
    """The score in each group of people who have something in common; columns that say the same
    count once."""
    found, told = [], set[tuple[str, ...]]()
    metric = group_metric(run.target.kind)
    for column in columns:
        values = run.people.columns[column]
        names = banded(values) if column == "age" else values
        same = tuple(names.tolist())
        if same in told or not 1 < len(set(same) - {""}) <= MOST_GROUPS:
            continue
        told.add(same)
        for name in sorted(set(names.tolist()) - {""}):
            whom = np.flatnonzero((names == name) & known(predicted))
            score = run.score(partial(run.value, metric, predicted), whom) if enough(
                run.target, whom) else None
            found.append(Group(column, name, len(set(run.people.participant[whom])), score))
    return found


def group_metric(kind: Kind) -> str:
    """Errors of numbers: R2 would compare with how much a group varies, as within an age band."""
    return "mean_absolute_error" if kind in ("regression", "ordinal") else "auroc"


def enough(target: Target, whom: np.ndarray) -> bool:
    """Whether the people of these indices are enough for a score of their own."""
    if target.kind == "regression":
        return len(whom) >= LEAST_OF_GROUP and varies(target.truth[whom])
    counts = np.unique(target.truth[whom], return_counts=True)[1]
    return len(counts) > 1 and counts.min() >= LEAST_OF_GROUP // 2


def banded(ages: np.ndarray) -> np.ndarray:
    """str [n]: the band of each age in years; "" where it is no number."""
    edges = [0, *BANDS]
    names = np.array([*(f"{low} to {high - 1}" for low, high in zip(edges, BANDS, strict=False)),
                      f"from {BANDS[-1]}"])
    numbers = as_numbers(np.where(ages == "", "-1", ages))
    if numbers is None:
        return np.full(len(ages), "")
    return np.where(numbers < 0, "", names[np.searchsorted(BANDS, numbers, side="right")])


# ---- calibration and bias ------------------------------------------------------------------------

def calibration(truth: np.ndarray, probability: np.ndarray) -> list[tuple[float, float, int]]:
    """Mean probability, share of positives and number of people in bins of equal number."""
    bins = int(np.clip(len(truth) // (2 * LEAST_OF_BIN), 1, BINS))
    order = np.argsort(probability, kind="stable")
    return [(float(probability[part].mean()), float(truth[part].mean()), len(part))
            for part in np.array_split(order, bins) if len(part)]


def corrected(truth: np.ndarray, predicted: np.ndarray, family: np.ndarray) -> np.ndarray:
    """[n] predictions without their pull towards the mean, as brain age needs it.

    A line of the prediction in the truth, fitted on the people of other families, is put upright:
    p - (a + b t) + t (de Lange & Cole 2020).  It uses the truth, so it says nothing of how good
    predictions are, only whose gap is large for the age.
    """
    found = np.full(len(truth), np.nan)
    names = np.unique(family)
    for part in np.array_split(names, min(10, len(names))):
        test = np.isin(family, part)
        if (~test).sum() > 2 and varies(truth[~test]):
            slope, start = np.polyfit(truth[~test], predicted[~test], 1)
            found[test] = predicted[test] - (start + slope * truth[test]) + truth[test]
    return found
