"""The atoms page: places and regions are the tokens' own, strongest scans are named, it opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from neurojepa.config import RootConfig
from neurojepa.downstream.__main__ import main as downstream
from neurojepa.downstream.atoms import Tally, observe, patch_places_mm, summary
from neurojepa.downstream.regions import load_regions, lobe_names, lobes
from neurojepa.errors import ConfigError
from neurojepa.feed.format import Feed, open_feed
from neurojepa.model.build import build_model
from neurojepa.weights import Weights, load
from tests.helpers.browser import look
from tests.helpers.feeds import GRID, tiny_config, write_feed
from tests.helpers.worker import job, run_ranks

PATCH = 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a feed, a finished run and its milestone's exported weights."""
    root = tmp_path_factory.mktemp("atoms")
    config = tiny_config(write_feed(str(root / "feed")), root / "run", steps=4, milestone_every=4)
    (process,) = run_ranks([job(config, root)], root)
    assert process.returncode == 0, process.stdout
    return root


@pytest.fixture(scope="module")
def feed(trained: Path) -> Feed:
    return open_feed(str(trained / "feed"))


@pytest.fixture(scope="module")
def weights(trained: Path) -> Weights:
    return load(str(trained / "run" / "weights" / "step-4"))


def test_known_places_are_in_their_regions() -> None:
    places = {(-38, -10, 55): "left frontal", (45, -30, 55): "right parietal",
              (-60, -30, -5): "left temporal", (8, -85, 5): "right occipital",
              (-10, -18, 8): "left deep", (20, -65, -40): "right cerebellum",
              (0, -25, -35): "brainstem", (35, -50, -15): "right temporal"}
    codes = lobes(np.array(list(places), dtype=float))
    assert [lobe_names()[code - 1] for code in codes] == list(places.values())


def test_regions_of_patches_come_from_the_atlas(tmp_path: Path) -> None:
    labels = np.zeros((182, 218, 182), np.int16)
    affine = np.array([[-1.0, 0, 0, 90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]])
    x_mm = 90 - np.arange(182)
    labels[x_mm < 0], labels[x_mm > 0] = 7, 30
    atlas = str(tmp_path / "sides.nii.gz")
    nibabel.save(nibabel.Nifti1Image(labels, affine), atlas)
    plain = load_regions(GRID, PATCH, atlas)
    assert plain.names == ["7", "30"] and plain.share_nR.shape == (96, 2)
    (tmp_path / "sides.tsv").write_text("index\tname\n7\tleft\n9\tnone\n30\tright\n")
    named = load_regions(GRID, PATCH, atlas)
    assert named.names == ["left", "right"]
    left = patch_places_mm(GRID, PATCH)[:, 0] < 0
    assert (named.share_nR[left, 1] == 0).all() and (named.share_nR[~left, 0] == 0).all()
    inside = (np.abs(patch_places_mm(GRID, PATCH) - [0, -17, 6]) < 60).all(1)
    assert inside.any() and np.allclose(named.share_nR[inside].sum(1), 1)


@pytest.mark.parametrize(("spoil", "words"), [
    ("missing", "cannot be read"), ("text", "cannot be read"), ("maps", "whole numbers"),
    ("far", "no label lies in the feed's grid"), ("names", "columns index and name")])
def test_an_atlas_that_is_none(tmp_path: Path, spoil: str, words: str) -> None:
    path = tmp_path / "atlas.nii"
    data, affine = np.ones((9, 9, 9), np.float32), np.eye(4)
    if spoil == "maps":
        data *= 0.5
    if spoil == "far":
        affine[:3, 3] = 500
    if spoil != "missing":
        nibabel.save(nibabel.Nifti1Image(data, affine), path)
    if spoil == "text":
        path.write_text("no image")
    if spoil == "names":
        (tmp_path / "atlas.tsv").write_text("code\tlabel\n1\ta\n")
    with pytest.raises(ConfigError, match=words):
        load_regions(GRID, PATCH, str(path))


