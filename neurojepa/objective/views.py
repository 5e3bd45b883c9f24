"""What the model sees of a batch: voxels on the device -> tokens, coordinates, masks.

    stored codes [B, X, Y, Z] -> patches -> foreground share (before augmentation) -> token budget,
    foreground first -> augmented, standardised tokens -> context and target masks

With cross-modal pairs the targets come from another scan of the session, which lies on the same
grid: the same patches are cut from it, augmented by draws of its own (no two sequences share a
scanner's bias or noise, so what the context cannot know of it is averaged out of the prediction).

All of it is batched tensor code on the batch's device with no read back to the host, and each
sample's part depends only on its voxels, its position and the seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from neurojepa.config import AugmentConfig, RootConfig
from neurojepa.feed.format import FeedCode, Grid
from neurojepa.methods import METHODS
from neurojepa.objective import random
from neurojepa.objective.anatomy import priors_on, regions_on, tissue_shares
from neurojepa.objective.masks import draw_masks, draw_uniform_masks

# Standardisation of brain intensities, which preparation scales to [0, 1].
INTENSITY_MEAN, INTENSITY_STD = 0.5, 0.25
BIAS_TERMS = 3  # per axis: a smooth field of degree two in each coordinate

_AIR, _NOT_SCANNED = int(FeedCode.AIR), int(FeedCode.NOT_SCANNED)  # torch traces plain numbers
_PARTNER = 1 << 40  # added to the position: the key of a partner's augmentation

_TIES, _GAMMA, _NOISE_LEVEL, _NOISE, _BIAS_LEVEL, _BIAS = range(6)  # random streams


class VoxelBatch(Protocol):
    """The part of a loader's batch that is read here."""

    voxels: Tensor  # uint8 [B, X, Y, Z]
    modality: Tensor  # int64 [B]
    position: Tensor  # int64 [B]
    weight: Tensor  # float32 [B]
    target_voxels: Tensor | None  # uint8 [B, X, Y, Z]; None: the targets come from voxels
    target_modality: Tensor | None  # int64 [B]
    all_scanned: bool  # no voxel of either says NOT_SCANNED


Regions = tuple[Tensor, int] | None  # from anatomy.regions_on
Priors = tuple[Tensor, Tensor] | None  # from anatomy.priors_on
Build = Callable[[VoxelBatch, RootConfig, Grid, int, Regions, Priors], "Views"]


class _Scans(NamedTuple):
    """The kept patches of a scan each."""

    tokens_BNP: Tensor
    foreground_BN: Tensor
    valid_BN: Tensor
    shows_brain_B: Tensor


@dataclass(kw_only=True)
class Views:
    """A micro-batch as the model takes it."""

    tokens_BNP: Tensor  # float32, standardised voxels of each patch
    coords_BN3: Tensor  # float32, patch centres in mm from the grid's centre
    foreground_BN: Tensor  # float32, share of brain voxels
    valid_BN: Tensor  # bool, False where nothing of the patch was scanned
    context_BMC: Tensor  # int64, indices into N
    target_BMT: Tensor  # int64, indices into N
    modality_B: Tensor  # int64, index into format.MODALITIES
    weight_B: Tensor  # float32, 0 for fill-up samples and for scans that show no brain at all
    # The scan that the targets come from; these are the fields above where it is the same one.
    target_tokens_BNP: Tensor
    target_foreground_BN: Tensor
    target_valid_BN: Tensor  # scanned in both
    target_modality_B: Tensor  # another than modality_B where it is another scan
    tissue_BNK: Tensor  # float32, shares of air, fluid, grey, white; or K = 0 without the head
    all_scanned: bool = False  # the host knows that nothing unscanned is in these scans

    def without_fill_up(self) -> Self:
        """The same views, of which no token of a sample that weighs 0 is valid.

        What repeats a scan to fill up a batch counts neither as load of the experts nor as use of
        atoms.
        """
        counts_B1 = self.weight_B[:, None] > 0
        return replace(self, valid_BN=self.valid_BN & counts_B1,
                       target_valid_BN=self.target_valid_BN & counts_B1)

    def of_targets(self) -> Self:
        """The scans that the targets come from as if they were the samples."""
        return replace(self, tokens_BNP=self.target_tokens_BNP, valid_BN=self.target_valid_BN,
                       foreground_BN=self.target_foreground_BN, modality_B=self.target_modality_B)


