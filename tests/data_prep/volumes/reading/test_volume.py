"""Reading scans: every awkward file gets its right answer, and world coordinates never change."""

from __future__ import annotations

import gzip
import itertools
import tracemalloc
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.scan import ScanError
from data_prep.volumes.reading.volume import Volume, read_scan, read_series
from neurojepa.errors import DataError
from neurojepa.storage import write_bytes
from tests.helpers.dicom import slice_of
from tests.helpers.synthetic_head import ellipsoid, moved, save

AXES = ["".join(codes) for order in itertools.permutations(("RL", "AP", "SI"))
        for codes in itertools.product(*order)]
OK = ["ok_4d_one_volume.nii.gz", "ok_bigendian_int16.nii", "ok_freesurfer.mgz",
      "ok_int16_slope_inter.nii.gz", "ok_las.nii.gz", "ok_nifti2.nii.gz", "ok_pair.hdr",
      "ok_pair.img", "ok_ras.nii.gz", "odd_duplicate_of_reference.nii.gz",
      "odd_sform_qform_disagree.nii.gz"]
REFUSED = {
    "bad_all_zero.nii.gz": "all_zero",
    "bad_constant.nii.gz": "constant",
    "bad_empty.nii.gz": "empty",
    "bad_html_error_page.nii.gz": "not_nifti",
    "bad_singular_affine.nii.gz": "singular_affine",
    "bad_truncated.nii": "truncated",
    "bad_truncated_gzip.nii.gz": "truncated",
    "odd_4d_as_t1w.nii.gz": "not_3d",
    "odd_no_qform_no_sform.nii.gz": "unknown_orientation",
    "odd_thin_slab_4_slices.nii.gz": "too_few_slices",
}


def refused(uri: str | Path, **more) -> str:
    with pytest.raises(ScanError) as caught:
        read_scan(str(uri), **more)
    assert str(uri).split("::")[0].split("/")[-1].split(".")[0] in str(caught.value)
    return caught.value.code


# ---- the awkward files ---------------------------------------------------------------------------

def test_ok_files_equal_the_reference_in_world_coordinates(awkward):
    reference = read_scan(str(awkward / "ok_reference.nii.gz"))
    for name in OK:
        volume = read_scan(str(awkward / name))
        np.testing.assert_allclose(volume.affine, reference.affine, atol=1e-4, err_msg=name)
        if "slope" not in name:
            np.testing.assert_array_equal(volume.data, reference.data, err_msg=name)
            continue
        # Its values are the reference's in another unit, rounded to steps of its slope.
        assert volume.data.min() == pytest.approx(-18 * 0.0125 - 17.5)
        line = np.polyfit(reference.data.ravel(), volume.data.ravel(), 1)
        np.testing.assert_allclose(np.polyval(line, reference.data), volume.data, atol=0.0125)


def test_oblique_file_is_the_reference_turned(awkward):
    reference = read_scan(str(awkward / "ok_reference.nii.gz"))
    volume = read_scan(str(awkward / "ok_oblique_20deg.nii.gz"))
    motion = volume.affine @ np.linalg.inv(reference.affine)
    np.testing.assert_allclose(motion[:3, :3] @ motion[:3, :3].T, np.eye(3), atol=1e-5)
    assert 15 < np.degrees(np.arccos((np.trace(motion[:3, :3]) - 1) / 2)) < 30
    assert volume.data.std() == pytest.approx(reference.data.std(), rel=0.1)


def test_bad_files_are_refused_with_file_and_code(awkward):
    assert {name: refused(awkward / name) for name in REFUSED} == REFUSED


def test_odd_files_carry_their_flag(awkward):
    assert "sform_qform_disagree" in read_scan(
        str(awkward / "odd_sform_qform_disagree.nii.gz")).flags
    assert "huge_field_of_view" in read_scan(str(awkward / "odd_huge_fov_off_centre.nii.gz")).flags
    volume = read_scan(str(awkward / "bad_nan_background_one_inf.nii.gz"))
    assert "non_finite_cleaned" in volume.flags
    assert np.isfinite(volume.data).all() and volume.invalid is not None
    assert (volume.data[volume.invalid] == 0).all() and volume.data.max() > 0


