"""The synthetic cohort: a valid tree, equal bytes every time, truth in scans, left and right."""

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
from scipy import ndimage

from data_prep.synth import (
    anatomy,
    codes,
    cohort,
    person,
    scanner,
    series,
    synthesise,
    warp,
)
from neurojepa.errors import ConfigError, DataError

SPACING_MM = 4.0
PEOPLE, SEED = 2, 942  # the second has two visits; together they have every modality


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synth") / "bids"
    synthesise(str(root), participants=PEOPLE, seed=SEED, spacing_mm=SPACING_MM, workers=2)
    return root


@pytest.fixture(scope="module")
def head() -> anatomy.Anatomy:
    return anatomy.load_anatomy("template-13", None)  # the tree has it too


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*")) if path.is_file()}


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


def images(root: Path) -> list[Path]:
    return sorted(root.glob("sub-*/ses-*/*/*.nii.gz"))


# ---- the tree ------------------------------------------------------------------------------------

def test_names_and_tables_follow_bids(tree: Path):
    rows = table(tree / "participants.tsv")
    assert [row["participant_id"] for row in rows] == ["sub-0001", "sub-0002"]
    described = json.loads((tree / "participants.json").read_text())
    assert set(described) == set(rows[0]) - {"participant_id"}
    assert set(rows[0]) > {"age", "sex", "diagnosis", "small_vessel", "amyloid", "site",
                           "family_id", "split_group", "event_years", "event", "log_hazard",
                           *person.VOLUME_COLUMNS}
    name = re.compile(r"(sub-\d{4})/(ses-\d)/(anat/\1_\2_(T1w|T2w|FLAIR)|pet/\1_\2_trc-FDG_pet|"
                      r"func/\1_\2_task-rest_bold)\.nii\.gz")
    seen = set()
    for path in images(tree):
        assert name.fullmatch(str(path.relative_to(tree))), path
        facts = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
        assert facts["Manufacturer"]
        assert facts["Modality"] == "PT" or facts["MagneticFieldStrength"] in (1.5, 3.0)
        seen.add(path.name.split("_")[-1].removesuffix(".nii.gz"))
    assert seen == {"T1w", "T2w", "FLAIR", "pet", "bold"}
    for row in rows:
        sub = row["participant_id"]
        visits = table(tree / sub / f"{sub}_sessions.tsv")
        assert {v["session_id"] for v in visits} == {p.name for p in (tree / sub).glob("ses-*")}
        assert visits[0]["age"] == row["age"]
        for visit in visits:
            assert list((tree / sub / visit["session_id"]).glob("anat/*_T1w.nii.gz"))
    assert len(table(tree / "sub-0002" / "sub-0002_sessions.tsv")) == 2
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
            for column, where in (
                    ("ventricle_ml", np.isin(labels, (4, 43))),
                    ("hippocampus_ml", np.isin(labels, (17, 53))),
                    ("cortex_gm_ml", np.isin(labels, (3, 42))), ("csf_ml", labels == 24),
                    ("lesion_ml", labels == 77), ("brain_ml", (labels > 0) & (labels != 24))):
                assert where.sum() * ml == pytest.approx(float(visit[column]), abs=2e-3)
            if ses == "ses-1":
                assert {k: row[k] for k in visit if k != "session_id"} == {
                    k: visit[k] for k in visit if k != "session_id"}


def test_labels_lie_on_the_t1w(tree: Path):
    for path in tree.glob("sub-*/ses-*/anat/*_T1w.nii.gz"):
        scan = nib.load(path)
        labels = nib.load(tree / "derivatives/labels" / path.relative_to(tree).with_name(
            path.name.replace("_T1w", "_space-T1w_dseg")))
        assert scan.shape == labels.shape
        np.testing.assert_array_equal(scan.affine, labels.affine)
        signal, found = scan.get_fdata(), np.asarray(labels.dataobj)
        white, grey, fluid = (np.median(signal[np.isin(found, c)])
                              for c in ((2, 41), (3, 42), (4, 43)))
        assert white > 1.1 * grey > 1.2 * fluid


@pytest.mark.slow(9)
def test_same_seed_same_bytes_whatever_the_workers(tree: Path, tmp_path: Path):
    synthesise(str(tmp_path / "again"), participants=PEOPLE, seed=SEED, spacing_mm=SPACING_MM,
               workers=1)
    first, second = contents(tree), contents(tmp_path / "again")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


