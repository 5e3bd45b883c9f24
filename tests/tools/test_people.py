"""What the check of straight people says of differences between scans."""

from __future__ import annotations

import numpy as np
import pytest

from neurojepa.downstream.embed import Embeddings
from tools.bench import people
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


def test_a_smoother_scan_with_a_larger_mask_is_told(monkeypatch):
    rng = np.random.default_rng(2)
    first, other = (np.zeros((20, 20, 20), np.uint8) for _ in range(2))
    first[4:16, 4:16, 4:16] = rng.integers(50, 200, (12, 12, 12))
    other[3:17, 3:17, 3:17] = rng.integers(100, 150, (14, 14, 14))
    feeds = {"first": {"a": first}, "other": {"a": other}}
    monkeypatch.setattr(people, "images", lambda feed, names, modality: feeds[feed])
    figures = people.beside("first", "other", {}, "T1w")
    assert figures["size of mask"] == pytest.approx((14 / 12)**3)
    assert figures["Dice of masks"] == pytest.approx(2 * 12**3 / (12**3 + 14**3))
    assert figures["gradient"] == pytest.approx(1 / 3, rel=0.2)


def test_what_preparation_makes_of_scans_is_told():
    rows = [{"participant": "b", "modality": "T1w", "status": "flagged", "reason": None,
             "flags": "low_snr;low_ncc"},
            {"participant": "b", "modality": "T2w", "status": "flagged", "reason": None,
             "flags": "low_snr"},
            {"participant": "a", "modality": "T1w", "status": "accepted", "reason": None,
             "flags": None}]
    assert people.judged(rows, {}) == ("of 3 scans preparation rejected none, and flagged 2: "
                                       "low_snr 2, low_ncc 1")
    lost = {"participant": "b", "modality": "FLAIR", "status": "rejected", "reason": "no_brain",
            "flags": None}
    assert people.judged([lost], {"b": "0007"}) == (
        "of 1 scans preparation rejected 0007 FLAIR, and flagged 0: -")
