"""The benchmark of flags: its damage damages, by dose, and its score is what it says."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.qc.judge import rules
from data_prep.volumes.reading.volume import Volume
from tools.bench.flags import SPOILS, TURNS, _scores, auroc


def head() -> tuple[Volume, np.ndarray]:
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 48, 44)), indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)
    data = np.where(radius < 0.8, 100.0, 2.0) + 20 * (np.sin(12 * y) > 0) * (radius < 0.6)
    return Volume("head", data.astype(np.float32), np.diag([4.0, 4.0, 4.0, 1.0])), radius < 0.6


@pytest.mark.parametrize("kind", SPOILS)
def test_every_dose_spoils_more_and_leaves_the_scan_as_it_was(kind: str) -> None:
    volume, mask = head()
    kept, (spoil, _, doses) = volume.data.copy(), SPOILS[kind]
    assert list(doses) == sorted(doses) and len(doses) > 1
    changes = []
    for dose in doses:
        spoilt, own = spoil(volume, mask, dose)
        assert spoilt.data.shape == own.shape and spoilt.data.dtype == np.float32
        if kind == "cut":
            changes.append(float(mask.sum() - own.sum()))
        elif kind == "wrap":  # more of the back of the head lies in the air in front
            changes.append(float(spoilt.data[:, -8:].sum()))
        else:
            changes.append(float(np.abs(spoilt.data - kept).sum()))
    assert (np.diff(changes) > 0).all() and changes[0] > 0
    np.testing.assert_array_equal(volume.data, kept)


def test_turns_keep_every_voxel_and_their_names_differ() -> None:
    data = head()[0].data
    images = [change(data) for change in TURNS.values()]
    assert all(image.sum() == data.sum() for image in images)
    mirrored = TURNS["left and right exchanged"](data)
    np.testing.assert_array_equal(mirrored[0], data[-1])


def test_the_area_under_the_curve_against_a_hand_worked_case() -> None:
    assert auroc(np.array([3.0, 2.0]), np.array([1.0, 2.0])) == (1 + 1 + 1 + 0.5) / 4
    assert auroc(np.array([1.0]), np.array([])) is None


def test_a_score_of_one_is_on_the_threshold_whichever_side_is_worse() -> None:
    volume, mask = head()
    heads = [("T1w", volume, mask), ("FLAIR", volume, mask)]
    limits = rules().thresholds["T1w"]
    below, above = limits["qc_snr"].flag_below, limits["qc_ghost"].flag_above
    assert below and above
    for name, limit in (("qc_snr", below), ("qc_ghost", above)):
        np.testing.assert_allclose(_scores([{name: limit}, {name: None}], heads, name), [1.0])
    worse, better = {"qc_snr": below / 2}, {"qc_snr": 2 * below}
    assert _scores([worse, better], heads, "qc_snr").tolist() == [2.0, 0.5]
