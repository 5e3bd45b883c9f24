"""What is read from a scan: maps find what was planted, add up, change with the weights, and lie
where the scan lies."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow as pa
import pytest
import torch

from neurojepa.downstream.__main__ import main as downstream
from neurojepa.downstream.api import Model
from neurojepa.downstream.crossval import linear
from neurojepa.downstream.embed import fit_places
from neurojepa.downstream.explain import (
    FOLLOWS_IMAGE,
    Check,
    Teachers,
    check_weights,
    like_random,
)
from neurojepa.downstream.features import plain
from neurojepa.downstream.native import Maps, Shown, resampled
from neurojepa.downstream.readout import Readout, readout
from neurojepa.downstream.saliency import ALL, DRAWN, Explainer, rank_correlation, usual_scan
from neurojepa.downstream.scans import Scans
from neurojepa.downstream.stats import auroc
from neurojepa.downstream.table import read_embeddings, vectors, write_tables
from neurojepa.downstream.targets import Target
from neurojepa.errors import ConfigError, DataError, NeurojepaError
from neurojepa.feed.format import is_brain, open_feed
from neurojepa.objective.anatomy import grid_mm, tissue_priors
from neurojepa.weights import Weights, untrained
from tests.helpers.browser import look
from tests.helpers.embedded import cohort, people
from tests.helpers.feeds import GRID, tiny_config, write_feed
from tests.helpers.trees import write

LESION_MM = 14.0


def heads(number: int, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Codes of T1w heads as the template has them, with noise, and the bright spot planted in each
    of the odd ones."""
    rng, priors, mm = np.random.default_rng(seed), tissue_priors(GRID), grid_mm(GRID)
    brain = (((mm - [0, -17, 8]) / [62, 80, 58]) ** 2).sum(-1) < 1
    scans, spots = [], []
    for each in range(number):
        value = 40 * priors[0] + 120 * priors[1] + 180 * priors[2] + rng.normal(0, 6, GRID.shape)
        place = np.array([rng.choice([-30, 30]), rng.uniform(-50, 20), rng.uniform(5, 30)])
        spot = (((mm - place) ** 2).sum(-1) < LESION_MM**2) & brain & bool(each % 2)
        codes = np.clip(np.rint(value + 60 * spot), 1, 254) * brain
        scans.append(codes.astype(np.uint8))
        spots.append(spot)
    return scans, spots


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """An untrained encoder that knows T1w from a feed of blobs."""
    feed = open_feed(write_feed(str(tmp_path_factory.mktemp("feed")), modalities=("T1w",)))
    config = tiny_config(feed.uri, "unused")
    fresh = untrained(config, GRID)
    return replace(fresh, places=fit_places(fresh.model, config, feed, np.arange(24)))


@pytest.fixture(scope="module")
def explainer(weights: Weights) -> Explainer:
    """Of a readout of whether there is a spot."""
    blank = Explainer(weights, Readout(np.zeros(1), 0))
    values = np.stack([blank.embedding(codes, 0) for codes in heads(40)[0]]).astype(float)
    target = Target("spot", "binary", np.arange(40) % 2.0, ("no", "yes"))
    return Explainer(weights, readout(target, values, np.arange(40)))


def test_a_readout_is_what_the_linear_model_says() -> None:
    values, truth = cohort(60)
    family = np.arange(60)
    taught, tested = plain(values)(np.arange(50), np.arange(50, 60))
    for target in (Target("dx", "binary", truth[:50].astype(float), ("no", "yes")),
                   Target("size", "regression", values[:50, 1] + 0.1 * values[:50, 2])):
        said = linear(target, taught, tested, target.truth, family[:50])
        score = readout(target, values[:50], family[:50])(values[50:])
        assert (1 / (1 + np.exp(-score)) if target.kind == "binary" else score) == pytest.approx(
            said, abs=1e-6)
    classes = Target("dx", "multiclass", truth.astype(float), ("a", "b", "c"))
    with pytest.raises(ConfigError, match="3 classes have no single score"):
        readout(classes, values, family)


