"""From one modality to another of the same people: what a T1w tells of a PET or of BOLD maps.

Both are embeddings.  In each fold the mean of the group that teaches is taken from the target's
features, and they are scaled to a spread of 1: what all people have in common is no success.  A
ridge regression with one penalty for all features predicts the rest, nested by person and family.

    embedding                  of the source
    region volumes             where embed found them
    covariates alone           age, sex, motion: columns to adjust for, and the volume of the brain
    covariates and embedding   both
    ..., sites left out        the first and the third, of people at sites that taught nothing
    people shuffled            targets dealt out anew: what chance gives

Scores: the share of the target's variance between people that is told (0 is the group mean), the
correlation over features of a person's prediction with the truth, and how often that prediction is
nearer to the own truth than to another person's of the same fold (chance is a half).  All of them
are a curve, too, of how few people teach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from neurojepa.downstream.crossval import (
    INNER,
    Plan,
    held_out,
    in_span,
    least,
    plan_folds,
    plan_sites,
    whole_families,
)
from neurojepa.downstream.features import Features, beside, design_of, plain
from neurojepa.downstream.labels import People
from neurojepa.downstream.scoring import Gain, known
from neurojepa.downstream.stats import Score, difference, of_people
from neurojepa.downstream.study_checks import SHUFFLES
from neurojepa.downstream.targets import Target
from neurojepa.downstream.tested import complete, may_test
from neurojepa.errors import DataError

ALONE, VOLUMES = "embedding", "region volumes"
WITHOUT, WITH, SHUFFLED = "covariates alone", "covariates and embedding", "people shuffled"
LEFT_OUT, WITHOUT_LEFT_OUT = f"{ALONE}, sites left out", f"{WITHOUT}, sites left out"
PAIRS = ((ALONE, WITHOUT), (WITH, WITHOUT), (ALONE, VOLUMES), (LEFT_OUT, WITHOUT_LEFT_OUT))
LEAST_PEOPLE = 10
SHOTS = (1, 2, 5, 10, 20, 50, 100)  # people who teach, of the curve
DROP = 0.1  # of r2, from folds to sites left out, that is told


@dataclass(frozen=True)
class Row:
    """Predictions and truths [n, R, T], both less the group's mean and scaled, and scores."""

    predicted: np.ndarray
    truth: np.ndarray
    scores: dict[str, Score]


@dataclass(frozen=True)
class Shot:
    """Scores where so few people teach."""

    row: str
    taught: int
    scores: dict[str, Score]


@dataclass(frozen=True)
class Transfer:
    people: People  # of the source
    rows: dict[str, Row]
    gains: list[Gain]
    features: int  # of the target
    covariates: tuple[str, ...]
    warnings: list[str]
    notes: list[str]
    shots: list[Shot]


def paired(source: People, target: People) -> tuple[People, np.ndarray, list[str]]:
    """People, or visits, with both modalities, and the target's features [n, T] of each.

    Raises
    ------
    DataError
        Fewer than ``LEAST_PEOPLE`` have both.
    """
    def names(people: People) -> list[tuple[str, str]]:
        visits = people.sessions if people.sessions is not None else np.full(len(people.ids), "")
        return list(zip(people.participant.tolist(), visits.tolist(), strict=True))

    row = {name: number for number, name in enumerate(names(target))}
    there = [(number, row[name]) for number, name in enumerate(names(source)) if name in row]
    if len(there) < LEAST_PEOPLE:
        raise DataError(f"{len(there)} people or visits have scans of both modalities, "
                        f"{LEAST_PEOPLE} are needed; scans of one visit are paired with --session")
    notes = [f"{count} with a scan of the {side} alone" for count, side in (
        (len(source.ids) - len(there), "source"), (len(target.ids) - len(there), "target"))
        if count]
    own, other = (np.array(part) for part in zip(*there, strict=True))
    people = source.take(own)
    seen = None if people.seen is None or target.seen is None else people.seen | target.seen[other]
    return replace(people, seen=seen), target.values[other].astype(float), notes


