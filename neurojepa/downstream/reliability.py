"""How alike rescans are: of features, of what is read from them, and of region volumes beside.

Scans of one visit, or of one person with ``across_visits``, are rescans.  The intraclass
correlation is ICC(1,1), of a one-way analysis of variance with unequal numbers of scans (Shrout &
Fleiss 1979): the share of variance that lies between people, where every difference between rescans
counts, those of sites too.  Of many features at once sums of squares are added up first (I2C2, Shou
et al. 2013).  Readouts are predicted by people who taught nothing, as in study.py.

With two sites or more all of it is told again after ComBat, fitted in each fold on the other
people, and so is how well sites are told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from neurojepa.downstream.crossval import Plan, predict
from neurojepa.downstream.features import Features, harmonised, plain
from neurojepa.downstream.harmonise import Combat
from neurojepa.downstream.labels import People
from neurojepa.downstream.scoring import known
from neurojepa.downstream.stats import Score, of_people
from neurojepa.downstream.study_checks import large_sites, site_told
from neurojepa.downstream.table import vectors
from neurojepa.downstream.targets import Target, target_of
from neurojepa.downstream.tested import of_seen
from neurojepa.errors import DataError

FOLDS = 5


@dataclass(frozen=True)
class Measure:
    """How alike rescans are in one set of features [n, F], or in one readout (F = 1)."""

    name: str
    alike: bool  # after ComBat
    icc: Score  # of all features at once
    features: np.ndarray  # float64 [F], ICC of each
    same: Score | None  # share of scans whose nearest other scan is a rescan; None of readouts
    site: Score | None  # balanced accuracy of telling the site; None of readouts


@dataclass(frozen=True)
class Reliability:
    measures: list[Measure]
    scans: int  # of rescanned visits or people
    units: int  # visits or people with rescans
    people: int
    sites: list[str]
    told_apart: int  # sites of enough families to be told
    readouts: dict[str, np.ndarray]  # float64 [n] of each label, nan for scans without it
    warnings: list[str]


def scans_of(table: pa.Table, volumes: Mapping[str, np.ndarray] | None,
             across_visits: bool) -> tuple[People, np.ndarray, list[str]]:
    """Scans that were repeated [n], the unit [n] of each whose scans are rescans, and notes.

    Raises
    ------
    DataError
        Fewer than two units have two scans.
    """
    person, session = (np.array(table[name].to_pylist()) for name in ("participant", "session"))
    unit = person if across_visits else np.char.add(np.char.add(person, "/"), session)
    names, place, number = np.unique(unit, return_inverse=True, return_counts=True)
    chosen = np.flatnonzero(number[place] > 1)
    if (number > 1).sum() < 2:
        what = "people" if across_visits else "visits"
        raise DataError(f"{int((number > 1).sum())} of {len(names)} {what} have two scans; "
                        "reliability needs two" + ("" if across_visits else (
                            "; where people were scanned again as another visit, add "
                            "--across-visits")))
    rows = table.take(pa.array(chosen))
    scans = rows["scan_id"].to_pylist()
    measured = volumes is not None and set(scans) <= set(volumes)
    notes = [f"{len(unit) - len(chosen)} scans without a rescan"] if len(chosen) < len(unit) else []
    if volumes is not None and not measured:
        notes.append(f"region volumes are not compared with: {len(set(scans) - set(volumes))} of "
                     f"{len(scans)} scans have none in volumes.csv")
    seen = rows["seen"].to_pylist() if "seen" in rows.column_names else [None]
    return People(
        values=vectors(rows), ids=np.array(scans), participant=person[chosen],
        family=np.array(rows["family"].to_pylist()),
        seen=None if None in seen else np.array(seen),
        columns={"site": np.array([name or "" for name in rows["site"].to_pylist()])}, notes=notes,
        volumes=np.stack([volumes[scan] for scan in scans]) if measured and volumes else None,
        sessions=session[chosen]), unit[chosen], notes


def reliability(scans: People, unit: np.ndarray, labels: Mapping[str, np.ndarray],
                positive: tuple[str, ...] = (), order: tuple[str, ...] = ()) -> Reliability:
    """How alike rescans are.

    Parameters
    ----------
    scans, unit : as ``scans_of`` gives them
    labels : str [n], of scans, "" where missing; each is read out
    positive, order : as target_of takes them

    Raises
    ------
    DataError
        A label cannot be told, or fewer families than folds have it.
    """
    site = scans.columns["site"]
    plan = _folds(scans.family)
    several = len(set(site.tolist())) > 1 and "" not in site
    ways: list[tuple[bool, Callable[[np.ndarray], Features]]] = [(False, plain)]
    if several:
        ways.append((True, lambda values: harmonised(values, site)))
    measures = []
    for name, values in (("embedding", scans.values), ("region volumes", scans.volumes)):
        if values is None:
            continue
        for alike, features in ways:
            shown = _alike(values, site, plan) if alike else values
            measures.append(Measure(
                name, alike, *_icc(shown, unit, scans), same=_same(shown, unit, scans),
                site=site_told(scans, site, features(values), FOLDS) if several else None))
    readouts = {}
    for label, values in labels.items():
        whom = np.flatnonzero(values != "")
        target = target_of(label, values[whom], positive, order)
        some = scans.take(whom)
        for alike, _ in ways:
            there = site[whom]
            read = (harmonised(some.values, there) if alike else plain(some.values))
            predicted = predict(target, read, _folds(some.family), some.family)
            if not known(predicted).all():
                raise DataError(f"label {label!r}: one of its values is known for people of a "
                                "single fold; bring more people, or fewer classes")
            told = _numbers(target, predicted)
            icc, features_icc = _icc(told[:, None], unit[whom], some)
            measures.append(Measure(f"readout of {label}", alike, icc, features_icc, None, None))
            if not alike:
                readouts[label] = np.full(len(values), np.nan)
                readouts[label][whom] = told
    return Reliability(measures, len(unit), len(set(unit.tolist())),
                       len(set(scans.participant.tolist())), sorted(set(site.tolist())),
                       len(large_sites(scans, site, FOLDS)) if several else 0, readouts,
                       of_seen(scans))


def with_labels(scans: People, people: People, names: list[str]) -> dict[str, np.ndarray]:
    """str [n], labels of scans by those of their people; "" where there are none."""
    row = {person: number for number, person in enumerate(people.participant.tolist())}
    return {name: np.array([people.column(name)[row[person]] if person in row else ""
                            for person in scans.participant.tolist()]) for name in names}


def _numbers(target: Target, predicted: np.ndarray) -> np.ndarray:
    """[n]: mean over repeats of a number, a probability, a level; of classes that of the first."""
    mean = predicted.mean(1)
    if mean.ndim == 1:
        return mean
    return mean @ np.arange(mean.shape[1]) if target.kind == "ordinal" else mean[:, 0]


def _folds(family: np.ndarray) -> Plan:
    """Folds of whole families, each scan tested once."""
    from sklearn.model_selection import GroupKFold

    number = len(set(family.tolist()))
    if number < 2:
        raise DataError("all rescans are of one family; reliability needs two to tell between")
    split = GroupKFold(min(FOLDS, number), shuffle=True, random_state=0)
    return Plan([list(split.split(family[:, None], groups=family))])


def _alike(values: np.ndarray, site: np.ndarray, plan: Plan) -> np.ndarray:
    """Features after ComBat, each scan's by what was fitted on other families."""
    found, none = values.astype(float), np.zeros((len(values), 0))
    for train, test in plan.repeats[0]:
        found[test] = Combat.fit(values[train], site[train], none[train]).apply(
            values[test], site[test], none[test])
    return found


