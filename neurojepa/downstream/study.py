"""What embeddings tell of a label, beside what they must be compared with.

    embedding                    repeated nested cross-validation by person and family
    embedding, adjusted          less what a line in the covariates to adjust for tells of it
    covariates alone             age, sex, volume of the brain, site
    covariates and embedding     and its gain over the row above, paired
    site alone, sites left out   whether it is the site that is told
    labels shuffled              what chance gives

Intervals resample families, then people within them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from neurojepa.downstream.crossval import (
    Features,
    Plan,
    adjusted,
    beside,
    design_of,
    moved,
    plain,
    plan_folds,
    plan_sites,
    predict,
)
from neurojepa.downstream.labels import People, suspected_codes
from neurojepa.downstream.stats import Score, interval, resamples
from neurojepa.downstream.targets import Target, classes_of, scorers, target_of
from neurojepa.errors import DataError

DRAWS = 300
SHUFFLES = 5
WITH, WITHOUT, ALONE = "covariates and embedding", "covariates alone", "embedding"
LEFT_OUT, SITE, SHUFFLED = "embedding, sites left out", "site alone", "labels shuffled"
CHANCE = {"auroc": 0.5, "rank_correlation": 0.0, "r2": 0.0}  # of the first score of each kind
DROP = 0.1  # of the first score, from folds to sites left out, that is told


@dataclass(frozen=True)
class Row:
    """Predictions of one set of features, and their scores."""

    predicted: np.ndarray  # [n, R] or [n, R, K], nan where a person was not tested
    scores: dict[str, Score]


@dataclass(frozen=True)
class Study:
    """All about one label; n people have it."""

    target: Target
    people: People
    rows: dict[str, Row]
    gain: Score | None  # of the first score, by the embedding beside the covariates
    site_told: Score | None  # balanced accuracy of telling the site from the embedding
    num_sites: int  # told apart so
    covariates: tuple[str, ...]
    adjust: tuple[str, ...]
    warnings: list[str]
    notes: list[str]  # who was left out and why

    @property
    def metric(self) -> str:
        """The first score's name."""
        return next(iter(scorers(self.target.kind)))


@dataclass(frozen=True)
class Design:
    """How labels are studied, alike for all of them."""

    folds: int = 5
    repeats: int = 5
    adjust: tuple[str, ...] = ()
    site: str | None = None
    positive: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    allow_seen: bool = False

    @property
    def covariates(self) -> tuple[str, ...]:
        """Columns that alone are compared with the embedding."""
        return tuple(dict.fromkeys([*self.adjust, "brain_ml", *([self.site] if self.site else [])]))


def study(people: People, label: str, design: Design) -> Study:
    """Study one label.

    Raises
    ------
    ConfigError
        A column is not there, or the positive class is not named.
    DataError
        One value alone, too few people of a class, or all of them were seen in pretraining.
    """
    people, notes = _with_label(people, label, design)
    target = target_of(label, people.column(label), design.positive, design.order)
    if target.kind == "regression":
        notes += suspected_codes(label, people.column(label))
    tested = (np.ones(len(people.ids), bool) if design.allow_seen or people.seen is None
              else ~people.seen)
    warnings = _seen(people, label, design.allow_seen)
    plan = plan_folds(target, people.family, design.folds, design.repeats).testing(tested)
    covariates = design_of({name: people.column(name) for name in design.covariates},
                           [design.site])
    run = _Runner(target, people, plan)
    rows = {ALONE: run(plain(people.values))}
    if design.adjust:
        to_adjust = design_of({name: people.column(name) for name in design.adjust},
                              [design.site])
        rows[f"embedding, adjusted for {', '.join(design.adjust)}"] = run(
            adjusted(people.values, to_adjust))
    rows |= {WITHOUT: run(plain(covariates)), WITH: run(beside(people.values, covariates))}
    told, sites = None, 0
    if design.site:
        site = people.column(design.site)
        told, sites = _site_told(people, site, design.folds)
        if len(set(site.tolist())) > 1:
            rows[SITE] = run(plain(design_of({design.site: site}, [design.site])))
            rows[LEFT_OUT] = _Runner(target, people, plan_sites(
                site, people.family).testing(tested), site)(plain(people.values))
    rows[SHUFFLED] = _shuffled(target, people, design, tested)
    found = Study(target, people, rows, run.gain(rows), told, sites,
                  design.covariates, design.adjust, warnings, notes)
    warnings += _confounds(found)
    return found


