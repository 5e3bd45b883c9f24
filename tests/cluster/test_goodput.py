"""A run's time by use, against cases worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.goodput import Goodput, goodput


def rows(*events: tuple[float, str, int | None]) -> list[dict[str, Any]]:
    return [{"time": time, "event": name, "step": step} for time, name, step in events]


SUPERVISED = rows(
    (0, "started", None), (20, "start", 0), (70, "checkpoint", 50),
    (100, "exit", 80),  # 80 s for 80 steps, of which 50 are kept
    (100, "restart", 50), (110, "started", 50), (130, "resume", 50), (190, "checkpoint", 110),
    (200, "stop", 120), (205, "exit", 120), (205, "stopped", 120))


def test_a_supervised_run_with_one_failure() -> None:
    found = goodput(SUPERVISED, step=120, now=900, running=False)
    assert found == Goodput(productive_s=50 + 70, starting_s=40, lost_s=30, down_s=10,
                            lost_steps=30)
    assert found.share == pytest.approx(120 / 200)


def test_what_runs_now_counts_up_to_now() -> None:
    found = goodput(SUPERVISED[:7], step=70, now=150, running=True)
    assert (found.productive_s, found.lost_steps) == (50 + 20, 30)
    found = goodput(SUPERVISED[:6], step=80, now=125, running=True)
    assert (found.productive_s, found.lost_s, found.starting_s) == (80, 0, 20 + 15)


def test_a_training_that_was_killed_without_a_word() -> None:
    alone = rows((0, "start", 0), (40, "checkpoint", 20), (500, "resume", 20), (540, "finish", 40))
    found = goodput(alone, step=40, now=999, running=False)
    assert found == Goodput(productive_s=40 + 40, down_s=460)


def test_nothing_yet() -> None:
    assert goodput([], 0, 5.0, running=False).share is None
    assert goodput(rows((0, "started", None)), 0, 30.0, running=True).share == 0.0
