"""The arithmetic of the quality table, without training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from neurojepa.config import dump_config
from neurojepa.downstream.embed import Embeddings
from neurojepa.downstream.pooling import Places, Tokens
from neurojepa.downstream.stats import mean_absolute_error
from neurojepa.errors import ConfigError, NeurojepaError
from neurojepa.feed.format import TRAINING_GRIDS, open_feed
from neurojepa.objective.views import make_views, patch_numbers
from neurojepa.train.stopping import REQUEUE
from tests.helpers.batches import make_batch
from tests.helpers.feeds import GRID, tiny_config, write_feed
from tools.bench import quality
from tools.bench._quality_readout import between_people, gates
from tools.bench._quality_run import overlap, stored
from tools.bench._quality_table import (
    PLAIN,
    both_poolings,
    changes_by_pooling,
    figures_of,
    value_of,
)
from tools.bench._runs import claim, command


def test_overlap_by_hand() -> None:
    shares = np.array([[[0.5, 0.0], [1.0, 0.0]]])  # one scan, two patches, two structures
    guess = np.array([[[0.25, 0.1], [1.0, 0.0]]])
    dice = overlap(shares, guess)
    assert dice[0, 0] == pytest.approx(2 * 1.25 / 2.75)
    assert np.isnan(dice[0, 1])  # the scan has none of it
    assert overlap(shares, shares)[0, 0] == pytest.approx(1)


@pytest.mark.parametrize("budget", [None, 100])
def test_tokens_know_their_patch(budget: int | None) -> None:
    grid, config = TRAINING_GRIDS["3mm"], tiny_config("feed", "run")
    model = config.model.model_copy(update={"token_budget": budget})
    config = config.model_copy(update={"model": model})
    batch = make_batch(2, grid)
    views = make_views(batch, config, grid, 0)
    number = patch_numbers(views.coords_BN3, grid, 6)
    brain = (batch.voxels > 0).view(2, 9, 6, 11, 6, 9, 6).float().mean((2, 4, 6)).flatten(1)
    assert torch.allclose(brain.gather(1, number), views.foreground_BN)
    assert all(len(set(row.tolist())) == len(row) for row in number)


def runs_of(errors: list[float]) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    truth, people = rng.normal(size=20), np.repeat(np.arange(10), 2)
    return [stored("age", truth, truth + error, people, people // 3) for error in errors]


def test_a_row_is_the_mean_over_seeds_and_differences_are_paired() -> None:
    ours, others = runs_of([1.0, 3.0]), runs_of([2.5])
    value = value_of("age", mean_absolute_error, ours)
    assert value is not None and value.num_people == 10
    assert (value.value, value.low, value.high) == pytest.approx((2, 2, 2))
    difference = value_of("age", mean_absolute_error, ours, others)
    assert difference is not None
    assert (difference.value, difference.low, difference.high) == pytest.approx((-0.5,) * 3)
    assert value_of("sex", mean_absolute_error, ours) is None
    assert value_of("age", mean_absolute_error, ours, [{}]) is None


def test_tissue_volumes_add_up_to_the_mask(tmp_path: Path) -> None:
    feed = open_feed(write_feed(str(tmp_path / "feed"), 4))
    volumes = quality.tissue_volumes(feed, np.arange(4))
    expected = np.array(feed.index["num_foreground"].to_pylist()) * GRID.spacing_mm**3 / 1000
    assert volumes[:, 0] == pytest.approx(expected)
    assert volumes[:, 1:].sum(1) == pytest.approx(expected) and volumes.min() > 0


@pytest.mark.parametrize("plan", [quality.FULL, quality.QUICK])
def test_no_two_runs_share_a_folder_and_every_method_is_tuned_alike(plan: quality.Plan,
                                                                   tmp_path: Path) -> None:
    chosen = dict.fromkeys(plan.methods, plan.rates[0])
    jobs = list(quality.remaining(plan, tmp_path, chosen))
    assert len({job.folder for job in jobs}) == len(jobs)
    tuned = [quality.job(plan, tmp_path, method, rate).folder.name
             for method in plan.methods for rate in plan.rates]
    assert len(set(tuned)) == len(plan.methods) * len(plan.rates)


def test_a_folder_of_another_plan_is_refused(tmp_path: Path) -> None:
    for _ in range(2):
        claim(tmp_path / "work", "one")
    with pytest.raises(ConfigError, match="another plan, one; choose another folder"):
        claim(tmp_path / "work", "other")


@pytest.mark.slow(11)
def test_a_run_that_is_stopped_leaves_no_scores(tmp_path: Path) -> None:
    feed = write_feed(str(tmp_path / "feed"))
    config = tiny_config(feed, str(tmp_path / "run"))
    run = config.run.model_copy(update={"time_limit_min": 1e-6})
    recipe = dump_config(config.model_copy(update={"run": run}))
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "run.json").write_text('{"scrambled": false, "head_alone": false}')
    with pytest.raises(NeurojepaError, match=f"status {REQUEUE}"):
        command(tmp_path / "log.txt", "tools.bench._quality_run", str(tmp_path))
    assert not (tmp_path / "scores.npz").exists() and not (tmp_path / "weights").exists()


def test_the_first_component_that_is_head_size_is_told() -> None:
    rng = np.random.default_rng(0)
    size, people = rng.normal(1000, 50, 30), np.repeat(np.arange(15), 2).astype(str)
    values = np.stack([size, rng.normal(0, 5, 30), rng.normal(0, 5, 30)], 1)
    embeddings = Embeddings(values, *[people] * 4, np.full(30, "T1w"),
                            np.where(np.arange(30) < 20, "train", "test"))
    found = between_people(embeddings, size, "T1w")
    assert found["size"] > 0.99 and found["size (test)"] > 0.99
    assert found["first component"] > 0.9 and found["participation"] < 1.2
    moved = replace(embeddings, values=np.where(np.arange(30)[:, None] % 2, 0.0, values))
    assert between_people(moved, size, "T1w") == found  # the first scan of each person counts
    unlike = between_people(replace(embeddings, values=rng.normal(size=(30, 3))), size, "T1w")
    assert unlike["participation"] > 2


def test_gates_by_hand() -> None:
    z = torch.tensor([[1.0, 5.0], [3.0, 7.0], [9.0, 9.0]])[..., None]  # the last one is no train
    tokens = [Tokens(z, torch.arange(2).expand(3, 2), torch.ones(3, 2), torch.zeros(3).long())]
    taught = Tokens(*(value[:2] for value in vars(tokens[0]).values()))
    places = Places.fit(lambda: [taught], 2)
    pooled = places.pool(tokens[0]).numpy()
    assert pooled.ravel() == pytest.approx([-1, 1, 5])
    found = gates(places, tokens, pooled, np.array([True, True, False]))
    # tokens 1 5 3 7 around 4: 20; places 2 and 6: 16; scans one off each: 4
    assert found == pytest.approx({"place": 0.8, "place and modality": 0.8, "scan": 0.2,
                                   "participation of tokens": 1.0})


def test_a_row_of_the_plain_mean_stands_below_each_method() -> None:
    ours = [each | {PLAIN + name: value for name, value in each.items()}
            | {"size": np.array(0.1), PLAIN + "size": np.array(0.9)} for each in runs_of([1.0])]
    rows = both_poolings({"ours": ours, "volumes": runs_of([2.0])})
    assert list(rows) == ["ours", "ours, plain mean", "volumes"]
    figures = figures_of({"ours": ours, "volumes": runs_of([2.0])})
    assert list(figures) == ["ours", "ours, plain mean"]
    assert [row["r with head size"] for row in figures.values()] == [0.1, 0.9]
    change = changes_by_pooling({"ours": ours, "volumes": runs_of([2.0])})
    assert list(change) == ["ours - its plain mean"]
    assert change["ours - its plain mean"]["age MAE (years)"].value == 0
