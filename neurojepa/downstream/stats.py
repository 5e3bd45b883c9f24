"""Scores with intervals that resample people, not scans.

Two scans of one person are not two observations, so every interval here draws people with
replacement and takes all scans of the people drawn (the cluster bootstrap, Davison & Hinkley
1997, section 3.8).  Where people come in groups that have much in common (families, the anatomy
that synthetic heads are made from), groups are drawn first, then people within each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

DRAWS = 300  # of people, for the interval of a score
P_DRAWS = 2000  # and for a p value: none is below 2 / 2001, so that it can hold among many
Metric = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Score:
    """A metric on a test set with its 95 % percentile interval."""

    value: float
    low: float
    high: float
    num_scans: int
    num_people: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def score(metric: Metric, truth: np.ndarray, predicted: np.ndarray, people: np.ndarray,
          groups: np.ndarray | None = None, draws: int = 1000, seed: int = 0) -> Score:
    """Evaluate ``metric(truth, predicted)``, arrays [n, ...], and its interval.

    Draws on which the metric is undefined (nan, for example a single class) are left out.

    Parameters
    ----------
    people : [n], who each scan is of.
    groups : [n], the group of each scan's person; None takes each person as a group.
    """
    values = [metric(truth[drawn], predicted[drawn])
              for drawn in resamples(people, groups, draws, seed)]
    return Score(metric(truth, predicted), *interval(values), len(truth), len(np.unique(people)))


def resamples(people: np.ndarray, groups: np.ndarray | None, draws: int, seed: int = 0
              ) -> Iterator[np.ndarray]:
    """Indices of scans, ``draws`` times: groups drawn with replacement, then people within each."""
    rng = np.random.default_rng(seed)
    person = np.unique(people, return_inverse=True)[1]
    group = person if groups is None else np.unique(groups, return_inverse=True)[1]
    order = np.lexsort((person, group))
    members: list[list[np.ndarray]] = [[] for _ in range(group.max() + 1)]
    for scans in np.split(order, np.flatnonzero(np.diff(person[order])) + 1):
        members[group[scans[0]]].append(scans)
    for _ in range(draws):
        yield np.concatenate([scans for k in rng.integers(len(members), size=len(members))
                              for scans in _resampled(members[k], rng)])


def of_people(value: Callable[[np.ndarray], float], chosen: np.ndarray, people: np.ndarray,
              groups: np.ndarray) -> Score:
    """``value(indices)`` of the chosen [m] indices with its interval.

    Parameters
    ----------
    people, groups : [n], who each index is and of which group
    """
    return _of_people(value, chosen, people, groups, DRAWS)[0]


def difference(value: Callable[[np.ndarray], float], chosen: np.ndarray, people: np.ndarray,
               groups: np.ndarray) -> tuple[Score, float]:
    """As ``of_people``, and the two-sided p of the value being 0 (from the bootstrap, Davison &
    Hinkley 1997, section 4.4)."""
    found, drawn = _of_people(value, chosen, people, groups, P_DRAWS)
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return found, min(1.0, 2 * float(tail + 1) / (len(drawn) + 1)) if len(drawn) else float("nan")


def _of_people(value: Callable[[np.ndarray], float], chosen: np.ndarray, people: np.ndarray,
               groups: np.ndarray, draws: int) -> tuple[Score, np.ndarray]:
    """The score, and the values of draws on which it is defined."""
    if not len(chosen):
        return Score(np.nan, np.nan, np.nan, 0, 0), np.zeros(0)
    who = people[chosen]
    drawn = np.array([value(chosen[each])
                      for each in resamples(who, groups[chosen], draws)])
    drawn = drawn[np.isfinite(drawn)]
    return Score(value(chosen), *interval(drawn), len(chosen), len(set(who.tolist()))), drawn


def holm(p: Sequence[float]) -> list[float]:
    """p values that hold for all of them together (Holm 1979); nan stays nan."""
    values = np.array(p, dtype=float)
    found, worst = np.full(len(values), np.nan), 0.0
    known = np.flatnonzero(np.isfinite(values))
    for rank, place in enumerate(known[np.argsort(values[known], kind="stable")]):
        worst = max(worst, min(1.0, (len(known) - rank) * values[place]))
        found[place] = worst
    return found.tolist()


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the values that are defined; nan without any."""
    defined = [value for value in values if np.isfinite(value)]
    low, high = np.percentile(defined, [2.5, 97.5]) if defined else (np.nan, np.nan)
    return float(low), float(high)


def _resampled(people: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    if len(people) == 1:
        return people
    return [people[k] for k in rng.integers(len(people), size=len(people))]


def mean_absolute_error(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(np.abs(truth - predicted).mean())


def r_squared(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Share of variance explained; nan when the truth does not vary."""
    total = ((truth - truth.mean()) ** 2).sum()
    return float(1 - ((truth - predicted) ** 2).sum() / total) if total > 0 else float("nan")


def auroc(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Area under the ROC curve as the Mann-Whitney statistic, ties counted half; nan for one class.

    Hanley & McNeil 1982.
    """
    chosen = truth == 1
    positive, others = predicted[chosen], np.sort(predicted[~chosen])
    if not len(positive) or not len(others):
        return float("nan")
    below, not_above = (others.searchsorted(positive, side).sum() for side in ("left", "right"))
    return float((below + not_above) / (2 * len(positive) * len(others)))


def participation_ratio(values: np.ndarray) -> float:
    """In how many directions rows [n, D] vary: tr(C)^2 / tr(C^2) of their covariance C.

    It is D where all directions vary alike and 1 where a single one does.
    """
    centred = values - values.mean(0)
    covariance = centred.T @ centred
    return float(np.trace(covariance)**2 / np.square(covariance).sum())
