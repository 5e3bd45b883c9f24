"""The bench of lesions: thresholds, volumes by hand, masks laid over one another."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from neurojepa.downstream.images import Image
from tests.helpers.blobs import blob
from tools.bench import _segment_lesions as lesions
from tools.bench.register import Head


def spotted(seed: int, times: float) -> Head:
    """A noisy head and a cube in it, ``times`` robust sd above the brain's median."""
    image = blob(seed)
    assert image.brain is not None
    data = np.random.default_rng(seed).normal(10, 1, image.data.shape).astype(np.float32)
    where = np.zeros(data.shape, bool)
    where[20:24, 20:24, 20:24] = True
    data[where] = 10 + times
    return Head(replace(image, data=data),
                replace(image, data=(where * lesions.CODE).astype(np.int32)))


@pytest.mark.parametrize("times", [6.0, 9.0])
def test_the_threshold_that_suits_the_learnt_heads_finds_the_spots_of_another(times: float
                                                                             ) -> None:
    number = lesions._best_threshold([spotted(seed, times) for seed in (0, 1)])
    assert 3 < number < times
    other = spotted(2, times)
    brightness = lesions._brightness(other.image)
    assert np.isneginf(brightness[~other.image.brain]).all()
    assert lesions._scored(brightness > number, other.labels)["dice"] > 0.9


def test_volumes_of_lesions_by_hand() -> None:
    truth = np.zeros((12, 12, 12), np.int32)
    truth[2:6, 2:6, 2:6] = lesions.CODE
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    found = np.zeros(truth.shape, bool)
    found[2:6, 2:6, 2:4] = True
    scores = lesions._scored(found, Image("truth", truth, affine))
    assert scores["truth_ml"] == pytest.approx(64 * 6 / 1000)
    assert scores["found_ml"] == pytest.approx(32 * 6 / 1000)
    assert scores["dice"] == pytest.approx(2 * 32 / 96)


@pytest.mark.parametrize("shift", [(12.0, -5.0, 8.0), (-3.0, 9.0, -20.0)])
def test_a_scan_is_found_where_its_brain_mask_was_moved(shift: tuple[float, float, float]
                                                        ) -> None:
    scan = blob(0)
    assert scan.brain is not None
    moved = scan.affine.copy()
    moved[:3, 3] += shift
    mask = Image("mask", scan.brain.astype(np.int32), moved)
    place = lesions._place(mask, scan)
    middle = np.append(moved[:3, :3] @ (np.array(scan.data.shape) / 2) + moved[:3, 3], 1)
    assert np.allclose((place @ middle - middle)[:3], -np.array(shift), atol=1.0)
