"""A person's scans end as volumes on the archive grid or as rejections with a reason."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.scan import Scan, ScanError
from data_prep.volumes.pipeline import Prepared, Rejected, prepare_person
from data_prep.volumes.placing.align import template
from data_prep.volumes.placing.geometry import on_grid, resample, to_itk
from data_prep.volumes.placing.matching import dice
from data_prep.volumes.preset import PRESETS
from data_prep.volumes.published import crop_neck
from data_prep.volumes.reading.volume import Volume, read_scan
from data_prep.volumes.structural.intensity import scale, window
from neurojepa.feed.format import ARCHIVE_GRID
from tests.helpers.synthetic_head import brain, moved, save, scan

QUICK = PRESETS["quick"]
NEAREST = 1  # SimpleITK's sitkNearestNeighbor


def whole(prepared: list[Prepared | Rejected]) -> list[Prepared]:
    rejected = [item for item in prepared if isinstance(item, Rejected)]
    assert not rejected, rejected[0].message
    return [item for item in prepared if isinstance(item, Prepared)]


def check_contract(item: Prepared) -> None:
    """What every prepared volume promises."""
    assert item.image.shape == item.mask.shape == ARCHIVE_GRID.shape
    assert item.image.dtype == np.float32 and item.mask.dtype == np.uint8
    assert item.image.min() >= 0 and item.image.max() <= 1
    assert (item.image[item.mask != 1] == 0).all()
    assert set(np.unique(item.mask)) <= {0, 1, 2}
    assert 0.2 < np.median(item.image[item.mask == 1]) < 0.9
    assert len(item.scan_id) == 24 and int(item.scan_id, 16) >= 0
    assert item.label is None or (item.label.shape == ARCHIVE_GRID.shape
                                  and item.label.dtype == np.int16)


@pytest.fixture(scope="module")
def visits(tmp_path_factory) -> list[Prepared]:
    """Two visits of a person; the first also has a T2w, which the person moved before."""
    folder = tmp_path_factory.mktemp("visits")
    data, affine = brain(marker=True)
    inverted = np.where(template(2).mask, 1300 - np.minimum(data, 1200), 0).astype(np.float32)
    first, _ = moved(affine, 6, (4, 9, -3))
    paths = [("2", "T1w", data, moved(affine, -9, (-8, 2, 6), axis=2)[0]),
             ("1", "T2w", inverted, moved(first, 3, (2, 0, 4))[0]),
             ("1", "T1w", data, first)]
    scans = [scan(save(folder / session / f"{modality}.nii.gz", voxels, where, "LIA"), modality,
                  session) for session, modality, voxels, where in paths]
    return whole(prepare_person(scans, QUICK))


def test_order_is_kept_and_every_volume_keeps_its_promises(visits):
    assert [(item.scan.session, item.scan.modality) for item in visits] == [
        ("2", "T1w"), ("1", "T2w"), ("1", "T1w")]
    for item in visits:
        check_contract(item)


def test_visits_and_contrasts_of_a_person_coincide(visits):
    second, t2w, first = visits
    assert dice(first.mask == 1, second.mask == 1) > 0.98
    assert dice(first.mask == 1, t2w.mask == 1) > 0.97
    inside = (first.mask == 1) & (second.mask == 1)
    assert np.corrcoef(first.image[inside], second.image[inside])[0, 1] > 0.97
    assert np.corrcoef(first.image[inside], t2w.image[inside])[0, 1] < -0.7
    for item in (first, second):
        bright = np.argwhere(item.image == item.image.max()).mean(axis=0)
        where = ARCHIVE_GRID.affine @ np.r_[bright, 1]
        np.testing.assert_allclose(where[:3], (34, -20, 20), atol=3)


def test_sessions_share_one_placement(visits):
    assert len({item.figures["affine_volume_factor"] for item in visits}) == 1
    assert {item.figures["mask_source"] for item in visits} == {"stripped"} | {
        visits[1].figures["mask_source"]}


def test_a_bad_scan_does_not_take_the_others_with_it(tmp_path):
    data, affine = brain()
    good = save(tmp_path / "good.nii.gz", data, affine)
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(Path(good).read_bytes()[:5000])
    items = prepare_person([scan(str(broken)), scan(good), scan(str(tmp_path / "none.nii.gz"))],
                           QUICK)
    assert [item.reason if isinstance(item, Rejected) else "" for item in items] == [
        "truncated", "", "missing"]
    assert "broken.nii.gz" in items[0].message


def test_label_and_given_mask_follow_by_world_coordinates(tmp_path):
    data, affine = brain()
    labels = np.zeros(data.shape, np.int16)
    labels[template(2).mask] = 3
    labels[20:40, 40:60, 40:60] = 1021
    turned, _ = moved(affine, 14, (6, -12, 9))
    # The label map and the mask lie on other grids than the scan.
    halved = turned @ np.diag([0.5, 0.5, 0.5, 1.0])
    halved[:3, 3] = (turned @ np.array([-0.25, -0.25, -0.25, 1.0]))[:3]
    fine = labels.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    uri = save(tmp_path / "t1.nii.gz", data, turned)
    item = whole(prepare_person([scan(
        uri, label_uri=save(tmp_path / "label.nii.gz", fine, halved, "LPI"),
        mask_uri=save(tmp_path / "mask.nii.gz", (fine > 0).astype(np.uint8), halved, "PSR"))],
        QUICK))[0]
    check_contract(item)
    assert item.figures["mask_source"] == "given"
    assert set(np.unique(item.label)) == {0, 3, 1021}
    matrix = np.array(json.loads(item.figures["archive_to_scan"]))
    expected = on_grid(to_itk(labels, turned), matrix, ARCHIVE_GRID, NEAREST)
    assert (item.label == expected).mean() > 0.99
    assert dice(item.label > 0, item.mask == 1) > 0.98


def test_what_the_field_of_view_misses_is_not_air(tmp_path):
    data, affine = brain()
    cut = data[:, :, 24:].copy()  # the lowest 48 mm were not scanned
    affine[:3, 3] += affine[:3, 2] * 24
    mask = save(tmp_path / "mask.nii.gz", (cut > 0).astype(np.uint8), affine)
    item = whole(prepare_person([scan(save(tmp_path / "a.nii.gz", cut, affine), mask_uri=mask)],
                                replace(QUICK, min_dice=0.7)))[0]
    assert "brain_cut" in item.flags and item.figures["template_covered"] < 0.97
    bottom = (np.arange(ARCHIVE_GRID.shape[2]) + ARCHIVE_GRID.affine[2, 3]) < affine[2, 3] - 12
    assert (item.mask[:, :, bottom] == 2).mean() > 0.9
    assert (item.mask[40:140, 40:170, 100] != 2).all()


def test_nan_in_the_brain_is_refused_and_outside_it_is_cleaned(tmp_path):
    data, affine = brain()
    mask = save(tmp_path / "mask.nii.gz", (data > 0).astype(np.uint8), affine)
    air = np.where(data > 0, data, np.nan).astype(np.float32)
    item = whole(prepare_person([scan(save(tmp_path / "air.nii", air, affine), mask_uri=mask)],
                                QUICK))[0]
    assert "non_finite_cleaned" in item.flags and np.isfinite(item.image).all()
    hole = data.copy()
    hole[40:60, 50:80, 40:60] = np.nan
    rejected = prepare_person([scan(save(tmp_path / "hole.nii", hole, affine), mask_uri=mask)],
                              QUICK)[0]
    assert isinstance(rejected, Rejected) and rejected.reason == "non_finite"


def test_a_mask_that_is_no_brain_is_refused(tmp_path):
    data, affine = brain()
    small = np.zeros(data.shape, np.uint8)
    small[40:50, 40:50, 40:50] = 1
    item = prepare_person([scan(save(tmp_path / "a.nii.gz", data, affine),
                                mask_uri=save(tmp_path / "m.nii.gz", small, affine))], QUICK)[0]
    assert isinstance(item, Rejected) and item.reason == "implausible_mask"
    assert "8 ml" in item.message


@pytest.mark.parametrize("level", [100, 500, 1100, 2500])
def test_a_lesion_of_30_ml_leaves_normal_tissue_where_it_was(level):
    data, mask, voxel_ml = brain()[0], template(2).mask, 0.008
    lesion = np.zeros(mask.shape, bool)
    lesion.ravel()[np.flatnonzero(mask)[90_000:90_000 + int(30 / voxel_ml)]] = True
    before = scale(data, mask)
    after = scale(np.where(lesion, level, data).astype(np.float32), mask)
    normal = mask & ~lesion
    assert np.abs(after - before)[normal].mean() < 0.01
    if level > 1100:  # and it has room to be seen
        assert after[lesion].min() > after[normal].max()


def test_a_brain_of_one_value_has_no_window():
    with pytest.raises(ScanError, match="half of the brain"):
        window(np.r_[np.full(80, 5.0), np.arange(20.0)])


def test_freesurfers_labels_follow_in_their_own_space(tmp_path):
    """An aseg.mgz lies on FreeSurfer's conformed grid (LIA, 1 mm), not on the scan's."""
    data, affine = brain()
    turned, _ = moved(affine, 8, (3, 6, -4))
    conformed = np.array([[-1.0, 0, 0, 128], [0, 0, 1, -128], [0, -1, 0, 128], [0, 0, 0, 1]])
    codes = on_box(np.where(template(2).mask, 41, 0).astype(np.uint8), turned, conformed)
    codes[:128][codes[:128] == 41] = 2  # x falls along LIA: the first half is the right
    path = tmp_path / "aseg.mgz"
    nib.save(nib.MGHImage(codes.astype(np.int32), conformed), path)
    item = whole(prepare_person([scan(save(tmp_path / "t1.nii.gz", data, turned),
                                      label_uri=str(path))], QUICK))[0]
    assert set(np.unique(item.label)) == {0, 2, 41}
    assert dice(item.label > 0, item.mask == 1) > 0.97
    right = np.argwhere(item.label == 2).mean(axis=0)[0]
    left = np.argwhere(item.label == 41).mean(axis=0)[0]
    assert right - left > 40  # index x rises to the right


def on_box(codes: np.ndarray, affine: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Codes on a grid of 256^3, nearest neighbour."""
    return resample(to_itk(codes, affine), np.eye(4), shape=(256, 256, 256), affine=box,
                    interpolator=NEAREST)


