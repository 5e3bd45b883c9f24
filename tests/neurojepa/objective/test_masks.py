"""Masks and views: exact counts, disjoint, foreground kept, and keyed by sample alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from neurojepa.config import MaskConfig
from neurojepa.feed.format import FeedCode
from neurojepa.objective.masks import FOREGROUND_SHARE, draw_masks
from neurojepa.objective.views import INTENSITY_MEAN, INTENSITY_STD, Views, make_views
from tests.helpers.batches import GRID, make_batch, make_config, part

NUM_PATCHES = 640


def foreground_share(views: Views, index_BMk: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(len(index_BMk))[:, None, None]
    return (views.foreground_BN[rows, index_BMk] > FOREGROUND_SHARE).float().mean(-1)


@pytest.mark.parametrize("budget, share", [(256, 0.75), (None, 0.75), (100, 0.3), (8, 0.9)])
def test_counts_are_exact_and_parts_disjoint(budget: int | None, share: float):
    config = make_config(budget, objective={"masks": {"target_share": share}})
    views = make_views(make_batch(4), config, GRID, seed=0)
    num = budget or NUM_PATCHES
    assert views.tokens_BNP.shape == (4, num, 27)
    assert views.target_BMT.shape == (4, 3, round(num * share))
    assert views.context_BMC.shape == (4, 3, num - round(num * share))
    together = torch.cat([views.context_BMC, views.target_BMT], -1).sort(-1).values
    assert torch.equal(together, torch.arange(num).expand(4, 3, num))


def test_context_and_targets_keep_the_share_of_brain():
    views = make_views(make_batch(6), make_config(None), GRID, seed=0)
    overall = (views.foreground_BN > FOREGROUND_SHARE).float().mean(1)[:, None]
    assert (overall > 0.2).all() and (overall < 0.8).all()
    for index in (views.context_BMC, views.target_BMT):
        assert (foreground_share(views, index) - overall).abs().max() < 2 / index.shape[-1]


def test_masks_are_blocks_not_salt_and_pepper():
    """Neighbouring tokens share their side far more often than independent draws would (0.625)."""
    views = make_views(make_batch(6), make_config(256), GRID, seed=0)
    distance = torch.cdist(views.coords_BN3, views.coords_BN3)
    neighbours = (distance > 0) & (distance < 9.1)
    for scale in range(3):
        is_target = torch.zeros(6, 256).scatter_(1, views.target_BMT[:, scale], 1.0)
        agree = is_target[:, :, None] == is_target[:, None]
        assert (agree & neighbours).sum() / neighbours.sum() > 0.72


def test_larger_scales_give_larger_holes():
    coords = make_views(make_batch(1), make_config(None), GRID, 0).coords_BN3.expand(64, -1, 3)
    every = torch.arange(NUM_PATCHES).expand(64, -1)
    foreground, valid = torch.ones(64, NUM_PATCHES), torch.ones(64, NUM_PATCHES, dtype=torch.bool)
    masks = MaskConfig(scales=[(40, 0.01, 0.05), (1, 0.9, 1.0)], target_share=0.4)
    context, target = draw_masks(every, (8, 10, 8), foreground_BN=foreground, valid_BN=valid,
                                 masks=masks, seed=0, position_B=torch.arange(64))
    rows = torch.arange(64)[:, None]
    nearest = [torch.cdist(coords[rows, target[:, m]], coords[rows, context[:, m]]).amin(-1).mean()
               for m in range(2)]
    assert nearest[1] > 1.2 * nearest[0]


def test_every_token_is_sometimes_context_and_sometimes_target():
    batch = part(make_batch(1), [0] * 200)
    batch.position = torch.arange(200)
    views = make_views(batch, make_config(256), GRID, seed=3)
    is_target = torch.zeros(200, 3, 256).scatter_(2, views.target_BMT, 1.0)
    rate = is_target.mean(0)
    assert rate.min() > 0.15 and rate.max() < 0.98
    assert rate.mean() == pytest.approx(0.75)


def test_views_depend_on_seed_position_and_voxels_only():
    batch, config = make_batch(5), make_config()
    whole = make_views(batch, config, GRID, seed=7)
    for index in ([3], [4, 1]):
        split = make_views(part(batch, index), config, GRID, seed=7)
        for name, value in vars(split).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(whole, name)[index]), name
    for other in (make_views(batch, config, GRID, seed=8),
                  make_views(SimpleNamespace(**{**vars(batch), "position": batch.position + 1}),
                             config, GRID, seed=7)):
        assert not torch.equal(other.tokens_BNP, whole.tokens_BNP)
        assert not torch.equal(other.target_BMT, whole.target_BMT)


def test_budget_keeps_the_patches_with_most_brain():
    batch = make_batch(3)
    every = make_views(batch, make_config(None), GRID, 0)
    kept = make_views(batch, make_config(200), GRID, 0)
    best = every.foreground_BN.sort(1, descending=True).values[:, :200]
    torch.testing.assert_close(kept.foreground_BN.sort(1, descending=True).values, best)


def test_foreground_is_judged_before_augmentation():
    batch = make_batch(2)
    plain = make_config(None, objective={"augment": {"gamma": 0, "noise": 0, "bias_field": 0}})
    strong = make_config(None, objective={"augment": {"gamma": 1, "noise": 1, "bias_field": 1}})
    a, b = make_views(batch, plain, GRID, 0), make_views(batch, strong, GRID, 0)
    assert torch.equal(a.foreground_BN, b.foreground_BN)
    air = a.foreground_BN == 0
    assert air.any() and torch.equal(a.tokens_BNP[air], b.tokens_BNP[air])
    assert (b.tokens_BNP[air] == -INTENSITY_MEAN / INTENSITY_STD).all()
    assert not torch.equal(a.tokens_BNP[~air], b.tokens_BNP[~air])
    assert a.foreground_BN[0].mean() == pytest.approx(
        ((batch.voxels[0] > 0) & (batch.voxels[0] < 255)).float().mean().item())


def test_plain_tokens_are_the_stored_intensities():
    config = make_config(None, objective={"augment": {"gamma": 0, "noise": 0, "bias_field": 0}})
    batch = make_batch(1)
    tokens = make_views(batch, config, GRID, 0).tokens_BNP[0] * INTENSITY_STD + INTENSITY_MEAN
    corner = batch.voxels[0, 9:12, 12:15, 9:12].flatten()  # patch 3, 4, 3
    torch.testing.assert_close(tokens[(3 * 10 + 4) * 8 + 3], (corner.float() - 1) / 253)


@pytest.mark.parametrize("part_name", ["gamma", "noise", "bias_field"])
def test_each_augmentation_changes_tokens_within_its_bound(part_name: str):
    off = {"gamma": 0.0, "noise": 0.0, "bias_field": 0.0}
    batch = make_batch(3)
    plain = make_views(batch, make_config(None, objective={"augment": off}), GRID, 0)
    changed = make_views(batch, make_config(None, objective={"augment": {**off, part_name: 0.2}}),
                         GRID, 0)
    difference = (changed.tokens_BNP - plain.tokens_BNP).abs() * INTENSITY_STD
    assert difference.max() > 0.005
    limit = {"gamma": 0.08, "noise": 0.2 * 3.47, "bias_field": 0.23}[part_name]
    assert difference.max() < limit


def test_unscanned_patches_come_last_and_are_invalid():
    batch = make_batch(2)
    batch.voxels[0, :, :, :12] = FeedCode.NOT_SCANNED  # half of the first scan
    views = make_views(batch, make_config(None), GRID, 0)
    assert views.valid_BN[0].sum() == NUM_PATCHES // 2 and views.valid_BN[1].all()
    assert not views.tokens_BNP[0][~views.valid_BN[0]].any()
    chosen = make_views(batch, make_config(256), GRID, 0)
    assert chosen.valid_BN.all()
    for index in (views.context_BMC[0], views.target_BMT[0]):  # context keeps its share of valid
        valid_share = views.valid_BN[0][index].float().mean(-1)
        assert (valid_share - 0.5).abs().max() < 0.02


def test_a_scan_without_brain_weighs_nothing():
    batch = make_batch(2)
    batch.voxels[1] = 0
    views = make_views(batch, make_config(), GRID, 0)
    assert views.weight_B.tolist() == [1.0, 0.0]
    assert bool(views.tokens_BNP.isfinite().all())
