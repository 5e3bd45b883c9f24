"""FLIRT's matrices: against its definition, voxel by voxel, and as a way into the archive."""

from __future__ import annotations

import json
import zipfile

import nibabel as nib
import numpy as np
import pytest

from data_prep.scan import ScanError
from data_prep.volumes import pipeline
from data_prep.volumes.pipeline import Prepared, prepare_person
from data_prep.volumes.placing.align import template
from data_prep.volumes.placing.transforms import flirt_to_world, read_flirt, stored_geometry
from data_prep.volumes.preset import PRESETS
from data_prep.volumes.reading.volume import read_scan
from data_prep.volumes.structural import session
from tests.helpers.synthetic_head import brain, flirt_matrix, moved, save, save_matrix, scan

QUICK = PRESETS["quick"]


@pytest.mark.parametrize("axes", ["RAS", "LAS", "PSR", "LIA", "IPL"])
def test_a_matrix_means_what_flirt_means_by_it(tmp_path, axes):
    _, motion = moved(np.eye(4), 17, (5, -30, 12), axis=1, zoom=1.1)
    affine, _ = moved(np.diag([1.5, 2.0, 1.0, 1.0]), 9, (-60, 20, 4))  # oblique, uneven voxels
    data = np.random.default_rng(0).uniform(size=(50, 44, 80)).astype(np.float32)
    uri = save(tmp_path / "a.nii.gz", data, affine, axes)
    source = stored_geometry(read_scan(uri))
    np.testing.assert_allclose(source.affine, nib.load(uri).affine, atol=1e-4)
    assert source.shape == nib.load(uri).shape
    np.testing.assert_allclose(flirt_to_world(flirt_matrix(uri, motion), source), motion, atol=1e-4)


def test_a_matrix_inside_a_zip_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("T1/transforms/linear.mat", "1 0 0 4  \n0 1 0 5\n0 0 1 6\n0 0 0 1\n")
    matrix = read_flirt(f"{tmp_path}/a.zip::T1/transforms/linear.mat")
    assert matrix[:3, 3].tolist() == [4, 5, 6]


@pytest.mark.parametrize(("text", "code", "what"), [
    ("1 0 0 0\n0 1 0 0\n0 0 1 0\n", "bad_transform", "3, 4"),
    ("1 0 0 0\n0 1 0\n0 0 1 0\n0 0 0 1\n", "bad_transform", "numbers"),
    ("<html>", "bad_transform", "numbers"),
    ("1 0 0 nan\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "bad_transform", "finite"),
    ("-1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "bad_transform", "determinant -1"),
    (None, "missing", "not found")])
def test_what_is_no_matrix_is_named(tmp_path, text, code, what):
    path = tmp_path / "linear.mat"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ScanError, match=what) as error:
        read_flirt(str(path))
    assert error.value.code == code and "linear.mat" in str(error.value)


# ---- in the pipeline -----------------------------------------------------------------------------

@pytest.fixture
def head(tmp_path) -> tuple[str, np.ndarray]:
    """A turned head stored as LIA, and the motion from MNI mm to its mm."""
    data, affine = brain()
    turned, motion = moved(affine, 14, (6, -12, 9), axis=2)
    return save(tmp_path / "t1.nii.gz", data, turned, "LIA"), motion


def test_a_given_transform_replaces_registration(head, tmp_path, monkeypatch):
    uri, motion = head
    monkeypatch.setattr(pipeline, "place", None)  # calling it would fail
    matrix = flirt_matrix(uri, np.linalg.inv(motion))
    item = prepare_person([scan(uri, transform_uri=save_matrix(tmp_path / "a.mat", matrix))],
                          QUICK)[0]
    assert isinstance(item, Prepared), item
    assert item.figures["placement"] == "cohort" and "cohort_transform_failed" not in item.flags
    np.testing.assert_allclose(np.array(json.loads(item.figures["archive_to_scan"])), motion,
                               atol=1e-3)
    assert item.figures["mask_dice_template"] > 0.98


def test_a_transform_that_misses_the_template_is_replaced_and_flagged(head, tmp_path):
    uri, motion = head
    wrong = moved(np.eye(4), 0, (0, 0, 25))[1] @ np.linalg.inv(motion)
    broken = tmp_path / "broken.mat"
    broken.write_text("1 2 3\n")
    for path, fault in ((save_matrix(tmp_path / "a.mat", flirt_matrix(uri, wrong)), "Dice"),
                        (str(broken), "bad_transform")):
        item = prepare_person([scan(uri, transform_uri=path)], QUICK)[0]
        assert isinstance(item, Prepared), item
        assert "cohort_transform_failed" in item.flags
        assert fault in item.figures["cohort_transform_fault"]
        assert item.figures["placement"] == "registration"
        assert item.figures["mask_dice_template"] > 0.98


def test_a_flair_follows_its_t1w_by_their_shared_matrix(head, tmp_path, monkeypatch):
    uri, motion = head
    flair = save(tmp_path / "flair.nii.gz", np.where(template(2).mask, 1200 - brain()[0], 0
                                                     ).astype(np.float32),
                 moved(brain()[1], 14, (6, -12, 9), axis=2)[0], "RAS")
    monkeypatch.setattr(session, "register_rigid", None)
    items = prepare_person([
        scan(path, modality, transform_uri=save_matrix(
            tmp_path / f"{modality}.mat", flirt_matrix(path, np.linalg.inv(motion))))
        for path, modality in ((uri, "T1w"), (flair, "FLAIR"))], QUICK)
    assert all(isinstance(item, Prepared) for item in items), items
    first, second = (np.array(json.loads(item.figures["archive_to_scan"])) for item in items)
    np.testing.assert_allclose(first, second, atol=1e-3)
    assert (items[0].mask == items[1].mask).mean() > 0.999


def test_visits_with_transforms_meet_at_their_midpoint(head, tmp_path, monkeypatch):
    uri, motion = head
    data, affine = brain()
    other, second = moved(affine, -8, (3, 4, -6), axis=2)
    later = save(tmp_path / "later.nii.gz", data, other)
    monkeypatch.setattr(pipeline, "place", None)
    items = prepare_person([
        scan(path, session=visit, transform_uri=save_matrix(
            tmp_path / f"{visit}.mat", flirt_matrix(path, np.linalg.inv(there))))
        for path, visit, there in ((uri, "1", motion), (later, "2", second))], QUICK)
    assert all(isinstance(item, Prepared) for item in items), items
    assert {item.figures["placement"] for item in items} == {"cohort"}
    inside = (items[0].mask == 1) & (items[1].mask == 1)
    assert np.corrcoef(items[0].image[inside], items[1].image[inside])[0, 1] > 0.97
