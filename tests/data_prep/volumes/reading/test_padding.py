"""Padding is no intensity: whatever its value, the image comes out as without it."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.flags import Flag, Note
from data_prep.volumes.output import scanned
from data_prep.volumes.pipeline import Prepared, Rejected, prepare_person
from data_prep.volumes.placing.align import coverage
from data_prep.volumes.preset import PRESETS
from data_prep.volumes.reading.padding import find_padding
from data_prep.volumes.reading.volume import read_scan, read_series
from data_prep.volumes.structural.brain import brain_mask
from tests.helpers.synthetic_head import brain, ellipsoid, save, scan

VALUES = [-32768, -32767, -2000, -1024, -1, 32767, 65535, 8000, np.nan]
QUICK = PRESETS["quick"]


def edges(shape: tuple[int, ...]) -> np.ndarray:
    where = np.zeros(shape, bool)
    where[:5] = where[:, :, -4:] = True
    return where


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("unit", [1.0, 0.001, 40.0])
def test_slabs_of_one_value_are_taken_out_and_count_as_not_scanned(tmp_path, value, unit):
    data, affine = ellipsoid()
    where = edges(data.shape)
    if value > 0 and unit == 40:
        value = value * 10  # inside the range of such an image it would be an intensity
    padded = np.where(where, value, data * unit).astype(np.float32)
    volume = read_scan(save(tmp_path / "a.nii", padded, affine))
    np.testing.assert_array_equal(volume.data, np.where(where, 0, data * np.float32(unit)))
    np.testing.assert_array_equal(volume.seen, ~where)
    assert (Note.PADDING_REMOVED in volume.notes) != (Flag.NON_FINITE_CLEANED in volume.flags)
    assert Flag.NEGATIVE_VALUES not in volume.flags


def test_both_ends_of_a_type_and_smeared_rims_go_together():
    data = ellipsoid()[0]
    where = edges(data.shape)
    data[where] = -32768
    data[5:7, :, :10] = -30000  # interpolated between padding and image
    data[20, 20, 20:23] = 32767
    found = find_padding(data)
    assert found is not None and set(found.values) == {-32768.0, 32767.0} and found.fill == 0
    assert found.where.sum() == where.sum() + 2 * 60 * 10 + 3


def test_a_ring_within_the_range_of_the_image_is_found_on_the_faces():
    data = ellipsoid()[0] + 1
    data[0], data[-1], data[:, 0], data[:, -1] = 500, 500, 500, 500
    data[24, 30, 20:30] = 500  # tissue of that very value stays
    found = find_padding(data)
    assert found is not None and found.values == (500.0,)
    assert not found.where[24, 30, 20] and found.where[0].all() and found.where[:, -1].all()


def heavy_tail() -> np.ndarray:
    return np.random.default_rng(0).gamma(1.0, 200.0, (30, 30, 30)).astype(np.float32)


@pytest.mark.parametrize("name", ["noise", "zeros around", "negative noise", "intercept", "z-score",
                                  "bright vessel", "clipped", "quantised"])
def test_images_without_padding_are_left_alone(name):
    data = ellipsoid()[0]
    image = {
        "noise": data, "zeros around": np.where(data < 20, 0, data), "negative noise": data - 10,
        "intercept": np.where(data < 20, 0, data) * 0.0125 - 17.5,
        "z-score": (np.where(data < 20, 0, data) - data.mean()) / data.std(),
        "bright vessel": heavy_tail(), "clipped": np.clip(data * 40, 0, 32767),
        "quantised": np.round(data / 20) * 20}[name].astype(np.float32)
    assert find_padding(image) is None


def test_an_image_that_goes_below_zero_is_filled_with_its_least_value():
    data = (ellipsoid()[0] - 300) / 300
    data[:5] = -1000
    found = find_padding(data.astype(np.float32))
    assert found is not None and found.fill == pytest.approx(data[5:].min())


@pytest.mark.parametrize("value", [-32768, -1, np.nan])
def test_around_a_stripped_brain_there_is_air(tmp_path, value):
    data, affine = brain()
    padded = np.where(data > 0, data, value).astype(np.float32)
    volume = read_scan(save(tmp_path / "a.nii", padded, affine))
    mask, source = brain_mask(volume, QUICK)
    assert source == "stripped" and (mask == (data > 0)).mean() > 0.999
    assert volume.seen.all()


def test_what_padding_hides_of_a_brain_is_not_covered(tmp_path):
    data, affine = brain()
    data[:, :, 60:] = -2000
    data[:, :, :60] += 5  # a whole head: no zeros around it
    volume = read_scan(save(tmp_path / "a.nii", data, affine))
    assert 0.7 < coverage(np.eye(4), volume) < 0.95
    assert not scanned(volume, np.eye(4))[90, 100, 150] and scanned(volume, np.eye(4))[90, 100, 60]


def test_a_series_keeps_its_values_and_loses_its_padding(tmp_path):
    data, affine = ellipsoid()
    frames = np.stack([data, data + 1, data + 2], axis=3)
    where = edges(data.shape)
    frames[where] = -2000
    series = read_series(save(tmp_path / "a.nii", frames, affine))
    assert (series.data[where] == 0).all() and Note.PADDING_REMOVED in series.notes
    np.testing.assert_array_equal(series.data[~where], frames[~where])


def test_single_voxels_at_the_end_of_the_type_are_no_overflow(tmp_path):
    data, affine = ellipsoid()
    stored = data.astype(np.int16)
    stored[20:24, 28:32, 24:26] = -32768
    volume = read_scan(save(tmp_path / "a.nii", stored, affine))
    assert volume.invalid is not None and volume.invalid.sum() == 32 and volume.seen.all()


@pytest.mark.slow(4)
def test_a_padded_scan_is_prepared_like_the_whole_one(tmp_path):
    data, affine = brain()
    wide = np.pad(data, 6)
    affine[:3, 3] -= affine[:3, :3] @ [6, 6, 6]
    ring = np.ones(wide.shape, bool)
    ring[3:-3, 3:-3, 3:-3] = False
    uris = [save(tmp_path / f"{n}.nii", image.astype(np.float32), affine) for n, image in enumerate(
        (wide, np.where(ring, -32768, wide)))]
    whole, padded = (prepare_person([scan(uri)], QUICK)[0] for uri in uris)
    assert isinstance(whole, Prepared) and isinstance(padded, Prepared), (
        padded.message if isinstance(padded, Rejected) else "")
    np.testing.assert_allclose(padded.image, whole.image, atol=1e-3)
    assert padded.flags == whole.flags