@pytest.mark.slow(5)
def test_an_interrupted_tree_is_completed_and_a_complete_one_left_alone(tree: Path, tmp_path: Path):
    root = tmp_path / "bids"
    shutil.copytree(tree, root)
    lost = next(root.glob("sub-0001/ses-1/anat/*_T1w.nii.gz"))
    lost.unlink()
    (root / "dataset_description.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in images(root) if "sub-0001" not in path.name}
    synthesise(str(root), participants=PEOPLE, seed=SEED, spacing_mm=SPACING_MM, workers=1)
    assert contents(root) == contents(tree)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    synthesise(str(root), participants=PEOPLE, seed=SEED, spacing_mm=SPACING_MM, workers=1)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_another_cohort_in_the_same_place_is_refused(tree: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"seed=942.*seed=7"):
        synthesise(str(tree), participants=PEOPLE, seed=7, spacing_mm=SPACING_MM)
    with pytest.raises(DataError, match=r"participants=2.*participants=5"):
        synthesise(str(tree), participants=5, seed=SEED, spacing_mm=SPACING_MM)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"code/synth\.json"):
        synthesise(str(tmp_path), participants=1)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_bad_arguments_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="participants=0"):
        synthesise(str(tmp_path / "a"), participants=0)
    with pytest.raises(DataError, match="synthseg_training_seg"):
        synthesise(str(tmp_path / "b"), participants=1, anatomies=tmp_path)
    (tmp_path / "synthseg_training_seg_99.nii.gz").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=r"seg_99\.nii\.gz"):
        synthesise(str(tmp_path / "c"), participants=1, workers=1, anatomies=tmp_path)
    assert not (tmp_path / "c").exists()


def test_object_store_gets_the_same_bytes(tree: Path, s3):
    import fsspec

    uri = f"{s3.uri}/synth"
    synthesise(uri, participants=1, seed=SEED, spacing_mm=SPACING_MM, workers=1)
    fs = fsspec.filesystem("s3")
    for path in images(tree):
        if "sub-0001" in path.name:
            assert fs.cat_file(f"{uri}/{path.relative_to(tree)}") == path.read_bytes()
    synthesise(uri, participants=1, seed=SEED, spacing_mm=SPACING_MM, workers=1)


# ---- left and right ------------------------------------------------------------------------------

def marker_mm(image: nib.Nifti1Image) -> np.ndarray:
    """World position of the brightest voxels."""
    signal = image.get_fdata()
    signal = signal.mean(3) if signal.ndim == 4 else signal
    bright = np.argwhere(signal > 0.75 * signal.max())
    return nib.affines.apply_affine(image.affine, bright.mean(0))


def test_marker_is_on_the_right_in_every_scan(tree: Path):
    orientations = set()
    for path in images(tree):
        image = nib.load(path)
        orientations.add(nib.aff2axcodes(image.affine))
        labels = nib.load(next((tree / "derivatives/labels" / path.parent.relative_to(tree))
                               .parent.glob("anat/*_dseg.nii.gz")))
        found = np.asarray(labels.dataobj)
        centre, right_ventricle = (
            nib.affines.apply_affine(labels.affine, np.argwhere(where).mean(0))
            for where in (found > 0, found == 43))
        assert anatomy.MARKER_SIDE * (marker_mm(image) - centre)[0] > 60, path
        assert anatomy.MARKER_SIDE * (right_ventricle - centre)[0] > 3, path
    assert len(orientations) > 2


def test_every_storage_keeps_world_positions():
    volume = np.zeros((9, 7, 8))
    volume[7, 2, 3] = 100
    affine = np.array([[2, 0.2, 0, -9], [-0.2, 2, 0, 5], [0, 0, 3, 1], [0, 0, 0, 1]], float)
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((-1, 1), repeat=3):
            data = scanner.store(volume, affine=affine,
                                 orientation=np.array([*zip(order, signs, strict=True)]),
                                 slope=2.5, dtype=np.uint16)
            image = nib.Nifti1Image.from_bytes(gzip.decompress(data))
            np.testing.assert_allclose(marker_mm(image), affine[:3, :3] @ (7, 2, 3) + affine[:3, 3],
                                       atol=1e-3)
            np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=0.3)
            assert image.get_fdata().max() == pytest.approx(250)


