"""Cross-modal pairs: the context from one scan of a session, the targets from another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from neurojepa.config import RootConfig
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import MODALITIES, Feed, open_feed
from neurojepa.feed.loader import Batch, SampleReader
from neurojepa.feed.order import Order
from neurojepa.model.build import build_model
from neurojepa.objective.views import Views, make_views
from neurojepa.storage import read_rows
from tests.helpers.batches import GRID, make_batch, make_config
from tests.helpers.feeds import damage, feed_config, read_batches, write_feed
from tests.helpers.kernels import NoSyncNoAtomics
from tests.helpers.worker import job, run_ranks

PLAIN = {"gamma": 0, "noise": 0, "bias_field": 0}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight sessions of T1w, T2w and PET."""
    folder = tmp_path_factory.mktemp("pairs") / "feed"
    write_feed(str(folder), modalities=("T1w", "T2w", "PET"), per_session=3)
    return folder


def order_of(feed: Feed, seed: int = 0, **data: Any) -> Order:
    return Order(feed.index, feed_config(feed.uri, cross_modal=0.4, **data).data, seed)


def pairs(order: Order, count: int) -> list[tuple[int, list[int]]]:
    return [(row, order.partners(row, position))
            for position, row in enumerate(order.rows(np.arange(count)).tolist())]


# ---- order ---------------------------------------------------------------------------------------

def test_partners_are_of_the_same_session_and_another_modality(local: Path) -> None:
    feed = open_feed(str(local))
    columns, found = feed.index.to_pydict(), pairs(order_of(feed), 3000)
    crossed = [(row, others) for row, others in found if others]
    assert len(crossed) / 3000 == pytest.approx(0.4, abs=0.03)
    for row, others in crossed:
        assert len(others) == 2
        assert {columns["participant"][other] for other in others} == {columns["participant"][row]}
        assert len({columns["modality"][other] for other in (row, *others)}) == 3
    first = [columns["modality"][others[0]] for row, others in crossed
             if columns["modality"][row] == "T1w"]
    assert first.count("PET") / len(first) == pytest.approx(0.5, abs=0.1)  # either as often


def test_partners_are_a_function_of_seed_and_position(local: Path) -> None:
    feed = open_feed(str(local))
    backwards = replace(feed, index=feed.index.take(list(range(23, -1, -1))))
    order, other = order_of(feed), order_of(backwards)
    assert order.fingerprint == other.fingerprint
    assert [(23 - row, [23 - each for each in others]) for row, others in pairs(other, 200)] == \
        pairs(order, 200)
    assert pairs(order_of(feed, seed=1), 200) != pairs(order, 200)
    off = Order(feed.index, feed_config(feed.uri).data, 0)
    assert off.fingerprint != order.fingerprint and not any(o for _, o in pairs(off, 200))
    assert np.array_equal(off.rows(np.arange(200)), order.rows(np.arange(200)))


def test_only_samples_of_the_order_are_partners(local: Path) -> None:
    feed = open_feed(str(local))
    modality = feed.index["modality"].to_pylist()
    for data in ({"modalities": ["T1w", "PET"]}, {"weights": {"blobs/T1w": 1, "blobs/PET": 2}}):
        found = pairs(order_of(feed, **data), 300)
        assert {modality[other] for _, others in found for other in others} == {"T1w", "PET"}
    with pytest.raises(ConfigError, match=r"data\.cross_modal > 0: of 8 scans in 8 sessions none"):
        order_of(feed, modalities=["T1w"])


def test_the_baselines_refuse_pairs() -> None:
    with pytest.raises(ConfigError, match=r"data\.cross_modal 0\.5: objective\.method mae"):
        make_config(data={"feed": "x", "cross_modal": 0.5}, objective={"method": "mae"})


# ---- loader --------------------------------------------------------------------------------------

def seen(config: RootConfig, world: int = 1, start: int = 0) -> dict[int, tuple[str, str, bytes]]:
    """Position -> scan id, modality of the targets and voxels that they come from."""
    found = {}
    for rank in range(world):
        for batch in read_batches(config, rank, world, start):
            assert batch.target_voxels is not None and batch.target_modality is not None
            for n in np.flatnonzero(batch.weight.numpy()):
                found[int(batch.position[n])] = (
                    batch.scan_ids[n], MODALITIES[int(batch.target_modality[n])],
                    batch.target_voxels[n].numpy().tobytes())
    return found


