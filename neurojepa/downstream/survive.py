"""When something happens to people: told from embeddings, beside what that is compared with.

    embedding                  Cox's model with an L2 penalty, nested cross-validation by family
    embedding, discrete time   a logistic model of intervals
    region volumes             where embed found them
    covariates alone           columns to adjust for and the volume of the brain
    covariates and embedding   both
    a reference                a column that knows the risk, such as the true one of made-up people
    nobody told apart          the Kaplan-Meier curve for all
    times shuffled             what chance gives

Scores (survival.py): the C-index, the AUC at three horizons, and the Brier score over all horizons,
which are deciles of the times at which events happened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from neurojepa.downstream.cox import cox, discrete, population
from neurojepa.downstream.crossval import Plan, held_out, plan_folds
from neurojepa.downstream.features import Features, beside, design_of, plain
from neurojepa.downstream.labels import People, numbers_of, suspected_codes
from neurojepa.downstream.scoring import Gain, known
from neurojepa.downstream.stats import Score, difference, of_people
from neurojepa.downstream.survival import Pairs, brier_parts, concordance, dynamic
from neurojepa.downstream.targets import Target
from neurojepa.downstream.tested import complete, may_test
from neurojepa.errors import ConfigError, DataError

ALONE, DISCRETE, VOLUMES = "embedding", "embedding, discrete time", "region volumes"
WITHOUT, WITH = "covariates alone", "covariates and embedding"
NOBODY, SHUFFLED = "nobody told apart", "times shuffled"
PAIRS = ((WITH, WITHOUT), (ALONE, VOLUMES))
DECILES = np.arange(10, 100, 10)
MOST = 6000  # people whose pairs are counted; more are sampled
SHOWN = (25, 50, 75)  # percentiles of event times at which the AUC is told
HAPPENED = {"1": True, "1.0": True, "yes": True, "true": True, "y": True,
            "0": False, "0.0": False, "no": False, "false": False, "n": False}
Model = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
                 np.ndarray]


@dataclass(frozen=True)
class Followed:
    """People, how long each was followed, and whether the event ended that."""

    people: People
    time: np.ndarray  # float64 [n]
    event: np.ndarray  # bool [n]


@dataclass(frozen=True)
class Row:
    """Predictions [n, R, 1 + H] (log hazard, shares by horizon) and their scores."""

    predicted: np.ndarray
    scores: dict[str, Score]


@dataclass(frozen=True)
class Survival:
    followed: Followed
    rows: dict[str, Row]
    gains: list[Gain]
    horizons: np.ndarray
    shown: np.ndarray  # those whose AUC is told
    covariates: tuple[str, ...]
    warnings: list[str]
    notes: list[str]


def followed(people: People, time: str, event: str, positive: str | None) -> tuple[
        Followed, list[str]]:
    """Times and events of people's columns; those with neither are left out and counted.

    Raises
    ------
    ConfigError
        The event's values do not say which one means that it happened.
    DataError
        A person has several visits, a time without an event or the reverse, a time that is
        negative or no number, or nobody has the event.
    """
    names, visits = np.unique(people.participant, return_counts=True)
    if visits.max() > 1:
        twice = people.ids[people.participant == names[visits.argmax()]][0]
        raise DataError(f"id {str(twice)!r} has {visits.max()} visits in the table; time counts "
                        "from one of them, so write one row for each person")
    when, what = people.column(time), people.column(event)
    for number in np.flatnonzero((when == "") != (what == "")):
        lacks, has = (event, time) if what[number] == "" else (time, event)
        who, value = str(people.ids[number]), str(people.column(has)[number])
        raise DataError(f"id {who!r} has {has} {value!r} but no {lacks}; write both "
                        f"({event} 0 where follow-up ended without it), or neither, and the person "
                        "is left out")
    there = when != ""
    notes = [f"{int((~there).sum())} people without {time} and {event}"] if not there.all() else []
    people = people.take(there)
    times = numbers_of(people, time, "times are numbers, in one unit")
    if (times < 0).any():
        earliest = int(np.argmin(times))
        who = str(people.ids[earliest])
        raise DataError(f"id {who!r}: {time} is {times[earliest]:g}; times begin "
                        "at the scan and cannot be negative; leave out people whose event came "
                        f"before, or add --missing={times[earliest]:g} if it stands for nothing")
    notes += suspected_codes(time, people.column(time))
    happened = _happened(event, people.column(event), positive)
    if not happened.any():
        raise DataError(f"column {event!r}: all {len(happened)} people are censored, so nothing "
                        "can be learnt of when it happens; is the column right, and --positive?")
    return Followed(people, times, happened), notes


def _happened(name: str, values: np.ndarray, positive: str | None) -> np.ndarray:
    found = sorted(set(values.tolist()))
    if positive is not None:
        if positive not in found:
            raise ConfigError(f"--positive {positive}: column {name!r} has {', '.join(found)}")
        return values == positive
    if unknown := [value for value in found if value.lower() not in HAPPENED]:
        raise ConfigError(f"column {name!r} has {unknown[0]!r}: which value says that the event "
                          f"happened? add --positive {unknown[0]}, or write 1 and 0")
    return np.array([HAPPENED[value.lower()] for value in values.tolist()])


def survive(people: People, time: str, event: str, *, positive: str | None = None,
            adjust: tuple[str, ...] = (), reference: str | None = None, folds: int = 5,
            repeats: int = 5, allow_seen: bool = False) -> Survival:
    """Study one kind of event.

    Parameters
    ----------
    time, event : columns
    positive : the value of ``event`` that says that it happened; None: 1, yes or true
    reference : a column of risks that are known, to be compared with

    Raises
    ------
    ConfigError, DataError
        As ``followed``; or too few events or people to test.
    """
    covariates = tuple(dict.fromkeys([*adjust, "brain_ml"]))
    followed_, notes = followed(people, time, event, positive)
    more = [*covariates, *([reference] if reference else [])]
    people, lacking = complete(followed_.people, more)
    if lacking:
        followed_, _ = followed(people, time, event, positive)
    tested, warnings = may_test(people, f"event {event!r}", allow_seen)
    happened = len(set(people.family[followed_.event].tolist()))
    if happened < folds:
        raise DataError(f"event {event!r}: happened to {happened} people or families, {folds} "
                        f"folds need {folds}; use fewer folds "
                        f"(--cv {repeats}x{max(2, happened)}) or more people")
    target = Target(event, "binary", followed_.event.astype(float))
    plan = plan_folds(target, people.family, folds, repeats).testing(tested)
    percentiles = np.unique(np.percentile(followed_.time[followed_.event], DECILES))
    horizons = percentiles[percentiles < followed_.time.max()]
    if not len(horizons):
        raise DataError(f"column {time!r}: nobody is followed for longer than the events take, so "
                        "no horizon can be told; bring people who were followed longer")
    wanted = np.percentile(followed_.time[followed_.event], SHOWN)
    shown = horizons[sorted({int(np.abs(horizons - each).argmin()) for each in wanted})]
    run = Runner(followed_, plan, horizons, shown)
    design = design_of({name: people.column(name) for name in covariates})
    rows = {ALONE: run(plain(people.values), cox), DISCRETE: run(plain(people.values), discrete)}
    if people.volumes is not None:
        rows[VOLUMES] = run(plain(people.volumes), cox)
    rows |= {WITHOUT: run(plain(design), cox), WITH: run(beside(people.values, design), cox)}
    if reference:
        known_risk = design_of({reference: people.column(reference)})
        rows[reference] = run(plain(known_risk), cox)
    rows[NOBODY] = run(plain(design), _population)
    rows[SHUFFLED] = _shuffled(run)
    if tested.sum() > MOST:
        notes.append(f"scores are of {MOST} people drawn from {int(tested.sum())}")
    return Survival(followed_, rows, run.gains(rows), horizons, shown, covariates, warnings,
                    notes + lacking)


class Runner:
    """Predicts and scores one set of features."""

    def __init__(self, followed: Followed, plan: Plan, horizons: np.ndarray,
                 shown: np.ndarray) -> None:
        self.followed, self.plan, self.horizons, self.shown = followed, plan, horizons, shown

    def predict(self, features: Features, model: Model) -> np.ndarray:
        """[n, R, 1 + H]."""
        time, event, family = self.followed.time, self.followed.event, self.followed.people.family

        def read(train: np.ndarray, test: np.ndarray, taught: np.ndarray,
                 tested: np.ndarray) -> np.ndarray:
            return model(taught, tested, time[train], event[train], family[train], self.horizons)

        return held_out(self.plan, features, len(time), read, (1 + len(self.horizons),))

    def __call__(self, features: Features, model: Model) -> Row:
        predicted = self.predict(features, model)
        whom = scored(predicted)
        people = self.followed.people
        return Row(predicted, {name: of_people(value, whom, people.participant, people.family)
                               for name, value in self.scorers(predicted, whom).items()})

    def scorers(self, predicted: np.ndarray,
                whom: np.ndarray) -> dict[str, Callable[[np.ndarray], float]]:
        """Each score by name, of people drawn (indices among all)."""
        time, event, found = self.followed.time[whom], self.followed.event[whom], predicted[whom]
        place = np.full(len(predicted), -1)
        place[whom] = np.arange(len(whom))

        def share(pairs: Pairs, drawn: np.ndarray) -> float:
            return pairs.share(np.bincount(place[drawn], minlength=len(whom)).astype(np.float32))

        scores: dict[str, Callable[[np.ndarray], float]] = {
            "c_index": partial(share, concordance(time, event, found[..., 0]))}
        for horizon in self.shown:  # by log hazards: shares of different folds differ by who taught
            scores[f"auc_at_{horizon:g}"] = partial(
                share, dynamic(time, event, found[..., 0], horizon))
        parts = np.stack([brier_parts(time, event, found[..., 1 + k], horizon)
                          for k, horizon in enumerate(self.horizons)]).mean((0, 2))
        scores["brier"] = lambda drawn: float(parts[place[drawn]].mean())
        return scores

    def gains(self, rows: dict[str, Row]) -> list[Gain]:
        """Paired differences of the C-index."""
        found, people = [], self.followed.people
        for row, over in PAIRS:
            if row in rows and over in rows:
                both = [rows[name].predicted for name in (row, over)]
                whom = np.intersect1d(scored(both[0]), scored(both[1]))
                one, other = (self.scorers(each, whom)["c_index"] for each in both)

                def better(drawn: np.ndarray, one: Callable[[np.ndarray], float] = one,
                           other: Callable[[np.ndarray], float] = other) -> float:
                    return one(drawn) - other(drawn)

                found.append(Gain(row, over, *difference(better, whom, people.participant,
                                                         people.family)))
        return found


def scored(predicted: np.ndarray) -> np.ndarray:
    """Indices of people who were tested; of more than ``MOST`` a sample, the same each time."""
    whom = np.flatnonzero(known(predicted))
    if len(whom) <= MOST:
        return whom
    return np.sort(np.random.default_rng(0).choice(whom, MOST, replace=False))


def _population(taught: np.ndarray, tested: np.ndarray, time: np.ndarray, event: np.ndarray,
                family: np.ndarray, horizons: np.ndarray) -> np.ndarray:
    return population(time, event, len(tested), horizons)


def _shuffled(run: Runner) -> Row:
    """Times and events dealt out anew, together: one repeat."""
    dealt = np.random.default_rng(0).permutation(len(run.followed.time))
    other = Followed(run.followed.people, run.followed.time[dealt], run.followed.event[dealt])
    plan = Plan(run.plan.repeats[:1])
    return Runner(other, plan, run.horizons, run.shown)(plain(other.people.values), cox)