# ---- the published order -------------------------------------------------------------------------

PAPER = replace(PRESETS["paper"], template_mm=2, shrink=(4, 2), sampling=0.5, mask_cube=192)


def test_the_published_order_takes_size_away_and_scales_by_the_whole_volume(tmp_path):
    data, affine = brain()
    small, _ = moved(affine, 6, (5, -10, 4), zoom=0.85)
    uri = save(tmp_path / "a.nii.gz", data, small)
    pet, item = prepare_person([scan(uri, "PET"), scan(uri)], PAPER)
    assert isinstance(pet, Rejected) and pet.reason == "not_in_preset"
    assert isinstance(item, Prepared), item
    check_contract(item)
    assert item.figures["brain_ml_archive"] == pytest.approx(template(2).brain_ml, rel=0.03)
    assert item.figures["affine_volume_factor"] == pytest.approx(0.85 ** -3, rel=0.05)
    # the 99.5th percentile of the volume, three quarters of which are air, is the 98th of a brain
    assert 0.005 * 0.7 < (item.image >= 1).mean() < 0.005 * 1.3


def test_a_neck_is_cropped_and_the_world_stays():
    data = np.zeros((40, 40, 130), np.float32)
    data[5:35, 5:35, 20:110] = 100  # 180 mm of head and neck under 40 mm of air
    volume = Volume("head", data, np.diag([2.0, 2.0, 2.0, 1.0]))
    head, inside = crop_neck(volume)
    kept = head.affine[2, 3] / 2
    assert (109 - kept) * 2 == pytest.approx(170, abs=2)
    np.testing.assert_array_equal(head.data, data[:, :, int(kept):])
    np.testing.assert_array_equal(inside, head.data > 50)


