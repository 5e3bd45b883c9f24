"""Headers whose fields contradict each other: the right one is used, or the scan is refused."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.flags import Flag
from data_prep.scan import ScanError
from data_prep.volumes.reading.volume import Volume, read_scan, read_series
from tests.helpers.synthetic_head import ellipsoid

DATA, AFFINE = ellipsoid()
CODED = {"sform_code": 1, "qform_code": 1}


def written(path: Path, affine: np.ndarray | None = None, data: np.ndarray = DATA, **fields) -> str:
    """A file with both forms, and then ``fields`` over its header, as a tool may leave them."""
    image = nib.Nifti1Image(data.astype(np.int16), AFFINE if affine is None else affine)
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    raw = bytearray(image.to_bytes())
    header = np.frombuffer(raw, nib.nifti1.header_dtype, 1).copy()
    for name, value in fields.items():
        where, _, place = name.partition("__")
        if place:
            header[0][where][int(place)] = value
        else:
            header[0][where] = value
    raw[:348] = header.tobytes()
    path.write_bytes(raw)
    return str(path)


def rows(affine: np.ndarray) -> dict[str, np.ndarray]:
    return {f"srow_{axis}": affine[n] for n, axis in enumerate("xyz")}


def refused(uri: str, **more) -> ScanError:
    with pytest.raises(ScanError) as caught:
        read_scan(uri, **more)
    assert Path(uri).name in str(caught.value)
    return caught.value


def unchanged(volume: Volume) -> bool:
    return np.allclose(volume.affine, AFFINE, atol=1e-3) and bool(
        (volume.data == DATA.astype(np.int16)).all())


# ---- fields that cannot be -----------------------------------------------------------------------

@pytest.mark.parametrize("excess", [2e-7, 1e-6, 1e-4, 5e-3])
@pytest.mark.parametrize("sform_code", [0, 1])
def test_a_rounded_quaternion_is_scaled_down(tmp_path, excess, sform_code):
    volume = read_scan(written(tmp_path / "a.nii", sform_code=sform_code, quatern_b=0,
                               quatern_c=0, quatern_d=1 + excess,
                               **rows(np.diag([-1, -1, 1, 1.0]) @ AFFINE)))
    assert volume.flags in ([], [Flag.SFORM_QFORM_DISAGREE])
    assert volume.affine[0, 0] == pytest.approx(4)


@pytest.mark.parametrize("fields", [
    {"quatern_b": 2.0}, {"quatern_c": np.nan}, {"pixdim__1": -4.0}, {"pixdim__2": 0.0},
    {"pixdim__3": np.nan}, {"pixdim__0": 3.0}, {"pixdim__0": np.nan}, {"qoffset_x": np.inf}])
def test_a_qform_that_cannot_be_yields_to_a_good_sform_and_alone_is_refused(tmp_path, fields):
    volume = read_scan(written(tmp_path / "a.nii", **fields))
    assert volume.flags == [Flag.QFORM_INVALID] and unchanged(volume)
    error = refused(written(tmp_path / "b.nii", sform_code=0, **fields))
    assert error.code == ("bad_pixdim" if "pixdim" in next(iter(fields)) else
                          "unknown_orientation") or "qfac" in str(error)


def test_a_sform_that_cannot_be_yields_to_a_good_qform(tmp_path):
    for number, row in enumerate(([0, 0, 0, 0], [np.nan, 0, 0, 0])):
        volume = read_scan(written(tmp_path / f"{number}.nii", srow_x=row))
        assert volume.flags == [Flag.SFORM_INVALID] and unchanged(volume)


@pytest.mark.parametrize(("slope", "inter", "flagged"), [
    (0, 0, False), (np.nan, 0, True), (np.inf, 0, True), (1, np.nan, True), (1, -np.inf, True)])
def test_scaling_that_is_no_number_leaves_values_as_stored(tmp_path, slope, inter, flagged):
    volume = read_scan(written(tmp_path / "a.nii", scl_slope=slope, scl_inter=inter))
    assert volume.flags == ([Flag.SLOPE_NOT_FINITE] if flagged else []) and unchanged(volume)


# ---- dim -----------------------------------------------------------------------------------------

def test_one_volume_of_four_axes_is_read_whatever_the_fourth_says(tmp_path):
    for last in (1, 0):
        uri = written(tmp_path / f"{last}.nii", dim__0=4, dim__4=last)
        volume = read_scan(uri)
        assert unchanged(volume) and volume.flags == ([] if last else [Flag.DIM_MENDED])
        assert read_series(uri).data.shape == (*DATA.shape, 1)


@pytest.mark.parametrize(("fields", "what"), [
    ({"dim__1": 0}, "at least one voxel"), ({"dim__2": -60}, "at least one voxel"),
    ({"dim__0": 4, "dim__3": 1, "dim__4": 52}, "along the third axis")])
def test_axes_that_cannot_be_are_named(tmp_path, fields, what):
    error = refused(written(tmp_path / "a.nii", **fields))
    assert error.code == "not_3d" and what in str(error)


# ---- sizes ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("zoom", [(0.9, 0.9, 0.9), (1, 1, 0.73), (1.1, 1, 1)])
@pytest.mark.parametrize("qform_code", [0, 1])
def test_sizes_that_disagree_are_refused_with_both_and_the_cure(tmp_path, zoom, qform_code):
    wrong = AFFINE @ np.diag([*zoom, 1])
    error = refused(written(tmp_path / "a.nii", qform_code=qform_code, **rows(wrong)))
    assert error.code == "voxel_size_disagrees"
    assert "4 x 4 x 4" in str(error) and f"{4 * zoom[2]:.4g}" in str(error)
    assert "sform_code" in str(error) and f"{np.prod(zoom):.2f}" in str(error)


def test_the_sidecars_slice_thickness_settles_sizes(tmp_path):
    uri = written(tmp_path / "a.nii", **rows(AFFINE @ np.diag([1, 1, 0.73, 1])))
    for thickness, step in ((4.0, 4.0), (2.92, 2.92)):
        volume = read_scan(uri, None, {"SliceThickness": thickness})
        assert volume.flags[0] == Flag.VOXEL_SIZE_SETTLED
        assert volume.affine[2, 2] == pytest.approx(step)
    assert refused(uri, facts={"SliceThickness": 7.0}).code == "voxel_size_disagrees"


@pytest.mark.parametrize("factor", [0.001, 0.2, 5, 1000])
def test_what_is_no_head_yields_to_what_is(tmp_path, factor):
    wrong = np.diag([factor] * 3 + [1]) @ AFFINE
    volume = read_scan(written(tmp_path / "a.nii", **rows(wrong)))
    assert volume.flags[0] == Flag.VOXEL_SIZE_SETTLED and unchanged(volume)


def test_a_sform_into_a_template_does_not_change_the_size_of_a_head(tmp_path):
    stretched = np.diag([1.2, 1.1, 1.15, 1]) @ AFFINE
    volume = read_scan(written(tmp_path / "a.nii", sform_code=4, **rows(stretched)))
    assert volume.flags[0] == Flag.SFORM_STRETCHES and unchanged(volume)


@pytest.mark.parametrize("pixdim", [1.0, 4.0, 4.05])
def test_sizes_that_agree_or_were_never_filled_in_say_nothing(tmp_path, pixdim):
    fields = {f"pixdim__{axis}": pixdim for axis in (1, 2, 3)}
    volume = read_scan(written(tmp_path / "a.nii", qform_code=0, **fields))
    assert volume.flags == [] and unchanged(volume)


@pytest.mark.parametrize("code", [0, 1, 2, 3])
@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_any_unit_of_length_becomes_mm(tmp_path, code, factor):
    affine = np.diag([factor] * 3 + [1]) @ AFFINE
    volume = read_scan(written(tmp_path / "a.nii", affine, xyzt_units=code))
    assert unchanged(volume)
    said = {0: 1.0, 1: 1e-3, 2: 1.0, 3: 1e3}[code]
    assert volume.flags == ([Flag.SPACE_UNIT_CONVERTED] if factor != 1 else
                            [] if said == 1 else [Flag.SPACE_UNIT_IGNORED])


# ---- left and right ------------------------------------------------------------------------------

@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (-1, 1, 1)])
def test_an_affine_of_no_one_is_refused_unless_the_user_stands_by_it(tmp_path, signs):
    data = np.repeat(np.repeat(np.repeat(DATA, 2, 0), 2, 1), 2, 2)
    uri = written(tmp_path / "a.nii", np.diag([*signs, 1.0]), data)
    error = refused(uri)
    assert error.code == "unknown_orientation" and "prepare --turn" in str(error)
    assert read_scan(uri, turn="RAS").turn == "RAS" and read_scan(uri, label=True).data.any()


def test_forms_that_disagree_about_the_side_are_refused_unless_the_user_says_which(tmp_path):
    uri = written(tmp_path / "a.nii", **rows(np.diag([-1, 1, 1, 1.0]) @ AFFINE))
    assert refused(uri).code == "left_right_doubtful"
    assert unchanged(read_scan(uri, turn="LAS"))