def make_views(batch: VoxelBatch, config: RootConfig, grid: Grid, seed: int,
               build: Build | None = None) -> Views:
    """Cut, choose, augment and mask a batch on its own device.

    ``build_model`` has checked that the patch divides the grid and that the budget fits.

    Parameters
    ----------
    build : ``build_views``, as it is or compiled.
    """
    regions, priors = anatomy_for(config, grid, batch.voxels.device)
    return (build or build_views)(batch, config, grid, seed, regions, priors)


def anatomy_for(config: RootConfig, grid: Grid, device: torch.device) -> tuple[Regions, Priors]:
    """What anatomy says of the grid, as far as the config asks for it; read once."""
    patch, objective = config.model.patch_voxels, config.objective
    return (regions_on(device, grid, patch, objective.regions)
            if objective.masks.region_share else None,
            priors_on(device, grid, patch) if objective.tissue else None)


def build_views(batch: VoxelBatch, config: RootConfig, grid: Grid, seed: int, regions: Regions,
                priors: Priors) -> Views:
    """``make_views`` with what anatomy says of the grid: tensor code alone, one graph."""
    patch, position_B = config.model.patch_voxels, batch.position
    counted = count_brain(batch.voxels, patch)
    keep_BN = _choose_tokens(*counted, config.model.token_budget, seed, position_B)
    own = target = _cut(batch.voxels, counted, keep_BN, position_B, config, grid, seed)
    target_modality_B = batch.modality
    if batch.target_voxels is not None and batch.target_modality is not None:
        target_modality_B = batch.target_modality
        key_B = position_B + (target_modality_B != batch.modality) * _PARTNER
        target = _cut(batch.target_voxels, count_brain(batch.target_voxels, patch), keep_BN, key_B,
                      config, grid, seed)
        target = target._replace(valid_BN=target.valid_BN & own.valid_BN)
    masks, device = config.objective.masks, keep_BN.device
    if METHODS[config.objective.method].masks == "blocks":
        context_BMC, target_BMT = draw_masks(
            keep_BN, patch_counts(grid, patch), foreground_BN=own.foreground_BN,
            valid_BN=own.valid_BN, masks=masks, seed=seed, position_B=position_B, regions=regions)
    else:
        context_BMC, target_BMT = draw_uniform_masks(keep_BN.shape[1], masks.target_share,
                                                     seed=seed, position_B=position_B)
    return Views(
        tokens_BNP=own.tokens_BNP, coords_BN3=patch_centres_mm(grid, patch, device)[keep_BN],
        foreground_BN=own.foreground_BN, valid_BN=own.valid_BN,
        context_BMC=context_BMC, target_BMT=target_BMT, modality_B=batch.modality,
        weight_B=batch.weight * own.shows_brain_B * target.shows_brain_B,
        target_tokens_BNP=target.tokens_BNP, target_foreground_BN=target.foreground_BN,
        target_valid_BN=target.valid_BN, target_modality_B=target_modality_B,
        tissue_BNK=_tissue(batch.voxels, keep_BN, patch, priors), all_scanned=batch.all_scanned)


def _cut(voxels: Tensor, counted: tuple[Tensor, Tensor], keep_BN: Tensor, key_B: Tensor,
         config: RootConfig, grid: Grid, seed: int) -> _Scans:
    """The kept patches of scans, augmented by the draws of ``key_B``."""
    patch, (brain_Bn, scanned_Bn) = config.model.patch_voxels, counted
    rows_B1 = torch.arange(len(keep_BN), device=keep_BN.device)[:, None]
    tokens_BNP = _tokens(patchify(voxels, patch)[rows_B1, keep_BN], keep_BN, grid, patch,
                         config.objective.augment, seed, key_B)
    return _Scans(tokens_BNP=tokens_BNP,
                  foreground_BN=brain_Bn[rows_B1, keep_BN].float() / patch**3,
                  valid_BN=scanned_Bn[rows_B1, keep_BN],
                  shows_brain_B=(brain_Bn.sum(-1) > 0).float())