# ---- intraclass correlation ----------------------------------------------------------------------

def _icc(values: np.ndarray, unit: np.ndarray, scans: People) -> tuple[Score, np.ndarray]:
    """Of all features at once, with an interval over families and people; and of each."""
    names, first, place, number = np.unique(unit, return_index=True, return_inverse=True,
                                            return_counts=True)
    values = values.astype(float)
    mean = np.zeros((len(names), values.shape[1]))
    np.add.at(mean, place, values)
    mean /= number[:, None]
    within = np.zeros_like(mean)
    np.add.at(within, place, np.square(values - mean[place]))

    def squares(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Mean squares between and within units, of each feature, and their mean number of scans.
        """
        count = number[drawn].astype(float)
        grand = count @ mean[drawn] / count.sum()
        between = count @ np.square(mean[drawn] - grand) / (len(drawn) - 1)
        rest = within[drawn].sum(0) / (count.sum() - len(drawn))
        return between, rest, (count.sum() - np.square(count).sum() / count.sum()) / (
            len(drawn) - 1)

    def together(drawn: np.ndarray) -> float:
        between, rest, scans_each = squares(drawn)
        return float(_ratio(between.sum(), rest.sum(), scans_each))

    who, families = scans.participant[first], scans.family[first]
    score = of_people(together, np.arange(len(names)), who, families)
    return replace(score, num_scans=len(unit)), _ratio(*squares(np.arange(len(names))))


def _ratio(between: np.ndarray, within: np.ndarray, number: float) -> np.ndarray:
    whole = between + (number - 1) * within
    return np.where(whole > 0, (between - within) / np.where(whole > 0, whole, 1), np.nan)


def _same(values: np.ndarray, unit: np.ndarray, scans: People) -> Score:
    """Share of scans whose nearest other one, over standardised features, is a rescan."""
    sd = values.std(0)
    z = (values[:, sd > 0] - values.mean(0)[sd > 0]) / sd[sd > 0]
    distance = np.square(z).sum(1)[:, None] - 2 * z @ z.T + np.square(z).sum(1)
    np.fill_diagonal(distance, np.inf)
    right = (unit[distance.argmin(1)] == unit).astype(float)
    return of_people(lambda drawn: float(right[drawn].mean()), np.arange(len(unit)),
                     scans.participant, scans.family)
