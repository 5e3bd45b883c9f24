"""How a label changes between two visits of a person, told from their scans.

    difference of scans           what the embedding changed by in a year
    first scan                    the embedding of the first visit alone: a prognosis
    difference of region volumes  where embed found them
    covariates alone              the label and time of the first visit, and columns to adjust for
    covariates and difference     both
    changes shuffled              what chance gives

The first and the last visit of a person make a pair, and the target is the change in a unit of the
time column, such as a year.  Predictions are nested by person and family, as in study.py.

Mixed models take all visits: the label by time since the first, with an intercept and, where people
have three visits, a slope of each person at random.  The predictions above enter them standardised,
and times time: by how much does the label change faster for a person whose predicted change is one
sd larger?
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from neurojepa.downstream.crossval import plan_folds
from neurojepa.downstream.features import beside, design_of, plain
from neurojepa.downstream.labels import People, numbers_of, suspected_codes
from neurojepa.downstream.scoring import Gain, Row, Runner, known
from neurojepa.downstream.study_checks import shuffled
from neurojepa.downstream.targets import Target
from neurojepa.downstream.tested import complete, may_test
from neurojepa.errors import ConfigError, DataError

DIFFERENCE, FIRST, VOLUMES = ("difference of scans", "first scan",
                              "difference of region volumes")
WITHOUT, WITH, SHUFFLED = ("covariates alone", "covariates and difference", "changes shuffled")
PAIRS = ((WITH, WITHOUT), (DIFFERENCE, VOLUMES), (DIFFERENCE, FIRST))
MODELLED = (WITHOUT, FIRST, DIFFERENCE)  # whose predictions enter mixed models
LEAST_PAIRS = 10


@dataclass(frozen=True)
class Visits:
    """Visits [n] with a label and a time, and the first and last [k] of each person of several."""

    people: People
    value: np.ndarray  # float64 [n]
    time: np.ndarray  # float64 [n]
    first: np.ndarray  # int [k]
    last: np.ndarray

    @property
    def span(self) -> np.ndarray:
        """float64 [k]: time between them."""
        return self.time[self.last] - self.time[self.first]

    @property
    def change(self) -> np.ndarray:
        """float64 [k]: of the label, in a unit of time."""
        return (self.value[self.last] - self.value[self.first]) / self.span


@dataclass(frozen=True)
class Slope:
    """What one sd of a prediction adds to the label's change in a unit of time."""

    row: str
    value: float
    low: float
    high: float
    p: float
    converged: bool


@dataclass(frozen=True)
class Change:
    visits: Visits
    target: Target
    rows: dict[str, Row]
    gains: list[Gain]
    slopes: list[Slope]
    covariates: tuple[str, ...]
    warnings: list[str]
    notes: list[str]


def visits_of(people: People, label: str, time: str,
              adjust: tuple[str, ...] = ()) -> tuple[Visits, list[str]]:
    """Pairs of visits; those without a value or a time are left out and counted, and so are people
    whose first visit lacks a covariate.

    Raises
    ------
    ConfigError
        Visits are not told apart.
    DataError
        Fewer than ``LEAST_PAIRS`` people have two visits, words in place of numbers, or two visits
        at one time.
    """
    if people.sessions is None:
        raise ConfigError("change needs visits; name the table's column of them, --session COLUMN")
    people, notes = complete(people, [label, time])
    numbers = {}
    for name in (label, time):
        numbers[name] = numbers_of(people, name, "change is told of numbers")
        notes += suspected_codes(name, people.column(name))
    covariates = {name: people.column(name) for name in adjust}
    lacking = dict.fromkeys(adjust, 0)
    first, last, single = [], [], 0
    rows: dict[str, list[int]] = {}
    for number, person in enumerate(people.participant.tolist()):
        rows.setdefault(person, []).append(number)
    for visits in rows.values():
        if len(visits) == 1:
            single += 1
            continue
        own = np.array(visits)
        own = own[np.argsort(numbers[time][own], kind="stable")]
        if unknown := [name for name in adjust if covariates[name][own[0]] == ""]:
            lacking[unknown[0]] += 1
            continue
        if len(set(numbers[time][own].tolist())) < len(own):
            raise DataError(f"id {str(people.ids[own[0]])!r}: two visits have the same {time}; the "
                            "column of times must tell when each visit was, such as the age")
        first.append(own[0])
        last.append(own[-1])
    if len(first) < LEAST_PAIRS:
        raise DataError(f"label {label!r}: {len(first)} people have two visits with {label} and "
                        f"{time}, {LEAST_PAIRS} are needed; is --session the column of visits?")
    notes += [f"{single} people with one visit"] if single else []
    notes += [f"{count} people without {name} at their first visit"
              for name, count in lacking.items() if count]
    return Visits(people, numbers[label], numbers[time], np.array(first), np.array(last)), notes


