"""Completion from several sources: each visit is told from those that it has, and nothing stands in
for one that it lacks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from neurojepa.downstream import teacher as module
from neurojepa.downstream.__main__ import main as downstream
from neurojepa.downstream.completion import Completion, Volume, members, missing
from neurojepa.downstream.sources import Visits, groups_of, had, spoken, visits_of
from neurojepa.downstream.teacher import Teacher, _left_out
from neurojepa.errors import NeurojepaError
from neurojepa.feed.format import LABELS_SCHEMA, commit_feed, is_brain, open_feed
from neurojepa.weights import load
from tests.helpers.feeds import GRID, write_feed
from tests.helpers.tuning import write_weights

pytestmark = pytest.mark.usefixtures("few_draws")
PEOPLE, WITHOUT = 20, 4  # the first of them have no T2w, the next of them no T1w


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``feed`` of people whose FLAIR is a sum of T1w and T2w, and ``weights``."""
    folder, last = tmp_path_factory.mktemp("sources"), []

    def alter(number: int, codes: np.ndarray) -> np.ndarray:
        last.append(codes)
        if number % 3 < 2:
            return codes
        one, other = ((each.astype(float) - 1) / 253 for each in last[-3:-1])
        brain = is_brain(last[-3]) & is_brain(last[-2])
        return np.where(brain, np.clip((0.1 + 0.4 * one + 0.4 * other) * 253 + 1, 1, 254),
                        0).astype(np.uint8)

    write_feed(str(folder / "feed"), 3 * PEOPLE, per_session=3, alter=alter,
               modalities=("T1w", "T2w", "FLAIR"))
    write_weights(folder / "weights", str(folder / "feed"))
    gone = {3 * n + 1 for n in range(WITHOUT)} | {3 * n for n in range(WITHOUT, 2 * WITHOUT)}
    index = open_feed(str(folder / "feed")).index
    commit_feed(str(folder / "feed"), GRID, labels=LABELS_SCHEMA.empty_table(),
                rows=index.take(pa.array([n for n in range(3 * PEOPLE) if n not in gone])))
    return folder


def drawn_visits(folder: Path, *sources: str, rows: slice = slice(None)) -> Visits:
    feed = open_feed(str(folder / "feed"))
    chosen = np.arange(feed.index.num_rows)[rows]
    return visits_of(feed, chosen, sources, "FLAIR", np.zeros(len(chosen), bool))


def test_a_visit_with_any_source_counts(folder: Path) -> None:
    found = drawn_visits(folder, "T1w", "T2w")
    modality = np.array(open_feed(str(folder / "feed")).index["modality"].to_pylist())
    assert had(found.names, found.sources) == {"T1w and T2w": 12, "T1w": 4, "T2w": 4}
    assert len(found.target) == PEOPLE and set(modality[found.target]) == {"FLAIR"}
    for k, name in enumerate(found.names):
        assert set(modality[found.sources[found.sources[:, k] >= 0, k]]) == {name}
    assert sum(len(found.whole(part)) for part in ("train", "val", "test")) == 12
    assert len(drawn_visits(folder, "T1w").target) == 16
    assert spoken(["T1w"]) == "T1w" and spoken(["T1w", "T2w", "PET"]) == "T1w, T2w and PET"


def test_too_few_visits_with_all_sources_are_told(folder: Path) -> None:
    with pytest.raises(NeurojepaError, match="no visit has both PET and FLAIR; it has FLAIR, T1w"):
        drawn_visits(folder, "T1w", "PET")
    with pytest.raises(NeurojepaError, match=r"visits that teach have all of T1w and T2w, .* name "
                                             "fewer modalities"):
        drawn_visits(folder, "T1w", "T2w", rows=slice(16 + 6))  # 2 people have both


def test_images_are_made_of_visits_or_of_each_scan_of_a_single_source(folder: Path) -> None:
    feed = open_feed(str(folder / "feed"))
    rows = np.arange(feed.index.num_rows)
    both = groups_of(feed, np.concatenate([rows, rows]), ["T2w", "T1w"])  # every scan twice
    assert both.shape == (PEOPLE, 2)
    assert (both < 0).sum(0).tolist() == [WITHOUT, WITHOUT]
    assert groups_of(feed, np.concatenate([rows, rows]), ["T1w"]).shape == (2 * (PEOPLE - 4), 1)


