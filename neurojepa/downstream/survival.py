"""Times to an event, of which some are censored: curves and scores.

    kaplan_meier     share without the event, with Greenwood's interval on the log(-log) scale
    Pairs            C-index (Harrell 1982) and time-dependent AUC (Uno et al. 2007), of any draw of
                     people at the cost of a matrix product
    brier_parts      squared errors weighted by the inverse probability of not being censored (Graf
                     et al. 1999)

n people with times [n] and events [n] (bool; False is censored at that time).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """A step function: ``share`` [m] from each of ``times`` [m] on, 1 before."""

    times: np.ndarray
    share: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def at(self, time: np.ndarray, before: bool = False) -> np.ndarray:
        """The share at times, or just before them."""
        place = np.searchsorted(self.times, time, side="left" if before else "right")
        return np.concatenate([[1.0], self.share])[place]


def kaplan_meier(time: np.ndarray, event: np.ndarray) -> Curve:
    """Kaplan & Meier 1958."""
    times, died = np.unique(time[event], return_counts=True)
    return _curve(times, died, len(time) - np.searchsorted(np.sort(time), times))


def uncensored(time: np.ndarray, event: np.ndarray) -> Curve:
    """The share not censored, which weights are the inverse of.

    Of one time, events come before censorings: who had the event was no more at risk of those.
    """
    times, left = np.unique(time[~event], return_counts=True)
    gone = (np.searchsorted(np.sort(time[event]), times, side="right")
            + np.searchsorted(np.sort(time[~event]), times))
    return _curve(times, left, len(time) - gone)


def _curve(times: np.ndarray, died: np.ndarray, at_risk: np.ndarray) -> Curve:
    share = np.cumprod(1 - died / at_risk)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.cumsum(died / (at_risk * (at_risk - died)))
        half = 1.96 * np.sqrt(variance) / np.abs(np.log(share))
        low, high = share ** np.exp(half), share ** np.exp(-half)
    return Curve(times, share, np.nan_to_num(low), np.nan_to_num(high))


@dataclass(frozen=True)
class Pairs:
    """Pairs of people of whom one has the worse fate, each with a weight; [n, n] float32."""

    weight: np.ndarray
    right: np.ndarray  # the same where the risks say so, half where they are equal

    def share(self, counts: np.ndarray) -> float:
        """Of pairs that are in order, where person i was drawn counts[i] times."""
        all_pairs = counts @ self.weight @ counts
        return float(counts @ self.right @ counts / all_pairs) if all_pairs > 0 else float("nan")


def concordance(time: np.ndarray, event: np.ndarray, risk: np.ndarray) -> Pairs:
    """Pairs of which one had the event while the other was still followed without it.

    Parameters
    ----------
    risk : [n, R], of R repeats
    """
    follows = (time[:, None] < time) | ((time[:, None] == time) & event[:, None] & ~event)
    return _pairs((event[:, None] & follows).astype(np.float32), risk)


def dynamic(time: np.ndarray, event: np.ndarray, risk: np.ndarray, horizon: float) -> Pairs:
    """Pairs of a person with the event by the horizon and one without; [n, R] risks."""
    follows = uncensored(time, event).at(time, before=True)
    case = np.where((time <= horizon) & event, 1 / np.maximum(follows, 1e-9), 0)
    return _pairs((case[:, None] * (time > horizon)).astype(np.float32), risk)


def _pairs(weight: np.ndarray, risk: np.ndarray) -> Pairs:
    right = np.zeros_like(weight)
    for each in risk.T:
        right += (each[:, None] > each) + 0.5 * (each[:, None] == each)
    return Pairs(weight, weight * right / risk.shape[1])


def brier_parts(time: np.ndarray, event: np.ndarray, share: np.ndarray,
                horizon: float) -> np.ndarray:
    """float64 [n, R] whose mean is the Brier score of predicted shares [n, R] at the horizon."""
    follows = uncensored(time, event)
    died, alive = (time <= horizon) & event, time > horizon
    weight = np.where(died, 1 / np.maximum(follows.at(time, before=True), 1e-9), 0)
    weight = np.where(alive, 1 / max(float(follows.at(np.array([horizon]))[0]), 1e-9), weight)
    return weight[:, None] * np.square(share - alive[:, None])
