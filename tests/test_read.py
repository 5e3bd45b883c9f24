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
from data_prep.volumes.read import Volume, read_scan
from neurojepa.errors import DataError
from neurojepa.feed.format import write_bytes
from tests.synthetic_head import ellipsoid, save

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

@pytest.mark.parametrize("name", OK)
def test_ok_files_equal_the_reference_in_world_coordinates(shared_data, name):
    reference = read_scan(str(shared_data / "awkward/ok_reference.nii.gz"))
    volume = read_scan(str(shared_data / "awkward" / name))
    np.testing.assert_allclose(volume.affine, reference.affine, atol=1e-4)
    if "slope" not in name:
        np.testing.assert_array_equal(volume.data, reference.data)
        return
    # Its values are the reference's in another unit, rounded to steps of its slope.
    assert volume.data.min() == pytest.approx(-18 * 0.0125 - 17.5)
    line = np.polyfit(reference.data.ravel(), volume.data.ravel(), 1)
    np.testing.assert_allclose(np.polyval(line, reference.data), volume.data, atol=0.0125)


def test_oblique_file_is_the_reference_turned(shared_data):
    reference = read_scan(str(shared_data / "awkward/ok_reference.nii.gz"))
    volume = read_scan(str(shared_data / "awkward/ok_oblique_20deg.nii.gz"))
    motion = volume.affine @ np.linalg.inv(reference.affine)
    np.testing.assert_allclose(motion[:3, :3] @ motion[:3, :3].T, np.eye(3), atol=1e-5)
    assert 15 < np.degrees(np.arccos((np.trace(motion[:3, :3]) - 1) / 2)) < 30
    assert volume.data.std() == pytest.approx(reference.data.std(), rel=0.1)


@pytest.mark.parametrize("name", REFUSED)
def test_bad_files_are_refused_with_file_and_code(shared_data, name):
    assert refused(shared_data / "awkward" / name) == REFUSED[name]


def test_odd_files_carry_their_flag(shared_data):
    folder = shared_data / "awkward"
    assert "sform_qform_disagree" in read_scan(f"{folder}/odd_sform_qform_disagree.nii.gz").flags
    assert "huge_field_of_view" in read_scan(f"{folder}/odd_huge_fov_off_centre.nii.gz").flags
    volume = read_scan(f"{folder}/bad_nan_background_one_inf.nii.gz")
    assert "non_finite_cleaned" in volume.flags
    assert np.isfinite(volume.data).all() and volume.invalid is not None
    assert (volume.data[volume.invalid] == 0).all() and volume.data.max() > 0


def test_every_awkward_file_has_an_answer_here(shared_data):
    here = {*OK, *REFUSED, "ok_reference.nii.gz", "ok_oblique_20deg.nii.gz",
            "odd_huge_fov_off_centre.nii.gz", "bad_nan_background_one_inf.nii.gz"}
    assert {path.name for path in (shared_data / "awkward").iterdir()} == here


def test_duplicates_share_their_scan_id_and_others_do_not(shared_data):
    def scan_id(name: str) -> str:
        return read_scan(str(shared_data / "awkward" / name)).scan_id

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
    assert refused(save(tmp_path / "small.nii", data, small)) == "small_field_of_view"


def test_every_scan_error_is_a_data_error():
    assert issubclass(ScanError, DataError)
