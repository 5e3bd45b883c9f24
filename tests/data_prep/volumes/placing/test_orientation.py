"""Heads that lie the wrong way round: seen in any contrast, and turned if the user says so."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from data_prep.flags import Flag, Note
from data_prep.scan import ScanError
from data_prep.volumes.pipeline import Prepared, Rejected, prepare_person
from data_prep.volumes.placing.align import template
from data_prep.volumes.placing.orientation import AS_STATED, _turns, check_turn, refuse_turned
from data_prep.volumes.placing.within import same_side
from data_prep.volumes.preset import PRESETS
from data_prep.volumes.reading.turn import turn_matrix, turn_of
from data_prep.volumes.reading.volume import Volume, read_scan
from data_prep.volumes.structural.brain import brain_mask
from tests.helpers.synthetic_head import brain, moved, save, scan

QUICK = PRESETS["quick"]
REAL = ("ixi/IXI012_T1w.nii.gz", "stroke/M2307_T2w.nii.gz",
        "bids-ms/sub-ms20/ses-2/anat/sub-ms20_ses-2_FLAIR.nii.gz", "pet/spm_PET_template.nii.gz")


def contrast(modality: str) -> tuple[np.ndarray, np.ndarray]:
    """The template's brain as another modality would show it, at 4 mm, and its affine."""
    data, affine = brain()
    if modality == "T2w":
        data = np.where(template(2).mask, 1200 - data, 0)
    elif modality == "PET":
        data = np.where(template(2).mask, 200 + np.square(data) / 2000, 0)
    return data[::2, ::2, ::2].astype(np.float32), affine @ np.diag([2, 2, 2, 1.0])


def misread(data: np.ndarray, affine: np.ndarray, turn: str) -> Volume:
    """A volume whose header is wrong so that ``turn`` puts it right, as reading would give it."""
    wrong = np.linalg.inv(turn_matrix(turn)) @ affine
    axes = nib.io_orientation(wrong)
    return Volume("scan", np.ascontiguousarray(nib.apply_orientation(data, axes)),
                  wrong @ nib.orientations.inv_ornt_aff(axes, data.shape))


# ---- names ---------------------------------------------------------------------------------------

def test_all_turns_have_a_name_and_a_matrix():
    assert len(_turns()) == 24 and {len(name) for name in _turns()} == {3}
    for name, turn in _turns().items():
        np.testing.assert_array_equal(turn_matrix(name)[:3, :3], turn.T)
        assert turn_of(turn.T) == name
    np.testing.assert_array_equal(turn_matrix("LPS"), np.diag([-1, -1, 1, 1]))


@pytest.mark.parametrize("turn", ["", "LP", "LRS", "lps", "RASL", "RA?"])
def test_what_is_no_turn_is_refused(turn):
    with pytest.raises(ValueError, match="no turn"):
        turn_matrix(turn)


# ---- turned heads --------------------------------------------------------------------------------

@pytest.mark.slow(4)
@pytest.mark.parametrize(("modality", "turn"), [
    ("T1w", AS_STATED), ("T1w", "LAI"), ("T2w", "LPS"), ("PET", "SAL")])
def test_the_turn_is_found_in_any_contrast(modality, turn):
    data, affine = contrast(modality)
    volume = misread(data, moved(affine, 14, (12, -30, 20))[0], turn)
    found = check_turn(volume, volume.data > 0)
    assert (found.turn, found.sure) == (turn, True)


@pytest.mark.parametrize("part", [np.s_[:, :, 10:], np.s_[:, :, :-8], np.s_[:, 6:], np.s_[8:]])
def test_a_part_of_a_head_is_not_doubted(part):
    data, affine = contrast("T1w")
    starts = [one.start or 0 for one in (*np.index_exp[part], *[slice(None)] * 3)[:3]]
    affine[:3, 3] += affine[:3, :3] @ starts
    cut = np.ascontiguousarray(data[part])
    assert check_turn(Volume("part", cut, affine), cut > 0).turn == AS_STATED


@pytest.mark.slow(3)
def test_lesions_and_noise_are_not_doubted():
    data, affine = contrast("T2w")
    mask = data > 0
    data[10:22, 20:34, 16:28] = np.where(mask[10:22, 20:34, 16:28], 1600, 0)  # 100 ml and more
    noisy = data + np.where(mask, np.random.default_rng(0).normal(0, 150, data.shape), 0)
    volume = Volume("lesion", noisy.astype(np.float32), affine)
    refuse_turned(volume, mask)
    assert volume.flags == []


