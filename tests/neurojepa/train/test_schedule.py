"""Rates as functions of the step, against values worked by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from neurojepa.config import OptimConfig
from neurojepa.train.schedule import learning_rate, rates_at
from tests.helpers.feeds import tiny_config


def rates(steps: int, **optim: object) -> list[float]:
    config = OptimConfig.model_validate({"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4, **optim})
    return [learning_rate(step, steps=steps, optim=config) for step in range(steps)]


def test_learning_rate_warms_up_and_decays() -> None:
    found = rates(11)
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[7] == pytest.approx(0.55)  # half way down
    assert found[10] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(found[3:]))


def test_constant_rate_cools_down_in_its_last_steps() -> None:
    found = rates(10, schedule="constant", cooldown_steps=3)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.7, 0.4, 0.1])


def test_a_later_end_changes_no_step_before_the_cooldown() -> None:
    short = rates(10, schedule="constant", cooldown_steps=3)
    long = rates(20, schedule="constant", cooldown_steps=3)
    assert short[:7] == long[:7] == rates(10, schedule="constant")[:7]
    assert long[7:17] == [1.0] * 10 and long[17:] == short[7:]


def test_cooldown_ends_a_cosine_early_and_never_lifts_a_rate() -> None:
    plain, cooled = rates(12), rates(12, cooldown_steps=10)
    assert all(a <= b for a, b in zip(cooled, plain, strict=True))
    assert cooled[:4] == [0.25, 0.5, 0.75, pytest.approx(0.82)]  # the line is below the warm-up
    assert cooled[-1] == pytest.approx(0.1)


def test_a_run_shorter_than_its_warm_up_and_cooldown() -> None:
    assert rates(3, schedule="constant", cooldown_steps=50) == pytest.approx(
        [0.1 + 0.9 * 2 / 50, 0.1 + 0.9 / 50, 0.1])
    assert rates(2) == [0.25, 0.5]


def test_sparsity_warms_up_and_momentum_stays(tmp_path: Path) -> None:
    config = tiny_config("feed", tmp_path)
    found = [rates_at(step, config) for step in range(6)]
    full = config.objective.sparse.l1
    assert [each.l1 / full for each in found] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert {each.ema for each in found} == {config.optim.ema}
