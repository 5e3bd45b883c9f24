"""Quality figures against hand-worked cases."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.qc import quality
from data_prep.volumes.read import Volume


def head(noise: float, air: str = "noisy") -> tuple[Volume, np.ndarray]:
    """A ball of 300 (inner) and 100 (outer) in Rayleigh noise on a 2 mm grid."""
    shape = (90, 90, 90)
    radius = np.linalg.norm(np.indices(shape) - 44.5, axis=0) * 2
    random = np.random.default_rng(1)
    signal = np.where(radius < 58, 300.0, np.where(radius < 60, 100.0, 0.0))
    data = np.hypot(signal + random.normal(0, noise, shape), random.normal(0, noise, shape))
    if air == "zero":
        data[radius >= 60] = 0
    return Volume("head", data.astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0])), radius < 60


def test_snr_is_signal_over_the_noise_that_was_put_in():
    for noise in (3.0, 10.0):
        volume, mask = head(noise)
        figures = quality(volume, mask)
        assert figures["qc_snr"] == pytest.approx(300 / noise, rel=0.05)
        assert figures["qc_snr_reason"] is None


def test_snr_is_null_with_a_reason_without_air():
    volume, mask = head(3.0, air="zero")
    figures = quality(volume, mask)
    assert figures["qc_snr"] is None and figures["qc_snr_reason"] == "air was set to zero"
    box = (slice(20, 70),) * 3
    tight = Volume("tight", volume.data[box], volume.affine)
    assert quality(tight, mask[box])["qc_snr_reason"] == "no air in the field of view"


def test_volume_and_contrast():
    volume, mask = head(5.0)
    figures = quality(volume, mask)
    assert figures["qc_mask_ml"] == pytest.approx(4 / 3 * np.pi * 60 ** 3 / 1000, rel=0.01)
    # Two classes with a spread of 5 each, 200 apart.
    assert figures["qc_cjv"] == pytest.approx((5 + 5) / 200, rel=0.05)


def test_an_intercept_below_zero_changes_nothing():
    volume, mask = head(5.0)
    shifted = Volume("shifted", volume.data - volume.data.min() - 50, volume.affine)
    plain, moved = quality(volume, mask), quality(shifted, mask)
    assert moved["qc_snr"] == pytest.approx(plain["qc_snr"], rel=0.02)
    assert moved["qc_cjv"] == pytest.approx(plain["qc_cjv"], rel=0.02)
