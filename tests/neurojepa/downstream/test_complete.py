"""Completion: what is planted is found, people tested taught nothing, and what is made says that it
is synthetic."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from neurojepa.downstream import teacher as module
from neurojepa.downstream.__main__ import main as downstream
from neurojepa.downstream.completion import Completion, Volume, psnr, ssim, volume_of
from neurojepa.downstream.sources import Visits, visits_of
from neurojepa.downstream.teacher import Teacher
from neurojepa.errors import NeurojepaError
from neurojepa.feed.format import is_brain, open_feed
from neurojepa.storage import sha256
from neurojepa.weights import hashed, load
from tests.helpers.feeds import write_feed
from tests.helpers.tuning import write_weights

pytestmark = pytest.mark.usefixtures("few_draws")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``feed`` of 16 people whose T2w is a quadratic of their T1w, darker on the left, and
    ``weights``."""
    folder, last = tmp_path_factory.mktemp("complete"), [np.zeros(0, np.uint8)]

    def alter(number: int, codes: np.ndarray) -> np.ndarray:
        if number % 2 == 0:
            last[0] = codes
            return codes
        brain = is_brain(last[0])
        value = (last[0].astype(float) - 1) / 253
        made = 0.9 - 0.5 * value - 0.2 * value**2
        made[:12] -= 0.1
        return np.where(brain, np.clip(made * 253 + 1, 1, 254), last[0]).astype(np.uint8)

    write_feed(str(folder / "feed"), 32, per_session=2, alter=alter)
    write_weights(folder / "weights", str(folder / "feed"))
    return folder


def drawn_pairs(folder: Path, seen: tuple[str, ...] = ()) -> Visits:
    feed = open_feed(str(folder / "feed"))
    names = feed.index["participant"].to_pylist()
    return visits_of(feed, np.arange(32), ["T1w"], "T2w",
                     np.array([name in seen for name in names]))


def test_visits_with_both_make_pairs_and_who_was_seen_is_not_tested(pairs: Path) -> None:
    found = drawn_pairs(pairs)
    assert {part: len(found.of(part)) for part in ("train", "val", "test")} == {
        "train": 9, "val": 3, "test": 4}
    columns = open_feed(str(pairs / "feed")).index
    assert [columns["modality"][int(row)].as_py() for row in found.target] == ["T2w"] * 16
    assert all(columns["participant"][int(one)] == columns["participant"][int(other)]
               for one, other in zip(found.sources[:, 0], found.target, strict=True))
    tested = tuple(found.participant[found.of("test")].tolist())
    again = drawn_pairs(pairs, tested)
    assert not set(again.participant[again.of("test")]) & set(tested)
    with pytest.raises(NeurojepaError, match="no visit has both T1w and PET; it has T1w, T2w"):
        visits_of(open_feed(str(pairs / "feed")), np.arange(32), ["T1w"], "PET", np.zeros(32, bool))


def test_the_polynomial_is_found_and_the_mean_map_is_of_who_teaches(pairs: Path,
                                                                    tmp_path: Path) -> None:
    weights, feed = load(str(pairs / "weights")), open_feed(str(pairs / "feed"))
    drawn = drawn_pairs(pairs)
    teacher = Teacher(weights, weights.places, feed, drawn, str(tmp_path), {})
    teacher.fit_intensities()
    images = [teacher.volumes(k)[1] for k in drawn.of("train")]
    there = np.sum([each.brain_XYZ for each in images], 0)
    mean = np.sum([each.value_XYZ for each in images], 0) / np.maximum(there, 1)
    assert np.allclose(teacher.completion.mean_map.numpy()[there > 0], mean[there > 0], atol=1e-6)
    assert np.allclose(teacher.completion.cubic, [0.85, -0.5, -0.2, 0], atol=0.05)  # half is darker
    teacher.fit_latents()
    told = {name: score.value for name, score in teacher.latent_scores().items()}
    assert told["tokens"] > 0.3  # a linear map of tokens tells much of a quadratic


