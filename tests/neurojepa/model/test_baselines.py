"""The baselines and the online probe, trained by the loop: they learn, continue, embed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from neurojepa.baselines.cnn import Labels, unpatchify
from neurojepa.baselines.mae import MAE
from neurojepa.config import RootConfig, dump_config, validate
from neurojepa.downstream.embed import embed, select_rows
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import Feed, open_feed
from neurojepa.model.build import build_model
from neurojepa.model.jepa import SparseJEPA
from neurojepa.objective.masks import draw_uniform_masks
from neurojepa.objective.views import make_views, patchify
from neurojepa.storage import Patience, read_rows
from neurojepa.train.checkpoint import open_checkpoint
from neurojepa.train.probe import OnlineProbe
from neurojepa.train.world import World
from neurojepa.weights import export, load
from tests.helpers.batches import make_batch
from tests.helpers.feeds import GRID, Describe, relabel, tiny_config, write_feed
from tests.helpers.worker import job, run_ranks

pytestmark = pytest.mark.slow(3)

MIDDLE, END = 12, 24
METHODS: dict[str, dict[str, Any]] = {
    "mae": {}, "cnn": {"model": {"size": "tiny", "patch_voxels": 6, "token_budget": None}}}


def config_of(feed: str, run: Path, method: str, label: str = "age", **train: Any) -> RootConfig:
    tree = tiny_config(feed, run, **train).model_dump(mode="json")
    tree["objective"] |= {"method": method, "label": label}
    tree["optim"] |= {"lr": 3e-3, "schedule": "constant"}  # so that steps add up to longer runs
    return validate(tree | METHODS.get(method, {}), "tests")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled feed and finished runs: both baselines, and a JEPA with and without probes."""
    root = tmp_path_factory.mktemp("baselines")
    for steps in (MIDDLE, END):
        (root / str(steps)).mkdir()
    write_feed(str(root / "raw"))
    relabel(root / "raw", root / "feed", by_size(root / "raw"))
    feed = str(root / "feed")
    jobs = [job(config_of(feed, root / method, method, steps=END), root) for method in METHODS]
    for steps in (MIDDLE, END):  # the second takes up what the first left
        for method in METHODS:
            config = config_of(feed, root / f"{method}-again", method, steps=steps)
            jobs.append(job(config, root / str(steps)))
    jobs += [job(config_of(feed, root / f"probe{every}", "jepa", steps=4, zero=3,
                           probe_every=every), root) for every in (0, 2)]
    finished = run_ranks(jobs, root, ranks=2)
    assert [process.returncode for process in finished] == [0, 0], finished
    return root


def by_size(feed: Path) -> Describe:
    """Two thirds of the people train, one third is val; age follows size, one age is unknown."""
    middle = np.median(open_feed(str(feed)).index["num_foreground"].to_numpy())

    def describe(number: int, row: dict) -> tuple[str, list[tuple[str, str, str]]]:
        size = row["num_foreground"]
        return ("val" if number % 3 == 2 else "train",
                [("", "age", str(size / 100) if number else ""),
                 ("", "sex", "FM"[int(size > middle)])])

    return describe


@pytest.mark.parametrize("method", METHODS)
def test_a_baseline_learns_and_its_export_embeds(root: Path, method: str) -> None:
    losses = [row["loss"] for row in read_rows(str(root / method / "metrics.jsonl"))]
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4])
    export(str(root / method), str(root / f"{method}-weights"))
    weights, feed = load(str(root / f"{method}-weights")), open_feed(str(root / "feed"))
    rows = select_rows(feed, None, None)
    values = embed(weights.model, weights.config, feed, rows, batch_size=24).values
    assert np.allclose(values[::-1], embed(weights.model, weights.config, feed, rows[::-1],
                                           batch_size=5).values, atol=1e-5)
    assert np.ptp(values, axis=0).max() > 1e-3
    for target, source in zip(weights.model.target.parameters(),
                              weights.model.encoder.parameters(), strict=True):
        assert target.shape == source.shape and not torch.equal(target, source)


@pytest.mark.parametrize("method", METHODS)
def test_a_baseline_continues_bit_equal(root: Path, method: str) -> None:
    states = [open_checkpoint(str(root / name), END).state_sha256()
              for name in (method, f"{method}-again")]
    assert states[0] == states[1]
    events = [row["event"] for row in read_rows(str(root / f"{method}-again" / "events.jsonl"))]
    assert "resume" in events


def test_the_probe_leaves_training_alone(root: Path) -> None:
    without, probed = str(root / "probe0"), str(root / "probe2")
    assert (open_checkpoint(without, 4).state_sha256()
            == open_checkpoint(probed, 4).state_sha256())
    rows = read_rows(probed + "/probes.jsonl")
    assert [row["step"] for row in rows] == [2, 4]
    assert all(0 <= row["sex/auroc"] <= 1 and row["age/mae"] > 0 for row in rows)
    assert not Path(without, "probes.jsonl").exists()


def test_ranks_probe_together_what_one_would_alone(root: Path, tmp_path: Path) -> None:
    """The rows of two ranks under ZeRO-3 are those of the exported weights; old ones are kept."""
    export(str(root / "probe2"), str(tmp_path / "weights"))
    model = load(str(tmp_path / "weights")).model
    config = config_of(str(root / "feed"), tmp_path / "run", "jepa", probe_every=2)
    world = World(rank=0, size=1, device=torch.device("cpu"), control=None)
    metrics = MagicMock(patience=Patience(0))
    probe = OnlineProbe(config, open_feed(config.data.feed), world)
    for step in (2, 6, 4):  # back from 6: its row is gone
        probe.run(model, step, metrics)
    assert [call.args[:2] for call in metrics.event.call_args_list] == [
        ("probe", 2), ("probe", 6), ("probe", 4)]
    together = read_rows(str(root / "probe2" / "probes.jsonl"))[-1]
    rows = read_rows(config.run.dir + "/probes.jsonl")
    assert [row["step"] for row in rows] == [2, 4]
    for name in together.keys() - {"seconds"}:
        assert rows[-1][name] == pytest.approx(together[name], rel=1e-3), name