def test_every_awkward_file_has_an_answer_here(awkward):
    here = {*OK, *REFUSED, "ok_reference.nii.gz", "ok_oblique_20deg.nii.gz",
            "odd_huge_fov_off_centre.nii.gz", "bad_nan_background_one_inf.nii.gz"}
    assert {path.name for path in awkward.iterdir()} == here


def test_duplicates_share_their_scan_id_and_others_do_not(awkward):
    def scan_id(name: str) -> str:
        return read_scan(str(awkward / name)).scan_id

    reference = scan_id("ok_reference.nii.gz")
    assert scan_id("odd_duplicate_of_reference.nii.gz") == reference
    assert scan_id("ok_las.nii.gz") == reference  # storage order is no content
    assert scan_id("ok_oblique_20deg.nii.gz") != reference


# ---- orientation ---------------------------------------------------------------------------------

@pytest.mark.parametrize("axes", AXES)
def test_all_48_orientations_read_equal(tmp_path, axes):
    data, affine = ellipsoid()
    uri = save(tmp_path / f"{axes}.nii", data, affine, axes)
    volume = read_scan(uri)
    assert volume.orientation == axes
    np.testing.assert_array_equal(volume.data, data)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    assert volume.scan_id == Volume("reference", data, affine).scan_id


def test_the_ball_on_the_right_stays_on_the_right(tmp_path):
    data, affine = ellipsoid()
    volume = read_scan(save(tmp_path / "a.nii.gz", data, affine, "LPI"))
    ball = np.argwhere(volume.data == 1200).mean(axis=0)
    world = volume.affine[:3, :3] @ ball + volume.affine[:3, 3]
    np.testing.assert_allclose(world, (35, 0, 20), atol=2)


# ---- containers and stores -----------------------------------------------------------------------

def test_reads_a_member_of_a_zip_and_names_a_missing_one(tmp_path):
    data, affine = ellipsoid()
    path = save(tmp_path / "a.nii.gz", data, affine)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, "T1/T1.nii.gz")
    volume = read_scan(str(tmp_path / "a.zip"), "T1/T1.nii.gz")
    np.testing.assert_array_equal(volume.data, data)
    assert refused(tmp_path / "a.zip", member="T1/other.nii.gz") == "missing_member"


def test_reads_from_an_object_store(tmp_path):
    data, affine = ellipsoid()
    path = Path(save(tmp_path / "a.nii.gz", data, affine))
    write_bytes("memory://scans/a.nii.gz", path.read_bytes())
    np.testing.assert_array_equal(read_scan("memory://scans/a.nii.gz").data, data)
    assert refused("memory://scans/b.nii.gz") == "missing"


def test_the_name_is_not_trusted(tmp_path):
    data, affine = ellipsoid()
    path = Path(save(tmp_path / "a.nii", data, affine))
    disguised = tmp_path / "b.nii.gz"
    disguised.write_bytes(path.read_bytes())  # not compressed at all
    np.testing.assert_array_equal(read_scan(str(disguised)).data, data)


def test_header_extensions_do_not_hide_the_voxels(tmp_path):
    data, affine = ellipsoid()
    image = nib.Nifti1Image(data, affine)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 70_000))
    nib.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_scan(str(tmp_path / "a.nii.gz")).data, data)


# ---- refusals ------------------------------------------------------------------------------------

def test_a_header_that_claims_too_much_is_refused_before_allocation(tmp_path):
    header = nib.Nifti1Header()
    header.set_data_shape((30_000, 30_000, 30_000))
    header.set_data_dtype(np.float64)
    header.set_sform(np.eye(4), 1)
    path = tmp_path / "bomb.nii.gz"
    with gzip.open(path, "wb") as file:
        file.write(header.binaryblock + bytes(1000))
    tracemalloc.start()
    assert refused(path) == "too_large"
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize(("content", "code"), [
    (b"version https://git-lfs.github.com/spec/v1\n", "not_downloaded"),
    (b"/annex/objects/MD5E-s1--0.nii.gz\n", "not_downloaded"),
    (b"\x5c\x01\x00\x00" + bytes(340) + bytes(4), "unknown_orientation"),  # Analyze
    (b"\x5c\x01\x00\x00" + bytes(100), "truncated"),
    (b"\x1f\x8b not gzip after all", "truncated"),
])
def test_what_is_no_scan_is_named(tmp_path, content, code):
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(content)
    assert refused(path) == code


