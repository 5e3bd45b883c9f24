"""Scores by the folds of a plan: who is compared with whom, and what chance gives."""

from __future__ import annotations

import numpy as np
import pytest

from neurojepa.downstream.crossval import Plan, predict
from neurojepa.downstream.features import design_of, plain
from neurojepa.downstream.scoring import Runner
from neurojepa.downstream.targets import Target, scorers
from tests.helpers.embedded import people

EVERYONE = np.arange(60)


def shares(target: Target, taught: np.ndarray, tested: np.ndarray, truth: np.ndarray,
           family: np.ndarray) -> np.ndarray:
    """A line by a little ridge, as a share of positives or a number: quick."""
    middle = taught.mean(0)
    line = np.linalg.solve((taught - middle).T @ (taught - middle) + np.eye(taught.shape[1]),
                           (taught - middle).T @ (truth - truth.mean()))
    found = truth.mean() + (tested - middle) @ line
    return np.clip(found, 0.01, 0.99) if target.kind == "binary" else found


def plan_of(truth: np.ndarray, rng: np.random.Generator) -> Plan:
    """Five folds of equal shares of each class."""
    fold = np.empty(60, int)
    fold[np.lexsort((rng.random(60), truth))] = EVERYONE % 5
    return Plan([[(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(5)]])


FEATURES = {
    "site": lambda rng: design_of({"site": rng.permutation(np.repeat(["x", "y", "z"], 20))}),
    "sex": lambda rng: design_of({"sex": rng.permutation(np.repeat(["F", "M"], 30))}),
    "age": lambda rng: rng.normal(size=(60, 1)),
    "embedding": lambda rng: rng.normal(size=(60, 16))}


@pytest.mark.parametrize("name", FEATURES)
def test_labels_without_a_signal_give_a_half_whatever_is_read(name: str) -> None:
    """Pooled folds do not: site and sex lie far below."""
    rng, scores, pooled = np.random.default_rng(0), [], []
    for _ in range(250):
        truth = rng.permutation(EVERYONE % 2).astype(float)
        target, values = Target("dx", "binary", truth, ("0", "1")), FEATURES[name](rng)
        plan, whom = plan_of(truth, rng), people(values)
        found = predict(target, plain(values), plan, whom.family, shares)
        scores.append(Runner(target, whom, plan).value("auroc", found, EVERYONE))
        pooled.append(scorers("binary")["auroc"](truth, found))
    assert abs(np.mean(scores) - 0.5) < 0.015
    if name in ("site", "sex"):
        assert np.mean(pooled) < 0.475


def test_numbers_without_a_signal_have_no_rank_correlation() -> None:
    rng, scores, pooled = np.random.default_rng(1), [], []
    for _ in range(250):
        truth, values = rng.normal(size=60), FEATURES["site"](rng)
        target, whom = Target("iq", "regression", truth), people(values)
        plan = plan_of(np.zeros(60), rng)
        found = predict(target, plain(values), plan, whom.family, shares)
        scores.append(Runner(target, whom, plan).value("rank_correlation", found, EVERYONE))
        pooled.append(scorers("regression")["rank_correlation"](truth, found))
    assert abs(np.mean(scores)) < 0.03 and np.mean(pooled) < np.mean(scores) - 0.02


def runner(truth: list[float], test: list[list[int]], pooled: bool = True) -> Runner:
    number = np.arange(len(truth))
    plan = Plan([[(np.setdiff1d(number, part), np.array(part)) for part in test]], pooled)
    return Runner(Target("dx", "binary", np.array(truth), ("0", "1")),
                  people(np.zeros((len(truth), 1))), plan)


def test_ranks_are_of_people_of_one_fold_and_other_scores_of_all() -> None:
    """By hand: each fold ranks its two people right, and one lies above the other."""
    run = runner([0, 1, 0, 1], [[0, 1], [2, 3]])
    predicted, everyone = np.array([[0.1], [0.2], [0.8], [0.9]]), np.arange(4)
    assert run.value("auroc", predicted, everyone) == 1
    assert scorers("binary")["auroc"](run.target.truth, predicted) == 0.75
    assert run.value("brier", predicted, everyone) == pytest.approx((.01 + .64 + .64 + .01) / 4)
    assert run.value("auprc", predicted, everyone) == pytest.approx((1 + 2 / 3) / 2)
    # drawn twice, a person is still of the own fold; a fold of one class says nothing
    assert run.value("auroc", predicted[::-1], np.array([0, 0, 1, 2, 2])) == 0
    assert np.isnan(run.value("auroc", predicted, np.array([0, 3])))


def test_folds_count_by_their_people_and_repeats_by_their_own_folds() -> None:
    truth = np.array([0, 1, 0, 1, 1, 0.0])
    right, wrong = [0, 1], [2, 3, 4, 5]
    run = runner(truth.tolist(), [right, wrong])
    predicted = np.where(np.isin(np.arange(6), right), truth, 1 - truth)[:, None]
    assert run.value("auroc", predicted, np.arange(6)) == pytest.approx(2 / 6)
    other = Plan([*run.plan.repeats, [(np.array([0, 1, 2]), np.array([3, 4, 5])),
                                      (np.array([3, 4, 5]), np.array([0, 1, 2]))]])
    twice = Runner(run.target, run.people, other)
    assert twice.fold.T.tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]
    both = np.hstack([predicted, truth[:, None]])
    assert twice.value("auroc", both, np.arange(6)) == pytest.approx((2 / 6 + 1) / 2)


def test_a_plan_of_sites_scores_each_apart_and_people_who_are_not_tested_nowhere() -> None:
    run = runner([0, 1, 0, 1, 1], [[0, 1], [2, 3]], pooled=False)
    predicted = np.array([[0.1], [0.2], [0.8], [0.9], [np.nan]])
    assert run.fold[:, 0].tolist() == [0, 0, 1, 1, -1]
    assert run.value("auprc", predicted, np.arange(4)) == 1
