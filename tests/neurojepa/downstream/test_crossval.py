"""Predictions of people who taught nothing, and their scores."""

from __future__ import annotations

import numpy as np
import pytest

from neurojepa.downstream import crossval, targets
from neurojepa.downstream.crossval import nearest, plan_folds, plan_sites, predict
from neurojepa.downstream.features import plain
from neurojepa.downstream.scoring import Runner
from neurojepa.downstream.targets import scorers, target_of
from neurojepa.errors import DataError
from tests.helpers.embedded import cohort, people


def test_families_stay_whole_and_everyone_is_tested_once_a_repeat() -> None:
    family = np.repeat(np.arange(30), 3).astype(str)
    for truth in (np.repeat(np.arange(30) % 2, 3), np.random.default_rng(0).normal(size=90)):
        target = target_of("x", truth.astype(str))
        for folds in plan_folds(target, family, 5, 2).repeats:
            assert sorted(np.concatenate([test for _, test in folds])) == list(range(90))
            assert not [1 for train, test in folds if set(family[train]) & set(family[test])]
    site = np.array(["a", "b", "c"] * 30)  # every family is at all of them
    assert all(len(train) == 0 for train, _ in plan_sites(site, family).repeats[0])


def test_too_few_of_a_class_names_the_cure() -> None:
    target = target_of("dx", np.array(["1"] * 2 + ["0"] * 20))
    with pytest.raises(DataError, match=r"class '1' has 2 people .*--cv 5x2"):
        plan_folds(target, np.arange(22).astype(str), 5, 5)


def test_the_span_of_who_teaches_loses_nothing() -> None:
    """Many features: the same predictions as without rotation."""
    rng = np.random.default_rng(0)
    taught, tested = rng.normal(size=(20, 50)), rng.normal(size=(7, 50))
    truth = taught[:, 0] + rng.normal(size=20)
    _, _, basis = np.linalg.svd(taught, full_matrices=False)
    for fit, y in ((crossval._ridge, truth), (crossval.logistic, (truth > 0).astype(float))):
        whole = fit(taught, y, tested, np.array([0.1, 3.0]), 2)
        rotated = fit(taught @ basis.T, y, tested @ basis.T, np.array([0.1, 3.0]), 2)
        assert np.allclose(whole, rotated, atol=1e-3)
    from sklearn.linear_model import Ridge
    assert np.allclose(crossval._ridge(taught, truth, tested, np.array([3.0]), 0)[0],
                       Ridge(3.0).fit(taught, truth).predict(tested))


def test_the_grid_grows_where_its_best_value_lies_at_an_edge() -> None:
    rng = np.random.default_rng(0)
    family, noise = np.arange(60).astype(str), rng.normal(size=(60, 5))
    truth = rng.normal(size=60)
    target = target_of("x", truth.astype(str))
    best = crossval._best_penalty(target, crossval._ridge, 100 * noise, truth, family)
    assert best > crossval.PENALTIES.max()  # nothing to be learnt
    exact = noise @ rng.normal(size=5)
    target = target_of("x", exact.astype(str))
    assert crossval._best_penalty(target, crossval._ridge, noise, exact, family) < (
        crossval.PENALTIES.min())


def test_levels_are_probabilities_in_order() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 3))
    truth = np.digitize(x[:, 0] + 0.3 * rng.normal(size=90), [-0.5, 0.5]).astype(float)
    found = crossval._ordinal(x, truth, x, np.array([0.1]), 3)[0]
    assert np.allclose(found.sum(1), 1) and (found >= 0).all()
    assert scorers("ordinal")["rank_correlation"](truth, found[:, None]) > 0.8


def test_shuffled_labels_give_a_half() -> None:
    values, truth = cohort(60, signal=0)
    whom, scores = people(values), []
    for seed in range(12):
        target = target_of("x", np.random.default_rng(seed).permutation(truth).astype(str))
        plan = plan_folds(target, whom.family, 3, 1)
        found = predict(target, plain(values), plan, whom.family)
        scores.append(Runner(target, whom, plan).value("auroc", found, np.arange(60)))
    assert abs(np.mean(scores) - 0.5) < 0.06


@pytest.mark.parametrize("label", ["dx", "three", "number"])
def test_nearest_people_tell_what_no_line_does(label: str) -> None:
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 2 * np.pi, 200)
    ring = np.arange(200) % 2  # an inner and an outer one
    values = (1 + 2 * ring)[:, None] * np.c_[np.cos(angle), np.sin(angle)]
    truth = {"dx": ring.astype(str), "three": np.where(ring, "c", np.where(angle > 3, "a", "b")),
             "number": ring * 10 + angle}[label]
    target, family = target_of(label, truth.astype(str)), np.arange(200).astype(str)
    plan = plan_folds(target, family, 4, 1)
    by_line, by_people = (predict(target, plain(values), plan, family, model)
                          for model in (crossval.linear, nearest))
    score = next(iter(scorers(target.kind).values()))
    assert score(target.truth, by_people) > max(0.9, score(target.truth, by_line) + 0.1)
    assert target.kind == "regression" or ((by_people > 0).all() and (by_people < 1).all())


def test_neighbours_of_the_own_family_choose_nothing() -> None:
    """Twins with equal features and labels: their likeness tells of nobody else."""
    rng = np.random.default_rng(0)
    family = np.repeat(np.arange(40), 2).astype(str)
    values, truth = np.repeat(rng.normal(size=(40, 4)), 2, 0), np.repeat(rng.normal(size=40), 2)
    target = target_of("x", truth.astype(str))
    found = nearest(target, values, rng.normal(size=(5, 4)), truth, family)
    assert np.abs(found - truth.mean()).max() < 0.6 * truth.std()  # not the nearest


def test_sensitivity_by_hand() -> None:
    score = scorers("binary")[targets.SENSITIVITY]
    truth = np.r_[np.zeros(10), np.ones(4)]
    predicted = np.r_[np.arange(10) / 10, 0.1, 0.8, 0.85, 0.95]  # 9 of 10 lie at .8 or below
    assert score(truth, predicted[:, None]) == 0.5
    assert np.isnan(score(np.ones(4), predicted[:4, None]))


def test_scores_by_hand() -> None:
    truth, predicted = np.array([0, 0, 1, 1.0]), np.array([0.1, 0.6, 0.6, 0.9])[:, None]
    binary = {name: scorer(truth, predicted) for name, scorer in scorers("binary").items()}
    assert binary["auroc"] == 7 / 8 and binary["balanced_accuracy"] == 0.75
    assert binary["brier"] == pytest.approx((0.01 + 0.36 + 0.16 + 0.01) / 4)
    numbers = scorers("regression")
    assert numbers["r2"](truth, truth[:, None]) == 1
    assert numbers["mean_absolute_error"](truth, predicted) == pytest.approx(0.3)
    certain = np.eye(3)[[0, 1, 2, 2]][:, None]
    classes = {name: scorer(np.array([0, 1, 2, 2.0]), certain)
               for name, scorer in scorers("multiclass").items()}
    assert classes == {"auroc": 1, "balanced_accuracy": 1, "brier": 0}