def test_colour_shear_and_small_fields_are_refused(tmp_path):
    data, affine = ellipsoid()
    colour = np.zeros(data.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert refused(save(tmp_path / "colour.nii", colour, affine)) == "unsupported_dtype"
    sheared = affine.copy()
    sheared[0, 1] = 1.0
    assert refused(save(tmp_path / "sheared.nii", data, sheared)) == "sheared_affine"
    small = np.diag([1.0, 1.0, 1.0, 1.0])
    small[:3, 3] = -20
    assert refused(save(tmp_path / "small.nii", data, small)) == "small_field_of_view"


def test_a_float64_header_within_the_voxel_limit_is_held_to_the_byte_limit(tmp_path):
    path = tmp_path / "long.nii"
    path.write_bytes(_header((128, 128, 80, 1000), np.float64).binaryblock + bytes(4))
    assert path.stat().st_size < 1000
    with pytest.raises(ScanError) as caught:
        read_series(str(path))
    assert caught.value.code == "too_large" and "float64" in str(caught.value)


def test_headers_without_orientation_or_with_two_are_told_apart(tmp_path):
    data, affine = ellipsoid()
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, 0)
    image.set_qform(affine, 0)
    nib.save(image, tmp_path / "none.nii")
    assert refused(tmp_path / "none.nii") == "unknown_orientation"
    image.set_sform(affine, 1)
    shifted = affine.copy()
    shifted[:3, 3] += 30
    image.set_qform(shifted, 1)
    nib.save(image, tmp_path / "two.nii")
    volume = read_scan(str(tmp_path / "two.nii"))
    assert volume.flags == ["sform_qform_disagree"]
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)


@pytest.mark.parametrize(("code", "factor"), [("meter", 1e-3), ("micron", 1e3)])
def test_space_units_are_converted_where_that_makes_a_head(tmp_path, code, factor):
    data, affine = ellipsoid()
    image = nib.Nifti1Image(data, np.diag([factor, factor, factor, 1.0]) @ affine)
    image.header.set_xyzt_units(code)
    nib.save(image, tmp_path / "unit.nii")
    volume = read_scan(str(tmp_path / "unit.nii"))
    assert volume.flags == ["space_unit_converted"]
    np.testing.assert_allclose(volume.affine, affine, atol=1e-3)
    mislabelled = nib.Nifti1Image(data, affine)
    mislabelled.header.set_xyzt_units(code)
    nib.save(mislabelled, tmp_path / "mm.nii")
    volume = read_scan(str(tmp_path / "mm.nii"))
    assert volume.flags == ["space_unit_ignored"]
    np.testing.assert_allclose(volume.affine, affine, atol=1e-3)


def test_values_that_wrapped_around_int16_are_refused_and_honest_negatives_kept(tmp_path):
    data, affine = ellipsoid()
    bright = np.where(data == 1200, 40_000, data * 40)  # the ball is inside tissue of 28,000
    wrapped = bright.astype(np.int32).astype(np.int16)
    assert wrapped.min() < -20_000
    assert refused(save(tmp_path / "wrapped.nii", wrapped, affine)) == "integer_wrap"
    clipped = np.clip(bright, 0, 32_767).astype(np.int16)
    assert read_scan(save(tmp_path / "clipped.nii", clipped, affine)).flags == []
    padded = clipped.copy()
    padded[data < 20] = -32_768  # air by convention: it reaches the border
    assert read_scan(save(tmp_path / "padded.nii", padded, affine)).notes == ["padding_removed"]
    phase = np.random.default_rng(0).integers(-4096, 4096, data.shape).astype(np.int16)
    assert read_scan(save(tmp_path / "phase.nii", phase, affine)).flags == ["negative_values"]


@pytest.mark.parametrize(("slope", "flags"), [(0.0, []), (np.nan, ["slope_not_finite"])])
def test_a_slope_of_zero_or_nan_counts_as_one(tmp_path, slope, flags):
    data, affine = ellipsoid()
    content = bytearray(nib.Nifti1Image(data.astype(np.int16), affine).to_bytes())
    content[112:116] = np.float32(slope).tobytes()
    path = tmp_path / "slope.nii"
    path.write_bytes(content)
    volume = read_scan(str(path))
    np.testing.assert_array_equal(volume.data, data.astype(np.int16))
    assert volume.flags == flags


