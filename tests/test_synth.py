"""The synthetic cohort: a valid tree, the same bytes every time, true volumes, left and right."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.synth import anatomy, cohort, person, synthesise, warp
from neurojepa.errors import ConfigError, DataError

SPACING_MM = 4.0
PEOPLE = 3  # of seed 0: the third has two visits


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synth") / "bids"
    synthesise(str(root), PEOPLE, spacing_mm=SPACING_MM, workers=2)
    return root


@pytest.fixture(scope="module")
def head() -> anatomy.Anatomy:
    return anatomy.load_anatomy("template-03", None)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*")) if path.is_file()}


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


def images(root: Path) -> list[Path]:
    return sorted(root.glob("sub-*/ses-*/anat/*.nii.gz"))


# ---- the tree ------------------------------------------------------------------------------------

def test_names_and_tables_follow_bids(tree: Path):
    rows = table(tree / "participants.tsv")
    assert [row["participant_id"] for row in rows] == ["sub-0001", "sub-0002", "sub-0003"]
    assert set(rows[0]) == {"participant_id", "age", "sex", "diagnosis", "site", "family_id",
                            "split_group", "ventricle_ml", "hippocampus_ml", "brain_ml"}
    described = json.loads((tree / "participants.json").read_text())
    assert set(described) == set(rows[0]) - {"participant_id"}
    name = re.compile(r"(sub-\d{4})/(ses-\d)/anat/\1_\2_(T1w|T2w|FLAIR)\.nii\.gz")
    for path in images(tree):
        assert name.fullmatch(str(path.relative_to(tree))), path
        sidecar = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
        assert sidecar["MagneticFieldStrength"] in (1.5, 3.0) and sidecar["Manufacturer"]
    for row in rows:
        sub = row["participant_id"]
        visits = table(tree / sub / f"{sub}_sessions.tsv")
        assert {v["session_id"] for v in visits} == {p.name for p in (tree / sub).glob("ses-*")}
        assert visits[0]["age"] == row["age"]
        for visit in visits:
            assert list((tree / sub / visit["session_id"]).glob("anat/*_T1w.nii.gz"))
    assert len(table(tree / "sub-0003" / "sub-0003_sessions.tsv")) == 2
    assert json.loads((tree / "dataset_description.json").read_text())["DatasetType"] == "raw"
    derivative = json.loads((tree / "derivatives/labels/dataset_description.json").read_text())
    assert derivative["DatasetType"] == "derivative"


def test_volumes_in_the_tables_are_those_of_the_label_maps(tree: Path):
    rows = {row["participant_id"]: row for row in table(tree / "participants.tsv")}
    for sub, row in rows.items():
        for visit in table(tree / sub / f"{sub}_sessions.tsv"):
            ses = visit["session_id"]
            image = nib.load(tree / "derivatives/labels" / sub / ses / "anat"
                             / f"{sub}_{ses}_space-T1w_dseg.nii.gz")
            labels = np.asarray(image.dataobj)
            ml = abs(np.linalg.det(image.affine)) / 1000
            assert np.isin(labels, (4, 43)).sum() * ml == pytest.approx(
                float(visit["ventricle_ml"]), abs=2e-3)
            assert np.isin(labels, (17, 53)).sum() * ml == pytest.approx(
                float(visit["hippocampus_ml"]), abs=2e-3)
            assert ((labels > 0) & (labels != 24)).sum() * ml == pytest.approx(
                float(visit["brain_ml"]), abs=2e-3)
            if ses == "ses-1":
                assert row["ventricle_ml"] == visit["ventricle_ml"]


def test_labels_lie_on_the_t1w(tree: Path):
    for path in tree.glob("sub-*/ses-*/anat/*_T1w.nii.gz"):
        scan = nib.load(path)
        labels = nib.load(tree / "derivatives/labels" / path.relative_to(tree).with_name(
            path.name.replace("_T1w", "_space-T1w_dseg")))
        assert scan.shape == labels.shape
        np.testing.assert_array_equal(scan.affine, labels.affine)
        signal, codes = scan.get_fdata(), np.asarray(labels.dataobj)
        white, grey, fluid = (np.median(signal[np.isin(codes, c)])
                              for c in ((2, 41), (3, 42), (4, 43)))
        assert white > 1.1 * grey > 1.2 * fluid


def test_same_seed_same_bytes_whatever_the_workers(tree: Path, tmp_path: Path):
    synthesise(str(tmp_path / "again"), PEOPLE, spacing_mm=SPACING_MM, workers=1)
    first, second = contents(tree), contents(tmp_path / "again")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_an_interrupted_tree_is_completed_and_a_complete_one_left_alone(tree: Path, tmp_path: Path):
    root = tmp_path / "bids"
    shutil.copytree(tree, root)
    lost = next(root.glob("sub-0002/ses-1/anat/*_T1w.nii.gz"))
    lost.unlink()
    (root / "dataset_description.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in images(root) if "sub-0002" not in path.name}
    synthesise(str(root), PEOPLE, spacing_mm=SPACING_MM, workers=1)
    assert contents(root) == contents(tree)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    synthesise(str(root), PEOPLE, spacing_mm=SPACING_MM, workers=1)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_another_cohort_in_the_same_place_is_refused(tree: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"seed=0.*seed=7"):
        synthesise(str(tree), PEOPLE, seed=7, spacing_mm=SPACING_MM)
    with pytest.raises(DataError, match=r"participants=3.*participants=5"):
        synthesise(str(tree), 5, spacing_mm=SPACING_MM)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"code/synth\.json"):
        synthesise(str(tmp_path), 1)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_bad_arguments_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="participants=0"):
        synthesise(str(tmp_path / "a"), 0)
    with pytest.raises(DataError, match="synthseg_training_seg"):
        synthesise(str(tmp_path / "b"), 1, anatomies=tmp_path)
    (tmp_path / "synthseg_training_seg_99.nii.gz").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=r"seg_99\.nii\.gz"):
        synthesise(str(tmp_path / "c"), 1, workers=1, anatomies=tmp_path)
    assert not (tmp_path / "c").exists()


def test_object_store_gets_the_same_bytes(tree: Path, s3):
    import fsspec

    uri = f"{s3.uri}/synth"
    synthesise(uri, 1, spacing_mm=SPACING_MM, workers=1)
    fs = fsspec.filesystem("s3")
    for path in images(tree):
        if "sub-0001" in path.name:
            assert fs.cat_file(f"{uri}/{path.relative_to(tree)}") == path.read_bytes()
    synthesise(uri, 1, spacing_mm=SPACING_MM, workers=1)


# ---- left and right ------------------------------------------------------------------------------

def marker_mm(image: nib.Nifti1Image) -> np.ndarray:
    """World position of the brightest voxels."""
    signal = image.get_fdata()
    bright = np.argwhere(signal > 0.75 * signal.max())
    return nib.affines.apply_affine(image.affine, bright.mean(0))


def test_marker_is_on_the_right_in_every_scan(tree: Path):
    orientations = set()
    for path in images(tree):
        image = nib.load(path)
        orientations.add(nib.aff2axcodes(image.affine))
        labels = nib.load(next((tree / "derivatives/labels" / path.parent.relative_to(tree))
                               .glob("*_dseg.nii.gz")))
        codes = np.asarray(labels.dataobj)
        centre, right_ventricle = (
            nib.affines.apply_affine(labels.affine, np.argwhere(where).mean(0))
            for where in (codes > 0, codes == 43))
        assert person.MARKER_SIDE * (marker_mm(image) - centre)[0] > 60, path
        assert person.MARKER_SIDE * (right_ventricle - centre)[0] > 3, path
    assert len(orientations) > 2


def test_every_storage_keeps_world_positions():
    volume = np.zeros((9, 7, 8))
    volume[7, 2, 3] = 100
    affine = np.array([[2, 0.2, 0, -9], [-0.2, 2, 0, 5], [0, 0, 3, 1], [0, 0, 0, 1]], float)
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((-1, 1), repeat=3):
            data = person._store(volume, affine, np.array([*zip(order, signs, strict=True)]),
                                 2.5, np.uint16)
            image = nib.Nifti1Image.from_bytes(gzip.decompress(data))
            np.testing.assert_allclose(marker_mm(image), affine[:3, :3] @ (7, 2, 3) + affine[:3, 3],
                                       atol=1e-3)
            np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=0.3)
            assert image.get_fdata().max() == pytest.approx(250)


# ---- anatomy -------------------------------------------------------------------------------------

def at_age(someone: cohort.Person, age: float, patient: bool) -> cohort.Person:
    return replace(someone, patient=patient, visits=(cohort.Visit("1", age, ("T1w",)),))


def test_ventricles_grow_and_hippocampi_shrink_without_folding(head: anatomy.Anatomy):
    someone = cohort.draw_person(0, 0)
    volumes = []
    for age, patient in ((25.0, False), (80.0, True)):
        one = at_age(someone, age, patient)
        field = person.visit_field(head, one, one.visits[0], seed=0)
        assert warp.min_jacobian(field) > 0
        volumes.append(person.measure(_inside(warp.warp_labels(head.labels, field)), 1.0))
        wanted = cohort.wanted_ml(one, age, head.intracranial_ml * np.prod(one.head_scale))
        assert volumes[-1]["ventricle_ml"] == pytest.approx(wanted[0], rel=0.3)
        assert volumes[-1]["hippocampus_ml"] == pytest.approx(wanted[1], rel=0.3)
    young, old = volumes
    assert old["ventricle_ml"] > 3 * young["ventricle_ml"]
    assert old["hippocampus_ml"] < 0.85 * young["hippocampus_ml"]


def test_head_scale_scales_the_brain(head: anatomy.Anatomy):
    still = np.zeros((3, *head.shaper.full_shape), np.float32)
    larger = warp.compose(still, still, np.full(3, 1.1), head.centre)
    ratio = (np.count_nonzero(_inside(warp.warp_labels(head.labels, larger)))
             / np.count_nonzero(_inside(head.labels)))
    assert ratio == pytest.approx(1.331, rel=0.01)


def test_min_jacobian_sees_a_fold():
    field = np.zeros((3, 8, 8, 8), np.float32)
    assert warp.min_jacobian(field) == pytest.approx(1)
    field[0, 4] = -20
    assert warp.min_jacobian(field) < 0


def test_upsample_is_linear_between_nodes():
    nodes = warp.nodes_mm((4, 5, 3))
    fine = warp.upsample(nodes, (10, 12, 7))
    np.testing.assert_allclose(fine, np.indices((10, 12, 7)), atol=1e-5)


def _inside(labels: np.ndarray) -> np.ndarray:
    return np.where(labels < 256, labels, 0)


def test_cohort_is_plausible_and_a_prefix_of_a_larger_one():
    people = [cohort.draw_person(3, index) for index in range(400)]
    assert people[:10] == [cohort.draw_person(3, index) for index in range(10)]
    assert people[:10] != [cohort.draw_person(4, index) for index in range(10)]
    share = np.mean([len(p.visits) == 2 for p in people])
    assert 0.18 < share < 0.32
    assert 0.4 < np.mean([p.patient for p in people if p.visits[0].age >= 55]) < 0.6
    size = {sex: np.mean([np.prod(p.head_scale) for p in people if p.sex == sex]) for sex in "MF"}
    assert 1.08 < size["M"] / size["F"] < 1.17
    ages = [p.visits[0].age for p in people]
    assert 20 <= min(ages) < 25 and 80 < max(ages) <= 85
    names = {f"a{k}": float(v) for k, v in enumerate(np.geomspace(6, 60, 12))}
    families: dict[str, set[str]] = {}
    for p in people:
        if p.family:
            families.setdefault(p.family, set()).add(cohort.choose_anatomy(p, names))
    assert len(families) > 20 and all(len(anatomies) == 1 for anatomies in families.values())


# ---- does it look like a head? -------------------------------------------------------------------

def brain_mask_dice(one: anatomy.Anatomy) -> float:
    """Agreement of the brain-mask network with the truth (inside of the skull)."""
    from deepbet import BrainExtraction

    someone = at_age(cohort.draw_person(0, 0), 60.0, False)
    files, _ = person.make_visit(one, someone, someone.visits[0], 0, 2.0)
    scan, truth = (nib.as_closest_canonical(nib.Nifti1Image.from_bytes(
        gzip.decompress(next(d for n, d in files.items() if n.endswith(end)))))
        for end in ("T1w.nii.gz", "dseg.nii.gz"))
    network = BrainExtraction(no_gpu=True)
    found = network.postprocess(
        (network.run_model(scan.get_fdata(dtype=np.float32)) > 0.5).astype(np.float32)) > 0
    inside = np.asarray(truth.dataobj) > 0
    return 2 * np.count_nonzero(found & inside) / (found.sum() + inside.sum())


def test_brain_mask_network_finds_the_brain_of_a_template_head(head: anatomy.Anatomy):
    assert brain_mask_dice(head) > 0.93


def test_real_anatomies(shared_data: Path, tmp_path: Path):
    for number in ("05", "13"):
        name = f"synthseg_training_seg_{number}.nii.gz"
        (tmp_path / name).symlink_to(shared_data / "labels" / name)
    synthesise(str(tmp_path / "bids"), 1, spacing_mm=SPACING_MM, workers=1, anatomies=tmp_path)
    row = table(tmp_path / "bids" / "participants.tsv")[0]
    assert row["split_group"] in ("synthseg_training_seg_05", "synthseg_training_seg_13")
    assert brain_mask_dice(anatomy.load_anatomy(row["split_group"], tmp_path)) > 0.93
