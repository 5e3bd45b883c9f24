"""BOLD maps against series whose fluctuations, noise, drift and motion are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from data_prep.scan import ScanError
from data_prep.volumes.functional.bold import RANGES, bold_maps, scale_map
from data_prep.volumes.functional.motion import (
    estimate_motion,
    framewise_displacement,
    parse_motion,
)
from data_prep.volumes.functional.temporal import make_plan, temporal_maps
from data_prep.volumes.placing.geometry import resample, to_itk
from data_prep.volumes.reading.volume import Series, read_series
from tests.helpers.synthetic_head import ellipsoid

TR, COUNT = 2.0, 120


@pytest.fixture(scope="module")
def head() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean image at 8 mm, affine, brain."""
    data, affine = ellipsoid()
    data, affine = data[::2, ::2, ::2], affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    return data, affine, data >= 700


def made(head, *, sd: float = 10.0, count: int = COUNT, seed: int = 0) -> Series:
    """White noise of a known standard deviation on the mean image."""
    mean, affine, _ = head
    noise = np.random.default_rng(seed).normal(0, sd, (*mean.shape, count)).astype(np.float32)
    return Series("bold", mean[..., None] + noise, affine, TR)


def wave(hertz: float, count: int = COUNT) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * TR * np.arange(count)).astype(np.float32)


# ---- the maps ------------------------------------------------------------------------------------

def test_mean_and_tsnr_are_those_of_the_noise(head):
    mean, _, brain = head
    found = bold_maps(made(head), processing="fix", confounds=None, brain=brain)
    assert set(found.maps) == {"BOLD", "tSNR", "ALFF", "fALFF"} and found.flags == []
    np.testing.assert_allclose(found.maps["BOLD"].data[brain], mean[brain], atol=5)
    tsnr = found.maps["tSNR"].data[brain]
    assert tsnr.mean() == pytest.approx(mean[brain].mean() / 10, rel=0.03)
    assert found.figures["bold_tsnr"] == pytest.approx(70, rel=0.05)
    assert found.figures["bold_duration_s"] == 240 and found.figures["bold_volumes"] == "120 of 120"