def test_invalid_voxels_become_zero_and_are_remembered(tmp_path):
    data, affine = ellipsoid()
    data[:5], data[20, 20, 20] = np.nan, np.inf
    volume = read_scan(save(tmp_path / "nan.nii", data, affine))
    assert volume.flags == ["non_finite_cleaned"]
    assert volume.invalid is not None and volume.invalid.sum() == 5 * 60 * 52 + 1
    assert (volume.data[volume.invalid] == 0).all()


def test_thick_slices_are_kept_with_their_spacing(tmp_path):
    data, affine = ellipsoid()
    volume = read_scan(save(tmp_path / "flair.nii", data[:, :, ::2],
                            affine @ np.diag([1.0, 1.0, 2.0, 1.0])))
    assert volume.spacing == (4.0, 4.0, 8.0)


def test_constant_complex_and_cifti_files_have_their_codes(tmp_path):
    data, affine = ellipsoid()
    assert refused(save(tmp_path / "flat.nii", np.full_like(data, 7), affine)) == "constant"
    complex_ = save(tmp_path / "complex.nii", data.astype(np.complex64), affine)
    assert refused(complex_) == "unsupported_dtype"
    image = nib.Nifti2Image(np.zeros((1, 1, 1, 1, 10, 20), np.float32), np.eye(4))
    image.header.set_intent("ConnDenseSeries")
    nib.save(image, tmp_path / "dense.nii")
    assert refused(tmp_path / "dense.nii") == "cifti"


def test_damaged_archives_and_streams_are_truncated(tmp_path):
    path = Path(save(tmp_path / "a.nii.gz", *ellipsoid()))
    (tmp_path / "cut.nii.gz").write_bytes(path.read_bytes()[:20_000])
    assert refused(tmp_path / "cut.nii.gz") == "truncated"
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, "T1/T1.nii.gz")
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    assert refused(tmp_path / "cut.zip", member="T1/T1.nii.gz") == "truncated"


def test_a_link_without_content_is_not_downloaded(tmp_path):
    (tmp_path / "annexed.nii.gz").symlink_to(".git/annex/objects/aa/bb/KEY/KEY")
    assert refused(tmp_path / "annexed.nii.gz") == "not_downloaded"


def test_every_scan_error_is_a_data_error():
    assert issubclass(ScanError, DataError)


# ---- series --------------------------------------------------------------------------------------

def _header(shape: tuple[int, ...], dtype: type) -> nib.Nifti1Header:
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(dtype)
    header.set_sform(np.eye(4), 1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    return header


def _series(path: Path, step: float = 2.0, unit: str = "sec", axes: str = "LPI") -> np.ndarray:
    data, affine = ellipsoid()
    stack = np.stack([data, data * 2, data * 3], axis=3).astype(np.int16)
    image = nib.Nifti1Image(stack, affine)
    image = image.as_reoriented(nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes)))
    image.header.set_zooms((4.0, 4.0, 4.0, step))
    image.header.set_xyzt_units("mm", unit)
    nib.save(image, path)
    return stack


def test_a_series_is_turned_like_a_scan_and_knows_its_time(tmp_path):
    stack = _series(tmp_path / "bold.nii.gz")
    series = read_series(str(tmp_path / "bold.nii.gz"))
    np.testing.assert_array_equal(series.data, stack)
    np.testing.assert_allclose(series.affine, ellipsoid()[1], atol=1e-4)
    assert (series.data.dtype, series.orientation, series.tr_s) == (np.float32, "LPI", 2.0)
    volume = series.volume(series.data[..., 1])
    assert volume.orientation == "LPI" and volume.scan_id != series.scan_id


@pytest.mark.parametrize(("step", "unit", "sidecar", "tr_s", "flags"), [
    (2.0, "sec", None, 2.0, []),
    (735.0, "msec", None, 0.735, []),
    (8e5, "usec", 0.8, 0.8, []),
    (2.0, "sec", 0.735, 0.735, ["tr_disagrees"]),
    (0.0, "sec", None, None, []),
    (0.0, "sec", 1.5, 1.5, []),
    (2000.0, "sec", None, None, ["tr_implausible"]),
    (2.0, "sec", 2000, 2.0, ["tr_implausible"]),
    (2.0, "unknown", None, 2.0, ["tr_unit_guessed"]),
    (720.0, "unknown", None, 0.72, ["tr_unit_guessed"]),
    (2.0, "hz", None, None, []),
])
def test_repetition_time_comes_from_the_sidecar_then_the_header(tmp_path, step, unit, sidecar,
                                                                tr_s, flags):
    _series(tmp_path / "bold.nii", step, unit)
    series = read_series(str(tmp_path / "bold.nii"),
                         facts={"RepetitionTime": sidecar} if sidecar else None)
    assert series.tr_s == (pytest.approx(tr_s) if tr_s else None)
    assert series.flags == flags


