"""Scores against hand-worked cases, and intervals that know people from scans."""

import numpy as np
import pytest

from neurojepa.downstream.stats import (
    auroc,
    difference,
    holm,
    mean_absolute_error,
    r_squared,
    resamples,
    score,
)


def test_auroc_by_hand() -> None:
    truth = np.array([0, 0, 1, 1])
    assert auroc(truth, np.array([0.1, 0.4, 0.35, 0.8])) == pytest.approx(0.75)
    assert auroc(truth, np.array([1.0, 1.0, 1.0, 1.0])) == 0.5
    assert np.isnan(auroc(np.ones(3), np.arange(3.0)))


def test_errors_by_hand() -> None:
    truth, predicted = np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 5.0])
    assert mean_absolute_error(truth, predicted) == pytest.approx(1.0)
    assert r_squared(truth, predicted) == pytest.approx(1 - 5 / 2)
    assert np.isnan(r_squared(np.ones(3), predicted))


def test_repeated_scans_of_a_person_do_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(size=40)
    predicted = truth + rng.normal(size=40)
    people = np.arange(40)
    once = score(mean_absolute_error, truth, predicted, people)
    twenty = score(mean_absolute_error, np.tile(truth, 20), np.tile(predicted, 20),
                   np.tile(people, 20))
    assert (twenty.num_scans, twenty.num_people) == (800, 40)
    assert twenty.value == pytest.approx(once.value)
    assert (twenty.high - twenty.low) == pytest.approx(once.high - once.low, rel=1e-6)
    as_if_apart = score(mean_absolute_error, np.tile(truth, 20), np.tile(predicted, 20),
                        np.arange(800))
    assert (as_if_apart.high - as_if_apart.low) < 0.4 * (once.high - once.low)


def test_people_of_one_group_are_no_independent_observations() -> None:
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(8), 25)
    error = np.repeat(rng.normal(size=8), 25) + 0.01 * rng.normal(size=200)
    people = np.arange(200)
    apart = score(mean_absolute_error, error, np.zeros(200), people)
    grouped = score(mean_absolute_error, error, np.zeros(200), people, groups)
    assert grouped.value == apart.value and grouped.num_people == 200
    assert (grouped.high - grouped.low) > 3 * (apart.high - apart.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        error = rng.exponential(size=50)
        interval = score(mean_absolute_error, error, np.zeros(50), np.arange(50), draws=300)
        covered += interval.low <= 1.0 <= interval.high
    assert 48 <= covered <= 60


def test_p_values_hold_together() -> None:
    """Holm 1979 by hand: times 3, 2 and 1 in order, and never below a smaller one's."""
    found = holm([0.04, 0.01, 0.03, float("nan")])
    assert found[:3] == pytest.approx([0.06, 0.03, 0.06]) and np.isnan(found[3])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize(("shift", "low", "high"), [(0.0, 0.05, 1.0), (0.5, 0.0, 0.02)])
def test_a_difference_that_is_none_has_a_large_p(shift: float, low: float, high: float) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=100)
    values += shift - values.mean() * (shift == 0)
    who = np.arange(100).astype(str)
    found, p = difference(lambda drawn: float(values[drawn].mean()), np.arange(100), who, who)
    assert low < p <= high and found.low < values.mean() < found.high
    assert np.isnan(difference(lambda drawn: 0.0, np.zeros(0, int), who, who)[1])


def test_a_clear_difference_holds_among_many() -> None:
    who = np.arange(60).astype(str)
    _, p = difference(lambda drawn: 1.0 + drawn.mean(), np.arange(60), who, who)
    assert p == 2 / 2001 and holm([p] * 8)[0] < 0.05


def test_groups_are_drawn_then_people_with_all_their_scans() -> None:
    people = np.array(["c", "a", "b", "a", "c", "d"])
    groups = np.array(["2", "1", "1", "1", "2", "3"])
    seen = set()
    for drawn in resamples(people, groups, 200):
        seen |= {tuple(sorted(drawn.tolist()))}
        assert sum(groups[drawn] == "2") % 2 == 0 and sum(drawn == 1) == sum(drawn == 3)
    assert (5, 5, 5) in seen and len(seen) > 10
