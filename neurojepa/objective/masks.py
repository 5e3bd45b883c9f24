"""Context and target masks: exact counts, drawn for a whole batch in one pass.

For each scale of the config a mask is a union of random blocks.  Every token gets its distance to
the union (negative inside), and the tokens nearest to or deepest in it become targets until the
exact count is reached: that grows or shrinks the union along its borders.  The count is filled in
proportion from foreground, background and unscanned tokens, so the context keeps its share of
brain whatever the blocks covered.

Context and target are disjoint and together use all N tokens.  Unscanned tokens are therefore
listed too (their number differs between scans, the shapes must not), but they count for nothing:
attention never reads them (``valid``) and as targets their loss weight is 0.

A share of the masks hides whole regions of an atlas instead: the regions are put in random order
and their tokens become targets, region by region, until the count is reached; only the last one is
cut, along the borders of the mask's blocks.

All scales are drawn at once.  Lengths are whole 128ths of a token, so distances are exact and the
masks the same on every device.

Of the shape letters (neurojepa/__init__.py): G are the blocks of all of a scan's masks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neurojepa.config import MaskConfig
from neurojepa.objective import random

FOREGROUND_SHARE = 0.1  # of brain voxels, above which a token counts as foreground
_UNIT = 128  # lengths per token: up to 127 tokens fit into int16, the fastest for a CPU
_BLOCKS, _UNIFORM, _REGIONS = 16, 17, 18  # random streams, apart from those of the views


def draw_masks(keep_BN: Tensor, counts: tuple[int, int, int], *, foreground_BN: Tensor,
               valid_BN: Tensor, masks: MaskConfig, seed: int, position_B: Tensor,
               regions: tuple[Tensor, int] | None = None) -> tuple[Tensor, Tensor]:
    """Draw one context/target split per scale.

    Parameters
    ----------
    keep_BN : int64, each token's patch among those of the grid (x, y, z; z fastest).
    counts : patches of the grid along x, y, z.
    foreground_BN : share of brain voxels of each token.
    valid_BN : False where nothing was scanned.
    position_B : int64, the key of each sample's draws.
    regions : int64 [n], the region of every patch of the grid, and the number of regions R; where
        ``masks.region_share`` is above 0.

    Returns
    -------
    context_BMC, target_BMT : int64 indices into N, ascending
        T = round(N * target_share) and C = N - T
    """
    num_tokens = keep_BN.shape[1]
    num_targets = round(num_tokens * masks.target_share)
    foreground_BN = (foreground_BN > FOREGROUND_SHARE) & valid_BN
    num_blocks = sum(blocks for blocks, _, _ in masks.scales)
    num_ties = len(masks.scales) * num_tokens
    shapes, ties = random.uniform(seed, position_B, _BLOCKS, 6 * num_blocks + num_ties).split(
        [6 * num_blocks, num_ties], 1)
    distance_BMN = _distance_to_blocks(keep_BN, counts, foreground_BN, masks,
                                       shapes.view(-1, num_blocks, 6))
    ties_BMN = (ties * (1 << 24)).long().view_as(distance_BMN)  # exact
    # one sort ranks the tokens of each stratum by distance: foreground, background, unscanned
    stratum_B1N = 2 - valid_BN.long()[:, None] - foreground_BN.long()[:, None]
    key_BMN = (stratum_B1N << 34) + distance_BMN
    if regions is not None:
        key_BMN += _turns(regions, keep_BN, masks, seed, position_B) << 16
    key_BMN = (key_BMN << 24) + ties_BMN
    order_BMN = key_BMN.sort(dim=2, stable=True).indices
    chosen_B1N = _leading_parts(foreground_BN, valid_BN, num_targets)[:, None]
    is_target_BMN = torch.empty_like(order_BMN, dtype=torch.bool).scatter_(
        2, order_BMN, chosen_B1N.expand_as(order_BMN))
    target_BMT, context_BMC = _front(is_target_BMN).split(
        [num_targets, num_tokens - num_targets], 2)
    return context_BMC, target_BMT


def draw_uniform_masks(num_tokens: int, target_share: float, *, seed: int,
                       position_B: Tensor) -> tuple[Tensor, Tensor]:
    """One split per scan in which every token is as likely a target: context and target as above.

    Returns
    -------
    context_B1C, target_B1T : int64 indices into N, ascending
    """
    num_targets = round(num_tokens * target_share)
    drawn_BN = random.uniform(seed, position_B, _UNIFORM, num_tokens)
    order_BN = drawn_BN.sort(dim=1, stable=True).indices
    target_BT, context_BC = order_BN.split([num_targets, num_tokens - num_targets], 1)
    return context_BC.sort(1).values[:, None], target_BT.sort(1).values[:, None]


def _distance_to_blocks(keep_BN: Tensor, counts: tuple[int, int, int], foreground_BN: Tensor,
                        masks: MaskConfig, drawn_BG6: Tensor) -> Tensor:
    """int64 [B, M, N]: distance along the farthest axis to the union of each scale's random boxes.

    A box takes a share of the foreground's volume: uniform between the scale's bounds, times a
    second uniform share, as the cross-section and depth of V-JEPA's blocks.  ``drawn_BG6`` is
    uniform: place, cross-section, depth and stretch along three axes.
    """
    per_scale = [blocks for blocks, _, _ in masks.scales]
    # in float64: what is rounded to whole numbers is then the same on every device
    drawn_BG6 = drawn_BG6.double()
    # centres at random foreground tokens, so that blocks lie where there is something to predict
    num_foreground_B1 = foreground_BN.sum(1, keepdim=True)
    places_B1 = torch.where(num_foreground_B1 > 0, num_foreground_B1, keep_BN.shape[1])
    pick_BG = (drawn_BG6[..., 0] * places_B1).long()
    centre_BG = keep_BN.gather(1, _front(foreground_BN).gather(1, pick_BG))

    section_BG = torch.cat([low + (high - low) * part for (_, low, high), part in zip(
        masks.scales, drawn_BG6[..., 1].split(per_scale, 1), strict=True)], 1)
    edge_BG = (section_BG * drawn_BG6[..., 2] * places_B1) ** (1 / 3)
    log_low, log_high = (math.log(bound) for bound in masks.aspect)
    stretch_BG3 = log_low + (log_high - log_low) * drawn_BG6[..., 3:]
    stretch_BG3 = torch.exp(stretch_BG3 - stretch_BG3.mean(-1, keepdim=True))  # volume unchanged
    half_BG3 = (edge_BG[..., None] * stretch_BG3 * (_UNIT / 2)).round()
    half_BG3 = half_BG3.clamp(max=127 * _UNIT).short()

    def beyond(axis: int, place_BG: Tensor) -> Tensor:
        """int16 [B, G, count]: how far layers of patches lie outside the boxes along an axis."""
        layers = torch.arange(counts[axis], dtype=torch.int16, device=keep_BN.device)
        return (layers - place_BG.short()[..., None]).abs() * _UNIT - half_BG3[..., axis, None]

    rows, columns = counts[1] * counts[2], counts[2]
    x, y = beyond(0, centre_BG // rows), beyond(1, centre_BG // columns % counts[1])
    z = beyond(2, centre_BG % columns)
    yz = torch.maximum(y[..., None], z[..., None, :]).flatten(2)[:, :, None]
    beyond_BGn = torch.maximum(x[..., None], yz).flatten(2)
    distance_BMn = torch.stack([part.amin(1) for part in beyond_BGn.split(per_scale, 1)], 1)
    index_BMN = keep_BN[:, None].expand(-1, len(per_scale), -1)
    return distance_BMn.gather(2, index_BMN).long()


def _turns(regions: tuple[Tensor, int], keep_BN: Tensor, masks: MaskConfig, seed: int,
           position_B: Tensor) -> Tensor:
    """int64 [B, M, N]: in which turn the region of each token is masked; 0 in masks of blocks."""
    region_n, num_regions = regions
    num_masks = len(masks.scales)
    is_whole, order = random.uniform(seed, position_B, _REGIONS, num_masks * (1 + num_regions)
                                     ).split([num_masks, num_masks * num_regions], 1)
    order_BMR = order.view(-1, num_masks, num_regions).sort(dim=2, stable=True).indices
    turn_R = torch.arange(num_regions, device=keep_BN.device)
    turn_BMR = torch.empty_like(order_BMR).scatter_(2, order_BMR, turn_R.expand_as(order_BMR))
    turn_BMN = turn_BMR.gather(2, region_n[keep_BN][:, None].expand(-1, num_masks, -1))
    return turn_BMN * (is_whole < masks.region_share)[..., None]


def _leading_parts(foreground_BN: Tensor, valid_BN: Tensor, num_targets: int) -> Tensor:
    """bool [B, N]: the places of the targets when tokens are sorted by stratum, then by distance.

    Each stratum gives its leading part, in proportion to its size (to within one token).
    """
    N = valid_BN.shape[1]
    place_N = torch.arange(N, device=valid_BN.device)
    inner_B2 = torch.stack([foreground_BN.sum(1), valid_BN.sum(1)], 1)
    bounds_B4 = torch.nn.functional.pad(torch.nn.functional.pad(inner_B2, (1, 0)), (0, 1), value=N)
    quota_B3 = ((2 * num_targets * bounds_B4 + N) // (2 * N)).diff(dim=1)
    start_B31 = bounds_B4[:, :3, None]
    return ((place_N >= start_B31) & (place_N < start_B31 + quota_B3[..., None])).any(1)


def _front(mask: Tensor) -> Tensor:
    """int64 [..., N]: indices of a mask's true elements, ascending, then those of the others."""
    place_N = torch.arange(mask.shape[-1], device=mask.device)
    rank = mask.cumsum(-1)
    slot = torch.where(mask, rank - 1, rank[..., -1:] + place_N - rank)
    return torch.empty_like(slot).scatter_(-1, slot, place_N.expand_as(slot))
