"""The arithmetic of the comparison and its people, without training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from data_prep.synth import codes, warp
from data_prep.synth.anatomy import Anatomy, Levels
from data_prep.synth.cohort import draw_person
from neurojepa.config import load_config
from neurojepa.downstream.embed import Embeddings
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import Grid
from neurojepa.model.build import build_model
from neurojepa.objective.views import make_views
from tests.helpers.batches import GRID, make_batch, make_config
from tools.bench import _compare_table, _people, _recipes, compare
from tools.bench._compare_run import CANDIDATES, FEW, chosen_rows, few_rows, nearest, retrieved
from tools.bench._mixing import Mixer, brain_of, registered, split_sources
from tools.bench._quality_run import finish, head_alone, stored
from tools.bench._runs import claim


def embeddings(values: np.ndarray, people: np.ndarray, modality: np.ndarray,
               split: np.ndarray) -> Embeddings:
    names = np.array([f"p{person:04d}" for person in people])
    return Embeddings(values, names, names, names, np.full(len(names), "1"), modality, split)


def paired(noise: float, num: int = 240) -> Embeddings:
    """A T1w and a T2w scan of each person, alike but for noise; half of the people are tested."""
    rng = np.random.default_rng(0)
    own = rng.normal(size=(num, 30))
    values = np.concatenate([own, own + noise * rng.normal(size=own.shape)])
    return embeddings(values, np.tile(np.arange(num), 2), np.repeat(["T1w", "T2w"], num),
                      np.tile(np.where(np.arange(num) % 2, "train", "test"), 2))


def test_retrieval_is_certain_for_twins_and_luck_for_strangers():
    assert retrieved(paired(0.0))["retrieval/predicted"] == pytest.approx(1)
    by_luck = retrieved(paired(1e6))["retrieval/predicted"].mean()
    assert by_luck == pytest.approx(1 / CANDIDATES, abs=0.02)


def test_retrieval_equals_drawing_candidates():
    found = paired(2.0)
    exact = retrieved(found)["retrieval/predicted"]
    assert 0.2 < exact.mean() < 0.95
    parts = {}
    for modality in ("T1w", "T2w"):
        rows = np.flatnonzero(found.modality == modality)
        train = found.values[rows[found.split[rows] == "train"]]
        values = (found.values[rows] - train.mean(0)) / train.std(0)
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        parts[modality] = values[found.split[rows] == "test"]
    alike, rng = parts["T1w"] @ parts["T2w"].T, np.random.default_rng(1)
    for k in range(0, len(alike), 17):
        others = np.delete(alike[k], k)
        hits = [alike[k, k] > rng.choice(others, CANDIDATES - 1, replace=False).max()
                for _ in range(400)]
        assert exact[k] == pytest.approx(np.mean(hits), abs=0.09)


def test_without_the_other_modality_nothing_is_retrieved():
    found = paired(0.0)
    assert retrieved(chosen_rows(found, found.modality == "T1w")) == {}


def test_few_people_are_the_same_whatever_the_order_and_keep_all_scans():
    found = paired(0.0, 400)
    chosen = few_rows(found)
    train = found.split == "train"
    assert len(set(found.participant[chosen & train])) == FEW and chosen[~train].all()
    assert (chosen & train).sum() == 2 * FEW
    order = np.random.default_rng(0).permutation(len(chosen))
    assert (few_rows(chosen_rows(found, order)) == chosen[order]).all()


def test_the_nearest_people_tell_an_age_that_values_hold():
    found = paired(0.0)
    age = np.array([repr(float(value)) for value in found.values[:, 0]])
    scores = nearest(replace(found, values=found.values[:, :2]), age)
    assert np.corrcoef(scores["age, nearest/truth"], scores["age, nearest/predicted"])[0, 1] > 0.7


def runs_of(quality: float, seeds: int = 2) -> list[dict[str, np.ndarray]]:
    """Stored predictions of 60 people from three sources, better with ``quality``."""
    people = np.array([f"p{k:02d}" for k in range(60)])
    sources, runs = np.array([f"s{k % 3}" for k in range(60)]), []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        age, ill = rng.normal(size=60), np.arange(60) % 4 == 0
        noise = rng.normal(size=60)
        runs.append(
            stored("age", age, quality * age + (1 - quality) * noise, people, sources)
            | stored("diagnosis", ill * 1.0, quality * ill + (1 - quality) * noise, people, sources)
            | stored("segmentation", np.ones((60, 2)), np.full((60, 2), quality), people, sources)
            | stored("retrieval", np.ones(60), np.full(60, quality), people, sources))
    return runs


def test_the_better_method_is_ahead_by_more_than_noise():
    found = {"random init": runs_of(0.2), _compare_table.REFERENCE: runs_of(0.5),
             "ours": runs_of(0.8), "the same": runs_of(0.5)}
    rows = _compare_table.compared(found)["primary endpoint"]
    value, low, high = rows["ours"][_compare_table.REFERENCE]
    assert 0 < low < value < high
    assert rows["the same"][_compare_table.REFERENCE] == pytest.approx([0, 0, 0])
    assert rows["random init"][_compare_table.REFERENCE][2] < 0
    assert "random init" not in rows["random init"]


def test_a_method_that_lacks_a_part_has_no_primary_endpoint(monkeypatch):
    monkeypatch.setattr(_compare_table, "DRAWS", 100)
    lacking = [{key: value for key, value in run.items() if not key.startswith("retrieval")}
               for run in runs_of(0.9)]
    endpoints = _compare_table.compared({"random init": runs_of(0.2), "ours": runs_of(0.5),
                                         "volumes": lacking})
    for rows in endpoints.values():
        assert set(rows) == {"random init", "ours"}


def test_rows_that_came_later_move_no_others(monkeypatch):
    monkeypatch.setattr(_compare_table, "DRAWS", 50)
    found = {"random init": runs_of(0.2), _compare_table.REFERENCE: runs_of(0.5)}
    before = _compare_table.compared(found)
    after = _compare_table.compared(found | {"session aim": runs_of(0.95)})
    for title, rows in before.items():
        assert "session aim" in after[title]
        assert {name: after[title][name] for name in rows} == rows
    moved = _compare_table.compared(found | {"another": runs_of(0.95)})
    assert moved["primary endpoint"]["random init"] != before["primary endpoint"]["random init"]


def test_who_only_retrieves_is_ahead_with_retrieval_alone(monkeypatch):
    monkeypatch.setattr(_compare_table, "DRAWS", 100)
    retrieving = [run | {"retrieval/predicted": np.full(60, 0.9)} for run in runs_of(0.4)]
    endpoints = _compare_table.compared({_compare_table.REFERENCE: runs_of(0.4),
                                         "worse": runs_of(0.3), "retrieving": retrieving})
    above = {title: rows["retrieving"][_compare_table.REFERENCE]
             for title, rows in endpoints.items()}
    assert above["primary endpoint"][1] > 0
    assert above["without retrieval"] == pytest.approx([0, 0, 0])


def test_arms_share_no_folder_and_a_teacher_costs_a_part_of_the_budget(tmp_path: Path):
    jobs = [compare.jobs_of(compare.FULL, tmp_path, arm, 0)[-1] for arm in compare.ARMS]
    assert len({job.folder for job in jobs}) == len(jobs)
    teacher, student = compare.jobs_of(compare.FULL, tmp_path, "frozen teacher", 0)
    assert student.teacher == teacher.folder / "weights"
    assert teacher.seconds + student.seconds == pytest.approx(compare.FULL.seconds)


def test_a_folder_of_other_people_is_refused(tmp_path: Path):
    for _ in range(2):
        claim(tmp_path / "work", compare.plan_text(compare.QUICK, None))
    with pytest.raises(ConfigError, match="another plan"):
        claim(tmp_path / "work", compare.plan_text(compare.QUICK, "s3://other/feed"))


def test_a_feed_that_cannot_be_opened_claims_no_folder(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere"):
        compare.run(True, None, str(tmp_path / "work"), feed=str(tmp_path / "nowhere"))
    assert not (tmp_path / "work").exists()


def test_where_nothing_was_made_nothing_is_finished(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no runs; leave --finished out"):
        compare.run(True, None, str(tmp_path / "work"), finished=True)


def test_people_of_another_dose_have_a_folder_of_their_own(tmp_path: Path):
    with pytest.raises(ConfigError, match="quick-large holds no runs"):
        compare.run(True, None, str(tmp_path), finished=True, dose="large")
    with pytest.raises(ConfigError, match="--dose large: of people that are made"):
        compare.run(True, None, str(tmp_path), feed=str(tmp_path), dose="large")
    assert not (tmp_path / "work").exists()


def test_another_budget_has_a_folder_of_its_own_below_the_same_people(tmp_path: Path, monkeypatch):
    made = []
    monkeypatch.setattr(compare, "make_people",
                        lambda cohort, people, workers: made.append(people) or "feed")
    monkeypatch.setattr(compare, "open_feed", lambda feed: None)
    monkeypatch.setattr(_compare_table, "ridges", lambda feed, runs: None)
    monkeypatch.setattr(_compare_table, "tables", lambda runs, folder: {"folder": folder})
    monkeypatch.setattr(compare, "Runner", Recorder)
    found = [compare.run(False, None, str(tmp_path), budget=budget)["folder"]
             for budget in (None, 120, 60, 360)]
    full = tmp_path / "full"
    assert made == [full] * 4
    assert found == [full / "runs", full / "runs", full / "budget-60/runs",
                     full / "budget-360/runs"]
    for budget, folder in zip((120, 60, 360), found[1:], strict=True):
        mine = [job for job in Recorder.jobs if job.folder.is_relative_to(folder)
                and job.folder.parent == folder]
        seconds = {job.folder.name: job.seconds for job in mine}
        assert seconds["mae-with-tissue-head-0"] == budget
        assert seconds["first-stage-0"] == budget - compare.CODE_SECONDS
    small = compare.run(False, None, str(tmp_path), size="small", budget=360)["folder"]
    assert small == full / "small/budget-360/runs"
    assert {job.folder.name[:-2] for job in Recorder.jobs if job.folder.parent == small} == {
        "random-init", "first-stage", "mae-with-tissue-head", "sparse-jepa", "session-code",
        "session-code,-wide-dense"}
    with pytest.raises(ConfigError, match="another plan"):
        compare.run(False, None, str(tmp_path), feed=str(tmp_path), budget=60)


def test_a_size_says_what_recipes_change(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(compare, "open_feed", lambda feed: SimpleNamespace(grid=GRID))
    written = {}
    for size in compare.SIZES:
        runner = compare.Runner("feed", tmp_path, size=size)
        runner._write(compare.Job(tmp_path, compare.ARMS["sparse JEPA"], 0, 1.0), 10, tmp_path)
        written[size] = load_config(tmp_path / "recipe.yaml")
    tiny, small = written.values()
    assert (tiny.model.size, small.model.size) == ("tiny", "small")
    assert tiny.model.patch_voxels == 2 * small.model.patch_voxels
    assert (tiny.train.dtype, small.train.dtype) == ("fp32", "bf16")


def test_a_cost_is_kept_where_a_lesser_budget_is_the_first(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(compare, "open_feed", lambda feed: SimpleNamespace(grid=GRID))
    monkeypatch.setattr(compare, "command", lambda log, *arguments: log.write_text("0.5\n"))
    job = compare.Job(tmp_path / "full/budget-60/runs/mae-0", compare.ARMS["MAE with tissue head"],
                      0, 60.0)
    job.folder.mkdir(parents=True)
    (job.folder / "run.json").write_text("{}")
    assert compare.Runner("feed", tmp_path / "full")._steps(job) == 120
    assert (tmp_path / "full/runs/mae.cost").read_text() == "0.5"


class Recorder:
    """Takes jobs in place of making them."""

    jobs: ClassVar[list[compare.Job]] = []

    def __init__(self, feed: str, work: Path, size: str = "tiny") -> None:
        pass

    def make(self, jobs: list[compare.Job]) -> None:
        self.jobs += jobs


def test_a_students_cost_holds_its_teachers(tmp_path: Path):
    for name, spent, teacher in (("teacher-0", 30.0, None), ("frozen-teacher-0", 90.0, "teacher-0"),
                                 ("mae-0", 120.0, None)):
        folder = tmp_path / name
        folder.mkdir()
        finish(folder, {"train_cpu_s": np.array(spent)})
        (folder / "run.json").write_text(json.dumps(
            {"teacher": f"elsewhere/{teacher}/weights"} if teacher else {}))
    assert [_compare_table.cpu_of(tmp_path / name) for name in ("frozen-teacher-0", "mae-0")] == [
        120.0, 120.0]


# ---- recipes on trial ----------------------------------------------------------------------------

def test_centred_targets_hold_nothing_of_the_place():
    config = make_config(None)
    views = make_views(make_batch(6), config, GRID, seed=0)
    place = torch.randn(640, 8, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)

    def targets(model: object, views: object) -> torch.Tensor:
        return 3 * place + torch.randn(6, 640, 8, generator=draw)

    of_place = _recipes.centred(targets, GRID, 3)
    for _ in range(60):
        found = of_place(None, views)
    assert found.mean(0).abs().mean() < 0.6 < 3 * place.abs().mean()
    assert found.std() == pytest.approx(1, abs=0.2)


def test_the_head_alone_gives_the_encoder_a_gradient_and_the_predictor_none():
    config = make_config(96)
    model = build_model(config, GRID)
    loss, parts = head_alone(model, make_views(make_batch(3), config, GRID, seed=0), 0.0)
    loss.backward()
    assert parts["tissue"] > 0 and "prediction" not in parts
    grads = {name: float(p.grad.abs().sum()) for name, p in model.named_parameters()
             if p.grad is not None}
    assert grads["encoder.patch.weight"] > 0 and grads["predictor.embed.weight"] == 0


# ---- people --------------------------------------------------------------------------------------

@pytest.mark.parametrize("fold", range(4))
def test_sources_are_split_before_anything_else(fold: int):
    parts = split_sources(None, fold)
    assert [len(parts[split]) for split in ("train", "val", "test")] == [10, 2, 4]
    assert len({name for names in parts.values() for name in names}) == 16


def test_every_source_is_tested_once_over_the_folds():
    tested = [name for fold in range(4) for name in split_sources(None, fold)["test"]]
    assert len(set(tested)) == len(tested) == 16


def ball(radius_mm: float, ventricle_mm: float) -> Anatomy:
    """A head of concentric balls: ventricles, white matter, cortex, fluid."""
    distance = np.sqrt(((np.indices((96, 96, 96)) - 48.0)**2).sum(0))
    labels = np.zeros((96, 96, 96), np.int16)
    for limit, code in ((radius_mm + 3, codes.FLUID), (radius_mm, 3), (radius_mm - 4, 2),
                        (ventricle_mm, 4)):
        labels[distance < limit] = code
    return Anatomy("ball", labels, Levels(csf=0.1, grey=0.5))


def test_a_registration_makes_one_head_look_like_the_other():
    small, large = ball(28, 8), ball(32, 13)
    velocity = registered(small, np.eye(4), large, np.eye(4))
    field = warp.flow(velocity / 2)  # its nodes are twice as far apart
    assert warp.jacobian(field).min() > 0
    across = warp.upsample(velocity, warp.coarse_shape(small.labels.shape), 0.5)
    moved = warp.warp_labels(small.labels, warp.flow(across))

    def overlap(labels: np.ndarray, code: int) -> float:
        ours, theirs = labels == code, large.labels == code
        return float(2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()))

    for code in (4, 3):  # the nodes are 6 mm apart, so walls come near each other, no more
        assert overlap(moved, code) > overlap(small.labels, code) + 0.15


def test_a_mask_of_the_brain_closes_its_sulci_and_holes():
    share = np.zeros((40, 40, 40), np.float32)
    share[8:32, 8:32, 8:32] = 1
    share[19:21, 8:32, 20:32] = 0  # a sulcus, two voxels wide
    share[14:18, 14:18, 14:18] = 0  # a ventricle
    mask = brain_of(share, 3.0)
    assert mask[20, 20, 26] and mask[16, 16, 16] and not mask[2].any()


@pytest.mark.slow(9)
def test_a_person_is_the_same_each_time_and_doses_change_the_scanner_alone():
    from data_prep.synth.anatomy import load_anatomy

    anatomy = load_anatomy("template-00", None)
    shape = tuple(-(-n // 2) for n in anatomy.shaper.full_shape)
    rng = np.random.default_rng(0)
    to_anatomy = np.eye(4)
    to_anatomy[:3, 3] = 92, 124, 108
    velocity = warp.random_velocity(rng, shape, rms_mm=3.0, smooth_mm=12.0)
    mixed = Mixer(anatomy, to_anatomy, [velocity])
    person = draw_person(14, 0)
    made = {dose: _people.make_person(mixed, person, _people.Cohort(dose=dose))
            for dose in ("small", "large")}
    again, _ = _people.make_person(mixed, person, _people.Cohort(dose="small"))
    assert [row for row, *_ in again] == [row for row, *_ in made["small"][0]]
    rescans, rescanned = _people.make_person(mixed, person, _people.Cohort(dose="small"),
                                             again=True)
    truths = {dose: truth for dose, (_, truth) in made.items()}
    assert {row["scan_id"] for row, *_ in rescans}.isdisjoint(
        row["scan_id"] for row, *_ in made["small"][0])
    assert rescanned["texture"] == truths["small"]["texture"]
    assert rescanned["ventricle_ml"] == pytest.approx(truths["small"]["ventricle_ml"], rel=0.03)
    assert truths["small"]["texture"] == truths["large"]["texture"]
    for name in ("brain_ml", "ventricle_ml"):
        assert truths["small"][name] == pytest.approx(truths["large"][name], rel=0.03)
    assert 500 < truths["small"]["brain_ml"] < 1900
    scans = made["small"][0]
    assert [row["modality"] for row, *_ in scans] == ["T1w", "T2w", "FLAIR"]
    assert [label is not None for *_, label in scans] == [True, False, False]
    assert {row["scan_id"] for row, *_ in scans}.isdisjoint(
        row["scan_id"] for row, *_ in made["large"][0])


def test_grids_have_tokens_of_18_mm():
    for name, grid in _people.GRIDS.items():
        patch = round(18 / grid.spacing_mm)
        assert patch * grid.spacing_mm == 18 and all(n % patch == 0 for n in grid.shape), name
        assert isinstance(grid, Grid)