def transfer(people: People, target: np.ndarray, *, adjust: tuple[str, ...] = (),
             site: str | None = None, folds: int = 5, repeats: int = 5, allow_seen: bool = False
             ) -> Transfer:
    """Study how a target [n, T] is told from the source's embeddings of the same people.

    Parameters
    ----------
    site : column of sites that are left out one by one

    Raises
    ------
    ConfigError
        A column is not there.
    DataError
        Too few people, a target that is the same for all, or all of them were seen in pretraining.
    """
    covariates = tuple(dict.fromkeys([*adjust, "brain_ml"]))
    needed = [*covariates, *([site] if site else [])]
    there = np.all([people.column(name) != "" for name in needed], 0)
    target = target[there]
    people, notes = complete(people, needed)
    if not np.ptp(target, axis=0).any():
        raise DataError("the target's embeddings are the same for all people; is it a constant "
                        "map?")
    tested, warnings = may_test(people, "transfer", allow_seen)
    plan = plan_folds(Target("target", "regression", target[:, 0]), people.family, folds,
                      repeats).testing(tested)
    run = Runner(people, target, plan)
    design = design_of({name: people.column(name) for name in covariates})
    rows = {ALONE: run(plain(people.values))}
    if people.volumes is not None:
        rows[VOLUMES] = run(plain(people.volumes))
    rows |= {WITHOUT: run(plain(design)), WITH: run(beside(people.values, design))}
    if site:
        rows |= _left_out(run, design, people.column(site), tested)
        warnings += _drops(rows, site)
    rows[SHUFFLED] = _shuffled(people, target, Plan(plan.repeats[:1]))
    shots = [shot for name, features in ((ALONE, plain(people.values)), (WITHOUT, plain(design)))
             for shot in few_shots(run, name, features)]
    return Transfer(people, rows, run.gains(rows), target.shape[1], covariates, warnings, notes,
                    shots)


def _left_out(run: Runner, design: np.ndarray, site: np.ndarray,
              tested: np.ndarray) -> dict[str, Row]:
    """Rows of people at sites that taught nothing; none where there is one site alone.

    Raises
    ------
    DataError
        No site can be left out.
    """
    names = np.unique(site)
    if len(names) < 2:
        raise DataError(f"--site: all {len(site)} people are at {str(names[0])!r}; no site can be "
                        "left out")
    plan = plan_sites(site, run.people.family).testing(tested)
    plan = Plan([[(train, test) for train, test in plan.repeats[0] if len(
        set(run.people.family[train].tolist())) > 1]], pooled=False)
    if not plan.repeats[0]:
        raise DataError("--site: no site can be left out, as families have people at all of them "
                        f"({', '.join(names)})")
    outside = Runner(run.people, run.target, plan)
    return {LEFT_OUT: outside(plain(run.people.values)), WITHOUT_LEFT_OUT: outside(plain(design))}


def _drops(rows: dict[str, Row], site: str) -> list[str]:
    within, outside = rows[ALONE].scores["r2"], rows[LEFT_OUT].scores["r2"]
    if not within.value - outside.value > DROP:
        return []
    return [f"on a {site} that taught nothing r2 is {outside}, within folds {within}: what is told "
            "may be the site"]


def few_shots(run: Runner, name: str, features: Features) -> list[Shot]:
    """Scores where 1, 2, 5, ... people teach, as far as there are so many."""
    most = min(len(set(run.people.participant[train].tolist()))
               for folds in run.plan.repeats for train, _ in folds)
    found = []
    for number in SHOTS:
        if number < most:
            found.append(Shot(name, number, run(features, number).scores))
    return found