def _tissue(voxels: Tensor, keep_BN: Tensor, patch: int, priors: Priors) -> Tensor:
    if priors is None:
        return voxels.new_empty(*keep_BN.shape, 0, dtype=torch.float32)
    rows_B1 = torch.arange(len(keep_BN), device=keep_BN.device)[:, None]
    return tissue_shares(patchify(voxels, patch)[rows_B1, keep_BN], keep_BN, priors)


def count_brain(voxels: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Brain voxels of each patch, int32 [B, n], and whether any of it was scanned, bool [B, n]."""
    # on a CPU two scans at a time, which stay in its cache
    parts = [_count_brain(part, patch)
             for part in (voxels.split(2) if voxels.device.type == "cpu" else [voxels])]
    brain, scanned = zip(*parts, strict=True)
    return torch.cat(brain), torch.cat(scanned)


def _count_brain(voxels: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Bytes are clamped and added rather than compared, which is an order faster on a CPU."""
    B, X, Y, Z = voxels.shape
    assert (_AIR, _NOT_SCANNED) == (0, 255) and patch < 128
    # + 1 wraps: air is 1, not scanned 0, brain more; so clamped to 1 and 2
    ones_and_twos = (voxels + 1).clamp_(1, 2).view(B, X // patch, patch, Y * Z)
    sums = ones_and_twos.sum(2, dtype=torch.uint8).view(B, X // patch, Y // patch, patch, Z)
    brain_Bn = sums.sum(3, dtype=torch.int32).view(B, -1, patch).sum(2, dtype=torch.int32)
    lowest = voxels.view(B, X // patch, patch, Y * Z).amin(2)
    lowest = lowest.view(B, X // patch, Y // patch, patch, Z).amin(3).view(B, -1, patch).amin(2)
    return brain_Bn - patch**3, lowest < _NOT_SCANNED


def patchify(voxels: Tensor, patch: int) -> Tensor:
    """[B, X, Y, Z] -> [B, n, patch^3]; patches and the voxels in them run x, y, z (z fastest)."""
    B, X, Y, Z = voxels.shape
    split = voxels.view(B, X // patch, patch, Y // patch, patch, Z // patch, patch)
    return split.permute(0, 1, 3, 5, 2, 4, 6).reshape(B, -1, patch**3)


def patch_counts(grid: Grid, patch: int) -> tuple[int, int, int]:
    """Patches along x, y, z."""
    x, y, z = (size // patch for size in grid.shape)
    return x, y, z


def patch_centres_mm(grid: Grid, patch: int, device: torch.device | None = None) -> Tensor:
    """float32 [n, 3]: centres of all patches from the grid's centre, in the order of patchify."""
    axes = [(torch.arange(size // patch, device=device) + 0.5) * patch * grid.spacing_mm
            - size * grid.spacing_mm / 2 for size in grid.shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def patch_numbers(coords_BN3: Tensor, grid: Grid, patch: int) -> Tensor:
    """int64 [B, N]: the patch of the grid at coordinates from the grid's centre, mm."""
    counts, edge_mm = patch_counts(grid, patch), patch * grid.spacing_mm
    x, y, z = ((coords / edge_mm + count / 2).floor().long()
               for coords, count in zip(coords_BN3.unbind(-1), counts, strict=True))
    return (x * counts[1] + y) * counts[2] + z


def _choose_tokens(brain_Bn: Tensor, scanned_Bn: Tensor, budget: int | None, seed: int,
                   position_B: Tensor) -> Tensor:
    """int64 [B, N]: the patches with most brain, ties by a keyed draw, unscanned ones last."""
    B, n = brain_Bn.shape
    if budget is None:
        return torch.arange(n, device=brain_Bn.device).expand(B, n)
    ties_Bn = random.uniform(seed, position_B, _TIES, n)
    score_Bn = torch.where(scanned_Bn, brain_Bn + ties_Bn, ties_Bn - 1)
    best_BN = score_Bn.sort(dim=1, descending=True, stable=True).indices[:, :budget]
    return best_BN.sort(dim=1).values


def _tokens(codes_BNP: Tensor, keep_BN: Tensor, grid: Grid, patch: int, augment: AugmentConfig,
            seed: int, position_B: Tensor) -> Tensor:
    """Decode the kept patches, augment inside the brain, standardise."""
    scanned_BNP = (codes_BNP + 1).bool()
    brain_BNP = codes_BNP.bool() & scanned_BNP
    value_BNP = codes_BNP.float().sub_(1).div_(253)

    def level(stream: int, largest: float) -> Tensor:
        return largest * random.uniform(seed, position_B, stream, 1)[..., None]  # [B, 1, 1]

    if augment.gamma > 0:
        exponent = torch.exp(2 * level(_GAMMA, augment.gamma) - augment.gamma)
        value_BNP = value_BNP.clamp_(min=0) ** exponent
    if augment.bias_field > 0:
        field_BNP = _bias_field(keep_BN, grid, patch, seed, position_B)
        value_BNP *= torch.exp(field_BNP.mul_(level(_BIAS_LEVEL, augment.bias_field)))
    if augment.noise > 0:
        # counted by patch of the grid, so a voxel's noise does not depend on the budget
        pairs = torch.arange((patch**3 + 1) // 2, device=keep_BN.device)
        drawn = random.normal(seed, position_B, _NOISE, keep_BN[..., None] * len(pairs) + pairs)
        value_BNP.addcmul_(drawn[..., :patch**3], level(_NOISE_LEVEL, augment.noise))
    value_BNP.clamp_(min=0).mul_(brain_BNP)
    # unknown voxels carry the mean
    return value_BNP.sub_(INTENSITY_MEAN).div_(INTENSITY_STD).mul_(scanned_BNP)


def _bias_field(keep_BN: Tensor, grid: Grid, patch: int, seed: int, position_B: Tensor) -> Tensor:
    """float32 [B, N, P] in [-1, 1]: a random product-Legendre field at each voxel of the tokens."""
    drawn = 2 * random.uniform(seed, position_B, _BIAS, BIAS_TERMS**3) - 1
    drawn = drawn * (torch.arange(BIAS_TERMS**3, device=drawn.device) > 0)  # no constant term
    drawn = drawn / drawn.abs().sum(-1, keepdim=True)  # |Legendre| <= 1, so |field| <= 1
    field = drawn.view(-1, 1, *[BIAS_TERMS] * 3)  # [B, 1, i, j, k]
    counts = patch_counts(grid, patch)
    index_BN = (keep_BN // (counts[1] * counts[2]), keep_BN // counts[2] % counts[1],
                keep_BN % counts[2])
    for size, patch_BN in zip(grid.shape, index_BN, strict=True):
        x = (torch.arange(size, device=keep_BN.device) + 0.5) * (2 / size) - 1
        basis = torch.stack([torch.ones_like(x), x, 1.5 * x * x - 0.5], -1)
        basis_of = basis.view(-1, patch, BIAS_TERMS)[patch_BN]
        # contract the first remaining degree: [B, N, i, rest] -> [B, N, rest, v]; plain sums, whose
        # rounding does not depend on the batch as a matrix product's may
        of_degree = [(field[:, :, i].unsqueeze(-1), _align(basis_of[..., i], field.dim() - 2))
                     for i in range(BIAS_TERMS)]
        field = of_degree[0][0] * of_degree[0][1]
        for coefficients, basis in of_degree[1:]:
            field = field.addcmul_(coefficients, basis)
    return field.flatten(2)


def _align(basis: Tensor, dims: int) -> Tensor:
    """[B, N, v] -> [B, N, 1, ..., v] with ``dims`` axes after N."""
    return basis.view(*basis.shape[:2], *[1] * (dims - 1), -1)
