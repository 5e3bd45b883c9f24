"""Where one person's atoms depart from those of people of the same age.

    reference feed -> mean activation of each atom in each region, scan by scan (atoms.py)
    -> at the person's age: a line through the people around it, and how they spread
    -> the person's mean less the line's, over the spread: z of each region and atom
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

DRAWS = 4  # of masks: which places of a scan are predicted, and so have atoms
WIDTH_YEARS = 10.0  # sd of the weights of people around an age
LEAST_PEOPLE = 20
ACTIVE = 0.25  # share of reference people in whom an atom must be active in a region
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
    region was predicted.

    Raises
    ------
    ConfigError
        The model has no sparse code.
    """
    found = []
    for number, row in enumerate(rows.tolist(), 1):
        total: np.ndarray | float = 0.0
        tokens: np.ndarray | float = 0.0
        for draw in range(DRAWS):
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
    told_RA = np.nanmean(others_SRA > 0, 0) >= ACTIVE
    z_RA, expected_RA = _z(own_RA, age, others_SRA, ages_S)
    z_RA = np.where(told_RA, z_RA, np.nan)
    size_R = _size(z_RA)
    everyone = np.arange(len(ages_S))
    usual_SR = np.stack([_size(np.where(told_RA, _z(
        others_SRA[one], float(ages_S[one]), others_SRA[everyone != one],
        ages_S[everyone != one])[0], np.nan)) for one in everyone])
    larger_R = (usual_SR >= size_R).sum(0)
    p_R = np.where(np.isfinite(size_R), (1 + larger_R) / (1 + np.isfinite(usual_SR).sum(0)), np.nan)
    return Departures(z_RA, own_RA, expected_RA, size_R, p_R, np.array(holm(p_R.tolist())),
                      len(ages_S))


def _z(own_RA: np.ndarray, age: float, others_SRA: np.ndarray,
       ages_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z and what is expected at an age, by a local line."""
    near_S = np.exp(-0.5 * ((ages_S - age) / WIDTH_YEARS) ** 2)
    seen_SRA = np.isfinite(others_SRA)
    weight_SRA = near_S[:, None, None] * seen_SRA
    value_SRA, years_S11 = np.where(seen_SRA, others_SRA, 0), (ages_S - age)[:, None, None]
    total_RA = np.maximum(weight_SRA.sum(0), 1e-9)
    middle_RA, years_RA = ((weight_SRA * each).sum(0) / total_RA
                           for each in (value_SRA, years_S11))
    apart_SRA = years_S11 - years_RA
    slope_RA = (weight_SRA * apart_SRA * (value_SRA - middle_RA)).sum(0) / np.maximum(
        (weight_SRA * apart_SRA**2).sum(0), 1e-9)
    rest_SRA = value_SRA - middle_RA - slope_RA * apart_SRA
    spread_RA = np.sqrt((weight_SRA * rest_SRA**2).sum(0) / total_RA)
    enough_RA = total_RA**2 / np.maximum((weight_SRA**2).sum(0), 1e-9) > 5  # people, in effect
    expected_RA = np.where(enough_RA, middle_RA - slope_RA * years_RA, np.nan)
    floor_RA = np.maximum(LEAST_SPREAD * np.abs(middle_RA), 1e-12)
    return (own_RA - expected_RA) / np.maximum(spread_RA, floor_RA), expected_RA


def _size(z_RA: np.ndarray) -> np.ndarray:
    """[R]: root mean square over atoms that can be told; nan without any."""
    told_RA = np.isfinite(z_RA)
    square_R = np.square(np.where(told_RA, z_RA, 0)).sum(1)
    return np.where(told_RA.any(1), np.sqrt(square_R / np.maximum(told_RA.sum(1), 1)), np.nan)
