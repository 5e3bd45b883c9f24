"""Context and target masks: exact counts, drawn for a whole batch in one pass.

For each scale of the config a mask is a union of random blocks.  Every token gets its distance to
the union (negative inside), and the tokens nearest to or deepest in it become targets until the
exact count is reached: that grows or shrinks the union along its borders.  The count is filled in
proportion from foreground, background and unscanned tokens, so the context keeps its share of
brain whatever the blocks covered.

Context and target are disjoint and together use all N tokens.  Unscanned tokens are therefore
listed too (their number differs between scans, the shapes must not), but they count for nothing:
attention never reads them (``valid``) and as targets their loss weight is 0.

Shape letters: B scans, N tokens, M masks, K blocks of a mask, C context and T target tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neurojepa.config import MaskConfig
from neurojepa.objective import random

FOREGROUND_SHARE = 0.1  # of brain voxels, above which a token counts as foreground
# random streams, apart from those of the views
_PLACE, _SECTION, _DEPTH, _ASPECT, _TIES, _UNIFORM = range(16, 22)
_SCALE_STRIDE = 1024  # streams of different scales never meet


def draw_masks(coords_BN3: Tensor, foreground_BN: Tensor, valid_BN: Tensor, masks: MaskConfig,
               token_mm: float, seed: int, position_B: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one context/target split per scale.

    Parameters
    ----------
    coords_BN3 : token centres, mm.
    foreground_BN : share of brain voxels of each token.
    valid_BN : False where nothing was scanned.
    token_mm : edge of a token.
    position_B : int64, the key of each sample's draws.

    Returns
    -------
    context_BMC, target_BMT : int64 indices into N, ascending
        T = round(N * target_share) and C = N - T
    """
    num_tokens = coords_BN3.shape[1]
    num_targets = round(num_tokens * masks.target_share)
    foreground_BN = (foreground_BN > FOREGROUND_SHARE) & valid_BN
    contexts, targets = [], []
    for scale, blocks in enumerate(masks.scales):
        distance_BN = _distance_to_blocks(coords_BN3, foreground_BN, blocks, masks.aspect,
                                          token_mm, seed, position_B, scale * _SCALE_STRIDE)
        ties_BN = random.uniform(seed, position_B, _TIES + scale * _SCALE_STRIDE, num_tokens)
        order_BN = _fill_in_proportion(distance_BN + 1e-3 * ties_BN, foreground_BN, valid_BN)
        targets.append(order_BN[:, :num_targets].sort(dim=1).values)
        contexts.append(order_BN[:, num_targets:].sort(dim=1).values)
    return torch.stack(contexts, 1), torch.stack(targets, 1)


def draw_uniform_masks(num_tokens: int, target_share: float, seed: int,
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


def _distance_to_blocks(coords_BN3: Tensor, foreground_BN: Tensor,
                        blocks: tuple[int, float, float], aspect: tuple[float, float],
                        token_mm: float, seed: int, position_B: Tensor, stream: int) -> Tensor:
    """[B, N] mm: distance along the farthest axis to the union of the scale's random boxes.

    A box takes a share of the foreground's volume: uniform between the scale's bounds, times a
    second uniform share, as the cross-section and depth of V-JEPA's blocks.
    """
    num_blocks, smallest, largest = blocks

    def draw(use: int, count: int) -> Tensor:
        return random.uniform(seed, position_B, use + stream, count)

    # centres at random foreground tokens, so that blocks lie where there is something to predict
    order_BN = (~foreground_BN).to(torch.uint8).sort(dim=1, stable=True).indices
    num_foreground_B1 = foreground_BN.sum(1, keepdim=True)
    places_B1 = torch.where(num_foreground_B1 > 0, num_foreground_B1, coords_BN3.shape[1])
    pick_BK = random.integers(seed, position_B, _PLACE + stream, num_blocks, places_B1)
    rows_B1 = torch.arange(len(order_BN), device=order_BN.device)[:, None]
    centre_BK3 = coords_BN3[rows_B1, order_BN.gather(1, pick_BK)]

    share_BK = (smallest + (largest - smallest) * draw(_SECTION, num_blocks)
                ) * draw(_DEPTH, num_blocks)
    log_low, log_high = math.log(aspect[0]), math.log(aspect[1])
    stretch_BK3 = (log_low + (log_high - log_low) * draw(_ASPECT, num_blocks * 3)
                   ).view(-1, num_blocks, 3)
    stretch_BK3 = torch.exp(stretch_BK3 - stretch_BK3.mean(-1, keepdim=True))  # volume unchanged
    edge_mm_BK = (share_BK * places_B1) ** (1 / 3) * token_mm
    half_BK3 = edge_mm_BK[..., None] * stretch_BK3 / 2

    beyond_BKN3 = (coords_BN3[:, None] - centre_BK3[:, :, None]).abs() - half_BK3[:, :, None]
    return beyond_BKN3.amax(-1).amin(1)


def _fill_in_proportion(distance_BN: Tensor, foreground_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """int64 [B, N]: tokens by their rank within their own stratum, nearest to the blocks first.

    Any leading part of the order holds foreground, background and unscanned tokens in the
    proportions of the whole (to within one token each).
    """
    stratum_BN = torch.where(valid_BN, torch.where(foreground_BN, 0, 1), 2)
    near_BN = distance_BN.sort(dim=1, stable=True).indices
    stratum_near_BN = stratum_BN.gather(1, near_BN)
    member_BN3 = stratum_near_BN[..., None] == torch.arange(3, device=near_BN.device)
    rank_BN = (member_BN3.cumsum(1) * member_BN3).sum(-1)
    size_BN = member_BN3.sum(1).gather(1, stratum_near_BN)
    quantile_BN = (rank_BN - 0.5) / size_BN
    return near_BN.gather(1, quantile_BN.sort(dim=1, stable=True).indices)