def test_what_is_put_together_is_of_one_person(folder: Path) -> None:
    feed, names = open_feed(str(folder / "feed")), ["T2w", "T1w"]
    found = drawn_visits(folder, *names, rows=slice(6, None))  # not all rows of the feed
    groups = groups_of(feed, np.arange(6, feed.index.num_rows), names)
    assert len(found.target) == len(groups) == PEOPLE - 3
    person, modality = (np.array(feed.index[name].to_pylist())
                        for name in ("participant", "modality"))
    assert person[found.target].tolist() == found.participant.tolist()
    for of_visits, people in ((found.sources, found.participant), (groups, None)):
        for k, rows in enumerate(of_visits):
            there = rows >= 0
            assert set(person[rows[there]]) == {person[rows[there][0]] if people is None
                                                else people[k]}
            assert modality[rows[there]].tolist() == np.array(names)[there].tolist()


def test_latents_of_each_set_of_sources_are_told(folder: Path, tmp_path: Path) -> None:
    weights, feed = load(str(folder / "weights")), open_feed(str(folder / "feed"))
    drawn, rng = drawn_visits(folder, "T1w", "T2w"), np.random.default_rng(0)
    planted = [torch.from_numpy(rng.normal(size=(96, 96)) / 10).float() for _ in range(2)]
    token = {int(row): torch.from_numpy(rng.normal(size=(99, 96))).float()
             for row in drawn.sources.flat if row >= 0}
    token |= {int(target): sum(token[int(row)] @ planted[k] for k, row in enumerate(rows)
                               if row >= 0)
              for rows, target in zip(drawn.sources, drawn.target, strict=True)}
    teacher = Teacher(weights, weights.places, feed, drawn, str(tmp_path), {})
    teacher.tokens = lambda rows: ((torch.arange(99), token[int(row)]) for row in rows)
    teacher.fit_latents()
    line = teacher.completion.line
    assert torch.allclose(line[2], torch.cat(planted), atol=0.01)
    for pattern, own in enumerate(planted):
        alone = line[pattern].reshape(2, 96, 96)
        assert not alone[1 - pattern].any()  # nothing is told by what is not there
        assert np.corrcoef(alone[pattern].flatten(), own.flatten())[0, 1] > 0.8
    assert teacher.latent_scores()["tokens"].value > 0.8


def volumes(seed: int = 0) -> list[Volume]:
    """Two of [6, 6, 6]: the first ends at x 3, the second begins at x 2."""
    rng, found = np.random.default_rng(seed), []
    for inside in (slice(0, 4), slice(2, 6)):
        brain = np.zeros((6, 6, 6), bool)
        brain[inside] = True
        found.append(Volume(np.where(brain, rng.uniform(0.2, 0.8, brain.shape), 0).astype(
            np.float32), brain))
    return found


def test_each_voxel_is_told_by_the_polynomial_of_the_sources_that_show_it() -> None:
    net, (one, other) = Completion((6, 6, 6), 3, 6, 2), volumes()
    net.cubic[0, 1], net.cubic[1, 4], net.cubic[2, 0] = 1.0, 0.5, 0.25
    made = net.guess([one, other], "cubic")
    assert np.allclose(made[:2], one.value_XYZ[:2]) and np.allclose(made[2:4], 0.25)
    assert np.allclose(made[4:], 0.5 * other.value_XYZ[4:])
    alone = net.guess([one, missing((6, 6, 6))], "cubic")
    assert np.allclose(alone, one.value_XYZ)  # no trace of a second source
    assert members(1) == [0] and members(2) == [1] and members(5) == [0, 2]
    planes = net.planes([one, missing((6, 6, 6))])[0].numpy()
    assert planes.shape == (6, 6, 6, 6) and np.array_equal(planes[2], one.brain_XYZ)
    assert not planes[3].any() and np.allclose(planes[-1], net.guess([one, missing(
        (6, 6, 6))], "first guess"))


def test_each_token_is_told_by_the_map_of_the_sources_that_have_its_patch() -> None:
    net = Completion((12, 12, 12), 2, 6, 2)
    net.line[0, :2], net.line[1, 2:] = torch.eye(2), 3 * torch.eye(2)
    net.line[2] = torch.cat([torch.eye(2), 10 * torch.eye(2)])
    one = torch.tensor([0, 3]), torch.tensor([[1.0, 0], [0, 1]])
    other = torch.tensor([3, 5]), torch.tensor([[1.0, 1], [2, 2]])
    patch, told = net.told([one, other])
    assert patch.tolist() == [0, 3, 5]
    assert told.tolist() == [[1, 0], [10, 11], [6, 6]]
    patch, told = net.told([None, other])
    assert patch.tolist() == [3, 5] and told.tolist() == [[3, 3], [6, 6]]


