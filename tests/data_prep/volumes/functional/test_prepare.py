"""PET and BOLD go where the anatomy of their person goes; what fits no head is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.scan import Scan
from data_prep.volumes.functional.pose import in_template_space
from data_prep.volumes.pipeline import Prepared, Rejected, prepare_person
from data_prep.volumes.placing.align import template
from data_prep.volumes.placing.matching import dice
from data_prep.volumes.preset import PRESETS
from neurojepa.feed.format import ARCHIVE_GRID
from tests.helpers.synthetic_head import brain, flirt_matrix, moved, save, save_matrix, scan

QUICK = replace(PRESETS["quick"], rigid_mm=6.0)
BQ = json.dumps({"Units": "Bq/mL"})
CEREBELLUM = 8  # FreeSurfer's code of its left cortex
HEAD = (9, (4, -8, 6))  # degrees about x and mm: how the head lies for its T1w


def uptake() -> np.ndarray:
    """2 in the brain and more in grey matter, 1 in the cerebellum, next to nothing elsewhere."""
    data, mask = brain()[0], template(2).mask
    image = np.where(mask, 2 + 0.5 * ((data > 400) & (data < 650)), 0.02)
    image[cerebellum()] = 1
    return (5000 * image).astype(np.float32)


def cerebellum() -> np.ndarray:
    target = template(2)
    x, y, z = np.moveaxis(np.indices(target.mask.shape), 0, -1).reshape(-1, 3).T
    mm = target.affine[:3, :3] @ [x, y, z] + target.affine[:3, 3:]
    found = (mm[1] < -40) & (mm[2] < -22) & (abs(mm[0]) < 45)
    return found.reshape(target.mask.shape) & target.mask


def t1w(folder: Path) -> Scan:
    """A T1w with its FLIRT matrix, so that it is placed at once, and labels of the cerebellum."""
    data, affine = brain()
    turned, motion = moved(affine, *HEAD)
    uri = save(folder / "t1.nii.gz", data, turned, "LIA")
    matrix = save_matrix(folder / "t1.mat", flirt_matrix(uri, np.linalg.inv(motion)))
    label = save(folder / "label.nii.gz", CEREBELLUM * cerebellum().astype(np.int16), turned)
    return scan(uri, transform_uri=matrix, label_uri=label, age_at_scan=70.0)


COARSE = np.diag([2.0, 2.0, 2.0, 1.0])  # of the series: every other voxel, 4 mm


def bold_series() -> np.ndarray:
    """[x, y, z, 24] at 4 mm: a still image with noise; skull and scalp are faint."""
    data = np.where(template(2).mask, 1200 - brain()[0], 40).astype(np.float32)[::2, ::2, ::2]
    rng = np.random.default_rng(0)
    return data[..., None] * (1 + 0.02 * rng.standard_normal((*data.shape, 24), np.float32))


def matrix_of(item: Prepared) -> np.ndarray:
    return np.array(json.loads(str(item.figures["archive_to_scan"])))


def distance_mm(a: np.ndarray, b: np.ndarray) -> float:
    """Mean distance of points of the brain under two matrices."""
    points = np.c_[np.random.default_rng(0).normal((0, -17, 6), 30, (200, 3)), np.ones(200)].T
    return float(np.linalg.norm(((a - b) @ points)[:3], axis=0).mean())


@pytest.fixture(scope="module")
def person(tmp_path_factory) -> dict[str, list[Prepared | Rejected]]:
    """Results of one person's scans by their names."""
    folder = tmp_path_factory.mktemp("person")
    affine = brain()[1]
    far, _ = moved(affine, -12, (180, -90, 420), axis=1)  # a PET scanner's own coordinates
    near, _ = moved(affine, HEAD[0] + 3, (6, -8, 4))
    cut = near @ COARSE  # the lowest 40 mm of the series are missing
    cut[:3, 3] += cut[:3, 2] * 10
    phantom = np.zeros(template(2).mask.shape, np.float32)
    phantom[20:70, 45:60, 5:80] = 5000
    pet = save(folder / "pet.nii.gz", uptake(), far, "PSR")
    scans = {
        "pet": scan(pet, "PET", tracer="AV45", facts=BQ),
        "t1": t1w(folder),
        "later": scan(save(folder / "later.nii.gz", uptake(), moved(affine, 5, (9, 50, 30))[0]),
                      "PET", "9", tracer="AV45", facts=BQ, age_at_scan=72.0),
        "unknown": scan(pet, "PET", tracer="H2O", facts=BQ),
        "phantom": scan(save(folder / "phantom.nii.gz", phantom, affine), "PET", tracer="AV45",
                        facts=BQ),
        "bold": scan(save(folder / "bold.nii.gz", bold_series()[:, :, 10:], cut), "BOLD",
                     facts='{"RepetitionTime": 2.0}'),
        "excluded": scan(str(folder / "none.nii.gz"), reason="cohort_unusable"),
    }
    results = prepare_person(list(scans.values()), QUICK)
    return {name: [one for one in results
                   if (one.scan.uri, one.scan.tracer) == (own.uri, own.tracer)]
            for name, own in scans.items()} | {"all": results}


