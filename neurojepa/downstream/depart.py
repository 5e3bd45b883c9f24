"""Where one person's atoms depart from those of people of the same age.

    reference feed -> mean activation of each atom in each region, scan by scan (atoms.py)
    -> at the person's age: a line through the people around it, and how they spread
    -> the person's mean less the line's, over the spread of a new person: z of each region and atom
    -> size of a region's departure: root mean square of z over its atoms

How unusual a size is, is told by the reference people themselves, each taken for the person and
left out of the others; p values hold for all regions (Holm).  A departure is no disease.

R regions, A atoms, S scans of as many reference people.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from neurojepa.downstream.atoms import observe
from neurojepa.downstream.regions import Regions
from neurojepa.downstream.stats import holm
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import Feed
from neurojepa.weights import Weights

DRAWS = 4  # of masks: which places are predicted, and so have atoms but of a session code
WIDTH_YEARS = 10.0  # sd of the weights of people around an age
LEAST_PEOPLE = 20
LEAST_NEAR = 5  # people around an age, in effect
ACTIVE = 0.25  # share of those in whom a region was seen in whom an atom must be active there
LEAST_SPREAD = 0.1  # of an atom's mean in a region: below it z would blow up on nothing


@dataclass(frozen=True)
class Departures:
    """Of one scan."""

    z_RA: np.ndarray  # nan where nothing can be told
    own_RA: np.ndarray  # mean activation
    expected_RA: np.ndarray
    size_R: np.ndarray
    p_R: np.ndarray
    p_holm_R: np.ndarray
    people: int  # that it was compared with


def region_means(weights: Weights, feed: Feed, rows: np.ndarray, regions: Regions,
                 progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
    """float64 [S, R, A]: mean activation of atoms in each region of scans; nan where no place of a
    region was predicted, or is brain.

    Raises
    ------
    ConfigError
        The model has no sparse code.
    """
    found, draws = [], 1 if weights.model.session_code else DRAWS
    for number, row in enumerate(rows.tolist(), 1):
        total: np.ndarray | float = 0.0
        tokens: np.ndarray | float = 0.0
        for draw in range(draws):
            config = weights.config.model_copy(update={"train": weights.config.train.model_copy(
                update={"seed": weights.config.train.seed + draw})})
            atoms = observe(weights.model, config, feed, np.array([row])).atoms
            if atoms is None:
                raise ConfigError("objective.sparse.code = identity: the weights have no atoms; "
                                  "take weights of a JEPA with a sparse code")
            total = total + regions.share_nR.T @ atoms.total_nF.cpu().numpy()
            tokens = tokens + regions.share_nR.T @ atoms.tokens_n.cpu().numpy()
        seen_R1 = np.asarray(tokens)[:, None]
        found.append(np.where(seen_R1 > 0, total / np.maximum(seen_R1, 1e-9), np.nan))
        progress(number)
    return np.stack(found)


def departures(own_RA: np.ndarray, age: float, others_SRA: np.ndarray,
               ages_S: np.ndarray) -> Departures:
    """How a scan departs from those of others.

    Raises
    ------
    DataError
        Too few others, or none near the age.
    """
    if len(ages_S) < LEAST_PEOPLE:
        raise DataError(f"{len(ages_S)} people of the reference have such a scan and an age, "
                        f"{LEAST_PEOPLE} are needed")
    if not ages_S.min() - WIDTH_YEARS <= age <= ages_S.max() + WIDTH_YEARS:
        raise DataError(f"the person is {age:g} years old, the reference {ages_S.min():g} to "
                        f"{ages_S.max():g}; nobody there is of that age")
    z_RA = np.full(own_RA.shape, np.nan)
    expected_RA, usual_SR = z_RA.copy(), np.full(others_SRA.shape[:2], np.nan)
    for region, own_A in enumerate(own_RA):
        seen_S = np.isfinite(others_SRA[:, region]).all(1)
        others_SA, years_S = others_SRA[seen_S, region], ages_S[seen_S]
        told_A = (others_SA > 0).sum(0) >= ACTIVE * max(len(others_SA), 1)
        others_SA = others_SA[:, told_A]
        z_RA[region, told_A], expected_RA[region, told_A] = _z(
            own_A[told_A], age, others_SA, years_S)
        usual_SR[seen_S, region] = [_size(_z(
            others_SA[one], years_S[one], np.delete(others_SA, one, 0),
            np.delete(years_S, one))[0]) for one in range(len(years_S))]
    size_R = _size(z_RA)
    larger_R = (usual_SR >= size_R).sum(0)
    p_R = np.where(np.isfinite(size_R), (1 + larger_R) / (1 + np.isfinite(usual_SR).sum(0)), np.nan)
    return Departures(z_RA, own_RA, expected_RA, size_R, p_R, np.array(holm(p_R.tolist())),
                      len(ages_S))


def _z(own_A: np.ndarray, age: float, others_SA: np.ndarray,
       ages_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z of a region's atoms and what is expected at an age, by a local line; nan with too few
    people around the age.

    The spread is that of a new person around the line: away from most people, as at the ages where
    the reference ends, the line itself is less sure, and z would be too large without.
    """
    weight_S = np.exp(-0.5 * ((ages_S - age) / WIDTH_YEARS) ** 2)
    if weight_S.sum()**2 <= LEAST_NEAR * np.square(weight_S).sum():
        return np.full(len(own_A), np.nan), np.full(len(own_A), np.nan)
    weight_S /= weight_S.sum()
    years = weight_S @ ages_S
    apart_S = ages_S - years
    slope_S = weight_S * apart_S / max(weight_S @ apart_S**2, 1e-9)
    line_SS = weight_S + np.outer(apart_S, slope_S)  # what each is told, by whom
    at_age_S = weight_S + (age - years) * slope_S
    rest_SA = others_SA - line_SS @ others_SA
    # the share of the variance that the line leaves of people who taught it
    left = weight_S @ (1 - 2 * np.diag(line_SS) + np.square(line_SS).sum(1))
    spread_A = np.sqrt(weight_S @ np.square(rest_SA) / max(left, 1e-9))
    floor_A = np.maximum(LEAST_SPREAD * np.abs(weight_S @ others_SA), 1e-12)
    expected_A = at_age_S @ others_SA
    unsure = np.sqrt(1 + np.square(at_age_S).sum())
    return (own_A - expected_A) / (np.maximum(spread_A, floor_A) * unsure), expected_A


def _size(z_A: np.ndarray) -> np.ndarray:
    """Root mean square over the last axis' atoms that can be told; nan without any."""
    told_A = np.isfinite(z_A)
    square = np.square(np.where(told_A, z_A, 0)).sum(-1)
    return np.where(told_A.any(-1), np.sqrt(square / np.maximum(told_A.sum(-1), 1)), np.nan)