def test_sources_are_left_out_of_some_visits_and_never_all() -> None:
    rows = np.array([[1, 2, 3], [4, -1, 6], [-1, 8, -1]] * 100)
    found = _left_out(rows, np.random.default_rng(0))
    assert (found >= 0).any(1).all() and ((found == rows) | (found == -1)).all()
    fewer = (found != rows).any(1).reshape(-1, 3).mean(0)
    assert 0.4 < fewer[0] < 0.6 and 0.4 < fewer[1] < 0.6 and fewer[2] == 0
    rng = np.random.default_rng(0)
    assert np.array_equal(_left_out(rows[:, :1], rng), rows[:, :1])
    assert rng.random() == np.random.default_rng(0).random()  # a single one costs no draw


def test_polynomials_of_both_find_what_was_planted(folder: Path, tmp_path: Path) -> None:
    weights, feed = load(str(folder / "weights")), open_feed(str(folder / "feed"))
    drawn = drawn_visits(folder, "T1w", "T2w")
    teacher = Teacher(weights, weights.places, feed, drawn, str(tmp_path), {})
    teacher.fit_intensities()
    planted = np.array([0.1, 0.4, 0, 0, 0.4, 0, 0])
    assert np.allclose(teacher.completion.cubic[2], planted, atol=0.02)
    for pattern, absent in ((1, slice(4, 7)), (2, slice(1, 4))):
        assert not teacher.completion.cubic[pattern - 1, absent].any()
    errors = []
    for k in drawn.whole("test"):
        (one, other), target = teacher.volumes(k)
        where = one.brain_XYZ & other.brain_XYZ & target.brain_XYZ
        for sources in ((one, other), (one, missing(GRID.shape))):
            errors.append(np.abs(teacher.completion.guess(sources, "cubic")
                                 - target.value_XYZ)[where].mean())
    both, alone = np.reshape(errors, (-1, 2)).T
    assert (both < 0.01).all() and (alone > 3 * both).all()


@pytest.mark.slow(8)
def test_the_command_says_of_each_image_what_it_was_made_from(
        folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "CROPS", 1)
    model, made = tmp_path / "c", tmp_path / "o"
    line = ["complete", "fit", str(folder / "feed"), "--weights", str(folder / "weights"),
            "--out", str(model), "--epochs", "1", "--to", "FLAIR", "--from", "T1w"]
    with pytest.raises(NeurojepaError, match="name each modality once"):
        downstream([*line, "T1w"])
    assert downstream([*line, "T2w"]) == 0
    with pytest.raises(NeurojepaError, match="a completion with from T1w T2w, now it is T1w"):
        downstream(line)
    record = json.loads((model / "evaluation/results.json").read_text())
    assert record["from"] == "T1w and T2w" and record["sources"] == ["T1w", "T2w"]
    assert record["visits_with"] == {"T1w and T2w": 12, "T1w": 4, "T2w": 4}
    told = {name: each["psnr"]["value"] for name, each in record["scores"].items()}
    assert told["polynomial"] > told["mean map"]
    assert {name.rpartition(", ")[2] for name in told if name.endswith("alone")} == {
        "T1w alone", "T2w alone"}
    assert "The rows of one source alone" in (model / "evaluation/report.html").read_text()
    assert downstream(["complete", "apply", str(model), str(folder / "feed"), "--out",
                       str(made)]) == 0
    assert "4 of 20 images were made without T2w, which the visit lacks" in capsys.readouterr().out
    record = json.loads((made / "results.json").read_text())
    assert record["images_with"] == {"T1w and T2w": 12, "T1w": 4, "T2w": 4}
    assert [each["from"] for each in record["made"]].count(["T2w"]) == 4
    assert all(len(each["from"]) == len(each["scan_ids"]) for each in record["made"])
    assert "made from" in (made / "report.html").read_text()
    lines = (made / "predictions.csv").read_text().splitlines()
    assert lines[0].endswith(",from") and sum(each.endswith(",T1w T2w") for each in lines) == 12
    sidecars = [json.loads(path.read_text()) for path in made.rglob("*_FLAIR.json")]
    assert sorted(len(each["Sources"]) for each in sidecars) == [1] * 8 + [2] * 12
    assert sum("from the T1w and T2w of" in each["Description"] for each in sidecars) == 12
    latents = pq.read_table(made / "latents.parquet")
    assert latents["from"].to_pylist().count("T1w") == 4
    assert np.isfinite(np.stack(latents["embedding"].to_pylist())).all()
