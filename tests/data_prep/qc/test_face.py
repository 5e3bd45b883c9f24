"""Faces that were cut away, filled or smoothed are seen, and whole ones are left in peace."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from data_prep.qc import describe
from data_prep.qc.face import face_is_gone
from data_prep.volumes.preset import PRESETS
from data_prep.volumes.reading.volume import Volume, read_scan
from data_prep.volumes.structural.brain import brain_mask

MM = np.full(3, 2.0)
SHAPE = (100, 128, 116)
Head = tuple[np.ndarray, np.ndarray]  # voxels and brain


@cache
def grid() -> tuple[np.ndarray, ...]:
    """Millimetres from the middle of the brain."""
    x, y, z = (np.arange(n) * 2.0 - middle for n, middle in zip(SHAPE, (100, 128, 150),
                                                                strict=True))
    return tuple(np.meshgrid(x, y, z, indexing="ij"))


@cache
def head() -> Head:
    """Skull, neck and a face with a nose, textured as tissue is; Rayleigh noise in the air."""
    x, y, z = grid()
    rng = np.random.default_rng(0)

    def ball(a: float, b: float, c: float) -> np.ndarray:
        return (x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2 < 1

    brain = ball(66, 84, 64) & ((z > -40) | (y < 20))
    neck = (x / 60) ** 2 + ((y + 10) / 75) ** 2 < 1
    face = ((x / 62) ** 2 + ((y - 20) / 72) ** 2 < 1) & (z > -140) & (z < -10)
    nose = (abs(x) < 14) & (y > 40) & (y < 106) & (z > -90) & (z < -50)
    tissue = ball(78, 96, 76) & ~ball(70, 88, 68) | (neck | face | nose) & (z < -10) & ~brain
    texture = 1 + 0.5 * np.sign(ndimage.gaussian_filter(rng.standard_normal(SHAPE), 1.5))
    signal = np.where(brain, 500, 0) + np.where(tissue, 420 * texture, 0)
    noise = rng.normal(0, 12, (2, *SHAPE))
    return np.abs(signal + noise[0] + 1j * noise[1]).astype(np.float32), brain


def place(data: np.ndarray, brain: np.ndarray, below_mm: float = 0.0) -> np.ndarray:
    """Where a face is, 6 mm and more from the brain."""
    _, y, z = grid()
    return (y > 50) & (z < -42 + below_mm) & ~ndimage.binary_dilation(brain, iterations=3)


def zeroed(data: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """mri_deface: all that is in front of the brain's underside."""
    return np.where(place(data, brain, 20), 0, data)