# ---- anatomy -------------------------------------------------------------------------------------

def at_age(someone: cohort.SyntheticPerson, age: float, patient: bool) -> cohort.SyntheticPerson:
    return replace(someone, patient=patient, visits=(cohort.Visit("1", age, ("T1w",)),))


def labels_2mm(head: scanner.Head) -> np.ndarray:
    shape = tuple(n // 2 for n in head.labels.shape)
    return _inside(warp.read_labels(head.labels, field=head.field, matrix=2 * np.eye(3),
                                    offset=np.zeros(3), shape=shape))


def test_a_head_has_the_volumes_of_its_age_without_folding(head: anatomy.Anatomy):
    someone = cohort.draw_person(0, 0)
    volumes = []
    for age, patient in ((25.0, False), (80.0, True)):
        one = at_age(someone, age, patient)
        made = person.visit_head(head, one, one.visits[0], seed=0)
        assert warp.jacobian(made.field).min() > 0
        labels = labels_2mm(made)
        volumes.append(person.measure(labels, 8.0))
        inside_ml = volumes[-1]["brain_ml"] + volumes[-1]["csf_ml"]
        wanted = cohort.wanted_ml(one, age=age, intracranial_ml=inside_ml, levels=head.levels)
        for column, ml in (("ventricle_ml", wanted.ventricles),
                           ("hippocampus_ml", wanted.hippocampi), ("lesion_ml", wanted.lesions)):
            assert volumes[-1][column] == pytest.approx(ml, rel=0.2, abs=0.2)
        assert volumes[-1]["csf_ml"] == pytest.approx(wanted.csf, rel=0.04)
        grey_ml = 0.008 * np.isin(labels, codes.GREY).sum()
        assert grey_ml == pytest.approx(wanted.grey, rel=0.04)
    young, old = volumes
    assert old["ventricle_ml"] > 3 * young["ventricle_ml"]
    assert old["hippocampus_ml"] < 0.85 * young["hippocampus_ml"]
    assert old["csf_ml"] > 1.5 * young["csf_ml"]
    assert old["cortex_gm_ml"] < 0.9 * young["cortex_gm_ml"]
    assert old["lesion_ml"] > 3 * young["lesion_ml"]


def test_lesions_grow_where_they_are(head: anatomy.Anatomy):
    few, many = head.labels.copy(), head.labels.copy()
    for labels, num in ((few, 500), (many, 3000)):
        head.tissue.add_lesions(labels, num, np.random.default_rng(1))
        assert np.count_nonzero(labels == codes.LESION) == num
        assert set(np.unique(head.labels[labels == codes.LESION])) == set(codes.WHITE)
    assert np.all(many[few == codes.LESION] == codes.LESION)
    other = head.labels.copy()
    head.tissue.add_lesions(other, 3000, np.random.default_rng(2))
    assert np.mean(many[other == codes.LESION] == codes.LESION) < 0.9


def test_cortex_gives_way_to_fluid_and_back(head: anatomy.Anatomy):
    def change(to_fluid: float, to_white: float) -> dict[str, int]:
        labels = head.labels.copy()
        head.tissue.exchange(labels, to_fluid, to_white)
        return {name: int(np.isin(labels, group).sum() - np.isin(head.labels, group).sum())
                for name, group in (("fluid", codes.FLUID), ("cortex", codes.CORTEX),
                                    ("white", codes.WHITE))}

    assert change(900, 500) == {"fluid": 900, "cortex": -1400, "white": 500}
    assert change(-900, -500) == {"fluid": -900, "cortex": 1400, "white": -500}


def test_shape_trait_bends_the_brain_but_keeps_its_volumes(head: anatomy.Anatomy):
    someone = at_age(cohort.draw_person(0, 0), 50.0, False)
    bends, volumes = [], []
    for shape in (-1.5, 1.5):
        one = replace(someone, traits=replace(someone.traits, shape=shape))
        labels = labels_2mm(person.visit_head(head, one, one.visits[0], 0))
        volumes.append(person.measure(labels, 8.0))
        where = np.argwhere(labels > 0)
        low, high = np.percentile(where[:, 1], (15, 85))
        poles = (where[:, 1] < low) | (where[:, 1] > high)
        bends.append(2 * (where[poles, 0].mean() - where[~poles, 0].mean()))
    assert abs(bends[1] - bends[0]) > 3  # millimetres
    for column in ("brain_ml", "cortex_gm_ml", "csf_ml"):
        assert volumes[0][column] == pytest.approx(volumes[1][column], rel=0.03)
    assert volumes[0]["hippocampus_ml"] == pytest.approx(volumes[1]["hippocampus_ml"], rel=0.06)


def test_head_scale_scales_the_brain(head: anatomy.Anatomy):
    still = np.zeros((3, *head.shaper.full_shape), np.float32)
    larger = warp.compose(still, velocity=still, scale=np.full(3, 1.1), centre=head.centre)
    ratio = (np.count_nonzero(_inside(warp.warp_labels(head.labels, larger)))
             / np.count_nonzero(_inside(head.labels)))
    assert ratio == pytest.approx(1.331, rel=0.01)


def test_jacobian_sees_a_fold_and_a_dilation():
    field = np.zeros((3, 8, 8, 8), np.float32)
    np.testing.assert_allclose(warp.jacobian(field), 1)
    np.testing.assert_allclose(warp.jacobian(0.1 * warp.nodes_mm((8, 8, 8))), 1.331, rtol=1e-5)
    field[0, 4] = -20
    assert warp.jacobian(field).min() < 0


def test_density_is_what_a_flow_enlarges():
    shape = (21, 21, 21)
    velocity = warp.random_velocity(np.random.default_rng(0), shape, rms_mm=2.0, smooth_mm=15.0)
    forth = warp.flow(-velocity)
    inner = (slice(3, -3),) * 3
    np.testing.assert_allclose(warp.density(velocity)[inner], warp.jacobian(forth)[inner],
                               atol=0.15)


def test_labels_are_read_at_world_positions():
    labels = np.zeros((30, 30, 30), np.int16)
    labels[10:20, 5:25, 8:22] = 7
    field = np.zeros((3, 10, 10, 10), np.float32)
    field[0] = 3
    found = warp.read_labels(labels, field=field, matrix=2 * np.eye(3),
                             offset=np.array([1.0, 0, 0]), shape=(14, 15, 15))
    x, y, z = (2 * axis for axis in np.indices(found.shape))
    np.testing.assert_array_equal(found, labels[np.minimum(x + 4, 29), y, z])


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
    scans = [len(v.modalities) for p in people for v in p.visits]
    assert 2.3 < sum(scans) / len(people) < 2.6
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


def test_drawn_truth_follows_the_stated_effects():
    people = [cohort.draw_person(5, index) for index in range(1500)]
    icv, levels = 1450.0, anatomy.TEMPLATE_LEVELS
    age = np.array([p.visits[0].age for p in people])
    wanted = [cohort.wanted_ml(p, age=p.visits[0].age, intracranial_ml=icv,
                               levels=levels) for p in people]
    truth = [cohort.truths(p, p.visits[0].age) for p in people]
    patient = np.array([p.patient for p in people])

    def fit(values: list[float], *more: np.ndarray) -> np.ndarray:
        """Coefficients of age and of each further regressor."""
        design = np.stack([np.ones(len(age)), age - cohort.MEAN_AGE, *more], axis=1).astype(float)
        return np.linalg.lstsq(design, np.array(values), rcond=None)[0][1:]

    assert fit(np.log([w.ventricles for w in wanted]), patient) == pytest.approx(
        [0.020, 0.5], abs=0.07)
    assert fit(np.log([w.csf for w in wanted]), patient)[0] == pytest.approx(0.0115, rel=0.1)
    assert fit([100 * w.grey / icv for w in wanted], patient)[0] == pytest.approx(-0.154, rel=0.1)
    assert fit(np.log([w.hippocampi for w in wanted]), patient)[1] == pytest.approx(-0.2, abs=0.03)
    small_vessel = np.array([p.small_vessel for p in people])
    assert fit(np.log([w.lesions for w in wanted]), small_vessel, patient) == pytest.approx(
        [cohort.LESION_PER_YEAR, cohort.SMALL_VESSEL_LESIONS, 0], abs=0.12)
    assert fit(np.log([t["t1w_contrast"] for t in truth]), patient) == pytest.approx(
        [cohort.CONTRAST_PER_YEAR, 0], abs=5e-3)
    men = np.array([p.sex == "M" for p in people])
    assert fit([t["shape_trait"] for t in truth], men)[1] == pytest.approx(
        2 * cohort.SHAPE_OF_SEX, abs=0.2)
    assert fit([t["fdg_ratio"] for t in truth], patient) == pytest.approx(
        [cohort.FDG_PER_YEAR, cohort.FDG_OF_PATIENT], abs=0.02)
    amyloid, old = np.array([p.amyloid for p in people]), age >= cohort.OLD_AGE
    assert amyloid[patient & old].mean() > 2 * amyloid[~patient & old].mean() > 0.2
    ratio = np.array([t["av45_ratio"] for t in truth])
    assert ratio[amyloid].mean() - ratio[~amyloid].mean() == pytest.approx(0.4, abs=0.05)
    pairs = [(a, b) for a, b in zip(people[::2], people[1::2], strict=True) if a.family]
    alike = np.corrcoef([(a.traits.shape, b.traits.shape) for a, b in pairs], rowvar=False)[0, 1]
    assert alike == pytest.approx(cohort.HERITABILITY, abs=0.2)


# ---- truth in the signal -------------------------------------------------------------------------

def scanned(one: anatomy.Anatomy, someone: cohort.SyntheticPerson, modality: str,
            ) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """A scan of 2 mm, the true labels on its voxels, and the truth."""
    visit = cohort.Visit("1", someone.visits[0].age, tuple({"T1w": 0, modality: 0}))
    files, truth = person.make_visit(one, someone, visit, seed=0, spacing_mm=2.0)
    names = person.file_names(someone, visit)
    scan, labels = (nib.Nifti1Image.from_bytes(gzip.decompress(files[names[key]]))
                    for key in (modality, "labels"))
    to_labels = np.linalg.inv(labels.affine) @ scan.affine
    return scan.get_fdata(), ndimage.affine_transform(
        np.asarray(labels.dataobj), to_labels[:3, :3], to_labels[:3, 3], scan.shape, order=0), truth


def viewed(one: anatomy.Anatomy, someone: cohort.SyntheticPerson, voxel_mm: float) -> scanner.View:
    """A head about to be scanned."""
    return scanner.draw_view(np.random.default_rng(0),
                             person.visit_head(one, someone, someone.visits[0], 0),
                             scanner.Pose(np.eye(3), np.zeros(3)), np.full(3, voxel_mm))


def frames_of(data: bytes) -> nib.Nifti1Image:
    """A stored series in the axis order of its view."""
    return nib.as_closest_canonical(nib.Nifti1Image.from_bytes(gzip.decompress(data)))


def test_lesions_are_bright_on_flair_and_dark_on_t1w(head: anatomy.Anatomy):
    someone = replace(at_age(cohort.draw_person(0, 1), 80.0, False), small_vessel=True)
    for modality, low, high in (("FLAIR", 1.25, 2.5), ("T1w", 0.5, 0.9)):
        signal, labels, truth = scanned(head, someone, modality)
        assert truth["lesion_ml"] > 3
        ratio = np.median(signal[labels == codes.LESION]) / np.median(
            signal[np.isin(labels, codes.WHITE)])
        assert low < ratio < high


def test_contrast_of_the_t1w_is_the_truth(head: anatomy.Anatomy):
    someone, ratios, wanted = at_age(cohort.draw_person(0, 1), 50.0, False), [], []
    for myelin in (-2.0, 2.0):
        one = replace(someone, traits=replace(someone.traits, myelin=myelin))
        signal, labels, truth = scanned(head, one, "T1w")
        thick = ndimage.binary_erosion(np.isin(labels, codes.CORTEX))
        ratios.append(np.median(signal[thick]) / np.median(signal[np.isin(labels, codes.WHITE)]))
        wanted.append(truth["t1w_contrast"])
    assert ratios[0] / ratios[1] == pytest.approx(wanted[0] / wanted[1], abs=0.02)
    assert wanted[0] > 1.1 * wanted[1]


def test_uptake_of_the_cortex_is_the_truth(head: anatomy.Anatomy):
    someone = at_age(cohort.draw_person(0, 1), 70.0, False)
    view = viewed(head, someone, 2.0)
    cortex, reference = (ndimage.binary_erosion(np.isin(view.labels, group))
                         for group in (codes.CORTEX, codes.CEREBELLUM))
    shapes = set()
    for tracer, column in series.TRUTH_OF_TRACER.items():
        found = []
        for seed, ratio in enumerate((1.0, 1.1, 1.5)):
            data, _ = series.pet(view, np.random.default_rng(seed), tracer, {column: ratio})
            image = frames_of(data).get_fdata()
            shapes.add(image.shape[3:])
            image = image.mean(3) if image.ndim == 4 else image
            assert 1000 < image[reference].mean() < 10_000  # Bq/mL
            found.append(image[cortex].mean() / image[reference].mean())
        # blur mixes in what lies beside the cortex
        assert 0.5 < (found[1] - found[0]) / 0.1 < 1.1
        assert 0.5 < (found[2] - found[0]) / 0.5 < 1.1
    assert shapes == {(), (series.NUM_FRAMES,)}


def test_pet_sidecar_times_the_frames(tree: Path):
    path = next(tree.glob("sub-*/ses-*/pet/*_pet.json"))
    facts = json.loads(path.read_text())
    frames = nib.load(path.with_name(path.name.replace(".json", ".nii.gz"))).shape[3:]
    assert len(facts["FrameTimesStart"]) == len(facts["FrameDuration"]) == (*frames, 1)[0]
    assert sum(facts["FrameDuration"]) == 1200 and facts["FrameTimesStart"][0] == 2400
    assert facts["Units"] == "Bq/mL" and facts["TracerName"] == "FDG"
    assert 170 < facts["InjectedRadioactivity"] < 200


def test_bold_fluctuates_in_grey_matter_by_the_persons_amplitude(head: anatomy.Anatomy):
    view = viewed(head, at_age(cohort.draw_person(0, 1), 40.0, False), 4.0)
    found = []
    for amplitude in (0.006, 0.018):
        data, _ = series.bold(view, np.random.default_rng(0), cohort.SITES[0],
                              {"fluctuation": amplitude})
        scan = frames_of(data)
        assert scan.shape[3] == series.NUM_VOLUMES and scan.header.get_zooms()[3] == series.TR_S
        signal = scan.get_fdata()
        slow = ndimage.gaussian_filter1d(signal, 2, axis=3).std(3) / signal.mean(3).clip(1)
        cortex, white = (np.percentile(slow[np.isin(view.labels, group)], 75)
                         for group in (codes.CORTEX, codes.WHITE))
        found.append(cortex)
    assert cortex > 1.2 * white
    assert found[1] > 1.5 * found[0]


# ---- does it look like a head? -------------------------------------------------------------------

def brain_mask_dice(one: anatomy.Anatomy) -> float:
    """Agreement of the brain-mask network with the truth (inside of the skull)."""
    from deepbet import BrainExtraction

    someone = at_age(cohort.draw_person(0, 0), 60.0, False)
    files, _ = person.make_visit(one, someone, someone.visits[0], seed=0, spacing_mm=2.0)
    scan, truth = (nib.as_closest_canonical(nib.Nifti1Image.from_bytes(
        gzip.decompress(next(d for n, d in files.items() if n.endswith(end)))))
        for end in ("T1w.nii.gz", "dseg.nii.gz"))
    network = BrainExtraction(no_gpu=True)
    found = network.postprocess(
        (network.run_model(scan.get_fdata(dtype=np.float32)) > 0.5).astype(np.float32)) > 0
    inside = np.asarray(truth.dataobj) > 0
    return 2 * np.count_nonzero(found & inside) / (found.sum() + inside.sum())


@pytest.mark.slow(4)
def test_brain_mask_network_finds_the_brain_of_a_template_head(head: anatomy.Anatomy):
    assert brain_mask_dice(head) > 0.93


@pytest.mark.slow(10)
def test_real_anatomies(shared_data: Path, tmp_path: Path):
    for number in ("05", "13"):
        name = f"synthseg_training_seg_{number}.nii.gz"
        (tmp_path / name).symlink_to(shared_data / "labels" / name)
    synthesise(str(tmp_path / "bids"), participants=1, spacing_mm=SPACING_MM, workers=1,
               anatomies=tmp_path)
    row = table(tmp_path / "bids" / "participants.tsv")[0]
    assert row["split_group"] in ("synthseg_training_seg_05", "synthseg_training_seg_13")
    assert brain_mask_dice(anatomy.load_anatomy(row["split_group"], tmp_path)) > 0.93
