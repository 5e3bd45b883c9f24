"""What the demo's page says of probes."""

from __future__ import annotations

import pytest

from tools.demo_report import _probe


def results(ours: tuple[float, float, float], random: tuple[float, float, float]) -> dict:
    return {"results": {
        name: {"diagnosis": {"auroc": dict(zip(("value", "low", "high"), score, strict=True),
                                           num_people=9, num_scans=9), "num_train_people": 30}}
        for name, score in (("neurojepa", ours), ("random init", random))}}


@pytest.mark.parametrize(("ours", "random"), [
    ((0.71, 0.4, 0.9), (0.91, 0.7, 1.0)), ((0.9, 0.7, 1.0), (0.5, 0.3, 0.7)),
    ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))])
def test_intervals_that_meet_are_no_difference(ours, random):
    page = _probe(results(ours, random))
    assert "no difference shown between neurojepa and random init" in page
    assert "0.71" not in page and "0.910" not in page


@pytest.mark.parametrize(("ours", "random"), [
    ((0.4, 0.3, 0.5), (0.91, 0.7, 1.0)), ((0.9, 0.8, 1.0), (0.5, 0.3, 0.7))])
def test_what_the_people_can_tell_is_told_in_figures(ours, random):
    page = _probe(results(ours, random))
    assert "no difference" not in page
    for value, low, high in (ours, random):
        assert f"{value:.3f} [{low:.3f}, {high:.3f}]" in page
