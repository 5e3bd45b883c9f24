"""What latents consist of: place, modality, the person, or the rest; in metrics.jsonl now and then.

A target that its place and modality explain is no news: whoever predicts the mean token of the
place has that part of the loss for free.  Every ``EVERY`` steps the step's last micro-batch goes
through the target encoder once more, and its row gets shares of the variance of brain tokens:

    gate_place, gate_modality    that lie between patches of the grid, between modalities
    gate_place_modality          between patches of each modality: what the mean token explains
    gate_person                  that a scan's tokens have in common beyond their modality
    rank_people                  in how many directions means of scans differ, at most scans - 1

Each share is a mean product of pairs of tokens less that of any two scans' tokens, over their
variance.  So a few scans give no bias, only noise; it can be negative.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurojepa.config import RootConfig
from neurojepa.downstream.pooling import LEAST_SHARE
from neurojepa.feed.format import MODALITIES, Grid
from neurojepa.methods import METHODS
from neurojepa.model.averaged import Averaged
from neurojepa.objective.views import Views, patch_centres_mm, patch_numbers
from neurojepa.train.world import World

EVERY = 50  # steps


class Gates:
    """Looks at what the latents of a run consist of."""

    def __init__(self, config: RootConfig, grid: Grid, world: World) -> None:
        self.grid, self.patch, self.world = grid, config.model.patch_voxels, world
        self.num_patches = len(patch_centres_mm(grid, self.patch))
        self.has_tokens = not METHODS[config.objective.method].whole_volumes

    @torch.no_grad()
    def look(self, model: nn.Module, views: Views, step: int) -> dict[str, Tensor]:
        """The figures of a micro-batch over all ranks, device scalars, where ``step`` has them.

        Collective.
        """
        if not self.has_tokens or step % EVERY:
            return {}
        assert isinstance(model, Averaged)
        patch_BN = patch_numbers(views.coords_BN3, self.grid, self.patch)
        used_BN = ((views.foreground_BN >= LEAST_SHARE) & views.valid_BN
                   & (views.weight_B > 0)[:, None])
        sums, spread = pair_sums(model.latents(views), patch_BN, views.modality_B, used_BN,
                                 self.num_patches)
        return shares(self.world.sum_(sums), self.world.sum_(spread))


def pair_sums(z_BND: Tensor, patch_BN: Tensor, modality_B: Tensor, used_BN: Tensor,
              num_patches: int) -> tuple[Tensor, Tensor]:
    """Sums over pairs of tokens, which add up over ranks, and the covariance of scans' means.

    Returns
    -------
    float64 [6, 2] : summed products and number of pairs: of tokens with themselves, in different
        scans, and in different scans of one modality; at one patch, at one patch in one modality;
        in one scan.
    float64 [D, D] : sum over scans of the square of their means less that of their modality.
    """
    weight_BN = used_BN.double()
    z_BND = z_BND.double() * weight_BN[..., None]
    modality_BN = modality_B[:, None].expand_as(patch_BN)

    def by(cell_BN: Tensor, cells: int) -> Tensor:
        """Squared sums of tokens, and squared numbers of them, over cells."""
        token = z_BND.new_zeros(cells, z_BND.shape[-1]).index_add_(
            0, cell_BN.flatten(), z_BND.flatten(0, 1))
        count = z_BND.new_zeros(cells).index_add_(0, cell_BN.flatten(), weight_BN.flatten())
        return torch.stack([token.square().sum(), count.square().sum()])

    scan_BN = torch.arange(len(z_BND), device=z_BND.device)[:, None].expand_as(patch_BN)
    own = torch.stack([z_BND.square().sum(), weight_BN.sum()])
    scan = by(scan_BN, len(z_BND))
    sums = torch.stack([
        own, by(torch.zeros_like(patch_BN), 1) - scan, by(modality_BN, len(MODALITIES)) - scan,
        by(patch_BN, num_patches) - own,
        by(patch_BN * len(MODALITIES) + modality_BN, num_patches * len(MODALITIES)) - own,
        scan - own])
    mean_BD = z_BND.sum(1) / weight_BN.sum(1).clamp(min=1)[:, None]
    seen_B = (weight_BN.sum(1) > 0).double()
    same_BB = (modality_B[:, None] == modality_B) * seen_B * seen_B[:, None]
    mean_BD = mean_BD - same_BB @ mean_BD / same_BB.sum(1, keepdim=True).clamp(min=1)
    return sums, mean_BD.T @ mean_BD


def shares(sums: Tensor, spread: Tensor) -> dict[str, Tensor]:
    """The figures, from what ``pair_sums`` gave; 0 where there is no pair to tell."""
    products, pairs = sums.unbind(1)
    mean = products / pairs.clamp(min=1)
    mean = torch.where(pairs > 0, mean, mean[1])
    own, any_two, modality, place, both, scan = mean
    variance = (own - any_two).clamp(min=1e-12)
    return {"gate_place": (place - any_two) / variance,
            "gate_modality": (modality - any_two) / variance,
            "gate_place_modality": (both - any_two) / variance,
            "gate_person": (scan - modality) / variance,
            "rank_people": spread.trace().square() / spread.square().sum().clamp(min=1e-12)}