@pytest.mark.parametrize("facts", [
    {"VolumeTiming": [0, 2, 9]}, {"VolumeTiming": [0, 2, 4], "RepetitionTime": 2.0},
    {"VolumeTiming": [0.5]}])
def test_volume_timing_leaves_no_repetition_time(tmp_path, facts):
    _series(tmp_path / "bold.nii", 2.0, "sec")
    series = read_series(str(tmp_path / "bold.nii"), facts=facts)
    assert series.tr_s is None and series.flags == ["volume_timing"]
    assert read_series(str(tmp_path / "bold.nii"), facts={"VolumeTiming": []}).tr_s == 2


def test_a_volume_is_a_series_of_one_with_the_same_id(tmp_path):
    uri = save(tmp_path / "a.nii", *ellipsoid())
    series = read_series(uri)
    assert series.data.shape == (48, 60, 52, 1) and series.tr_s is None
    assert series.scan_id == read_scan(uri).scan_id


def test_series_are_refused_where_a_volume_is_expected_and_when_too_long(tmp_path):
    _series(tmp_path / "bold.nii")
    assert refused(tmp_path / "bold.nii") == "not_3d"
    with pytest.raises(ScanError) as caught:
        read_series(str(tmp_path / "bold.nii"), max_voxels=100_000)
    assert caught.value.code == "too_large"


@pytest.fixture(params=["made", "real"])
def bold_file(request, tmp_path) -> Path:
    """A BOLD file of ten volumes, 1.79 s apart, stored LAS and oblique."""
    if request.param == "real":
        return (request.getfixturevalue("shared_data")
                / "studyforrest/sub-01_task-localizer_bold.nii.gz")
    affine, _ = moved(np.array([[-3.0, 0, 0, 30], [0, 3, 0, -40], [0, 0, 3.3, -20],
                                [0, 0, 0, 1]]), 13, (2, -5, 3))
    data = np.random.default_rng(0).integers(0, 3000, (24, 28, 20, 10)).astype(np.int16)
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_zooms((*image.header.get_zooms()[:3], 1.79))
    nib.save(image, tmp_path / "bold.nii.gz")
    return tmp_path / "bold.nii.gz"


def test_series_keep_their_volumes_and_time(bold_file):
    series = read_series(str(bold_file), facts={"RepetitionTime": 2.0})
    stored = nib.as_closest_canonical(nib.load(bold_file))
    assert series.data.shape == stored.shape and series.flags == ["tr_disagrees"]
    np.testing.assert_allclose(series.data[..., 7], stored.dataobj[..., 7])
    np.testing.assert_allclose(series.affine, stored.affine)


@pytest.fixture(params=["made", "real"])
def bold_slices(request, tmp_path) -> tuple[str, tuple[int, ...]]:
    """A folder of DICOM slices of two volumes, and the shape of their series."""
    if request.param == "real":
        return f"{request.getfixturevalue('shared_data')}/dicom/bold_2vols/", (80, 80, 35, 2)
    for number in range(40):
        pixels = np.full((24, 22), 100 + number, np.int16)
        slice_of(4.0 * (number % 20), number, AcquisitionNumber=1 + number // 20,
                 TemporalPositionIdentifier=1 + number // 20, RepetitionTime=2000.0,
                 Rows=24, Columns=22, PixelSpacing=[4.0, 4.0],
                 PixelData=pixels.tobytes()).save_as(tmp_path / f"{number}.dcm")
    return f"{tmp_path}/", (22, 24, 20, 2)


def test_a_folder_of_dicom_files_is_a_series_with_its_facts(bold_slices):
    folder, shape = bold_slices
    series = read_series(folder)
    assert series.data.shape == shape
    assert series.tr_s == pytest.approx(series.facts["RepetitionTime"]) == pytest.approx(2)