@pytest.mark.slow(3)
def test_a_ball_fits_any_way_and_is_flagged_not_turned():
    grid = np.indices((48, 48, 48)) - 23.5
    inside = np.linalg.norm(grid, axis=0) < 17
    ball = np.where(inside, 100 + np.random.default_rng(0).normal(0, 9, inside.shape), 0)
    volume = Volume("ball", ball.astype(np.float32), np.diag([4.0, 4, 4, 1]))
    refuse_turned(volume, inside)
    assert volume.flags == [Flag.ORIENTATION_UNSURE]


@pytest.mark.slow(4)
def test_a_turned_scan_is_refused_by_name_and_turned_where_the_user_says_so(tmp_path):
    data, affine = contrast("T2w")
    wrong = turn_matrix("LPS") @ affine
    uri = save(tmp_path / "back.nii.gz", data, wrong)
    label = save(tmp_path / "label.nii.gz", (data > 500).astype(np.int16), wrong)
    (refused,) = prepare_person([scan(uri, "T2w")], QUICK)
    assert isinstance(refused, Rejected) and refused.reason == "orientation_doubtful"
    assert "LPS" in refused.message and "back.nii.gz" in refused.message
    (turned,) = prepare_person([scan(uri, "T2w", label_uri=label, facts='{"Turn": "LPS"}')], QUICK)
    (right,) = prepare_person([scan(save(tmp_path / "right.nii.gz", data, affine), "T2w",
                                    label_uri=save(tmp_path / "l.nii.gz",
                                                   (data > 500).astype(np.int16), affine))], QUICK)
    assert isinstance(turned, Prepared) and isinstance(right, Prepared)
    np.testing.assert_allclose(turned.image, right.image, atol=1e-4)
    np.testing.assert_array_equal(turned.label, right.label)
    assert Note.LEFT_RIGHT_FROM_HEADER in right.notes and not right.flags
    (stubborn,) = prepare_person([scan(uri, "T2w", facts='{"Turn": "RAS"}')], QUICK)
    assert not isinstance(stubborn, Rejected) or stubborn.reason != "orientation_doubtful"


@pytest.mark.slow(6)
def test_a_turned_scan_of_a_session_does_not_take_the_others_with_it(tmp_path):
    t1, affine = contrast("T1w")
    t2, _ = contrast("T2w")
    wrong = turn_matrix("LPS") @ affine
    right, back = (save(tmp_path / name, *image) for name, image in (
        ("t2.nii.gz", (t2, affine)), ("t1.nii.gz", (t1, wrong))))
    first, second = prepare_person([scan(back), scan(right, "T2w")], QUICK)
    assert isinstance(first, Rejected) and first.reason == "orientation_doubtful"
    assert isinstance(second, Prepared)
    upright, back = (save(tmp_path / name, *image) for name, image in (
        ("t1u.nii.gz", (t1, affine)), ("t2b.nii.gz", (t2, wrong))))
    first, second = prepare_person([scan(upright), scan(back, "T2w")], QUICK)
    assert isinstance(first, Prepared)
    assert isinstance(second, Rejected) and second.reason == "orientation_doubtful"


# ---- left and right ------------------------------------------------------------------------------

def lopsided(modality: str) -> tuple[np.ndarray, np.ndarray]:
    """A brain whose sides differ as people's do: a smooth shift of a few mm, and a lesion."""
    data, affine = contrast(modality)
    place = np.indices(data.shape).astype(float)
    wave = np.sin(place[0] / 7) * np.cos(place[1] / 9 + 1) * np.sin(place[2] / 8 + 0.5)
    bent = ndimage.map_coordinates(data, place + 1.2 * wave, order=1)
    bent[10:14, 20:25, 20:24] = 900
    return np.where(data > 0, np.maximum(bent, 20), 0).astype(np.float32), affine


def mirror(affine: np.ndarray) -> np.ndarray:
    return turn_matrix("LAS") @ affine