def boxed_out(data: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """pydeface: eyes and nose, but not the chin."""
    x, _, z = grid()
    return np.where(place(data, brain) & (abs(x) < 60) & (z > -110), 0, data)


def sheared(data: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """quickshear: all in front of a plane that touches the brain."""
    _, y, z = grid()
    return np.where((y - 90 > 0.9 * (z + 5)) & (z < 20), 0, data)


def shell(data: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Zeros in a head whose air is zero everywhere."""
    air = ndimage.gaussian_filter(data, 1) < 60
    return np.where(air, 0, zeroed(data, brain))


def filled(data: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """A box of one grey value."""
    x, y, z = grid()
    return np.where((y > 45) & (z < -42) & (abs(x) < 60), np.float32(300), data)


def blurred(data: np.ndarray, brain: np.ndarray) -> np.ndarray:
    return np.where(place(data, brain), ndimage.gaussian_filter(data, 2), data)


def box_filtered(data: np.ndarray, brain: np.ndarray) -> np.ndarray:
    return np.where(place(data, brain), ndimage.uniform_filter(data, 5), data)


def replaced(data: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """afni_refacer_run, mri_reface: the average of many faces, interpolated, which is smooth."""
    others = [np.roll(data, (dx, dy, dz), (0, 1, 2)) for dx in (-4, 0, 4) for dy in (-4, 0, 4)
              for dz in (-4, 0, 4)]
    return np.where(place(data, brain), ndimage.gaussian_filter(np.mean(others, axis=0), 0.7), data)


GONE: list[Callable[[np.ndarray, np.ndarray], np.ndarray]] = [
    zeroed, boxed_out, sheared, shell, filled, blurred, box_filtered, replaced]


@pytest.mark.parametrize("deface", GONE)
def test_a_face_that_is_gone_is_seen(deface) -> None:
    data, brain = head()
    assert face_is_gone(deface(data, brain), brain, MM) is True


def turned(data: np.ndarray, brain: np.ndarray, degrees: float) -> Head:
    """Nodding, about the axis from ear to ear."""
    return (ndimage.rotate(data, degrees, (1, 2), reshape=False, order=1, mode="nearest"),
            ndimage.rotate(brain.astype(np.float32), degrees, (1, 2), reshape=False, order=1) > 0.5)


@pytest.mark.parametrize("change", [
    lambda data, brain: (data, brain),
    lambda data, brain: turned(data, brain, 12),
    lambda data, brain: turned(data, brain, -12),
    lambda data, brain: (data[:, :, 30:], brain[:, :, 30:]),  # the field of view ends at the eyes
    lambda data, brain: (data[:, :112], brain[:, :112]),  # and in front of the forehead
    lambda data, brain: (np.where(ndimage.gaussian_filter(data, 1) < 60, 0, data), brain),
    lambda data, brain: (data + np.random.default_rng(1).normal(0, 40, SHAPE), brain),
], ids=["whole", "chin up", "chin down", "low", "narrow", "zero air", "noise"])
def test_a_whole_face_is_no_false_alarm(change) -> None:
    data, brain = change(*head())
    assert face_is_gone(data - min(data.min(), 0), brain, MM) is False


def test_thick_slices_and_turned_axes_change_nothing() -> None:
    data, brain = head()
    thick = np.array([2.0, 2.0, 4.0])
    for deface, gone in ((None, False), (sheared, True), (blurred, True)):
        seen = deface(data, brain) if deface else data
        coarse = (seen[..., ::2] + seen[..., 1::2]) / 2
        assert face_is_gone(coarse, brain[..., ::2], thick) is gone


def test_where_nothing_can_be_seen_nothing_is_said() -> None:
    data, brain = head()
    assert face_is_gone(np.where(brain, data, 0), brain, MM) is None  # stripped
    low = 53  # the lowest plane of the frontal pole
    assert face_is_gone(data[:, :, low:], brain[:, :, low:], MM) is None


def test_the_row_says_where_it_is_known_from() -> None:
    data, brain = head()
    volume = Volume("a", sheared(data, brain) - 100, np.diag([2.0, 2.0, 2.0, 1.0]))
    said = describe(volume, {}, brain)
    assert (said["defaced"], said["defaced_source"]) == ("yes", "voxels")
    said = describe(volume, {"Defaced": False}, brain)
    assert (said["defaced"], said["defaced_source"]) == ("no", "header")


@pytest.mark.slow(9)
def test_real_heads(shared_data) -> None:
    """Scans of a study that cut faces away by shears, and one that did not touch them."""
    for path, gone in (("bids-ms/sub-ms20/ses-2/anat/sub-ms20_ses-2_T1w.nii.gz", True),
                       ("bids-ms/sub-ms01/ses-2/anat/sub-ms01_ses-2_FLAIR.nii.gz", True),
                       ("studyforrest/sub-02_res-half_T1w.nii.gz", True),
                       ("ixi/IXI012_T1w.nii.gz", False), ("ixi/IXI015_T1w.nii.gz", False)):
        volume = read_scan(str(shared_data / path))
        mask, _ = brain_mask(volume, PRESETS["quick"])
        assert describe(volume, {}, mask)["defaced"] == ("yes" if gone else "no"), path
