"""Registration: known deformations are found, files say what SimpleITK reads, bad input is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial.transform import Rotation

from neurojepa.downstream import register as module
from neurojepa.downstream import warps
from neurojepa.downstream.__main__ import main
from neurojepa.downstream.images import Image, read_image, read_labels, stored, write_field
from neurojepa.downstream.register import Registration, register
from neurojepa.errors import ConfigError, DataError
from tests.helpers.blobs import blob, save

OBLIQUE = np.eye(4)  # turned by 20, -10 and 5 degrees, voxels of 2, 3 and 4 mm
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", [20, -10, 5], degrees=True).as_matrix() * [2, 3, 4]
OBLIQUE[:3, 3] = 90, -80, -60


def field_of(shape: tuple[int, ...], affine: np.ndarray, bend: float = 6.0) -> np.ndarray:
    """A smooth displacement [x, y, z, 3] in world mm."""
    points = warps.points_of(shape, affine)
    return np.stack([bend * np.sin(points[..., (k + 1) % 3] / 25) for k in range(3)],
                    -1).astype(np.float32)


@pytest.mark.parametrize("turned", ["RAS", "LPS", "PIR", "LSA"])
def test_what_is_written_lies_where_the_scan_was_stored(turned: str) -> None:
    data = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)
    affine = np.diag([2.0, 3, 4, 1])
    ras = nib.Nifti1Image(data, affine)
    file = ras.as_reoriented(nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(turned))))
    written = stored(data, Image("", data, affine, turned))
    assert np.array_equal(written.affine, file.affine)
    assert np.array_equal(written.get_fdata(), file.get_fdata())


@pytest.mark.parametrize("turned", ["RAS", "LPS", "PIR"])
def test_a_field_is_read_by_simpleitk_as_we_read_it(tmp_path: Path, turned: str) -> None:
    rng = np.random.default_rng(1)
    smooth = ndimage.gaussian_filter(rng.random((26, 30, 28)), 2).astype(np.float32)
    image = Image("scan", smooth, OBLIQUE, turned)
    field = field_of(smooth.shape, OBLIQUE)
    write_field(str(tmp_path / "warp.nii.gz"), field, image)
    header = nib.load(tmp_path / "warp.nii.gz").header
    assert (header["intent_code"], header["dim"][:6].tolist()[-1]) == (1007, 3)
    nib.save(stored(smooth, image), tmp_path / "scan.nii.gz")
    transform = sitk.DisplacementFieldTransform(
        sitk.ReadImage(str(tmp_path / "warp.nii.gz"), sitk.sitkVectorFloat64))
    scan = sitk.ReadImage(str(tmp_path / "scan.nii.gz"))
    theirs = sitk.Resample(scan, scan, transform, sitk.sitkLinear, 0.0)
    sitk.WriteImage(theirs, str(tmp_path / "theirs.nii.gz"))
    ours = stored(warps.read_through(image, field, OBLIQUE), image).get_fdata()
    assert np.abs(nib.load(tmp_path / "theirs.nii.gz").get_fdata() - ours).max() < 1e-4
    assert np.abs(ours - stored(smooth, image).get_fdata()).max() > 0.05  # the field does something


def test_the_jacobian_is_that_of_a_known_map_on_an_oblique_grid() -> None:
    shape = (8, 9, 10)
    turn = np.array([[1.1, 0.1, 0], [0.05, 0.9, 0.2], [0, -0.1, 1.3]])
    field = warps.points_of(shape, OBLIQUE) @ (turn - np.eye(3)).T.astype(np.float32)
    assert np.allclose(warps.jacobian(field, OBLIQUE), np.linalg.det(turn), atol=1e-3)
    folded = warps.points_of(shape, OBLIQUE) @ (np.diag([-1.0, 1, 1]) - np.eye(3)).T
    assert (warps.jacobian(folded.astype(np.float32), OBLIQUE) < 0).all()


def test_labels_are_the_highest_of_their_interpolated_one_hot_maps() -> None:
    rng = np.random.default_rng(2)
    codes = rng.choice([0, 3, 7, 1000], (9, 8, 7)).astype(np.int32)
    labels = Image("", codes, np.diag([2.0, 2, 2, 1]))
    grid = np.diag([1.3, 1.3, 1.3, 1])
    field = field_of((10, 9, 8), grid, bend=0.8)
    points = (warps.points_of((10, 9, 8), grid) + field) / 2
    shares = np.stack([ndimage.map_coordinates((codes == code).astype(np.float32),
                                               np.moveaxis(points, -1, 0), order=1, mode="nearest")
                       for code in (0, 3, 7, 1000)])
    inside = ((points > 0) & (points < np.array(codes.shape) - 1)).all(-1)
    clear = inside & (np.sort(shares, 0)[-1] - np.sort(shares, 0)[-2] > 1e-4)
    found = warps.labels_through(labels, field, grid)
    assert clear.sum() > 200
    assert np.array_equal(found[clear], np.array([0, 3, 7, 1000])[shares.argmax(0)][clear])
    far = warps.labels_through(labels, field + 1000, grid)
    assert not far.any()


@pytest.fixture(scope="module")
def pair() -> tuple[Image, Image]:
    """A blob bent by ``field_of``, and the blob."""
    fixed = blob(0)
    bent = warps.read_through(fixed, field_of(fixed.data.shape, fixed.affine), fixed.affine)
    return Image("bent", bent, fixed.affine, brain=bent > 0.1), fixed


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORK_MM", (5.0, 5.0))
    monkeypatch.setattr(module, "LEVELS", ((2, 20), (1, 20)))


@pytest.mark.slow(3)
@pytest.mark.usefixtures("coarse")
def test_a_known_deformation_is_undone_without_folds(pair: tuple[Image, Image]) -> None:
    moving, fixed = pair
    found = register(moving, fixed, evened=False)
    assert found.correlation[1] > found.correlation[0] and found.dice[1] > 0.95
    warp = found.warp()
    assert (warps.jacobian(warp, fixed.affine) > 0).all()
    known = field_of(fixed.data.shape, fixed.affine)
    gone = warps.points_of(fixed.data.shape, fixed.affine) + warp
    left = warp + np.stack([warps.sample(each, fixed.affine, gone)
                            for each in np.moveaxis(known, -1, 0)], -1)
    of_affine = warps.total(0 * found.field, found.grid.affine, fixed, found.matrix) + known
    assert np.linalg.norm(left[fixed.brain], axis=-1).mean() < 0.5 * np.linalg.norm(
        of_affine[fixed.brain], axis=-1).mean()
    assert found.inverse_error_mm().mean() < 0.3
    # there and back through the two files' fields
    points = warps.points_of(fixed.data.shape, fixed.affine)[fixed.brain]
    gone = points + warp[fixed.brain]
    back = np.stack([warps.sample(each, moving.affine, gone) for each in np.moveaxis(
        found.inverse_warp(), -1, 0)], -1)
    assert np.abs(gone + back - points).mean() < 0.6
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(3)
    again = register(moving, fixed, evened=False)
    assert np.array_equal(again.matrix, found.matrix)  # to the bit, however many threads
    assert np.array_equal(again.warp(), warp)
    assert np.array_equal(again.inverse_warp(), found.inverse_warp())


def left_of(found: Registration, fixed: Image) -> float:
    """Millimetres apart on average, of where ``field_of`` and what undoes it lead."""
    warp, known = found.warp(), field_of(fixed.data.shape, fixed.affine)
    gone = warps.points_of(fixed.data.shape, fixed.affine) + warp
    left = warp + np.stack([warps.sample(each, fixed.affine, gone)
                            for each in np.moveaxis(known, -1, 0)], -1)
    return float(np.linalg.norm(left[fixed.brain], axis=-1).mean())


@pytest.mark.slow(3)
@pytest.mark.usefixtures("coarse")
def test_another_contrast_leads_astray_but_where_it_is_evened(pair: tuple[Image, Image]) -> None:
    moving, fixed = pair
    ramp = np.linspace(0.3, 1.7, fixed.data.shape[0], dtype=np.float32)[:, None, None]
    other = replace(moving, data=moving.data * ramp)
    plain, evened = (left_of(register(other, fixed, evened), fixed) for evened in (False, True))
    assert evened < 0.5 * plain


@pytest.mark.usefixtures("coarse")
def test_brains_that_have_nothing_in_common_are_refused(pair: tuple[Image, Image]) -> None:
    fixed = pair[1]
    assert fixed.brain is not None
    turned = Image("negative", np.where(fixed.brain, 1.2 - fixed.data, 0).astype(np.float32),
                   fixed.affine, brain=fixed.brain)
    with pytest.raises(DataError, match=r"negative: within the brain .* scans of one modality"):
        register(turned, fixed)
    with pytest.raises(DataError, match="does not come to lie over that of"):
        module._check(fixed, turned, 0.5, 0.6)
    with pytest.raises(DataError, match="correlation nan"):  # of an image without contrast
        module._check(fixed, turned, 0.9, float("nan"))


@pytest.mark.parametrize(("data", "message"), [
    (np.zeros((40, 40, 40)), "every voxel is 0"),
    (np.ones((40, 40, 40, 2)), "a 3D volume is expected"),
    (np.full((40, 40, 40), np.nan), "every voxel is 0"),
])
def test_images_that_are_none_are_told(tmp_path: Path, data: np.ndarray, message: str) -> None:
    file = save(tmp_path / "scan.nii.gz", data)
    with pytest.raises(DataError, match=message) as told:
        read_image(str(file))
    assert str(file) in str(told.value)


@pytest.mark.parametrize(("data", "message"), [
    (np.zeros((30, 30, 30)), "holds 0 labels"),
    (np.full((30, 30, 30), 0.5), "holds 0.5, a label map holds whole numbers"),
    (np.full((30, 30, 30), -2), "holds -2"),
    (np.arange(27000).reshape(30, 30, 30), "holds 26999 labels"),
    (np.full((30, 30, 30), 2.0**32 - 1), "holds label 4294967296, only codes below 16777216"),
])
def test_label_maps_that_are_none_are_told(tmp_path: Path, data: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_labels(str(save(tmp_path / "labels.nii.gz", data)))


@pytest.mark.slow(3)
@pytest.mark.usefixtures("coarse")
def test_the_command_writes_files_that_lie_over_the_fixed_scan(
        tmp_path: Path, pair: tuple[Image, Image], capsys: pytest.CaptureFixture[str]) -> None:
    moving, fixed = pair
    turned = np.array([[0, -4.0, 0, 96], [-4, 0, 0, 88], [0, 0, 4, -84], [0, 0, 0, 1]])  # PLS
    for name, image in (("moving", moving), ("fixed", fixed)):
        save(tmp_path / f"{name}.nii.gz", image.data, image.affine)
    nib.save(nib.as_closest_canonical(nib.load(tmp_path / "fixed.nii.gz")).as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(fixed.affine),
                                        nib.io_orientation(turned))), tmp_path / "fixed.nii.gz")
    save(tmp_path / "labels.nii.gz", np.where(moving.data > 0.6, 2, moving.data > 0).astype(int),
         moving.affine)
    out = tmp_path / "out"
    words = [str(tmp_path / "moving.nii.gz"), str(tmp_path / "fixed.nii.gz"), "--out", str(out)]
    assert main(["register", *words, "--moving-labels", str(tmp_path / "labels.nii.gz")]) == 0
    assert "0 voxels fold" in capsys.readouterr().out
    over = nib.load(tmp_path / "fixed.nii.gz")
    for name in ("moved", "jacobian", "moved_labels", "warp"):
        written = nib.load(out / f"{name}.nii.gz")
        assert written.shape[:3] == over.shape and np.allclose(written.affine, over.affine)
    assert nib.load(out / "inverse_warp.nii.gz").shape == (*moving.data.shape, 1, 3)
    assert set(np.unique(nib.load(out / "moved_labels.nii.gz").dataobj)) == {0, 1, 2}
    record = json.loads((out / "results.json").read_text())
    assert record["schema"] == "neurojepa/register/1" and record["folds"] == 0
    assert [each["label"] for each in record["labels"]] == [1, 2]
    page = (out / "report.html").read_text()
    assert page.count("<img") == 4 and "Dice of the brains" in page
    (tmp_path / "labels.tsv").write_text("code\tname\n1\touter\n")
    with pytest.raises(ConfigError, match=r"labels.tsv: expected columns index and name"):
        main(["register", str(tmp_path / "gone"), *words[1:],
              "--moving-labels", str(tmp_path / "labels.nii.gz")])  # before any scan is read
    (tmp_path / "labels.tsv").unlink()
    far = np.array(moving.affine)
    far[0, 3] += 1000
    save(tmp_path / "labels.nii.gz", np.ones(moving.data.shape, int), far)
    with pytest.raises(DataError, match=r"--moving-labels .*no label comes to lie in"):
        main(["register", *words, "--moving-labels", str(tmp_path / "labels.nii.gz")])