def test_a_tally_is_means_by_place_and_modality(feed: Feed) -> None:
    tally = Tally.empty(96, 2, torch.device("cpu"))
    patches = torch.tensor([0, 5, 5])
    tally.add(torch.tensor([[1.0, 0], [3.0, 0], [5.0, 0]]), patches, modality=0, scan=4)
    tally.add(torch.tensor([[9.0, 0], [0.0, 0], [1.0, 0.5]]), patches, modality=1, scan=9)
    regions = load_regions(GRID, PATCH)
    regions.share_nR[:] = 0
    regions.share_nR[0, 0], regions.share_nR[5, 1] = 0.25, 1.0
    found = summary(tally, regions, feed, PATCH)
    assert found.map_nF[0].tolist() == [5, 0] and found.map_nF[5].tolist() == [2.25, 0.125]
    assert found.share_F.tolist() == pytest.approx([5 / 6, 1 / 6])
    assert found.mean_F.tolist() == pytest.approx([19 / 5, 0.5])
    assert found.region_RF[:2].tolist() == [[5, 0], [2.25, 0.125]]
    assert np.isnan(found.region_RF[2:]).all()
    assert found.selectivity_RF[0].tolist() == pytest.approx([2.75 / 7.25, -1])
    assert found.modalities == ["T1w", "T2w"]
    assert found.modality_mF.tolist() == [[3, 0], [pytest.approx(10 / 3), pytest.approx(0.5 / 3)]]
    ids = feed.index["scan_id"].to_pylist()
    places = patch_places_mm(GRID, PATCH)
    assert found.strongest[0] == [
        {"scan_id": ids[9], "modality": "T2w", "mm": places[0].tolist(), "value": 9.0},
        {"scan_id": ids[4], "modality": "T1w", "mm": places[5].tolist(), "value": 5.0}]
    assert [each["scan_id"] for each in found.strongest[1]] == [ids[9]]


def test_an_atom_of_bright_voxels_shows_where_they_are(feed: Feed, weights: Weights) -> None:
    """A code that reads the place from a listener's input lights up exactly there."""
    config = weights.config
    model = build_model(config, GRID).eval()
    model.code.encode = Places(model.code.encode.out_features)  # type: ignore[union-attr]
    model.predictor.forward = coordinates  # type: ignore[union-attr, method-assign]
    seen = observe(model, config, feed, np.arange(6))
    assert seen.atoms
    found = summary(seen.atoms, load_regions(GRID, PATCH), feed, PATCH)
    x = patch_places_mm(GRID, PATCH)[:, 0]
    often = found.map_nF[:, 2] > 0
    assert often.sum() > 20
    assert found.map_nF[often & (x > 0), 0] == pytest.approx(x[often & (x > 0)])
    assert not found.map_nF[x < 0, 0].any() and not found.map_nF[x > 0, 1].any()
    for name, selectivity in zip(lobe_names(), found.selectivity_RF[:, 0], strict=True):
        if np.isfinite(selectivity) and name != "brainstem":
            assert selectivity > 0 if name.startswith("right") else selectivity == -1


class Places(torch.nn.Module):
    """Pre-activations x, -x and 1 of a token at x mm."""

    def __init__(self, atoms: int) -> None:
        super().__init__()
        self.out_features = atoms

    def forward(self, coords: torch.Tensor) -> torch.Tensor:
        x = coords[..., :1]
        rest = torch.zeros(*x.shape[:-1], self.out_features - 3)
        return torch.cat([x, -x, torch.ones_like(x), rest], -1)


def coordinates(context: torch.Tensor, coords: torch.Tensor, *_: Any) -> torch.Tensor:
    return coords[:, context.shape[1]:]


def test_experts_are_tallied_for_every_scanned_token(feed: Feed, weights: Weights) -> None:
    rows = np.arange(5)
    seen = observe(weights.model, weights.config, feed, rows, batch_size=2)
    again = observe(weights.model, weights.config, feed, rows, batch_size=5)
    assert seen.layers == [1, 3] and seen.atoms and again.atoms
    budget = weights.config.model.token_budget
    for tally, other in zip(seen.experts, again.experts, strict=True):
        assert tally.tokens_n.sum() == 5 * budget
        assert tally.total_nF.sum(1) == pytest.approx(tally.tokens_n)  # each token counts once
        assert (tally.total_nF - other.total_nF).abs().max() < 1e-4  # whatever the batches are