def expected(feed: Feed, order: Order, position: int, choice: int = 0) -> tuple[str, str, bytes]:
    row = order.row(position)
    target = [*order.partners(row, position)[choice:], row][0]
    columns = feed.index.to_pydict()
    return (columns["scan_id"][row], columns["modality"][target],
            SampleReader(feed).image(target).tobytes())


def test_every_world_size_and_start_reads_the_same_pairs(local: Path) -> None:
    config, feed = feed_config(str(local), cross_modal=0.4), open_feed(str(local))
    alone, order = seen(config), order_of(feed)
    assert alone == {position: expected(feed, order, position) for position in range(32)}
    assert seen(config, 2) == seen(config, 3) == alone
    assert seen(config, 2, start=3) == {p: alone[p] for p in range(12, 32)}


def test_switched_off_a_batch_holds_no_second_scan(local: Path) -> None:
    batch = read_batches(feed_config(str(local)))[0]
    assert batch.target_voxels is None and batch.target_modality is None


def test_a_damaged_partner_is_replaced_by_the_next_and_at_last_by_the_sample(
        local: Path, tmp_path: Path) -> None:
    feed = open_feed(str(local))
    order = order_of(feed)
    position, row = next((p, row) for p, (row, others) in enumerate(pairs(order, 32)) if others)
    first, second = order.partners(row, position)
    one = damage(local, tmp_path / "one", [first])
    config = feed_config(one, cross_modal=0.4, replace_damaged=True)
    assert seen(config)[position] == expected(feed, order, position, choice=1)
    assert seen(config, 3) == seen(config)
    both = feed_config(damage(local, tmp_path / "both", [first, second]), cross_modal=0.4,
                     replace_damaged=True)
    assert seen(both)[position] == expected(feed, order, position, choice=2)
    with pytest.raises(DataError, match=r"content differs.*or set data\.replace_damaged=true"):
        read_batches(feed_config(one, cross_modal=0.4))


# ---- views and model -----------------------------------------------------------------------------

def paired_batch(unscanned: bool = False) -> SimpleNamespace:
    """Three scans, the second of which has its targets from another one."""
    batch, others = make_batch(3), make_batch(6)
    batch.target_voxels, batch.target_modality = batch.voxels.clone(), batch.modality.clone()
    batch.target_voxels[1], batch.target_modality[1] = others.voxels[5], 3
    if unscanned:
        batch.target_voxels[1, :, :, :12] = 255
    return batch


def test_the_same_patches_are_cut_from_both_scans() -> None:
    batch, config = paired_batch(), make_config(256, objective={"augment": PLAIN})
    views = make_views(batch, config, GRID, seed=0)
    alone = make_views(make_batch(3), config, GRID, seed=0)
    for name in ("tokens_BNP", "coords_BN3", "context_BMC", "target_BMT", "foreground_BN"):
        assert torch.equal(getattr(views, name), getattr(alone, name)), name
    assert torch.equal(views.target_tokens_BNP[[0, 2]], views.tokens_BNP[[0, 2]])
    every = make_config(None, objective={"augment": PLAIN})
    partner = make_views(SimpleNamespace(**{**vars(make_batch(3)), "voxels": batch.target_voxels}),
                         every, GRID, 0)
    patch_of = (make_views(batch, every, GRID, 0).coords_BN3[1][None] ==
                views.coords_BN3[1][:, None]).all(-1).long().argmax(1)
    assert torch.equal(views.target_tokens_BNP[1], partner.tokens_BNP[1][patch_of])
    assert torch.equal(views.target_foreground_BN[1], partner.foreground_BN[1][patch_of])


def test_a_partner_is_augmented_by_draws_of_its_own() -> None:
    batch, config = paired_batch(), make_config(256)
    batch.target_voxels[1] = batch.voxels[1]  # so that the draws alone differ
    views = make_views(batch, config, GRID, seed=0)
    assert torch.equal(views.target_tokens_BNP[[0, 2]], views.tokens_BNP[[0, 2]])
    assert not torch.equal(views.target_tokens_BNP[1], views.tokens_BNP[1])
    assert torch.equal(views.target_foreground_BN, views.foreground_BN)