# ---- awkward and real scans ----------------------------------------------------------------------

@pytest.mark.slow(8)
def test_awkward_files_end_as_volumes_or_with_a_reason(awkward):
    names = ["ok_reference.nii.gz", "odd_huge_fov_off_centre.nii.gz",
             "bad_nan_background_one_inf.nii.gz", "bad_html_error_page.nii.gz"]
    found = {}
    for name in names:
        item = prepare_person([scan(str(awkward / name))], QUICK)[0]
        found[name] = item
        if isinstance(item, Prepared):
            check_contract(item)
            assert item.figures["mask_dice_template"] > 0.9
    assert isinstance(found["ok_reference.nii.gz"], Prepared)
    huge = found["odd_huge_fov_off_centre.nii.gz"]
    assert "huge_field_of_view" in huge.flags if isinstance(huge, Prepared) else huge.reason
    assert "non_finite_cleaned" in found["bad_nan_background_one_inf.nii.gz"].flags
    assert found["bad_html_error_page.nii.gz"].reason == "not_nifti"


REAL = [
    [("ixi/IXI012_T1w.nii.gz", "T1w", "1")],
    [("studyforrest/sub-02_res-half_T1w.nii.gz", "T1w", "1")],
    [("colin27/ch2bet.nii.gz", "T1w", "1")],
    [(f"bids-ms/sub-ms03/ses-2/anat/sub-ms03_ses-2_{modality}.nii.gz", modality, "2")
     for modality in ("T1w", "T2w", "FLAIR")],
]