def test_latents_of_a_linear_map_are_told_and_of_chance_are_not(pairs: Path,
                                                                tmp_path: Path) -> None:
    weights, feed = load(str(pairs / "weights")), open_feed(str(pairs / "feed"))
    drawn, rng = drawn_pairs(pairs), np.random.default_rng(0)
    planted = torch.from_numpy(rng.normal(size=(96, 96)) / 10).float()
    values = {int(row): torch.from_numpy(rng.normal(size=(40, 96))).float()
              for row in drawn.sources[:, 0]}
    target = {int(other): values[int(one)] @ planted
              for one, other in zip(drawn.sources[:, 0], drawn.target, strict=True)}
    chance = {row: torch.from_numpy(rng.normal(size=(40, 96))).float() for row in target}
    for made, low, high in ((target, 0.95, 1.0), (chance, -0.3, 0.05)):
        teacher = Teacher(weights, weights.places, feed, drawn, str(tmp_path), {})
        known = values | made
        teacher.tokens = lambda rows, known=known: ((torch.arange(40), known[int(row)])
                                                    for row in rows)
        teacher.fit_latents()
        assert low < teacher.latent_scores()["tokens"].value <= high


@pytest.mark.slow(5)
def test_a_fit_that_was_stopped_goes_on_to_the_same_bits(
        pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything was kept, before the first epoch was, and before the second."""
    monkeypatch.setattr(module, "CROPS", 1)
    monkeypatch.setattr(module, "CROP", 12)
    weights, feed = load(str(pairs / "weights")), open_feed(str(pairs / "feed"))
    drawn, rng = drawn_pairs(pairs), np.random.default_rng(0)
    token = {row: torch.from_numpy(rng.normal(size=(40, 96))).float() for row in range(32)}
    write, read = module.write_bytes, []

    def fitted(keep: str, stop: int | None) -> dict[str, torch.Tensor]:
        teacher = Teacher(weights, weights.places, feed, drawn, str(tmp_path / keep), {"from": "x"})
        teacher.tokens = lambda rows: (read.append(1) or (torch.arange(40), token[int(row)])
                                       for row in rows)
        kept = []

        def keeping(uri: str, data: bytes) -> None:
            if len(kept) == stop:
                raise KeyboardInterrupt
            kept.append(uri)
            write(uri, data)

        monkeypatch.setattr(module, "write_bytes", keeping)
        teacher.begin()
        net, losses = teacher.fit_network(True, 2)
        assert len(losses) == 3
        return {**net.state_dict(), "losses": torch.tensor(losses)}

    whole = fitted("whole", None)
    for writes in (0, 1, 1):
        with pytest.raises(KeyboardInterrupt):
            fitted("stopped", writes)
    assert len(list((tmp_path / "stopped").iterdir())) == 2
    again = fitted("stopped", None)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    read.clear()
    assert all(torch.equal(whole[name], each) for name, each in fitted("stopped", 0).items())
    assert not read  # all is there: nothing is read anew


def test_scores_by_hand() -> None:
    truth, where = np.random.default_rng(0).uniform(size=(9, 9, 9)), np.zeros((9, 9, 9), bool)
    where[2:7, 2:7, 2:7] = True
    assert psnr(truth, truth + 0.1 * where, where) == pytest.approx(20)
    assert ssim(truth, truth, where) == pytest.approx(1)
    assert ssim(truth, 1 - truth, where) < 0


def test_a_network_begins_at_the_first_guess_and_latents_reach_their_place() -> None:
    torch.manual_seed(0)
    net = Completion((12, 12, 12), 5, 6)
    codes = np.random.default_rng(0).integers(1, 255, (12, 12, 12)).astype(np.uint8)
    codes[:, :, :2] = 0
    source = volume_of(codes)
    net.first[1] = 0.7
    made = net.complete([source], torch.arange(1), torch.ones(1, 5))
    assert np.allclose(made, 0.7 * source.value_XYZ, atol=1e-6)
    assert not made[:, :, :2].any()  # nothing outside the brain
    laid = net.laid((12, 12, 12), torch.tensor([7]), torch.ones(1, 5))[0, 0].detach()
    assert laid[-1, -1, -1].abs() > 1e-3 and laid[0, 0, 0] == 0
    assert not net.laid((12, 12, 12), torch.tensor([7]), None).any()
    assert isinstance(source, Volume) and source.value_XYZ.max() <= 1


@pytest.mark.slow(8)
def test_the_command_tests_it_and_marks_what_it_makes(pairs: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CROPS", 1)
    line = ["complete", "fit", str(pairs / "feed"), "--weights", str(pairs / "weights"), "--from",
            "T1w", "--out", str(pairs / "c"), "--epochs", "1", "--to"]
    with pytest.raises(NeurojepaError, match="name each modality once"):
        downstream([*line, "T1w"])
    with pytest.raises(NeurojepaError, match="these weights complete no modality"):
        downstream(["complete", "apply", str(pairs / "weights"), str(pairs / "feed"), "--out",
                    str(pairs / "o")])
    assert downstream([*line, "T2w"]) == 0
    with pytest.raises(NeurojepaError, match="state of a completion with epochs 1, now it is 3"):
        downstream([*line, "T2w", "--epochs", "3"])
    other = shutil.copytree(pairs / "weights", pairs / "other")  # the same network
    save_file(load_file(other / "pooling.safetensors"), other / "pooling.safetensors",
              {"by": "another feed"})
    about = json.loads((other / "config.json").read_text())
    about["pooling"]["sha256"] = sha256((other / "pooling.safetensors").read_bytes())
    (other / "config.json").write_text(json.dumps(about))
    with pytest.raises(NeurojepaError, match="state of a completion with pooling "):
        downstream([*line, "T2w", "--weights", str(other)])
    record = json.loads((pairs / "c/evaluation/results.json").read_text())
    assert record["schema"] == "neurojepa/complete/1"
    found = {name: each["psnr"]["value"] for name, each in record["scores"].items()}
    assert found["mean map"] < found["polynomial"] < found["polynomial and mean map"]
    assert found[record["kept"]] > found["polynomial and mean map"] - 0.3
    assert [gain["over"] for gain in record["gains"]] == ["polynomial and mean map", "network",
                                                          "polynomial"]
    page = (pairs / "c/evaluation/report.html").read_text()
    assert page.count("<figure>") == 2 and "synthetic" in page
    seen = load(str(pairs / "c")).seen
    assert seen is not None and hashed(drawn_pairs(pairs).participant[
        drawn_pairs(pairs).of("train")[0]]) in seen
    about = json.loads((pairs / "c/config.json").read_text())
    assert about["completes"].pop("sources") == ["T1w"]  # as versions with one source wrote it
    (pairs / "c/config.json").write_text(json.dumps(about))
    assert downstream(["complete", "apply", str(pairs / "c"), str(pairs / "feed"), "--out",
                       str(pairs / "o")]) == 0
    images = sorted((pairs / "o").rglob("*.nii.gz"))
    assert len(images) == 16 and all("_desc-synthetic_T2w" in path.name for path in images)
    image = nib.load(images[0])
    assert bytes(image.header["descrip"]).startswith(b"SYNTHETIC, not acquired")
    assert json.loads(images[0].with_name(images[0].name.replace(".nii.gz", ".json")).read_text())[
        "Synthetic"] is True
    assert "not acquired" in (pairs / "o/report.html").read_text()
    assert "sub-p" not in (pairs / "o/report.html").read_text()  # whom files show, they say alone
    latents = pq.read_table(pairs / "o/latents.parquet")
    assert latents.num_rows == 16 and set(latents["synthetic"].to_pylist()) == {True}