def test_targets_count_where_both_scans_show_something() -> None:
    views = make_views(paired_batch(unscanned=True), make_config(None), GRID, seed=0)
    assert views.valid_BN.all()
    assert views.target_valid_BN.float().mean(1).tolist() == [1.0, 0.5, 1.0]
    poisoned = torch.where(views.target_valid_BN[..., None], views.target_tokens_BNP, 50.0)
    model = build_model(make_config(None), GRID)
    assert torch.equal(model(views, 1e-3)[0],
                       model(replace(views, target_tokens_BNP=poisoned), 1e-3)[0])


def losses(model: torch.nn.Module, views: Views) -> torch.Tensor:
    """Loss of each sample, [B]."""
    parts = [Views(**{name: value[[n]] if isinstance(value, torch.Tensor) else value
                      for name, value in vars(views).items()}) for n in range(3)]
    return torch.stack([model(part, 1e-3)[0].detach() for part in parts])


def test_targets_come_from_the_partner_whose_modality_the_predictor_is_told() -> None:
    config = make_config(96)
    model, views = build_model(config, GRID), make_views(paired_batch(), config, GRID, seed=0)
    before = losses(model, views)
    tokens = views.target_tokens_BNP.clone()
    tokens[1] += 0.5
    of_target = losses(model, replace(views, target_tokens_BNP=tokens))
    told = losses(model, replace(views, target_modality_B=torch.tensor([0, 4, 2])))
    for changed in (of_target, told):
        assert (changed != before).tolist() == [False, True, False]
    # the encoder is told nothing
    assert torch.equal(losses(model, replace(views, modality_B=torch.tensor([2, 0, 1]))), before)


def test_cross_modal_losses_are_told_apart() -> None:
    config = make_config(96)
    model, views = build_model(config, GRID), make_views(paired_batch(), config, GRID, seed=0)
    loss, metrics = model(views, 1e-3)
    parts = losses(model, views)
    torch.testing.assert_close(metrics["loss/cross"], parts[1])
    torch.testing.assert_close(metrics["loss/PET"], parts[1])  # by the modality of the targets
    assert metrics["weight/cross"] == 1 and metrics["weight/T2w"] == 0
    torch.testing.assert_close(metrics["loss/T1w"] + metrics["loss/FLAIR"], parts[0] + parts[2])
    torch.testing.assert_close(loss, parts.sum())


def test_pairs_need_no_wait_for_the_device() -> None:
    config, batch = make_config(96), paired_batch()
    model = build_model(config, GRID)
    with NoSyncNoAtomics():
        model(make_views(batch, config, GRID, 0), torch.tensor(1e-3))[0].backward()


def test_a_batch_moves_whole() -> None:
    batch = Batch(**{name: getattr(paired_batch(), name) for name in (
        "voxels", "modality", "position", "weight", "target_voxels", "target_modality")},
        scan_ids=["a", "b", "c"])
    moved = batch.to(torch.device("meta"))
    assert moved.target_voxels is not None and moved.target_voxels.device.type == "meta"
    assert moved.voxels.device.type == "meta" and moved.scan_ids == batch.scan_ids


# ---- training ------------------------------------------------------------------------------------

@pytest.mark.slow(8)
def test_a_run_with_pairs_and_priors_continues_bit_equal(local: Path, tmp_path: Path) -> None:
    def config(name: str) -> RootConfig:
        tree = feed_config(str(local), tmp_path / name, cross_modal=0.5).model_dump()
        tree["objective"]["masks"]["region_share"] = 0.5
        return RootConfig.model_validate(tree | {"objective": {
            **tree["objective"], "tissue_weight": 0.2}})

    (process,) = run_ranks([job(config("straight"), tmp_path),
                            job(config("killed"), tmp_path, die=["Run._train_step", 7])], tmp_path)
    assert process.returncode == 0, process.stdout
    rows, killed = (read_rows(str(tmp_path / name / "metrics.jsonl"))
                    for name in ("straight", "killed"))
    assert [row["loss"] for row in rows] == [row["loss"] for row in killed]
    ends = [read_rows(str(tmp_path / name / "events.jsonl"))[-1]["state_sha256"]
            for name in ("straight", "killed")]
    assert ends[0] == ends[1]
    events = [row["event"] for row in read_rows(str(tmp_path / "killed" / "events.jsonl"))]
    assert "resume" in events
    assert all(row["tissue"] > 0 for row in rows) and any("loss/cross" in row for row in rows)
