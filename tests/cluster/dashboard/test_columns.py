"""Few points of many rows: none of them hides a spike."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cluster.dashboard.columns import Columns

LAST = 10**9


def test_points_are_means_between_least_and_greatest_of_all_rows() -> None:
    columns = Columns(("loss", "rank"))
    losses = np.random.default_rng(0).normal(size=1000)
    losses[500] = 99.0  # a spike must not be lost
    for step, loss in enumerate(losses, 1):
        columns.add({"step": step, "loss": loss, **({"rank": step / 2} if step % 50 == 0 else {})})
    points = columns.points(0, LAST, 40)
    assert len(points["loss"]) == 40 and max(point[3] for point in points["loss"]) == 99.0
    for number, (step, mean, least, greatest) in enumerate(points["loss"]):
        bucket = losses[number * 25:number * 25 + 25]
        assert (mean, least, greatest) == pytest.approx(
            (bucket.mean(), bucket.min(), bucket.max()))
        assert number * 25 < step <= number * 25 + 25
    assert [point[1] for point in points["rank"]] == [step / 2 for step in range(50, 1001, 50)]


def test_points_of_some_steps_and_of_few_rows_are_the_rows() -> None:
    columns = Columns(("loss",))
    for step in range(1, 21):
        columns.add({"step": step, "loss": None if step == 7 else float(step)})
    assert columns.points(5, 8, 100) == {"loss": [[5, 5, 5, 5], [6, 6, 6, 6], [8, 8, 8, 8]]}
    assert columns.points(90, 99, 100) == {"loss": []}
    columns.cut(6)
    assert len(columns) == 6 and columns.last_values("loss", 2) == [5.0, 6.0]
    columns.add({"step": 7, "loss": math.inf})
    assert [point[0] for point in columns.points(0, LAST, 100)["loss"]] == list(range(1, 7))