def only(results: list[Prepared | Rejected]) -> Prepared:
    assert len(results) == 1 and isinstance(results[0], Prepared), results
    return results[0]


def test_a_pet_with_coordinates_of_its_own_is_found_by_its_t1w(person):
    pet, t1 = only(person["pet"]), only(person["t1"])
    to_t1 = moved(np.eye(4), *HEAD)[1]
    truth = moved(np.eye(4), -12, (180, -90, 420), axis=1)[1] @ np.linalg.inv(to_t1)
    assert distance_mm(matrix_of(pet), truth @ matrix_of(t1)) < 2
    assert pet.figures["placement"] == "anchor" and pet.figures["mask_dice_session"] > 0.9
    assert dice(pet.mask == 1, t1.mask == 1) > 0.999  # the anchor's own mask
    np.testing.assert_array_equal(pet.label, t1.label)


def test_its_ratio_is_taken_over_the_labelled_reference(person):
    pet = only(person["pet"])
    assert pet.figures["pet_reference"] == "labels"
    ratio = pet.image[pet.mask == 1] * pet.figures["pet_suvr_max"]
    assert np.median(ratio) == pytest.approx(2.0, rel=0.05)  # as made: 2 against 1
    assert pet.image.max() <= 1 and (pet.image[pet.mask != 1] == 0).all()


def test_a_visit_without_a_t1w_borrows_the_nearest(person):
    later = only(person["later"])
    assert later.figures["placement"] == "anchor of another session"
    truth = moved(np.eye(4), 5, (9, 50, 30))[1] @ np.linalg.inv(moved(np.eye(4), *HEAD)[1])
    assert distance_mm(matrix_of(later), truth @ matrix_of(only(person["t1"]))) < 2


def test_one_scan_that_fails_takes_no_other_with_it(person):
    for name, reason, words in (("unknown", "unknown_tracer", "H2O"),
                                ("phantom", "registration_failed", "silhouette"),
                                ("excluded", "cohort_unusable", "not read")):
        found = person[name][0]
        assert isinstance(found, Rejected), name
        assert found.reason == reason and words in found.message


def test_a_bold_series_becomes_its_maps(person):
    maps = {item.scan.modality: item for item in person["bold"]}
    assert list(maps)[:2] == ["BOLD", "tSNR"]
    still = maps["BOLD"]
    assert maps["tSNR"].scan_id == f"{still.scan_id}-tSNR" and len(still.scan_id) == 24
    truth = moved(np.eye(4), HEAD[0] + 3, (6, -8, 4))[1] @ np.linalg.inv(
        moved(np.eye(4), *HEAD)[1])
    assert distance_mm(matrix_of(still), truth @ matrix_of(only(person["t1"]))) < 2
    inside = maps["tSNR"].image[still.mask == 1] * 200
    assert np.median(inside) == pytest.approx(50, rel=0.2)  # noise of 2 %
    assert "minimal" in still.notes and still.figures["placement"] == "anchor"


def test_what_a_series_did_not_scan_is_not_air(person):
    still, t1 = person["bold"][0], only(person["t1"])
    missing = (t1.mask == 1) & (still.mask == 2)
    assert 0.02 < missing.sum() / (t1.mask == 1).sum() < 0.4
    assert not ((still.mask == 1) & (t1.mask != 1)).any()


def test_results_keep_the_order_of_the_scans(person):
    names = [result.scan.modality for result in person["all"]]
    assert names[:5] == ["PET", "T1w", "PET", "PET", "PET"] and names[5] == "BOLD"
    assert names[-1] == "T1w"


def test_a_pet_alone_is_placed_by_its_silhouette(tmp_path):
    turned, motion = moved(brain()[1], 10, (60, 20, -80))
    pet = only(prepare_person([scan(save(tmp_path / "pet.nii.gz", uptake(), turned), "PET",
                                    tracer="AV45", facts=BQ)], QUICK))
    assert "no_anchor" in pet.flags and "reference_approximate" in pet.notes
    assert distance_mm(matrix_of(pet), motion) < 5


def test_a_series_in_mni_space_stays_there(tmp_path):
    target = template(2)
    series = bold_series()
    series[:, :, :15] = 0  # cleaned series are zero where nothing was measured
    series[~target.mask[::2, ::2, ::2]] = 0
    own = scan(save(tmp_path / "bold.nii.gz", series, target.affine @ COARSE), "BOLD",
               processing="fmriprep:MNI152NLin2009cAsym", facts='{"RepetitionTime": 2.0}')
    assert in_template_space(own)
    still = prepare_person([own], QUICK)[0]
    assert isinstance(still, Prepared), still
    np.testing.assert_array_equal(matrix_of(still), np.eye(4))
    assert still.figures["placement"] == "delivered"
    height = ARCHIVE_GRID.affine[2, 3] + np.arange(ARCHIVE_GRID.shape[2]) - target.affine[2, 3]
    assert (still.mask[:, :, height < 56] != 1).all() and (still.mask == 2).any()
    assert (still.mask[:, :, height > 60] == 1).sum() > 700_000