@pytest.mark.slow(6)
@pytest.mark.parametrize("files", REAL, ids=lambda files: files[0][0].split("/")[-1])
def test_real_scans_come_out_upright_and_centred(shared_data, files):
    start = time.process_time()
    items = whole(prepare_person([scan(str(shared_data / uri), modality, session)
                                  for uri, modality, session in files], QUICK))
    print(f"{len(items)} scans, {time.process_time() - start:.1f} CPU seconds")
    target = template(2)
    reference = on_grid(to_itk(target.mask.astype(np.uint8), target.affine), np.eye(4),
                        ARCHIVE_GRID, NEAREST).astype(bool)
    for item in items:
        check_contract(item)
        assert item.figures["mask_dice_template"] > 0.92
        inside = np.argwhere(item.mask == 1)
        assert np.abs(inside.mean(axis=0) - np.argwhere(reference).mean(axis=0)).max() < 8
        assert (inside.min(axis=0) > 3).all()  # nothing is cut by the grid
        assert (inside.max(axis=0) < np.array(ARCHIVE_GRID.shape) - 4).all()
        assert dice(item.mask == 1, reference) > 0.85  # size differs, place does not


@pytest.mark.slow(8)
def test_scans_of_a_session_coincide_in_the_archive(shared_data):
    """The FLAIR's own mask, which the registration never saw, falls on the T1w's."""
    folder = shared_data / "bids-ms/sub-ms20/ses-2/anat"
    items = whole(prepare_person(
        [scan(str(folder / f"sub-ms20_ses-2_{modality}.nii.gz"), modality)
         for modality in ("T1w", "FLAIR")], replace(QUICK, share_mask=False)))
    assert items[1].figures["mask_dice_session"] > 0.95


@pytest.fixture(params=["made", "real"])
def stripped(request, tmp_path) -> Scan:
    """A brain without its skull, and labels on its grid."""
    if request.param == "real":
        folder = request.getfixturevalue("shared_data") / "colin27"
        return scan(str(folder / "ch2bet.nii.gz"), label_uri=str(folder / "aal.nii.gz"))
    data, affine = brain()
    turned, _ = moved(affine, 6, (4, 9, -3))
    labels = template(2).mask.astype(np.int16)
    return scan(save(tmp_path / "t1.nii.gz", data, turned),
                label_uri=save(tmp_path / "labels.nii.gz", labels, turned))


@pytest.mark.slow(20)
def test_the_default_preset_on_a_stripped_brain(stripped):
    item = whole(prepare_person([stripped], PRESETS["default"]))[0]
    check_contract(item)
    assert item.figures["mask_dice_template"] > 0.95 and item.figures["mask_source"] == "stripped"
    assert dice(item.label > 0, item.mask == 1) > 0.8
    assert item.scan_id == read_scan(stripped.uri).scan_id