class Runner:
    """Predicts and scores one set of features."""

    def __init__(self, people: People, target: np.ndarray, plan: Plan) -> None:
        self.people, self.target, self.plan = people, target, plan
        self.fold = plan.folds(len(target))

    def __call__(self, features: Features, few: int | None = None) -> Row:
        """Of features; with ``few``, of so many people of those who teach, drawn anew in each fold.
        Truths stay less the mean of all of them, so not to know it costs R2."""
        target, family, size = self.target, self.people.family, self.target.shape[1]
        rng = np.random.default_rng(0)

        def read(train: np.ndarray, test: np.ndarray, taught: np.ndarray,
                 tested: np.ndarray) -> np.ndarray:
            mean, sd = target[train].mean(0), target[train].std(0)
            sd = np.where(sd > 1e-9 * max(sd.max(), 1e-30), sd, np.inf)
            truth = (target[train] - mean) / sd
            if few is not None:  # features are those of the few alone
                person = self.people.participant[train]  # each with all visits
                chosen = np.isin(person, rng.permutation(np.unique(person))[:few])
                train, truth = train[chosen], truth[chosen]
                taught, tested = features(train, test)
            if few is not None and len(set(family[train].tolist())) < 2:
                told = np.repeat(truth.mean(0, keepdims=True), len(test), 0)  # no penalty by one
            else:
                told = ridge(taught, tested, truth, family[train])
            return np.stack([told, (target[test] - mean) / sd], -1)

        both = held_out(self.plan, features, len(target), read, (size, 2))
        predicted, truth = both[..., 0], both[..., 1]
        whom = np.flatnonzero(known(predicted))
        return Row(predicted, truth, {
            name: of_people(value, whom, self.people.participant, family)
            for name, value in self.scorers(predicted, truth).items()})

    def scorers(self, predicted: np.ndarray,
                truth: np.ndarray) -> dict[str, Callable[[np.ndarray], float]]:
        """Each score by name, of people drawn."""
        rest = np.square(truth - predicted).sum((1, 2))
        whole = np.square(truth).sum((1, 2))
        alike = correlation(predicted, truth).mean(1)
        own = self._own(predicted, truth)
        return {"r2": lambda drawn: float(1 - rest[drawn].sum() / whole[drawn].sum()),
                "correlation": lambda drawn: float(np.nanmean(alike[drawn])),
                "own_is_nearer": lambda drawn: float(np.nanmean(own[drawn]))}

    def _own(self, predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """[n]: share of the others of a person's fold whose truth is less like the prediction."""
        found = np.full(self.fold.shape, np.nan)
        for r in range(len(self.plan.repeats)):
            for fold in np.unique(self.fold[self.fold[:, r] >= 0, r]):
                here = np.flatnonzero((self.fold[:, r] == fold) & known(predicted))
                like = _unit(predicted[here, r]) @ _unit(truth[here, r]).T
                mine = np.diag(like)[:, None]
                person = self.people.participant[here]
                others = person[:, None] != person  # not other visits of the same person
                better = ((mine > like) + 0.5 * (mine == like)) * others
                with np.errstate(invalid="ignore"):
                    found[here, r] = better.sum(1) / others.sum(1)
        seen = np.isfinite(found)
        return np.where(seen.any(1), np.where(seen, found, 0).sum(1) / np.maximum(seen.sum(1), 1),
                        np.nan)

    def gains(self, rows: dict[str, Row]) -> list[Gain]:
        """Paired differences of r2."""
        found = []
        for row, over in PAIRS:
            if row in rows and over in rows:
                one, other = (self.scorers(rows[name].predicted, rows[name].truth)["r2"]
                              for name in (row, over))

                def better(drawn: np.ndarray, one: Callable[[np.ndarray], float] = one,
                           other: Callable[[np.ndarray], float] = other) -> float:
                    return one(drawn) - other(drawn)

                whom = np.flatnonzero(known(rows[row].predicted) & known(rows[over].predicted))
                found.append(Gain(row, over, *difference(
                    better, whom, self.people.participant, self.people.family)))
        return found


def _shuffled(people: People, target: np.ndarray, plan: Plan) -> Row:
    """Targets dealt out anew, a few times over: mean, least and most of their scores."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(SHUFFLES):
        dealt = target[rng.permutation(len(target))]
        rows.append(Runner(people, dealt, plan)(plain(people.values)))
    scores = {}
    for name, first in rows[0].scores.items():
        values = [row.scores[name].value for row in rows]
        scores[name] = replace(first, value=float(np.mean(values)), low=min(values),
                               high=max(values))
    return Row(rows[0].predicted, rows[0].truth, scores)


def correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Over the last axis; 0 where one side does not vary, as a prediction of the mean alone."""
    return (_unit(one) * _unit(other)).sum(-1)


def _unit(values: np.ndarray) -> np.ndarray:
    """Less their mean over the last axis, and of length 1; 0 where they do not vary."""
    rest = values - values.mean(-1, keepdims=True)
    size = np.sqrt(np.square(rest).sum(-1, keepdims=True))
    return rest / np.where(size > 0, size, 1)


def ridge(taught: np.ndarray, tested: np.ndarray, truth: np.ndarray,
          family: np.ndarray) -> np.ndarray:
    """[m, T] of ``tested`` [m, D]; one penalty for all features of truth [n, T], chosen by folds of
    families."""
    taught, tested = in_span(taught, tested)
    folds = max(2, min(INNER, len(set(family.tolist()))))
    splits = list(whole_families("regression", truth[:, 0], family, folds, seed=0))

    def losses(penalties: np.ndarray) -> np.ndarray:
        found = np.zeros(len(penalties))
        for train, test in splits:
            told = _ridges(taught[train], taught[test], truth[train], penalties)
            found += np.square(told - truth[test]).sum((1, 2))
        return found

    return _ridges(taught, tested, truth, np.array([least(losses)]))[0]


def _ridges(taught: np.ndarray, tested: np.ndarray, truth: np.ndarray,
            penalties: np.ndarray) -> np.ndarray:
    """[penalties, m, T] from one decomposition."""
    mean, middle = taught.mean(0), truth.mean(0)
    left, singular, right = np.linalg.svd(taught - mean, full_matrices=False)
    along, seen = left.T @ (truth - middle), (tested - mean) @ right.T
    shrink = singular / (singular**2 + penalties[:, None])
    return middle + np.einsum("mk,pk,kt->pmt", seen, shrink, along, optimize=True)