def change(people: People, label: str, time: str, *, adjust: tuple[str, ...] = (), folds: int = 5,
           repeats: int = 5, allow_seen: bool = False) -> Change:
    """Study the change of one label of numbers.

    Parameters
    ----------
    people : visits, as labels.join gives them with a column of sessions
    time : column of when each visit was, in one unit
    adjust : columns of covariates, of the first visit

    Raises
    ------
    ConfigError, DataError
        As ``visits_of``; or too few people to test, or a change that is the same for all.
    """
    visits, notes = visits_of(people, label, time, adjust)
    start = visits.people.take(visits.first)
    if not np.ptp(visits.change):
        raise DataError(f"label {label!r}: changes alike in all {len(visits.change)} people; there "
                        "is nothing to tell apart")
    tested, told = may_test(start, f"label {label!r}", allow_seen)
    target = Target(f"change of {label}", "regression", visits.change)
    plan = plan_folds(target, start.family, folds, repeats).testing(tested)
    run = Runner(target, start, plan)
    moved = _moved(visits, visits.people.values)
    known_first = np.column_stack([visits.value[visits.first], visits.time[visits.first]])
    covariates = np.hstack([known_first, *(
        [design_of({name: start.column(name) for name in adjust})] if adjust else [])])
    rows = {DIFFERENCE: run(plain(moved)), FIRST: run(plain(start.values))}
    if visits.people.volumes is not None:
        rows[VOLUMES] = run(plain(_moved(visits, visits.people.volumes)))
    rows |= {WITHOUT: run(plain(covariates)), WITH: run(beside(moved, covariates))}
    slopes = [slope(visits, rows[name], name) for name in MODELLED]
    rows[SHUFFLED] = shuffled(target, start.replaced(moved), folds, tested)
    return Change(visits, target, rows, run.gains(rows, PAIRS), slopes,
                  (f"first {label}", f"first {time}", *adjust), told, notes)


def _moved(visits: Visits, values: np.ndarray) -> np.ndarray:
    """What values [n, D] changed by in a unit of time, [k, D]."""
    return (values[visits.last] - values[visits.first]) / visits.span[:, None]


def slope(visits: Visits, row: Row, name: str) -> Slope:
    """Of a mixed model by restricted maximum likelihood (Laird & Ware 1982, in statsmodels).

    label = time * (1 + prediction) + person * (1 + time) + rest, on all visits of the people who
    were tested.  Without slopes of people p would be too small, as these differ (Schielzeth
    & Forstmeier 2009); two visits a person cannot tell them from the rest.
    """
    from statsmodels.regression.mixed_linear_model import MixedLM

    whom = known(row.predicted)
    mean = row.predicted[whom].mean(1)
    score = (mean - mean.mean()) / max(mean.std(), 1e-12)
    people, firsts = visits.people.participant, visits.first[whom]
    of_person = {people[first]: number for number, first in enumerate(firsts)}
    rows = np.array([number for number, person in enumerate(people) if person in of_person])
    person = np.array([of_person[each] for each in people[rows]])
    since = visits.time[rows] - visits.time[firsts[person]]
    design = np.column_stack([np.ones(len(rows)), since, score[person], since * score[person]])
    slopes = (np.bincount(person) > 2).sum() >= LEAST_PAIRS
    at_random = design[:, :2] if slopes else design[:, :1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it says of convergence is told beside the figures
        try:  # powell where people hardly differ in slope
            found = MixedLM(visits.value[rows], design, groups=person, exog_re=at_random).fit(
                reml=True, method=["bfgs", "powell"])
        except np.linalg.LinAlgError:  # a prediction that is the same for all
            return Slope(name, np.nan, np.nan, np.nan, np.nan, False)
    value, error = float(found.fe_params[3]), float(found.bse_fe[3])
    return Slope(name, value, value - 1.96 * error, value + 1.96 * error, float(found.pvalues[3]),
                 bool(found.converged))