def _with_label(people: People, label: str, design: Design) -> tuple[People, list[str]]:
    """People who have the label and all covariates, and how many have not."""
    notes = []
    for name in dict.fromkeys([label, *design.covariates]):
        known = people.column(name) != ""
        if not known.all():
            notes.append(f"{int((~known).sum())} people without {name}")
            people = people.take(known)
    return people, notes


def _seen(people: People, label: str, allowed: bool) -> list[str]:
    """Who was seen in pretraining, and what follows."""
    if people.seen is None:
        return ["who was in the pretraining of the weights is not known, as they were exported "
                "without its feed: if people of this table were, scores may be too good"]
    count = int(people.seen.sum())
    if not count:
        return []
    if allowed:
        return [f"{count} of {len(people.ids)} people were seen in the pretraining of the weights "
                "and tested all the same (--allow-seen): scores may be too good"]
    if count == len(people.ids):
        raise DataError(f"label {label!r}: all {count} people were seen in the pretraining of the "
                        "weights, so nobody is left to test; bring others, or add --allow-seen, "
                        "which stands in the report")
    return [f"{count} of {len(people.ids)} people were seen in the pretraining of the weights: "
            "they teach, and are not tested"]


class _Runner:
    """Predicts and scores; with ``site``, scores are means over sites of those within each."""

    def __init__(self, target: Target, people: People, plan: Plan,
                 site: np.ndarray | None = None) -> None:
        self.target, self.people, self.plan, self.site = target, people, plan, site

    def __call__(self, features: Features) -> Row:
        predicted = predict(self.target, features, self.plan, self.people.family)
        known = _known(predicted)
        return Row(predicted, {name: self._score(partial(self._value, name, predicted), known)
                               for name in scorers(self.target.kind)})

    def gain(self, rows: dict[str, Row]) -> Score | None:
        """By how much the first score is better with the embedding beside the covariates."""
        if WITH not in rows:
            return None
        both = [rows[name].predicted for name in (WITH, WITHOUT)]
        metric = next(iter(scorers(self.target.kind)))
        return self._score(lambda drawn: (self._value(metric, both[0], drawn)
                                          - self._value(metric, both[1], drawn)),
                           _known(both[0]) & _known(both[1]))

    def _score(self, value: Callable[[np.ndarray], float], known: np.ndarray) -> Score:
        chosen = np.flatnonzero(known)
        who = self.people.participant[chosen]
        if not len(chosen):
            return Score(np.nan, np.nan, np.nan, 0, 0)
        drawn = [value(chosen[each])
                 for each in resamples(who, self.people.family[chosen], DRAWS)]
        return Score(value(chosen), *interval(drawn), len(chosen), len(set(who.tolist())))

    def _value(self, metric: str, predicted: np.ndarray, drawn: np.ndarray) -> float:
        truth, scores, weights = self.target.truth, [], []
        site = np.zeros(len(truth)) if self.site is None else self.site
        for name in np.unique(site[drawn]):
            part = drawn[site[drawn] == name]
            if _varies(truth[part]):
                found = predicted[part]
                if metric == "balanced_accuracy":  # at the threshold that predictions are made for
                    taught = truth if self.site is None else truth[site != name]
                    found = moved(self.target, found, taught, truth[part])
                scores.append(scorers(self.target.kind)[metric](truth[part], found))
                weights.append(len(part))
        return float(np.average(scores, weights=weights)) if scores else float("nan")


def _varies(truth: np.ndarray) -> bool:
    return len(truth) > 1 and np.ptp(truth) > 0


def _known(predicted: np.ndarray) -> np.ndarray:
    """[n] bool: whom every repeat predicted."""
    return np.isfinite(predicted).all(axis=tuple(range(1, predicted.ndim)))


