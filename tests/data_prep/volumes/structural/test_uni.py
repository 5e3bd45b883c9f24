"""MP2RAGE UNI images: the noise around the head goes, the head stays, other images are left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from data_prep.flags import Flag, Note
from data_prep.volumes.pipeline import Prepared, Rejected, prepare_person
from data_prep.volumes.placing.matching import dice
from data_prep.volumes.preset import PRESETS
from data_prep.volumes.reading.volume import Volume, read_scan
from data_prep.volumes.structural.uni import is_uni, quiet_background
from tests.helpers.synthetic_head import ellipsoid, save, scan

UNI: dict[str, object] = {"ImageType": ["DERIVED", "PRIMARY", "M", "ND", "UNI"]}


def ratio(data: np.ndarray, noise: float = 0.03) -> np.ndarray:
    """The uniform image of two inversions whose contrast is that of ``data``; -0.5 to 0.5."""
    random = np.random.default_rng(0)
    level = data / np.percentile(data, 99.5)
    second = np.minimum(level * 6, 1)  # proton density: nearly the same in all of the head
    first = second * (1.6 * level - 0.9).clip(-1, 1)
    first, second = (one + random.normal(0, noise, data.shape) for one in (first, second))
    return (first * second / (first**2 + second**2)).astype(np.float32)


@pytest.mark.parametrize(("facts", "found"), [
    (UNI, True), ({"ImageType": ["UNI"]}, True), ({"ImageType": "DERIVED\\PRIMARY\\UNI"}, True),
    ({"ImageType": ["DERIVED", "UNI-DEN"]}, True), ({"ImageType": ["ORIGINAL", "UNIFORM"]}, False),
    ({"ImageType": ["ORIGINAL", "PRIMARY", "M"]}, False), ({}, False)])
def test_the_sidecar_names_it(facts, found):
    assert is_uni(facts) is found


@pytest.mark.parametrize("facts", [UNI, {}])
@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (4095, 2047)])
def test_the_noise_goes_and_the_head_stays(facts, scale, shift):
    data, affine = ellipsoid()
    data = ndimage.zoom(np.where(data < 25, 0, data), 2, order=1)
    affine = affine @ np.diag([0.5, 0.5, 0.5, 1])
    volume = Volume("uni", ratio(data) * scale + shift, affine, flags=[Flag.NEGATIVE_VALUES])
    quiet = quiet_background(volume, facts)
    assert quiet.notes == [Note.RATIO_BACKGROUND_REMOVED] and quiet.flags == []
    assert dice(quiet.data > 0, data > 50) > 0.95
    inside = ndimage.binary_erosion(data == 700)
    np.testing.assert_allclose(quiet.data[inside], (volume.data - volume.data.min())[inside],
                               rtol=1e-5)


@pytest.mark.parametrize("name", ["head", "stripped", "denoised", "tight", "noise alone"])
def test_other_images_are_left_alone(name):
    data, affine = ellipsoid()
    random = np.random.default_rng(0)
    image = {"head": data, "stripped": np.where(data >= 700, data, 0),
             "denoised": np.where(data > 50, ratio(data) + 0.5, 0), "tight": data[8:40, 8:52, 4:48],
             "noise alone": random.uniform(0, 4095, data.shape)}[name].astype(np.float32)
    volume = Volume(name, image, affine)
    assert quiet_background(volume, UNI) is volume
    assert quiet_background(volume, {}) is volume


@pytest.mark.slow(8)
def test_a_real_head_is_prepared_from_its_uniform_image(shared_data: Path, tmp_path):
    whole = read_scan(str(shared_data / "ixi/IXI012_T1w.nii.gz"))
    uri = save(tmp_path / "sub-1_UNIT1.nii.gz", ratio(whole.data) * 4095 + 2047, whole.affine)
    one, other = (prepare_person([scan(name)], PRESETS["quick"])[0]
                  for name in (str(shared_data / "ixi/IXI012_T1w.nii.gz"), uri))
    assert isinstance(one, Prepared)
    assert isinstance(other, Prepared), other.message if isinstance(other, Rejected) else ""
    assert Note.RATIO_BACKGROUND_REMOVED in other.notes
    assert dice(one.mask == 1, other.mask == 1) > 0.93