def test_the_usual_scan_is_the_template_in_the_scans_own_contrast() -> None:
    priors = tissue_priors(GRID)
    brain = np.zeros(GRID.shape, bool)
    brain[6:18, 8:28, 6:18] = True
    for bright in ((30, 120, 200), (220, 150, 90)):  # whatever the contrast
        exact = np.rint(np.tensordot(bright, priors, 1)) * brain
        codes = exact.astype(np.uint8)
        codes[0, 0, 0] = 255
        assert np.abs(usual_scan(codes, priors).astype(int) - codes).max() <= 1
        spot = codes.copy()
        spot[10:12, 12:14, 10:12] = 254
        changed = usual_scan(spot, priors)
        assert np.abs(changed.astype(int) - codes)[brain].max() < 12  # the spot is not usual
        assert changed[0, 0, 0] == 255 and not changed[~brain & (codes == 0)].any()


def test_a_map_finds_what_was_planted_and_adds_up(explainer: Explainer) -> None:
    scans, spots = heads(8, seed=2)
    rng, found, random = np.random.default_rng(0), [], []
    for codes, spot in zip(scans, spots, strict=True):
        made = explainer(codes, 0)
        assert not made.map[~is_brain(codes)].any()
        assert abs(made.error) < 0.05 * abs(made.score - made.usual) + 0.02
        if spot.any():
            brain = is_brain(codes)
            truth = spot[brain].astype(float)
            found.append(auroc(truth, np.abs(made.map[brain])))
            random.append(auroc(truth, rng.random(len(truth))))
            assert auroc(truth, made.map[brain]) > 0.8  # with its sign: spots raise the score
    assert min(found) > 0.8 and np.mean(found) > 0.9 > 0.65 > np.mean(random)


def test_maps_change_with_the_weights_block_by_block(explainer: Explainer) -> None:
    codes = heads(2, seed=2)[0][1]
    brain = is_brain(codes)
    own = explainer(codes, 0).map[brain]
    parts, ranks = zip(*((part, rank_correlation(own, other(codes, 0).map[brain]))
                         for part, other in explainer.randomised()), strict=True)
    assert parts == ("from block 3", "from block 2", "from block 1", "from block 0", *[ALL] * DRAWN)
    assert len(set(ranks[-DRAWN:])) == DRAWN and np.abs(ranks[-DRAWN:]).mean() < 0.5
    assert rank_correlation(own, explainer(codes, 0).map[brain]) == 1
    assert rank_correlation(own, np.zeros_like(own)) == 0


def test_experts_choose_freely_again_after_a_map_and_after_an_error(weights: Weights,
                                                                    explainer: Explainer) -> None:
    codes = heads(1)[0][0]
    explainer(codes, 0)
    assert not any("choose" in vars(layer) for layer in weights.model.modules())
    with pytest.raises(RuntimeError):
        Explainer(weights, Readout(np.zeros(3), 0))(codes, 0)  # of another width
    assert not any("choose" in vars(layer) for layer in weights.model.modules())


def test_nothing_of_the_encoder_is_kept_where_all_of_it_is_drawn_anew(weights: Weights) -> None:
    trained = replace(weights, model=copy.deepcopy(weights.model))
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter.fill_(torch.nan)
    wholly = [other for part, other in Explainer(trained, Readout(np.zeros(1), 0)).randomised()
              if part == ALL]
    assert len(wholly) == DRAWN
    assert all(each.isfinite().all() for other in wholly
               for each in (*other.model.encoder.parameters(), *other.model.target.parameters()))


def test_maps_that_follow_the_image_are_told_whatever_their_sign() -> None:
    who = Shown("s", "p", "1", "T1w")

    def checks(*ranks: float) -> list[Check]:
        return [Check(who, "from block 3", 0.99, 0.99), *(
            Check(who, ALL, rank, 0.3) for rank in ranks)]

    assert like_random(checks(-0.8, 0.7, -0.6)) == pytest.approx(0.7) and FOLLOWS_IMAGE < 0.7
    assert like_random(checks(0.59, -0.1, 0.2)) < FOLLOWS_IMAGE  # one draw is no evidence


