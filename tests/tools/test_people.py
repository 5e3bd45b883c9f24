"""What the check of straight people says of differences between scans."""

from __future__ import annotations

import numpy as np
import pytest

from neurojepa.downstream.embed import Embeddings
from tools.bench.people import by_person, differences


def test_a_shift_of_all_people_is_told_apart_from_what_a_rescan_adds():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(20, 30))
    noise = 0.3 * rng.normal(size=first.shape)
    rescanned, shifted = (differences(first, first + noise + shift) for shift in (0.0, 1.0))
    assert rescanned["distance"] == pytest.approx(0.09, rel=0.1)
    assert shifted["distance"] == pytest.approx(1.09, rel=0.1)
    assert rescanned["same for all"] < 0.1 < 0.85 < shifted["same for all"]
    assert rescanned["found"] == shifted["found"] == 1


def test_scans_of_strangers_are_not_found():
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(2, 40, 30))
    figures = differences(one, other)
    assert figures["found"] < 0.2 and figures["distance"] == pytest.approx(2, rel=0.1)


def test_people_are_told_by_the_names_they_have_elsewhere():
    names = np.array(["b", "a"])
    found = Embeddings(np.eye(2), names, names, names, names, names, names)
    assert by_person(found, {"b": "own"})["own"].tolist() == [1, 0]
    assert set(by_person(found, {"b": "own"})) == {"own", "a"}