def _shuffled(target: Target, people: People, design: Design, tested: np.ndarray) -> Row:
    """Labels that were dealt out anew, a few times over: mean, least and most of their scores."""
    rng, parts, truths = np.random.default_rng(0), [], []
    one_each = np.arange(len(people.ids)).astype(str)  # dealt labels know no families
    for _ in range(SHUFFLES):
        dealt = replace(target, truth=rng.permutation(target.truth))
        plan = plan_folds(dealt, one_each, design.folds, 1).testing(tested)
        parts.append(predict(dealt, plain(people.values), plan, one_each))
        truths.append(dealt.truth)
    scores = {}
    for name, scorer in scorers(target.kind).items():
        values = [scorer(truth[known], part[known])
                  for truth, part in zip(truths, parts, strict=True)
                  if (known := _known(part)).any() and _varies(truth[known])]
        scores[name] = Score(float(np.mean(values)) if values else np.nan,
                             min(values, default=np.nan), max(values, default=np.nan),
                             len(target.truth), len(set(people.participant.tolist())))
    return Row(parts[0], scores)


def _site_told(people: People, site: np.ndarray, folds: int) -> tuple[Score | None, int]:
    """How well sites [n] are told from the embedding, and how many: those of enough families."""
    large = [name for name in np.unique(site) if len(set(people.family[site == name])) >= folds]
    if len(large) < 2:
        return None, len(large)
    some = np.isin(site, large)
    target, people = classes_of("site", site[some]), people.take(some)
    plan = plan_folds(target, people.family, folds, 1)
    told = _Runner(target, people, plan)(plain(people.values))
    return told.scores["balanced_accuracy"], len(large)


def _confounds(found: Study) -> list[str]:
    """What speaks for the site, and not the label, being told."""
    told, metric = [], found.metric
    if SITE not in found.rows:
        return []
    alone, site, left_out = (found.rows[name].scores[metric] for name in (ALONE, SITE, LEFT_OUT))
    chance = CHANCE.get(metric, 0.5)
    if site.low > chance:
        is_read = found.site_told and found.site_told.low > 1 / found.num_sites
        read = (f", and the embedding tells the site (balanced accuracy {found.site_told})"
                if is_read else "")
        told.append(f"{found.target.name} goes with the site: the site alone gives {metric} "
                    f"{site}{read}")
    if np.isfinite(left_out.value) and alone.value - left_out.value > DROP:
        told.append(f"on sites that taught nothing {metric} is {left_out}, within folds {alone}: "
                    "what is told may be the site")
    return told


def record_of(found: Study) -> dict[str, Any]:
    """One label of results.json."""
    return {
        "kind": found.target.kind, "classes": list(found.target.classes),
        "people": len(set(found.people.participant.tolist())), "rows": len(found.people.ids),
        "counts": {name: int((found.target.truth == k).sum())
                   for k, name in enumerate(found.target.classes)},
        "covariates": list(found.covariates), "adjusted_for": list(found.adjust),
        "scores": {name: {metric: value.as_dict() for metric, value in row.scores.items()}
                   for name, row in found.rows.items()},
        "gain_over_covariates": found.gain.as_dict() if found.gain else None,
        "site": {"number": found.num_sites, "told_from_embedding":
                 found.site_told.as_dict() if found.site_told else None},
        "warnings": found.warnings, "notes": found.notes}


def predictions_of(studies: Sequence[Study]) -> list[list[str]]:
    """Rows of predictions.csv, with a header: mean over repeats, under the user's own ids."""
    lines = [["participant_id", "label", "truth", "predicted", "probability"]]
    for found in studies:
        target, predicted = found.target, found.rows[ALONE].predicted
        for number in np.flatnonzero(_known(predicted)):
            mean = predicted[number].mean(0)
            if target.kind == "regression":
                told = [f"{target.truth[number]:g}", f"{mean:g}", ""]
            else:
                each = np.array([1 - mean, mean]) if target.kind == "binary" else mean
                told = [target.classes[int(target.truth[number])],
                        target.classes[int(each.argmax())], " ".join(
                            f"{name}={value:.4f}" for name, value in zip(target.classes, each,
                                                                         strict=True))]
            lines.append([str(found.people.ids[number]), target.name, *told])
    return lines
