"""PET: late frames by hand, reference regions by place, ratios that keep their scale."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk

from data_prep.scan import ScanError
from data_prep.volumes.functional.pet import (
    PET_TRACERS,
    is_suvr,
    mean_frame,
    reference_region,
    suvr,
    tracer_name,
)
from data_prep.volumes.functional.pet_table import REGIONS
from data_prep.volumes.functional.pet_units import unit_of
from data_prep.volumes.placing.align import template
from data_prep.volumes.placing.geometry import on_grid, to_itk
from data_prep.volumes.reading.volume import Series
from neurojepa.feed.format import ARCHIVE_GRID

BQ = {"Units": "Bq/mL"}


def series(values: list[float]) -> Series:
    """Frames of 24 x 24 x 24 voxels of 8 mm; frame t is values[t] times a fixed pattern."""
    pattern = 1 + np.arange(24**3, dtype=np.float32).reshape(24, 24, 24) % 7
    data = pattern[..., None] * np.array(values, np.float32)
    return Series("pet", data, np.diag([8.0, 8.0, 8.0, 1.0]))


def late(frames: Series, facts: dict[str, object], **more) -> tuple[float, dict, list[str]]:
    """The value of the mean frame in units of the pattern, figures, flags and notes."""
    volume, figures = mean_frame(frames, facts, **more)
    return float(volume.data.min()), figures, volume.flags + volume.notes


def code(call, *arguments, **more) -> str:
    with pytest.raises(ScanError) as caught:
        call(*arguments, **more)
    return caught.value.code


# ---- tracers -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "name"), [
    ("FDG", "FDG"), ("18F-FDG", "FDG"), ("[18F]AV-45", "AV45"), ("Florbetapir", "AV45"),
    ("18FAV1451", "AV1451"), ("flortaucipir", "AV1451"), ("11C-PiB", "PIB"), ("[11C]DASB", "DASB"),
    ("18F", None), ("water", None), ("", None), (None, None),
])
def test_tracers_are_known_by_their_spellings(text, name):
    assert tracer_name(text) == name


def test_every_tracer_has_a_region_a_window_and_a_range():
    for tracer in PET_TRACERS.values():
        low, high = tracer.window_min
        assert tracer.region in REGIONS and 0 < low < high and tracer.suvr_max > 1


# ---- frames --------------------------------------------------------------------------------------

def test_late_frames_are_weighted_by_their_duration():
    facts = {**BQ, "FrameTimesStart": [0, 1800, 3000, 3300, 3900],
             "FrameDuration": [1800, 1200, 300, 600, 300]}
    value, figures, flags = late(series([9, 8, 1, 4, 100]), facts, tracer="AV45")
    assert value == pytest.approx((300 * 1 + 600 * 4 + 300 * 100) / 1200)
    assert figures == {"pet_frames": "3 of 5", "pet_window_min": "50-70",
                       "pet_frame_motion": "not corrected", "pet_unit": "Bq/mL"}
    assert flags == []


def test_frames_timed_from_the_scan_are_counted_from_the_injection():
    facts = {**BQ, "FrameTimesStart": [0, 300, 900, 1200], "FrameDuration": [300, 600, 300, 600],
             "InjectionStart": -3000}
    assert late(series([1, 4, 100, 9]), facts, tracer="AV45")[1]["pet_window_min"] == "50-70"


def test_a_frame_counts_when_half_of_it_is_inside_the_window():
    facts = {**BQ, "FrameTimesStart": [0, 2700, 3300, 3900, 4500],
             "FrameDuration": [2700, 600, 600, 600, 600]}
    value, figures, _ = late(series([9, 1, 2, 3, 100]), facts, tracer="AV45")
    assert value == pytest.approx(2) and figures["pet_window_min"] == "45-75"


@pytest.fixture(params=["made", "real"])
def sidecar(request) -> dict[str, object]:
    """A dynamic scan of 90 minutes in 36 frames, whose last six take 10 minutes each."""
    if request.param == "real":
        folder = request.getfixturevalue("shared_data") / "pet/bids-pet002-sidecars"
        return json.loads(next(folder.rglob("*_pet.json")).read_text())
    durations = 12 * [10] + 6 * [40] + 8 * [60] + 4 * [240] + 6 * [600]
    return {"Units": "Bq/mL", "TracerName": "DASB", "TimeZero": "10:33:47", "ScanStart": 0,
            "InjectionStart": 0, "FrameDuration": durations,
            "FrameTimesStart": [sum(durations[:number]) for number in range(36)]}


def test_frames_of_a_whole_sidecar(sidecar):
    value, figures, flags = late(series([float(t) for t in range(36)]), sidecar,
                                 tracer=sidecar["TracerName"])
    assert value == pytest.approx(34)  # 60 to 90 minutes: the last three, 10 minutes each
    assert figures["pet_frames"] == "3 of 36" and flags == []


def test_a_single_frame_passes_unchanged():
    value, figures, flags = late(series([3]), BQ)
    assert (value, flags) == (3, []) and figures["pet_frame_motion"] == "single frame"


def test_static_frames_may_lack_times_or_count_from_their_own_start():
    value, _, flags = late(series([1, 2, 3, 6]), BQ, tracer="FDG")
    assert value == pytest.approx(3) and flags == ["frame_times_missing"]
    facts = {**BQ, "FrameTimesStart": [0, 300, 600, 900], "FrameDuration": 4 * [300]}
    value, _, flags = late(series([1, 2, 3, 6]), facts, tracer="AV45")
    assert value == pytest.approx(3) and flags == ["frames_outside_window"]


def test_an_empty_frame_is_left_out_and_named():
    facts = {**BQ, "FrameTimesStart": [3000, 3300, 3600], "FrameDuration": 3 * [300]}
    value, figures, flags = late(series([2, 0, 4]), facts, tracer="AV45")
    assert value == pytest.approx(3)
    assert flags == ["empty_frames"] and figures["pet_frames"] == "2 of 3"


@pytest.mark.parametrize(("facts", "count", "reason"), [
    ({}, 7, "bad_frames"),  # dynamic without times
    ({"FrameTimesStart": [0, 60]}, 2, "bad_frames"),
    ({"FrameTimesStart": [0, 60], "FrameDuration": [60, 60]}, 3, "bad_frames"),
    ({"FrameTimesStart": [60, 0], "FrameDuration": [60, 60]}, 2, "bad_frames"),
    ({"FrameTimesStart": [0, 600000], "FrameDuration": [600000, 600000]}, 2, "bad_frames"),  # ms
    ({"FrameTimesStart": [0, "x"], "FrameDuration": [60, 60]}, 2, "bad_frames"),
    ({"FrameTimesStart": [0, 60, 120], "FrameDuration": 3 * [60]}, 3, "no_late_frames"),
    ({"Units": "1/min"}, 1, "unknown_units"),
    ({"Units": None}, 1, "unknown_units"),
])
def test_frames_and_units_that_cannot_be_used_are_refused(facts, count, reason):
    assert code(mean_frame, series([1.0] * count), {**BQ, **facts}, tracer="AV45") == reason


def test_a_dynamic_scan_of_an_unknown_tracer_is_refused():
    facts = {**BQ, "FrameTimesStart": [0, 3000], "FrameDuration": [3000, 600]}
    assert code(mean_frame, series([1, 2]), facts, tracer="water") == "unknown_tracer"


def test_units_are_judged_by_what_is_known():
    assert late(series([1]), {"Units": "kBq/ml"})[2] == []
    assert late(series([1]), {}, processing="Coreg, Avg")[2] == ["units_missing"]
    assert late(series([1]), {"Units": "SUVR"})[2] == ["already_suvr"]
    assert is_suvr({}, "ucb-suvr") and not is_suvr({"Units": "SUV"})


@pytest.mark.parametrize(("text", "name", "factor"), [
    ("Bq/mL", "Bq/mL", 1), ("BQML", "Bq/mL", 1), ("Bq/cc", "Bq/mL", 1), ("bq / ml", "Bq/mL", 1),
    ("Bq.mL-1", "Bq/mL", 1), ("Bq mL^-1", "Bq/mL", 1), ("Bq/cm^3", "Bq/mL", 1),
    ("Bq/cm³", "Bq/mL", 1), ("becquerels per millilitre", "Bq/mL", 1), ("[Bq/ml]", "Bq/mL", 1),
    ("kBq/ml", "Bq/mL", 1e3), ("kBq/cc", "Bq/mL", 1e3), ("KBQ/CC", "Bq/mL", 1e3),
    ("MBq/mL", "Bq/mL", 1e6), ("kBq/L", "Bq/mL", 1), ("kilobecquerel/ml", "Bq/mL", 1e3),
    ("nCi/cc", "Bq/mL", 37), ("µCi/mL", "Bq/mL", 37e3), ("uCi/ml", "Bq/mL", 37e3),
    ("CNTS", "counts", 1), ("counts/sec", "counts", 1), ("PROPCNTS", "counts", 1),
    ("SUV", "g/mL", 1), ("g/ml", "g/mL", 1), ("GML", "g/mL", 1), ("SUVbw (g/ml)", "g/mL", 1),
    (["Bq/mL"], "Bq/mL", 1), ("SUVR", "SUVR", 1), ("SUV ratio", "SUVR", 1)])
def test_units_are_known_by_their_spellings_and_converted(text, name, factor):
    unit = unit_of(text)
    assert unit is not None and unit.name == name and unit.factor == pytest.approx(factor)


@pytest.mark.parametrize("text", ["1/min", "mL/cm3", "Bq", "ml/Bq", "HU", "unitless", "mm", "kg/ml",
                                  "", None, "Bq/g", "DVR", "percent"])
def test_units_that_are_no_activity_are_not_guessed(text):
    assert unit_of(text) is None
    with pytest.raises(ScanError, match=str(text) if text else "names no Units"):
        late(series([1]), {"Units": text})


def test_activity_is_counted_in_becquerel():
    value, figures = late(series([2]), {"Units": "kBq/cc"})[:2]
    assert value == pytest.approx(2000) and figures["pet_unit"] == "Bq/mL"


# ---- reference and ratio -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def brain() -> np.ndarray:
    return _placed(np.eye(4))


def _placed(matrix: np.ndarray) -> np.ndarray:
    target = template(2)
    return on_grid(to_itk(target.mask.astype(np.uint8), target.affine), matrix, ARCHIVE_GRID,
                   sitk.sitkNearestNeighbor).astype(bool)


def _centre(region: np.ndarray) -> np.ndarray:
    return np.argwhere(region).mean(0) + ARCHIVE_GRID.affine[:3, 3]


@pytest.mark.parametrize(("tracer", "centre", "ml"), [
    ("AV45", (0, -64, -36), (120, 220)), ("DASB", (0, -64, -36), (90, 190)),
    ("AV1451", (0, -62, -46), (45, 100)), ("FDG", (0, -29, -32), (5, 15)),
])
def test_the_approximate_region_lies_in_the_posterior_fossa(brain, tracer, centre, ml):
    region, source = reference_region(tracer, label=None, brain=brain)
    assert source == "approximate" and not (region & ~brain).any()
    np.testing.assert_allclose(_centre(region), centre, atol=6)
    assert ml[0] < region.sum() / 1000 < ml[1]


def test_the_approximate_region_follows_the_size_of_the_head(brain):
    whole, _ = reference_region("AV45", label=None, brain=brain)
    to_template = np.diag([1.25, 1.25, 1.25, 1.0])  # a head of 0.8 times the template's size
    small, _ = reference_region("AV45", label=None, brain=_placed(to_template),
                                to_template=to_template)
    assert small.sum() == pytest.approx(whole.sum() * 0.8**3, rel=0.05)
    np.testing.assert_allclose(_centre(small), 0.8 * _centre(whole), atol=2)


def test_labels_are_used_where_they_are_freesurfers(brain):
    atlas, _ = reference_region("DASB", label=None, brain=brain)
    label = np.where(atlas, 8, 0).astype(np.int16)
    label[95:] = np.where(atlas[95:], 47, 0)
    label[60] = 0
    region, source = reference_region("DASB", label=label, brain=brain)
    assert source == "labels"
    np.testing.assert_array_equal(region, atlas & (label > 0))
    elsewhere = np.zeros_like(label)
    elsewhere[100:130, 90:120, 70:90] = 47  # a hippocampus in another code system
    assert reference_region("DASB", label=elsewhere, brain=brain)[1] == "approximate"


def test_a_region_that_was_not_scanned_is_refused(brain):
    cut = brain.copy()
    cut[:, :, :80] = False
    assert code(reference_region, "AV45", label=None, brain=cut) == "no_reference"
    assert code(reference_region, "water", label=None, brain=brain) == "unknown_tracer"


def test_the_ratio_keeps_its_scale_between_people(brain):
    reference, _ = reference_region("AV45", label=None, brain=brain)
    high = PET_TRACERS["AV45"].suvr_max
    for uptake in (1.1, 1.8):
        image = np.where(reference, 5000.0, np.where(brain, 5000.0 * uptake, 9e9))
        scaled, figures = suvr(image.astype(np.float32), reference=reference, brain=brain,
                               tracer="florbetapir")
        np.testing.assert_allclose(scaled[brain & ~reference], uptake / high, rtol=1e-5)
        np.testing.assert_allclose(scaled[reference], 1 / high, rtol=1e-5)
        assert scaled.dtype == np.float32 and not scaled[~brain].any()
        assert figures["pet_reference_mean"] == pytest.approx(5000)
        assert figures["pet_suvr_median"] == pytest.approx(uptake)
        assert figures["pet_clipped"] == 0


def test_values_above_the_range_are_counted(brain):
    image = np.where(brain, 1.0, 0).astype(np.float32)
    image[:80] *= 10
    scaled, figures = suvr(image, reference=None, brain=brain, tracer="AV45")
    assert scaled.max() == 1 and 0.3 < figures["pet_clipped"] < 0.7
    assert figures["pet_reference_ml"] is None


def test_no_ratio_is_invented(brain):
    image = np.where(brain, 900.0, 0).astype(np.float32)
    reference, _ = reference_region("AV45", label=None, brain=brain)
    # no SUVR is 900
    assert code(suvr, image, reference=None, brain=brain, tracer="AV45") == "unknown_units"
    assert code(suvr, image, reference=reference, brain=brain, tracer="water") == "unknown_tracer"
    image[reference] = 0
    assert code(suvr, image, reference=reference, brain=brain, tracer="AV45") == "no_reference"
