"""Segmentation: scores by hand, maps in the scan's grid, a fit that goes on, both commands."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import neurojepa
from neurojepa.downstream import segment_fit as fitting
from neurojepa.downstream import segment_task as task
from neurojepa.downstream.__main__ import main
from neurojepa.downstream.images import Image, read_image, stored
from neurojepa.downstream.segment import (
    Recipe,
    Segmenter,
    Working,
    build,
    highest,
    load_segmenter,
    predict,
    prepare,
    save_model,
)
from neurojepa.downstream.segment_score import score
from neurojepa.downstream.segmenter import Segmentation
from neurojepa.errors import ConfigError, DataError, NeurojepaError
from tests.helpers.blobs import blob, save

RECIPE = Recipe(mm=8.0, window=24, filters=8, steps=6)
CPU = torch.device("cpu")


def labels_of(image: Image) -> Image:
    """Left and right of the middle, and a ball inside: codes 3, 41 and 7."""
    points = np.indices(image.data.shape) - np.array(image.data.shape).reshape(3, 1, 1, 1) / 2
    ball = (points**2).sum(0) < 7**2
    codes = np.where(ball, 7, np.where(points[0] < 0, 3, 41)) * image.brain
    return replace(image, data=codes.astype(np.int32), name=f"labels of {image.name}")


# ---- scores --------------------------------------------------------------------------------------

def box(low: int, high: int) -> np.ndarray:
    data = np.zeros((20, 20, 20), int)
    data[low:high, 4:14, 4:14] = 5
    return data


@pytest.mark.parametrize(("shift", "spacing"), [(1, 1.0), (2, 1.5), (3, 2.0)])
def test_scores_of_a_shifted_box_by_hand(shift: int, spacing: float) -> None:
    found = score(box(4 + shift, 14 + shift), box(4, 14), [5, 6], np.full(3, spacing))[5]
    assert found["dice"] == pytest.approx(2 * (10 - shift) / 20)
    assert found["volume_bias_percent"] == 0
    assert found["hd95_mm"] == pytest.approx(shift * spacing)
    assert (found["surface_dice"] == 1) == (shift * spacing <= 2)


def test_a_region_that_is_larger_or_not_found() -> None:
    larger = score(box(4, 16), box(4, 14), [5], np.ones(3))[5]
    assert larger["volume_bias_percent"] == pytest.approx(20)
    missing = score(box(4, 4), box(4, 14), [5], np.ones(3))[5]
    assert (missing["dice"], missing["surface_dice"]) == (0, 0)
    assert np.isnan(missing["hd95_mm"]) and missing["volume_bias_percent"] == -100
    assert score(box(4, 14), box(4, 4), [5], np.ones(3)) == {}  # not in the truth


# ---- grids ---------------------------------------------------------------------------------------

def test_maps_are_interpolated_into_the_scans_grid_not_labels() -> None:
    scan = blob(0)
    grid = scan.affine @ np.diag([2.0, 2, 2, 1])  # half the resolution
    x = np.arange(22, dtype=np.float32)[:, None, None] * np.ones((22, 24, 21), np.float32)
    maps = np.stack([0 * x, x - 10.3])  # the border lies at voxel 20.6 of the scan
    found = highest(maps, grid, scan)
    assert not found[:21].any() and found[21:40, :40, :40].all()


def test_windows_that_overlap_add_up_to_the_whole() -> None:
    scan = Working(np.random.default_rng(0).random((4, 30, 20, 41)).astype(np.float32), np.eye(4),
                   np.ones((30, 20, 41), bool))

    class Same(torch.nn.Conv3d):  # a network that returns its first two channels
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :2]

    found = predict(Same(1, 1, 1), scan, RECIPE)
    assert np.allclose(found, scan.channels[:2], atol=1e-5)


@pytest.mark.parametrize("prior", [True, False])
def test_coordinates_tell_left_from_right_however_a_scan_is_stored(tmp_path: Path,
                                                                   prior: bool) -> None:
    scan = blob(0)
    file = nib.load(save(tmp_path / "RAS.nii.gz", scan.data, scan.affine))
    turn = nib.orientations.axcodes2ornt(("P", "S", "L"))
    nib.save(file.as_reoriented(turn), tmp_path / "PSL.nii.gz")
    work, turned = (prepare(read_image(str(tmp_path / f"{name}.nii.gz")), 8.0, prior)
                    for name in ("RAS", "PSL"))
    assert np.array_equal(turned.channels, work.channels)
    assert np.allclose(turned.affine, work.affine)
    points = work.affine[0, 0] * np.arange(work.brain.shape[0])
    unit = 2.5 * points[np.nonzero(work.brain)[0]].std() if prior else 100  # mm
    assert np.allclose(np.diff(work.channels[1, :, 5, 5]), np.diff(points) / unit, atol=1e-4)
    assert abs(work.channels[1:, work.brain].mean()) < 1e-3
    assert work.channels[0][work.brain].std() == pytest.approx(1, abs=0.01)


def test_a_single_slice_has_coordinates() -> None:
    scan = blob(0)
    assert scan.brain is not None
    scan.brain[..., :20] = scan.brain[..., 21:] = False
    work = prepare(scan, 4.0)
    assert np.ptp(np.nonzero(work.brain)[2]) == 0
    assert np.isfinite(work.channels).all() and abs(work.channels[3]).max() < 2


# ---- fit -----------------------------------------------------------------------------------------

@pytest.mark.slow(3)
def test_a_network_starts_from_where_labels_lie_on_average() -> None:
    people = [fitting.taught(blob(seed), labels_of(blob(seed)), np.array([3, 7, 41]), 6.0)
              for seed in range(2)]
    network = fitting.started(people, replace(RECIPE, mm=6.0), 3)
    other = prepare(blob(2, size=0.85), 6.0)  # smaller: coordinates follow the brain's size
    found = predict(network, other, RECIPE).argmax(0)
    truth = fitting.taught(blob(2, size=0.85), labels_of(blob(2, size=0.85)),
                           np.array([3, 7, 41]), 6.0).target
    for rank in (1, 2, 3):
        both = (found == rank) & (truth == rank)
        assert 2 * both.sum() / ((found == rank).sum() + (truth == rank).sum()) > 0.6
    assert not found[0, 0, 0]
    with torch.no_grad():
        far = torch.full((1, 4, 24, 24, 24), 0.99)  # a corner where nobody has a label
        assert (network(far).argmax(1) == 0).all()


@pytest.mark.parametrize(("balanced", "low", "high"), [(0.0, 0, 0.1), (1.0, 0.4, 0.6)])
def test_small_labels_come_up_as_often_as_large_ones(balanced: float, low: float,
                                                     high: float) -> None:
    target = np.ones((40, 40, 40), np.int64)
    target[:4, :4, :4] = 2
    scan = Working(np.zeros((4, 40, 40, 40), np.float32), np.eye(4), np.ones((40, 40, 40), bool))
    recipe, rng = replace(RECIPE, balanced=balanced), np.random.default_rng(0)
    drawn = [target[tuple(fitting._middle(fitting.Taught(scan, target), recipe, rng))]
             for _ in range(200)]
    assert low <= np.mean(np.array(drawn) == 2) <= high


def test_networks_of_before_priors_still_give_what_they_gave(tmp_path: Path) -> None:
    old = replace(RECIPE, prior=False)
    network = build(old, 1)
    save_model(str(tmp_path), Segmenter(network, old, [3], ["left"]), {})
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("prior", "balanced"):  # as the first ones were written
        del config["recipe"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_segmenter(str(tmp_path))
    assert not loaded.recipe.prior
    for one, other in zip(network.parameters(), loaded.network.parameters(), strict=True):
        assert torch.equal(one, other)
    found, _ = loaded.maps(blob(0))
    assert np.array_equal(found, predict(network.eval(), prepare(blob(0), old.mm, False), old))
    assert not np.allclose(found, predict(network, prepare(blob(0), old.mm), old), atol=1e-3)


@pytest.mark.slow(3)
def test_a_fit_that_was_stopped_goes_on_to_the_same_weights(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "SAVE_EVERY", 2)
    codes = np.array([3, 7, 41])
    people = [fitting.taught(blob(0), labels_of(blob(0)), codes, RECIPE.mm)]

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return build(RECIPE, 3)

    whole, stopped = network(), network()
    fitting.fit(whole, people, RECIPE, str(tmp_path / "whole"))

    def stop(step: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitting.fit(stopped, people, RECIPE, str(tmp_path / "stopped"), progress=stop)
    done: list[int] = []
    again = network()
    fitting.fit(again, people, RECIPE, str(tmp_path / "stopped"),
                progress=lambda step, loss: done.append(step))
    assert done == [5, 6]
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow(8)
def test_both_commands_and_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "Recipe", lambda **said: Recipe(filters=8, lr=5e-3, **said))
    for seed in range(3):
        image = blob(seed, size=1 - 0.05 * seed)
        save(tmp_path / f"sub-{seed}_T1w.nii.gz", image.data, image.affine)
        save(tmp_path / f"sub-{seed}_dseg.nii.gz", labels_of(image).data, image.affine)
    (tmp_path / "sub-0_dseg.tsv").write_text("index\tname\n3\tleft\n41\tright\n7\tball\n")
    turn = nib.orientations.axcodes2ornt(("P", "S", "R"))
    for name in ("T1w", "dseg"):
        nib.save(nib.load(tmp_path / f"sub-2_{name}.nii.gz").as_reoriented(turn),
                 tmp_path / f"sub-2_{name}.nii.gz")
    scans, truths = ([str(tmp_path / f"sub-{seed}_{name}.nii.gz") for seed in range(3)]
                     for name in ("T1w", "dseg"))
    model, out = str(tmp_path / "model"), tmp_path / "out"
    assert main(["segment", "fit", *scans[:2], "--labels", *truths[:2], "--out", model,
                 "--method", "network", "--steps", "40", "--mm", "8"]) == 0
    assert not (tmp_path / "model/state.safetensors").exists()
    assert main(["segment", "apply", model, scans[2], "--truth", truths[2], "--out", str(out)]) == 0
    file = nib.load(out / "sub-2/anat/sub-2_T1w_dseg.nii.gz")
    stored_scan = nib.load(scans[2])
    assert file.shape == stored_scan.shape and np.allclose(file.affine, stored_scan.affine)
    record = json.loads((out / "results.json").read_text())
    assert record["schema"] == "neurojepa/segment/1" and record["people"] == 2
    assert record["scores"]["all"]["dice"] > 0.5  # of three regions
    assert list(record["scores"]["regions"]) == ["left", "ball", "right"]
    rows = list(csv.DictReader((out / "volumes.csv").open()))
    found = neurojepa.load_segmenter(model).segment(scans[2])
    found.to_nifti(str(tmp_path / "seg.nii.gz"))
    assert np.array_equal(np.asarray(nib.load(tmp_path / "seg.nii.gz").dataobj),
                          np.asarray(file.dataobj))
    assert float(rows[0]["left ml"]) == pytest.approx(found.volumes["left"], abs=1e-3)
    assert (out / "dseg.tsv").read_text().splitlines()[1] == "3\tleft"
    assert (out / "report.html").read_text().count("<img") == 1
    assert json.loads((out / "dataset_description.json").read_text())["DatasetType"] == "derivative"
    with pytest.raises(ConfigError, match="a model lies there already"):
        main(["segment", "fit", *scans[:2], "--labels", *truths[:2], "--out", model])
    learnt = json.loads((tmp_path / "model/config.json").read_text())["learnt_from"]
    assert [each["name"] for each in learnt] == ["sub-0_T1w.nii.gz", "sub-1_T1w.nii.gz"]
    _a_scan_that_fails_stops_no_other(model, scans, out, truths[2])


def _a_scan_that_fails_stops_no_other(model: str, scans: list[str], out: Path, truth: str) -> None:
    gone = str(out / "gone_T1w.nii")
    assert main(["segment", "apply", model, gone, scans[2], "--out", str(out)]) == 0
    record = json.loads((out / "results.json").read_text())
    assert record["scans"] == scans[2:] and record["files"] == ["sub-2/anat/sub-2_T1w_dseg.nii.gz"]
    assert [note for note in record["notes"] if note.startswith(f"left out: {gone}: ")]
    assert len(list(csv.DictReader((out / "volumes.csv").open()))) == 1
    with pytest.raises(DataError, match="gone_T1w"):
        main(["segment", "apply", model, gone, "--out", str(out / "none")])
    other = nib.load(truth)
    nib.save(nib.Nifti1Image(np.asarray(other.dataobj) * 0 + 9, other.affine), truth)
    assert main(["segment", "apply", model, scans[2], "--truth", truth, "--out",
                 str(out / "none")]) == 0
    record = json.loads((out / "none/results.json").read_text())
    assert record["scores"] is None and (out / "none" / record["files"][0]).exists()
    assert any("not compared: --truth" in note and "holds no region that the model knows" in note
               for note in record["notes"])


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    image = blob(0)
    scan = str(save(tmp_path / "a.nii.gz", image.data, image.affine))
    labels = str(save(tmp_path / "b.nii.gz", labels_of(image).data, image.affine))
    out = str(tmp_path / "model")
    cases: list[tuple[list[str], str]] = [
        (["fit", scan, scan, "--labels", labels, "--out", out], "2 scans and --labels of 1 files"),
        (["fit", scan, "--labels", labels, "--out", out, "--method", "network", "--steps",
          "0"], "--steps 0"),
        (["fit", scan, "--labels", scan, "--out", out], "a label map holds whole numbers"),
        (["apply", out, scan, "--out", out], "no segmentation model here"),
        (["apply", out, scan, str(tmp_path / "x" / "a.nii.gz"), "--out", out],
         "both would be written to a_dseg.nii.gz"),
        (["apply", out, scan, "--truth", labels, labels, "--out", out], "--truth of 2 files"),
        (["fit", "sub-1_T1w.nii", "--labels", "sub-2_dseg.nii", "--out", out],
         "--labels sub-2_dseg.nii: is of sub-2, its scan sub-1_T1w.nii of sub-1; name label maps"),
        (["apply", out, "sub-1_ses-a_T1w.nii", "--truth", "sub-1_ses-b.nii", "--out", out],
         "--truth sub-1_ses-b.nii: is of ses-b"),
    ]
    for words, message in cases:
        with pytest.raises(NeurojepaError, match=message):
            main(["segment", *words])


def test_labels_and_truths_elsewhere_are_told(tmp_path: Path) -> None:
    image = blob(0)
    far = replace(labels_of(image), affine=image.affine + [[0, 0, 0, 900.0]] + 0 * np.eye(4))
    far.affine[1:, 3] = image.affine[1:, 3]
    with pytest.raises(DataError, match="no label lies in the brain of blob 0"):
        fitting.taught(image, far, np.array([3, 7, 41]), 8.0)
    found = Segmentation(image, labels_of(image).data, {3: "left"})
    other = str(save(tmp_path / "truth.nii.gz", labels_of(image).data[1:], image.affine))
    with pytest.raises(DataError, match=r"its grid \(43, 48, 42\) is not that of blob 0"):
        task._scored(found, other)


def test_a_folder_that_holds_something_else_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "fit.json").write_text(json.dumps({"recipe": 1, "codes": [3]}))
    task._check_free(str(tmp_path), {"recipe": 1, "codes": [3]})
    with pytest.raises(ConfigError, match="holds a fit of other codes"):
        task._check_free(str(tmp_path), {"recipe": 1, "codes": [3, 4]})
    (tmp_path / "config.json").write_text("{}")  # as exported weights have it
    with pytest.raises(ConfigError, match="a model lies there already"):
        task._check_free(str(tmp_path), {"recipe": 1, "codes": [3]})


def test_a_fit_whose_scan_cannot_be_read_leaves_nothing(tmp_path: Path) -> None:
    image = blob(0)
    labels = str(save(tmp_path / "b.nii.gz", labels_of(image).data, image.affine))
    with pytest.raises(DataError, match=r"gone\.nii"):
        main(["segment", "fit", str(tmp_path / "gone.nii"), "--labels", labels, "--out",
              str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


def test_label_maps_are_named_after_their_scans() -> None:
    assert task.places_of(["x/sub-1_ses-2_T1w.nii.gz", "sub-3.mgz", "head.nii.zst"]) == [
        "sub-1/ses-2/anat/sub-1_ses-2_T1w_dseg.nii.gz", "sub-3/anat/sub-3_dseg.nii.gz",
        "head_dseg.nii.gz"]


def test_a_damaged_model_is_told(tmp_path: Path) -> None:
    model = str(tmp_path)
    save_model(model, Segmenter(build(RECIPE, 1), RECIPE, [3], ["left"]), {})
    assert load_segmenter(model).codes == [3]
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"model\.safetensors: does not match the sha256"):
        load_segmenter(model)
    (tmp_path / "config.json").write_text('{"schema": ')
    with pytest.raises(DataError, match=r"config\.json: is no JSON"):
        load_segmenter(model)


def test_a_label_map_is_written_as_the_scan_was_stored() -> None:
    image = replace(blob(0), orientation="PSR")
    assert "".join(nib.aff2axcodes(stored(image.data, image).affine)) == "PSR"
