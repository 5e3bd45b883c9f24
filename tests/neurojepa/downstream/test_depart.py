"""One person's atoms against people of the same age: what was planted departs, age alone does not.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from neurojepa.downstream import depart as module
from neurojepa.downstream.__main__ import main as downstream
from neurojepa.downstream.depart import departures
from neurojepa.downstream.depart_page import painted
from neurojepa.downstream.regions import load_regions
from neurojepa.errors import NeurojepaError
from neurojepa.feed.format import open_feed
from neurojepa.weights import untrained
from tests.helpers.browser import look
from tests.helpers.feeds import GRID, relabel, tiny_config, write_feed

R, A = 6, 30


def reference(number: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Activations [S, R, A] that follow age, and the ages."""
    rng = np.random.default_rng(seed)
    ages = rng.uniform(20, 85, number)
    base, of_age = rng.uniform(0.5, 1, (R, A)), 0.01 * rng.normal(size=(R, A))
    rest = 0.15 * rng.normal(size=(number, R, A))
    return base + of_age * (ages[:, None, None] - 50) + rest, ages


def test_a_planted_departure_is_found_in_its_region() -> None:
    others, ages = reference()
    own = others[0].copy()
    own[2] += 0.3 * np.random.default_rng(1).choice([-1, 1], A)  # two sd, either way
    found = departures(own, ages[0], others[1:], ages[1:])
    assert found.size_R.argmax() == 2 and found.size_R[2] > 1.8
    assert found.p_R[2] == pytest.approx(1 / 80) and found.p_holm_R[2] < 0.1
    assert (np.delete(found.p_holm_R, 2) > 0.3).all() and found.people == 79


def test_whoever_is_only_older_does_not_depart() -> None:
    others, ages = reference(160)
    of_all = others.mean(0)
    oldest = int(ages.argmax())
    away = ages != ages[oldest]
    assert np.abs(others[oldest] - of_all).mean() > 0.2
    found = departures(others[oldest], float(ages[oldest]), others[away], ages[away])
    assert found.p_holm_R.min() > 0.05 and np.nanmean(found.size_R) < 1.6


def test_p_values_of_reference_people_are_even() -> None:
    others, ages = reference(60, seed=3)
    p = np.concatenate([departures(others[one], float(ages[one]), np.delete(others, one, 0),
                                   np.delete(ages, one)).p_R for one in range(0, 60, 3)])
    assert 0.4 < p.mean() < 0.6 and (p < 0.1).mean() < 0.2


def test_whoever_is_older_than_all_others_is_no_more_unusual() -> None:
    """Where the reference ends the line is less sure, and z counts that in."""
    rng, p, sizes = np.random.default_rng(0), [], []
    for _ in range(40):
        ages, everyone = rng.uniform(50, 80, 25), 1 + 0.15 * rng.normal(size=(26, R, A))
        found = departures(everyone[25], float(ages.max() + 9), everyone[:25], ages)
        p.append(found.p_R)
        sizes.append(found.size_R)
    assert (np.stack(p) < 0.1).mean() < 0.2 and 0.9 < np.nanmean(sizes) < 1.15


def test_regions_that_were_not_seen_and_silent_atoms_tell_nothing() -> None:
    others, ages = reference()
    others[:, 1], others[:, 0, :20] = np.nan, 0.0
    own = others[3].copy()
    own[0, 0] = 5.0
    found = departures(own, ages[3], np.delete(others, 3, 0), np.delete(ages, 3))
    assert np.isnan(found.size_R[1]) and np.isnan(found.p_R[1])
    assert np.isnan(found.z_RA[0, :20]).all()
    assert np.isfinite(found.size_R[0]) and found.p_R[0] > 1 / 80
    with pytest.raises(NeurojepaError, match="19 people of the reference have such a scan"):
        departures(own, 50.0, others[:19], ages[:19])
    with pytest.raises(NeurojepaError, match=r"is 8 years old, the reference 2\d\.?\d* to 8"):
        departures(own, 8.0, others, ages)


def test_a_map_shows_each_regions_size_inside_the_brain() -> None:
    regions = load_regions(GRID, 6)
    codes = np.ones(GRID.shape, np.uint8)
    codes[:6] = 0
    size_R = np.arange(13.0)
    size_R[4] = np.nan
    found = module.Departures(np.zeros((13, 2)), np.zeros((13, 2)), np.zeros((13, 2)), size_R,
                              size_R, size_R, 30)
    volume = painted(found, regions, codes, 6)
    assert not volume[:6].any() and volume.max() <= 12
    whole = np.flatnonzero((regions.share_nR[:, 1] > 0) & (regions.share_nR[:, 1] ==
                                                           regions.share_nR.sum(1)))
    x, y, z = np.unravel_index(whole[0], (4, 6, 4))
    block = volume[6 * x:6 * x + 6, 6 * y:6 * y + 6, 6 * z:6 * z + 6]
    assert set(np.unique(block)) <= {0.0, 1.0}


@pytest.mark.browser
@pytest.mark.slow(4)
def test_the_command_writes_a_map_and_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    write_feed(str(tmp_path / "plain"), modalities=("T1w",))
    relabel(tmp_path / "plain", tmp_path / "feed", lambda number, row: (
        "train", [("1", "age", str(40 + number))] if number != 23 else []))
    feed = open_feed(str(tmp_path / "feed"))
    weights = untrained(tiny_config(feed.uri, "unused"), GRID)
    monkeypatch.setattr("neurojepa.downstream.api.load", lambda uri: weights)
    monkeypatch.setattr(module, "DRAWS", 1)
    ids = feed.index["scan_id"].to_pylist()
    words = ["depart", feed.uri, "--weights", "W", "--reference", feed.uri, "--out",
             str(tmp_path / "out"), "--scan-id"]
    with pytest.raises(NeurojepaError, match="age of the person is not known; add --age"):
        downstream([*words, ids[23]])
    with pytest.raises(NeurojepaError, match=r"--scan-id none: .* has no such scan"):
        downstream([*words, "none"])
    with pytest.raises(NeurojepaError, match="24 scans are there, one is compared"):
        downstream(words[:-1])
    assert downstream([*words, ids[5]]) == 0
    assert "left frontal: " in capsys.readouterr().out
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert record["schema"] == "neurojepa/depart/1" and record["age"] == 45
    assert record["people"] == 22  # neither the person nor the one without an age
    image = nib.load(tmp_path / "out" / record["map"])
    assert record["map"].endswith("_mod-T1w_space-MNI152_desc-atoms_departure.nii.gz")
    sizes = [each["size"] for each in record["regions"] if each["size"] is not None]
    assert 0 < image.get_fdata().max() <= max(sizes) + 1e-3
    assert "region,atom,activation,expected,z" in (tmp_path / "out/predictions.csv").read_text()
    facts = look(tmp_path / "out/report.html", tmp_path)
    assert facts["images"] == 1 and not facts["broken"] and facts["overflow"] <= 0
    dense = replace(weights, config=weights.config.model_copy(update={
        "objective": weights.config.objective.model_copy(update={
            "sparse": weights.config.objective.sparse.model_copy(update={"code": "identity"})})}))
    monkeypatch.setattr("neurojepa.downstream.api.load",
                        lambda uri: untrained(dense.config, GRID))
    with pytest.raises(NeurojepaError, match="the weights have no atoms"):
        downstream([*words, ids[5]])