def test_alff_follows_slow_waves_and_falff_their_share(head):
    _, _, brain = head
    series = made(head, sd=1.0)
    half = brain.copy()
    half[: brain.shape[0] // 2] = False
    series.data[half] += 8 * wave(0.05)
    series.data[brain & ~half] += 8 * wave(0.2)  # as strong, outside the band
    found = bold_maps(series, processing="xcp_d", confounds=None, brain=brain)
    alff, falff = found.maps["ALFF"].data, found.maps["fALFF"].data
    assert alff[brain].mean() == pytest.approx(1, abs=1e-4)  # over its own brain mean
    assert np.median(alff[half]) > 3 * np.median(alff[brain & ~half])
    assert np.median(falff[half]) > 0.5 > 0.3 > np.median(falff[brain & ~half])


def test_alff_of_one_wave_is_its_amplitude_over_the_bins_of_the_band():
    count, hertz = 100, 0.05  # a whole number of cycles: all in one bin
    courses = 500 + 6 * np.cos(2 * np.pi * hertz * TR * np.arange(count))[None].astype(np.float32)
    maps = temporal_maps(courses, make_plan(count, tr_s=TR, whole=courses[0], motion=None,
                                            remove_motion=False))
    bins = 15  # 0.010 to 0.080 Hz in steps of 0.005
    assert maps["ALFF"][0] == pytest.approx(6 / bins, rel=0.1)  # drift terms take a little
    assert maps["fALFF"][0] > 0.8


def test_drift_counts_neither_as_noise_nor_as_fluctuation(head):
    _, _, brain = head
    series = made(head)
    time = np.linspace(-1, 1, COUNT)
    drifting = replace(series, data=series.data + (60 * time + 40 * time**2).astype(np.float32))
    still, moved = (bold_maps(s, processing="fix", confounds=None,
                              brain=brain).maps for s in (series, drifting))
    for name in ("tSNR", "ALFF", "fALFF"):
        np.testing.assert_allclose(moved[name].data[brain], still[name].data[brain], rtol=0.02)


def test_noise_of_any_repetition_time_has_the_same_falff():
    noise = np.random.default_rng(0).normal(100, 1, (200, 800)).astype(np.float32)
    shares = [np.median(temporal_maps(noise, make_plan(800, tr_s=tr, whole=noise[0], motion=None,
                                                       remove_motion=False))["fALFF"])
              for tr in (0.735, 2.0)]
    assert shares[0] == pytest.approx(0.07 / 0.25, abs=0.03)
    assert shares[1] == pytest.approx(shares[0], abs=0.02)


def test_blocks_do_not_show(head, monkeypatch):
    _, _, brain = head
    series = made(head, sd=5)
    whole = bold_maps(series, processing="fix", confounds=None, brain=brain).maps
    monkeypatch.setattr("data_prep.volumes.functional.temporal.BLOCK", 100)
    for name, volume in bold_maps(series, processing="fix", confounds=None,
                                  brain=brain).maps.items():
        np.testing.assert_allclose(volume.data, whole[name].data, rtol=1e-4, atol=1e-6)


def test_unsteady_volumes_are_dropped(head):
    _, _, brain = head
    series = made(head)
    clean = bold_maps(series, processing="fix", confounds=None, brain=brain)
    series.data[..., 0] *= 1.8
    series.data[..., 1] *= 1.2
    found = bold_maps(series, processing="fix", confounds=None, brain=brain)
    assert found.figures["bold_volumes"] == "118 of 120"
    assert found.figures["bold_tsnr"] == pytest.approx(clean.figures["bold_tsnr"], rel=0.02)


# ---- what a series cannot give -------------------------------------------------------------------

@pytest.mark.parametrize(("count", "tr_s", "names", "flag"), [
    (1, None, {"BOLD"}, "short_series"),
    (10, 2.0, {"BOLD"}, "short_series"),
    (30, 2.0, {"BOLD", "tSNR"}, "short_series"),
    (60, 0.8, {"BOLD", "tSNR"}, "short_series"),  # 48 s
    (60, None, {"BOLD", "tSNR"}, "no_tr"),
    (60, 8.0, {"BOLD", "tSNR"}, None),  # Nyquist below the band
])
def test_short_or_timeless_series_give_what_they_can(head, count, tr_s, names, flag):
    _, _, brain = head
    found = bold_maps(replace(made(head, count=count), tr_s=tr_s), processing="fix",
                      confounds=None, brain=brain)
    assert set(found.maps) == names
    assert found.flags == ([flag] if flag else [])
    assert found.figures["alff_reason"]
    assert ("tsnr_reason" in found.figures) == ("tSNR" not in names)


def test_a_series_without_its_mean_keeps_its_fluctuations_only(head):
    mean, _, brain = head
    series = made(head)
    found = bold_maps(replace(series, data=series.data - mean[..., None]), processing="xcp_d",
                      confounds=None, brain=brain)
    assert set(found.maps) == {"ALFF", "fALFF"} and found.notes == ["demeaned"]
    assert found.figures["bold_reason"] == found.figures["tsnr_reason"] == "the series has no mean"
    without_mask = bold_maps(replace(series, data=series.data - mean[..., None]),
                             processing="xcp_d", confounds=None, brain=None)
    assert set(without_mask.maps) == {"ALFF", "fALFF"}


def test_a_filtered_series_has_no_falff(head):
    mean, _, brain = head
    slow = sum(wave(h, 240)[:COUNT] for h in (0.02, 0.03, 0.05, 0.07))
    amplitude = np.random.default_rng(1).uniform(1, 5, mean.shape)[..., None]
    taper = np.hanning(COUNT)  # a whole band-pass leaves no edge
    data = (mean[..., None] + amplitude * slow * taper).astype(np.float32)
    found = bold_maps(replace(made(head), data=data), processing="xcp_d", confounds=None,
                      brain=brain)
    assert "fALFF" not in found.maps and "ALFF" in found.maps
    assert "filtered" in str(found.figures["falff_reason"])


def test_the_brain_is_found_where_no_mask_is_given(head):
    _, _, brain = head
    with_mask, without = (bold_maps(made(head), processing="fix", confounds=None,
                                    brain=mask) for mask in (brain, None))
    ratio = without.maps["ALFF"].data[brain].mean() / with_mask.maps["ALFF"].data[brain].mean()
    assert ratio == pytest.approx(1, abs=0.1)


# ---- motion --------------------------------------------------------------------------------------

PARAMETERS = np.cumsum(np.random.default_rng(3).normal(
    0, [0.1, 0.1, 0.1, 0.002, 0.002, 0.002], (COUNT, 6)), axis=0)


def fmriprep(parameters: np.ndarray, unsteady: int = 0) -> bytes:
    names = ["trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z"]
    fd = framewise_displacement(parameters)
    lines = ["\t".join(["csf", *names, "framewise_displacement",
                        *(f"non_steady_state_outlier{k:02d}" for k in range(unsteady))])]
    for t, row in enumerate(parameters):
        lines.append("\t".join(["1.0", *(repr(float(v)) for v in row),
                                "n/a" if t == 0 else repr(float(fd[t])),
                                *("1" if t == k else "0" for k in range(unsteady))]))
    return "\n".join(lines).encode()


def test_displacement_is_powers():
    parameters = np.zeros((3, 6))
    parameters[1] = [0.3, -0.2, 0, 0, 0.01, 0]
    np.testing.assert_allclose(framewise_displacement(parameters)[1:], [1.0, 1.0])


def test_motion_tables_of_all_kinds_are_understood():
    truth = framewise_displacement(PARAMETERS)
    swapped = PARAMETERS[:, [3, 4, 5, 0, 1, 2]]
    mcf = "\n".join("  ".join(f"{v:.8f}" for v in row) + "  " for row in swapped).encode()
    column = "\n".join(["framewise_displacement", "n/a", *map(repr, truth[1:].tolist())]).encode()
    bare = "\n".join(map(repr, truth[1:].tolist())).encode()  # one row less: between volumes
    for content in (fmriprep(PARAMETERS), mcf, column, bare):
        found = parse_motion(content, COUNT, "bold").displacement
        assert np.isnan(found[0])
        np.testing.assert_allclose(found[1:], truth[1:], atol=1e-5)
    assert parse_motion(fmriprep(PARAMETERS, unsteady=3), COUNT, "bold").unsteady == 3


@pytest.mark.parametrize("content", [b"", b"a\tb\n1\t2\n", b"1 2 3\n4 5 6\n", b"1\n2\n3\n4\n5\n",
                                     b"\xff\xfe\x00", b"<html>\n<p>\n</html>\n"])
def test_other_tables_are_refused(content):
    with pytest.raises(ScanError) as caught:
        parse_motion(content, 2, "bold")
    assert caught.value.code == "bad_confounds"


def test_motion_of_aligned_series_is_removed_with_their_confounds(head):
    _, _, brain = head
    series = made(head, sd=3)
    clean = bold_maps(series, processing="fix", confounds=None, brain=brain)
    series.data += (200 * PARAMETERS[:, 0]).astype(np.float32)
    dirty = bold_maps(series, processing="fmriprep", confounds=None, brain=brain)
    cured = bold_maps(series, processing="fmriprep", confounds=fmriprep(PARAMETERS), brain=brain)
    assert dirty.notes == ["minimal"] and cured.notes == ["cleaned_here"]
    assert dirty.flags == cured.flags == []
    assert cured.figures["bold_tsnr"] == pytest.approx(clean.figures["bold_tsnr"], rel=0.05)
    assert dirty.figures["bold_tsnr"] < 0.5 * clean.figures["bold_tsnr"]
    assert cured.figures["qc_fd_mean"] == pytest.approx(
        np.nanmean(framewise_displacement(PARAMETERS)))
    assert dirty.figures["qc_fd_mean"] is None
    assert "motion-corrected" in dirty.figures["qc_fd_reason"]


def test_a_table_that_does_not_fit_is_flagged_and_the_series_kept(head):
    found = bold_maps(made(head), processing="fmriprep", confounds=fmriprep(PARAMETERS[:50]),
                      brain=head[2])
    assert found.flags == ["bad_confounds"] and found.notes == ["minimal"] and "ALFF" in found.maps
    assert "50 rows" in found.figures["confounds_reason"]


def test_motion_of_a_raw_series_is_estimated_and_told():
    data, affine = ellipsoid()
    texture = ndimage.gaussian_filter(np.random.default_rng(0).normal(0, 1, data.shape), 3)
    data, shape = data * (1 + texture / texture.std() / 4), data.shape
    parameters = PARAMETERS[:8]
    middle = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    frames = []
    for row in parameters:
        inverse, matrix = Rotation.from_rotvec(row[3:]).as_matrix().T, np.eye(4)
        matrix[:3, :3] = inverse
        matrix[:3, 3] = middle - inverse @ (middle + row[:3])
        frames.append(resample(to_itk(data, affine), matrix, shape=shape, affine=affine))
    series = Series("bold", np.stack(frames, axis=3), affine, TR)
    truth = framewise_displacement(parameters)
    found = estimate_motion(series)
    assert np.corrcoef(found.displacement[1:], truth[1:])[0, 1] > 0.9
    maps = bold_maps(series, processing=None, confounds=None, brain=None)
    assert maps.flags == ["short_series"] and maps.notes == ["minimal"]
    assert maps.figures["qc_fd_source"] == "estimated"
    assert maps.figures["qc_fd_mean"] == pytest.approx(np.nanmean(truth), rel=0.15)
    assert maps.figures["qc_fd_max"] == pytest.approx(np.nanmax(truth), rel=0.2)
    still = replace(series, data=np.repeat(series.data[..., :1], 4, axis=3))
    assert np.nanmax(estimate_motion(still).displacement) < 0.01


def test_a_real_raw_series(shared_data):
    path = shared_data / "studyforrest/sub-01_task-localizer_bold.nii.gz"
    found = bold_maps(read_series(str(path)), processing=None, confounds=None, brain=None)
    assert set(found.maps) == {"BOLD"} and found.flags == ["short_series"]
    assert found.notes == ["minimal"]
    assert 0 < found.figures["qc_fd_mean"] < 0.5
    assert found.maps["BOLD"].orientation == "LAS"


# ---- scale ---------------------------------------------------------------------------------------

def test_maps_have_fixed_ranges(head):
    mean, _, brain = head
    for name, top in RANGES.items():
        image = np.full(mean.shape, top / 2, np.float32)
        image[12] = 2 * top
        scaled = scale_map(name, image, brain)
        assert scaled.dtype == np.float32 and not scaled[~brain].any()
        assert set(np.unique(scaled[brain])) == {0.5, 1.0}
    tissue = mean + np.random.default_rng(0).normal(0, 50, mean.shape).astype(np.float32)
    np.testing.assert_allclose(scale_map("BOLD", tissue, brain),
                               scale_map("BOLD", tissue * 100, brain), atol=1e-5)
