"""Models of times to an event: Cox's, and one of discrete time.

Cox's partial likelihood takes ties as Efron 1977 does, with an L2 penalty, by Newton's method.
Neither lifelines nor scikit-survival is needed for that; a test compares with statsmodels.  The
baseline hazard is Breslow's.  In discrete time a logistic model tells whether the event falls into
an interval that a person reached (Singer & Willett 1993), which assumes nothing of how hazards of
people keep their ratio.

The penalty is chosen by cross-validation inside those who teach: for Cox by the partial likelihood
that a fold adds (Verweij & van Houwelingen 1993), else by the likelihood.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neurojepa.downstream.crossval import in_span, least, logistic, whole_families
from neurojepa.downstream.survival import kaplan_meier

STEPS, CLOSE = 50, 1e-7  # of Newton's method, and the gain that ends it
INNER = 5
INTERVALS = 10  # of discrete time at most
LOOSE = 10.0  # by which intervals are scaled, so that the penalty hardly holds them


@dataclass(frozen=True)
class Efron:
    """What the partial likelihood needs of times: people in order of falling time, risk sets."""

    order: np.ndarray  # [n]
    event: np.ndarray  # bool [n], in that order, like all below
    last: np.ndarray  # [E], of each event the last of its risk set
    first: np.ndarray  # [E], the first of those tied with it
    part: np.ndarray  # [E], share of the tied events that left the risk set before it
    tied: np.ndarray  # [E], group of tied events

    @classmethod
    def of(cls, time: np.ndarray, event: np.ndarray) -> Efron:
        order = np.lexsort((~event, -time))  # of one time, events first
        time, event = time[order], event[order]
        when = np.flatnonzero(event)
        last = np.searchsorted(-time, -time[when], side="right") - 1
        _, first_event, tied, number = np.unique(-time[when], return_index=True,
                                                 return_inverse=True, return_counts=True)
        first = when[first_event][tied]
        part = (np.arange(len(when)) - first_event[tied]) / number[tied]
        return cls(order, event, last, first, part, tied)

    def __call__(self, line: np.ndarray, values: np.ndarray | None = None
                 ) -> tuple[float, np.ndarray, np.ndarray]:
        """Log partial likelihood of linear predictors [n]; with features [n, p] its gradient [p]
        and the negative Hessian [p, p]."""
        line = line[self.order] - line.max()
        risk = np.exp(line)
        when = np.flatnonzero(self.event)
        ends = self.first + np.bincount(self.tied)[self.tied] - 1  # the last tied event
        total = risk.cumsum()
        ties = total[ends] - np.where(self.first > 0, total[self.first - 1], 0)
        below = total[self.last] - self.part * ties  # [E], the denominators
        value = float(line[when].sum() - np.log(below).sum())
        if values is None:
            return value, np.zeros(0), np.zeros((0, 0))
        x = values[self.order]
        sums = (risk[:, None] * x).cumsum(0)
        of_ties = sums[ends] - np.where((self.first > 0)[:, None], sums[self.first - 1], 0)
        mean = (sums[self.last] - self.part[:, None] * of_ties) / below[:, None]
        # of each person the sum over events that it is in the risk set of
        share = np.bincount(self.last, 1 / below, len(x))[::-1].cumsum()[::-1]
        gone = np.bincount(self.tied, self.part / below)
        share[when] -= gone[self.tied]
        curve = (x * (risk * share)[:, None]).T @ x - mean.T @ mean
        return value, x[when].sum(0) - mean.sum(0), curve


def fit_cox(values: np.ndarray, time: np.ndarray, event: np.ndarray, penalty: float,
            start: np.ndarray | None = None) -> np.ndarray:
    """Coefficients [p] of features [n, p] that maximise the penalised partial likelihood."""
    likelihood = Efron.of(time, event)
    found = np.zeros(values.shape[1]) if start is None else start
    value = -np.inf
    for _ in range(STEPS):
        now, slope, curve = likelihood(values @ found, values)
        now -= float(penalty / 2 * found @ found)
        if now - value < CLOSE * max(1.0, abs(now)):
            break
        value = now
        step = np.linalg.solve(curve + penalty * np.eye(len(found)), slope - penalty * found)
        size = 1.0
        while size > 1e-4:
            new = found + size * step
            if likelihood(values @ new)[0] - penalty / 2 * new @ new >= now - 1e-12:
                break
            size /= 2
        found = new
    return found


def baseline(line: np.ndarray, time: np.ndarray, event: np.ndarray,
             horizons: np.ndarray) -> np.ndarray:
    """Cumulative hazard [H] of a person of predictor 0 by each horizon (Breslow 1974)."""
    times, died = np.unique(time[event], return_counts=True)
    order = np.argsort(time)
    followed = np.exp(line[order])[::-1].cumsum()[::-1]  # summed over those of a later time, too
    below = followed[np.searchsorted(time[order], times)]
    total = np.concatenate([[0.0], np.cumsum(died / below)])
    return total[np.searchsorted(times, horizons, side="right")]


def cox(taught: np.ndarray, tested: np.ndarray, time: np.ndarray, event: np.ndarray,
        family: np.ndarray, horizons: np.ndarray) -> np.ndarray:
    """[m, 1 + H]: log hazard of ``tested`` [m, D] over the mean of ``taught`` [n, D], and the share
    without the event by each horizon."""
    taught, tested = in_span(taught, tested)
    splits = _inner(event, family)

    def losses(penalties: np.ndarray) -> np.ndarray:
        found = np.zeros(len(penalties))
        whole = Efron.of(time, event)
        for train, _ in splits:
            part, start = Efron.of(time[train], event[train]), None
            for place in np.argsort(-penalties):
                start = fit_cox(taught[train], time[train], event[train], penalties[place], start)
                line = taught @ start
                found[place] -= whole(line)[0] - part(line[train])[0]
        return found

    weights = fit_cox(taught, time, event, least(losses))
    centre = (taught @ weights).mean()
    line, new = taught @ weights - centre, tested @ weights - centre
    share = np.exp(-np.exp(new)[:, None] * baseline(line, time, event, horizons))
    return np.column_stack([new, share])


def discrete(taught: np.ndarray, tested: np.ndarray, time: np.ndarray, event: np.ndarray,
             family: np.ndarray, horizons: np.ndarray) -> np.ndarray:
    """The same by a logistic model of intervals, whose ends are the horizons and the last event."""
    taught, tested = in_span(taught, tested)
    ends = np.unique(np.append(horizons, time[event].max()))[-INTERVALS:]
    person, interval, fell = periods(time, event, ends)

    def rows(values: np.ndarray, who: np.ndarray, at: np.ndarray) -> np.ndarray:
        return np.hstack([values[who], LOOSE * np.eye(len(ends))[at]])

    splits = _inner(event, family)

    def losses(penalties: np.ndarray) -> np.ndarray:
        found = np.zeros(len(penalties))
        for train, test in splits:
            here, there = np.isin(person, train), np.isin(person, test)
            told = _hazards(rows(taught, person[here], interval[here]), fell[here],
                            rows(taught, person[there], interval[there]), penalties)
            right = np.where(fell[there], told, 1 - told)
            found -= np.log(np.clip(right, 1e-6, 1)).sum(1)
        return found

    everyone = np.vstack([taught, tested])
    who, at = np.divmod(np.arange(len(everyone) * len(ends)), len(ends))
    hazard = _hazards(rows(taught, person, interval), fell, rows(everyone, who, at),
                      np.array([least(losses)]))[0].reshape(len(everyone), len(ends))
    of_all = np.cumprod(1 - hazard, 1)
    # the complementary log-log of the last share orders people as a log hazard does
    risk = np.log(-np.log(np.clip(of_all[:, -1], 1e-12, 1 - 1e-12)))
    risk, share = risk[len(taught):] - risk[:len(taught)].mean(), of_all[len(taught):]
    place = np.searchsorted(ends, horizons, side="right")
    by_horizon = np.column_stack([np.ones(len(tested)), share])[:, place]
    return np.column_stack([risk, by_horizon])


def periods(time: np.ndarray, event: np.ndarray,
            ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row for each interval that a person reached: person, interval, whether the event fell in.

    An interval within which follow-up ended is left out: what it would have shown is not known.
    """
    place = np.searchsorted(ends, time, side="left")  # the interval that the time lies in
    whole = event | (time == ends[np.minimum(place, len(ends) - 1)])
    reached = np.minimum(place + whole, len(ends))
    person = np.repeat(np.arange(len(time)), reached)
    interval = np.arange(len(person)) - np.repeat(reached.cumsum() - reached, reached)
    return person, interval, event[person] & (interval == place[person])


def _hazards(taught: np.ndarray, fell: np.ndarray, tested: np.ndarray,
             penalties: np.ndarray) -> np.ndarray:
    """[penalties, m]; none or all where nobody or everybody of those who teach had the event."""
    if fell.all() or not fell.any():
        return np.full((len(penalties), len(tested)), float(fell.any()))
    return logistic(taught, fell.astype(float), tested, penalties, 2)[..., 1]


def _inner(event: np.ndarray, family: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Folds of whole families with a like share of events."""
    folds = max(2, min(INNER, len(set(family.tolist())), int(event.sum())))
    return list(whole_families("binary", event.astype(float), family, folds, seed=0))


def population(time: np.ndarray, event: np.ndarray, number: int,
               horizons: np.ndarray) -> np.ndarray:
    """[m, 1 + H]: what is known of anybody: the Kaplan-Meier curve, and no order of people."""
    share = kaplan_meier(time, event).at(horizons)
    return np.tile(np.concatenate([[0.0], share]), (number, 1))