def test_a_probe_without_labels_or_people_is_refused(root: Path, tmp_path: Path) -> None:
    world = World(rank=0, size=1, device=torch.device("cpu"), control=None)
    feed = open_feed(str(root / "raw"))  # no labels, no split val
    with pytest.raises(ConfigError, match=r"train.probe_every = 5.*set it to 0"):
        OnlineProbe(config_of(feed.uri, tmp_path, "jepa", probe_every=5), feed, world)


def labels_of(root: Path, name: str) -> tuple[Feed, Labels]:
    feed = open_feed(str(root / "feed"))
    return feed, Labels(feed, config_of(feed.uri, root, "cnn", name))


def test_labels_are_standardised_on_train_and_unknown_ones_weigh_nothing(root: Path) -> None:
    feed, labels = labels_of(root, "age")
    config = config_of(feed.uri, root, "cnn")
    ids, splits = feed.index["scan_id"].to_pylist(), feed.index["split"].to_pylist()
    batch = make_batch(3)
    views = make_views(batch, config.model_copy(update={"model": config.model.model_copy(
        update={"patch_voxels": 3})}), replace(GRID, shape=tuple(batch.voxels.shape[1:])), 0)
    attached = labels.attach(views, ids[:3])  # the first person's age is unknown
    assert attached.weight_B.tolist() == [0, 1, 1] and not attached.is_binary
    sizes = np.array(feed.index["num_foreground"].to_pylist()) / 100
    taught = [k for k, split in enumerate(splits) if split == "train" and k]
    expected = (sizes[1] - sizes[taught].mean()) / sizes[taught].std()
    assert attached.label_B[1].item() == pytest.approx(expected, abs=1e-5)
    _, binary = labels_of(root, "sex")
    assert binary.names == ("F", "M")
    assert set(binary.attach(views, ids[:3]).label_B.tolist()) <= {0.0, 1.0}
    with pytest.raises(DataError, match="no label 'iq'"):
        labels_of(root, "iq")


def test_a_scan_without_label_does_not_count(root: Path) -> None:
    feed, labels = labels_of(root, "age")
    config = config_of(feed.uri, root, "cnn")
    model, batch = build_model(config, GRID), make_batch_on_grid()
    ids = feed.index["scan_id"].to_pylist()
    with torch.no_grad():
        both = model(labels.attach(make_views(batch, config, GRID, 0), ids[:2]), 0.0)[0]
        batch.weight[0] = 0
        known = model(labels.attach(make_views(batch, config, GRID, 0), ids[1:3]), 0.0)[0]
    assert both > 0 and known > 0
    batch.weight[:] = 0
    with torch.no_grad():
        assert model(labels.attach(make_views(batch, config, GRID, 0), ids[:2]), 0.0)[0] == 0


def make_batch_on_grid() -> Any:
    batch = make_batch(2)
    batch.voxels = torch.randint(0, 255, (2, *GRID.shape), dtype=torch.uint8)
    return batch


def test_the_cnn_sees_the_volume_that_was_cut(root: Path) -> None:
    volume = torch.arange(2 * 24 * 36 * 24).view(2, 24, 36, 24).float()
    assert torch.equal(unpatchify(patchify(volume, 6), (4, 6, 4), 6), volume)
    with pytest.raises(ConfigError, match=r"set model.token_budget=null"):
        validate(config_of("feed", root, "cnn").model_dump(mode="json")
                 | {"model": {"token_budget": 32}}, "tests")


def test_uniform_masks_are_exact_keyed_and_uniform() -> None:
    position = torch.arange(400)
    context, target = draw_uniform_masks(40, 0.75, seed=1, position_B=position)
    assert context.shape == (400, 1, 10) and target.shape == (400, 1, 30)
    assert torch.equal(torch.cat([context, target], -1).sort(-1).values[:, 0],
                       torch.arange(40).expand(400, 40))
    share = (target[:, 0, :, None] == torch.arange(40)).sum((0, 1)) / 400
    assert (share - 0.75).abs().max() < 0.1
    again = draw_uniform_masks(40, 0.75, seed=1, position_B=position[7:9])
    assert torch.equal(again[0], context[7:9])
    other = draw_uniform_masks(40, 0.75, seed=2, position_B=position)
    assert not torch.equal(other[0], context)


def test_the_mae_hides_what_it_predicts(root: Path) -> None:
    config = config_of(str(root / "feed"), root, "mae")
    model, views = build_model(config, GRID), make_views(make_batch_on_grid(), config, GRID, 0)
    seen: list[torch.Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(views, 0.0)[0].backward()
    visible = views.tokens_BNP.gather(1, views.context_BMC[:, 0, :, None].expand(-1, -1, 216))
    assert torch.equal(seen[0], visible)
    missing = [name for name, p in model.named_parameters()
               if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert missing == []


def test_recipes_of_baselines_are_stored(root: Path) -> None:
    assert "method: mae" in (root / "mae" / "config.yaml").read_text()
    assert "method: jepa" in dump_config(tiny_config("feed", root))


def test_the_mae_is_counted_as_what_it_computes(root: Path) -> None:
    jepa, mae = (method.flops(config_of("feed", root, name), GRID)
                 for name, method in (("jepa", SparseJEPA), ("mae", MAE)))
    assert mae[0] == mae[1]  # all of it is trained
    assert 0 < mae[1] < jepa[1] < jepa[0]