def test_other_codes_and_models_without_atoms(feed: Feed, tmp_path: Path) -> None:
    def changed(**objective: Any) -> RootConfig:
        tree = tiny_config("feed", tmp_path).model_dump()
        tree["objective"].update(objective)
        return RootConfig.model_validate(tree)

    dense = changed(sparse={"code": "identity"})
    seen = observe(build_model(dense, GRID), dense, feed, np.arange(2))
    assert seen.atoms is None and len(seen.experts) == 2
    gated = changed(sparse={"code": "gated"})
    seen = observe(build_model(gated, GRID), gated, feed, np.arange(2))
    assert seen.atoms and (seen.atoms.active_F > 0).any()
    filled = changed(method="mae")
    with pytest.raises(ConfigError, match=r"objective.method = mae.*no atoms and no experts"):
        observe(build_model(filled, GRID), filled, feed, np.arange(2))


@pytest.fixture(scope="module")
def shown(trained: Path) -> Path:
    out = trained / "atoms"
    assert downstream(["atoms", "--weights", str(trained / "run" / "weights" / "step-4"), "--feed",
                       str(trained / "feed"), "--split", "train", "--out", str(out)]) == 0
    return out


def test_results_of_every_atom_and_expert(shown: Path, feed: Feed) -> None:
    record = json.loads((shown / "results.json").read_text())
    for name, rows in (("atoms.csv", record["atoms"]["rows"]),
                       ("experts.csv", [row for layer in record["experts"]
                                        for row in layer["rows"]])):
        lines = (shown / name).read_text().splitlines()
        assert len(lines) == 1 + 13 * len(rows)  # regions
    assert record["scans"] == 24 and record["step"] == 4
    rows = record["atoms"]["rows"]
    assert [row["number"] for row in rows] == list(range(4 * 96))
    assert record["atoms"]["active"] == sum(row["share"] > 0 for row in rows) > 50
    assert all(set(row["selectivity"]) == set(lobe_names()) for row in rows)
    active = max(rows, key=lambda row: row["share"])
    assert len({each["scan_id"] for each in active["strongest"]}) == 5
    assert set(active["mean_by_modality"]) == {"T1w", "T2w"}
    assert [layer["block"] for layer in record["experts"]] == [1, 3]
    for layer in record["experts"]:
        assert 1 <= layer["expert_max_load"] <= 2 and 0.5 <= layer["expert_entropy"] <= 1
        for name in lobe_names():
            shares = [row["mean_by_region"][name] for row in layer["rows"]]
            assert None in shares or sum(shares) == pytest.approx(1, abs=1e-3)


@pytest.mark.browser
def test_the_page_shows_in_a_browser(shown: Path, tmp_path: Path) -> None:
    facts = look(shown / "report.html", tmp_path, """
      const cards = () => [...document.querySelectorAll('.group')[0].querySelectorAll('.card')];
      const titles = () => cards().map(card => card.querySelector('h3').textContent);
      facts.first = titles();
      facts.drawn = [...document.querySelectorAll('canvas')].filter(
        c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v)).length;
      facts.canvases = document.querySelectorAll('canvas').length;
      const [order, search] = document.querySelectorAll('.group select, .group input');
      order.value = 1; order.onchange(); facts.byShare = titles();
      order.value = 4; order.onchange(); facts.bySelectivity = titles();
      search.value = '7'; search.oninput(); facts.found = titles();
      search.value = ''; search.oninput();
      document.querySelector('.group button').onclick(); facts.more = titles().length;""")
    record = json.loads((shown / "results.json").read_text())
    rows = sorted(record["atoms"]["rows"], key=lambda row: -row["share"])
    assert facts["byShare"][0] == f"atom {rows[0]['number']}" and len(facts["first"]) == 12
    assert facts["drawn"] == facts["canvases"] == 3 * (12 + 4 + 4)
    name, least = record["regions"]["names"][0], 20 / record["atoms"]["tokens"]
    best = max((row for row in rows if row["share"] >= least),
               key=lambda row: row["selectivity"][name])
    assert facts["bySelectivity"][0] == f"atom {best['number']}"
    assert facts["found"] == ["atom 7"] and facts["more"] == 60
    assert facts["overflow"] <= 0 and facts["requests"] == 0