@pytest.mark.slow(8)
def test_scans_of_a_session_whose_sides_differ_are_both_refused_unless_outvoted(tmp_path):
    names = {"T1w": mirror, "T2w": np.copy, "FLAIR": np.copy}
    uris = {}
    for name, change in names.items():
        data, affine = lopsided("T2w" if name == "T2w" else "T1w")
        uris[name] = save(tmp_path / f"{name}.nii.gz", data, change(affine))
        uris[name + " right"] = save(tmp_path / f"{name}-right.nii.gz", data, affine)
    pair = prepare_person([scan(uris["T1w"]), scan(uris["T2w"], "T2w")], QUICK)
    assert [one.reason for one in pair if isinstance(one, Rejected)] == ["left_right_doubtful"] * 2
    assert "T2w.nii.gz" in pair[0].message and "T1w.nii.gz" in pair[0].message
    data, affine = lopsided("T2w")
    flipped = save(tmp_path / "flipped.nii.gz", data, mirror(affine))
    three = prepare_person([scan(uris["T1w right"]), scan(flipped, "T2w"),
                            scan(uris["FLAIR"], "FLAIR")], QUICK)
    assert [getattr(one, "reason", "") for one in three] == ["", "left_right_doubtful", ""]
    assert all(Note.LEFT_RIGHT_FROM_HEADER not in one.notes for one in (three[0], three[2]))
    cured = prepare_person([scan(uris["T1w"], facts='{"Turn": "LAS"}'), scan(uris["T2w"], "T2w")],
                           QUICK)
    assert all(isinstance(one, Prepared) for one in cured)


@pytest.mark.slow(3)
def test_visits_whose_sides_differ_are_refused(tmp_path):
    data, affine = lopsided("T1w")
    visits = [scan(save(tmp_path / f"{n}.nii.gz", data + n, change(affine)), session=str(n))
              for n, change in enumerate((np.copy, mirror))]
    results = prepare_person(visits, QUICK)
    assert [one.reason for one in results if isinstance(one, Rejected)] == [
        "left_right_doubtful"] * 2


def test_a_symmetric_head_says_nothing_of_its_sides():
    data, affine = contrast("T1w")
    both = (data + data[::-1]) / 2
    volume = Volume("even", both, affine)
    assert same_side(volume, mask=both > 0, moving=volume, matrix=np.eye(4)) is None


# ---- real heads ----------------------------------------------------------------------------------

@pytest.mark.slow(12)
@pytest.mark.parametrize("file", REAL)
def test_a_real_head_in_lps_is_seen_and_as_it_is_it_passes(shared_data: Path, file):
    right = read_scan(str(shared_data / file))
    mask = ((right.data > np.percentile(right.data, 60)) if "PET" in file
            else brain_mask(right, QUICK)[0])
    assert check_turn(right, mask).turn == AS_STATED
    wrong = misread(right.data, right.affine, "LPS")
    with pytest.raises(ScanError, match="LPS") as caught:
        refuse_turned(wrong, np.ascontiguousarray(mask[::-1, ::-1]))
    assert caught.value.code == "orientation_doubtful"


@pytest.mark.slow(3)
@pytest.mark.parametrize("degrees", [30, -30])
def test_a_real_head_that_nods_is_not_doubted(shared_data: Path, degrees):
    volume = read_scan(str(shared_data / REAL[0]))
    volume.affine = moved(volume.affine, degrees, (0, 0, 0))[0]
    mask, _ = brain_mask(volume, QUICK)
    found = check_turn(volume, mask)
    assert (found.turn, found.sure) == (AS_STATED, True)


@pytest.mark.slow(6)
@pytest.mark.parametrize(("fixed", "moving"), [
    ("sub-ms03/ses-2/anat/sub-ms03_ses-2_T1w", "sub-ms03/ses-2/anat/sub-ms03_ses-2_T2w"),
    ("sub-ms01/ses-1/anat/sub-ms01_ses-1_T1w", "sub-ms01/ses-2/anat/sub-ms01_ses-2_T1w")])
def test_real_scans_of_a_person_tell_their_mirror_image(shared_data: Path, fixed, moving):
    first, second = (read_scan(str(shared_data / "bids-ms" / f"{name}.nii.gz"))
                     for name in (fixed, moving))
    mask = brain_mask(first, QUICK)[0]
    assert same_side(first, mask=mask, moving=second, matrix=np.eye(4)) is True
    flipped = Volume("flipped", np.ascontiguousarray(second.data[::-1]), second.affine)
    assert same_side(first, mask=mask, moving=flipped, matrix=np.eye(4)) is False