@pytest.mark.parametrize("axes", [(1, 1, 1), (-1, 1, 1), (-1, -1, 1)])
def test_a_map_lies_where_the_scan_lies(tmp_path: Path, axes: tuple[int, ...]) -> None:
    """A point on the person's right in MNI space comes out there in a file stored any way."""
    point, value = np.array([30.0, -20.0, 10.0]), np.zeros(GRID.shape, np.float32)
    voxel = np.rint(np.linalg.inv(GRID.affine) @ [*point, 1])[:3].astype(int)
    value[tuple(voxel)] = 1
    point = (GRID.affine @ [*voxel, 1])[:3]
    turn = np.eye(4)  # archive mm to the scan's mm
    turn[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    turn[:3, 3] = 5, -3, 8
    affine = np.diag([2.0 * axes[0], 2.0 * axes[1], 2.5 * axes[2], 1])
    affine[:3, 3] = -np.array([110, 120, 90]) * axes
    file = tmp_path / "t1.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((110, 120, 72), np.int16), affine), file)
    about = pa.table({"scan_id": ["s"], "uri": [str(file)], "member": pa.array([None], pa.string()),
                      "facts": pa.array([None], pa.string()),
                      "archive_to_scan": [json.dumps(turn.tolist())]})
    scans = Scans(None, about, {})  # type: ignore[arg-type]
    maps = Maps(str(tmp_path / "out"), GRID, scans)
    who = Shown("s", "p 07", "1", "T1w")
    paths = [maps.write(who, value, "saliency", "dx", {"Units": "a"}) for _ in range(2)]
    stem = "sub-p07/ses-1/sub-p07_ses-1{}_mod-T1w_desc-dx_saliency.nii.gz"
    assert paths == [stem.format(""), stem.format("_run-2")]
    image = nib.load(tmp_path / "out" / paths[0])
    assert image.shape == (110, 120, 72) and np.allclose(image.affine, affine)
    data = image.get_fdata()
    centre = np.array(np.nonzero(data > 0.1)) @ data[data > 0.1] / data[data > 0.1].sum()
    assert (image.affine @ [*centre, 1])[:3] == pytest.approx((turn @ [*point, 1])[:3], abs=1.0)
    sidecar = json.loads((tmp_path / "out" / paths[0].replace(".nii.gz", ".json")).read_text())
    assert sidecar["Units"] == "a" and sidecar["SpatialReference"] == "orig"
    described = json.loads((tmp_path / "out/dataset_description.json").read_text())
    assert described["DatasetType"] == "derivative"
    file.unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        maps.write(who, value, "saliency", "dx", {})


def test_a_map_of_a_feed_stays_in_the_template(tmp_path: Path) -> None:
    value = np.random.default_rng(0).random(GRID.shape, dtype=np.float32)
    path = Maps(str(tmp_path), GRID, None).write(Shown("s", "a1", "2", "PET"), value, "saliency",
                                                 "dx", {})
    assert path == "sub-a1/ses-2/sub-a1_ses-2_mod-PET_space-MNI152_desc-dx_saliency.nii.gz"
    image = nib.load(tmp_path / path)
    assert np.array_equal(image.get_fdata(dtype=np.float32), value)
    assert np.allclose(image.affine, GRID.affine)
    same = resampled(value, GRID.affine, GRID.shape, GRID.affine)
    assert np.allclose(same, value, atol=1e-6)


# ---- the command ---------------------------------------------------------------------------------

@pytest.fixture
def embedded(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A feed of 24 people embedded, and their ages; returns the words of the command."""
    monkeypatch.setattr("neurojepa.downstream.api.load", lambda uri: weights)
    feed = write_feed(str(tmp_path / "feed"), modalities=("T1w",))
    Model(weights, "W", "cpu").embed(feed).write(str(tmp_path))
    (tmp_path / "key").write_bytes(b"a public key for invented people")
    (tmp_path / "key").chmod(0o600)
    monkeypatch.setattr("data_prep.identity.pseudonym", lambda key, cohort, person: person)
    write(tmp_path, {"my.csv": "participant_id,age,dx\n" + "".join(
        f"p{n},{50 + n % 7},{'abc'[n % 3]}\n" for n in range(24))})
    return ["explain", feed, "--weights", "W", "--embeddings", str(tmp_path), "--labels",
            str(tmp_path / "my.csv"), "--key", str(tmp_path / "key"), "--out",
            str(tmp_path / "out"), "--label"]


@pytest.mark.browser
@pytest.mark.slow(4)
def test_the_command_writes_maps_and_a_page(embedded: list[str], tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert downstream([*embedded, "age", "--most", "2"]) == 0
    said = capsys.readouterr().out
    assert "22 scans beyond the first 2 were not explained" in said
    assert "p0: all of it drawn anew: rank correlation" in said
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert record["schema"] == "neurojepa/explain/1" and record["unit"] == "age"
    for path, scan in zip(record["maps"], record["scans"], strict=True):
        data = nib.load(tmp_path / "out" / path).get_fdata()
        assert data.sum() == pytest.approx(scan["score"] - scan["usual"], abs=1e-3)
        assert scan["taught_by"] == 23
    assert len(record["other_weights"]) == 2 * (4 + DRAWN)
    lines = (tmp_path / "out/predictions.csv").read_text().splitlines()
    assert lines[0].startswith("participant_id,session_id,modality") and len(lines) == 3
    facts = look(tmp_path / "out/report.html", tmp_path)
    assert facts["images"] == 2 and not facts["broken"] and not facts["requests"]
    assert facts["overflow"] <= 0


def test_what_cannot_be_explained_is_said(embedded: list[str], weights: Weights, tmp_path: Path
                                          ) -> None:
    with pytest.raises(NeurojepaError, match="3 classes have no single score to explain"):
        downstream([*embedded, "dx"])
    with pytest.raises(NeurojepaError, match="--most 0: at least one scan"):
        downstream([*embedded, "age", "--most", "0"])
    with pytest.raises(NeurojepaError, match=r"^T2w: the embeddings are of T1w"):
        downstream([*embedded, "age", "--modality", "T2w"])
    write(tmp_path, {"my.csv": "participant_id,age\n" + "".join(
        f"p{n},{50 + n % 7}\n" for n in range(10))})
    with pytest.raises(NeurojepaError, match="'age': 9 people teach the readout where the family"):
        downstream([*embedded, "age"])
    with pytest.raises(NeurojepaError, match="have 4 features, the weights give"):
        check_weights(weights, 4)
    with pytest.raises(NeurojepaError, match="without what is usual of tokens"):
        check_weights(replace(weights, places=None), 4)


def test_embeddings_of_other_weights_are_refused(embedded: list[str], tmp_path: Path) -> None:
    table = read_embeddings(str(tmp_path))
    other = vectors(table) + np.random.default_rng(0).normal(size=(24, 1))
    write_tables(str(tmp_path), table.set_column(
        table.schema.get_field_index("embedding"), "embedding",
        pa.array(list(other.astype(np.float32)), pa.list_(pa.float32()))))
    with pytest.raises(NeurojepaError, match="do not give its stored embedding"):
        downstream([*embedded, "age"])


def test_a_scans_own_family_does_not_teach_its_readout() -> None:
    values, truth = cohort(30)
    whom = people(values, dx=truth)
    scans = pa.table({"scan_id": ["s0"], "participant": ["p003"], "family": ["p003"]})
    teachers = Teachers.of(whom, "dx", ("1",), scans)
    everyone, count = teachers.without("elsewhere", "stranger", "stranger")
    assert count == 30
    apart, count = teachers.without("s0", "stranger", "stranger")  # known by the scan alone
    assert count == 29 and not np.allclose(everyone.weight_D, apart.weight_D)
    assert teachers.without("elsewhere", "p003", "p004")[1] == 28
    # a new scan, whose source knows of no family; embeddings know of one
    siblings = replace(whom, family=np.where(whom.family == "p004", "p003", whom.family))
    scans = scans.set_column(0, "scan_id", pa.array(["another"]))
    assert Teachers.of(siblings, "dx", ("1",), scans).without("new", "p003", "alone")[1] == 28
