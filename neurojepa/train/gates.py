"""What latents consist of: place, modality, the person, or the rest; in metrics.jsonl now and then.

A target that its place and modality explain is no news: whoever predicts the mean token of the
place has that part of the loss for free.  Every ``EVERY`` steps the step's last micro-batch goes
through the target encoder once more, and its row gets shares of the variance of brain tokens:

    gate_place, gate_modality    that lie between patches of the grid, between modalities
    gate_place_modality          between patches of each modality: what the mean token explains
    gate_person                  that a scan's tokens have in common beyond their modality
    rank_people                  in how many directions means of scans of one modality differ

Each share is a mean product of pairs of tokens less that of any two scans' tokens, over their
variance.  Pairs are averaged within each patch or modality, and these averages by their number of
tokens, so rare ones count for what they are.  A few scans give no bias, only noise; a share can be
negative.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurojepa.config import RootConfig
from neurojepa.downstream.pooling import LEAST_SHARE
from neurojepa.feed.format import MODALITIES, Grid
from neurojepa.methods import METHODS
from neurojepa.model.averaged import Averaged
from neurojepa.objective.views import Views, patch_numbers
from neurojepa.train.world import World

EVERY = 50  # steps


class Gates:
    """Looks at what the latents of a run consist of."""

    def __init__(self, config: RootConfig, grid: Grid, world: World) -> None:
        self.grid, self.patch, self.world = grid, config.model.patch_voxels, world
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
        sums, spread = pair_sums(model.latents(views), patch_BN, views.modality_B, used_BN)
        return shares(self.world.sum_(sums), self.world.sum_(spread))


def pair_sums(z_BND: Tensor, patch_BN: Tensor, modality_B: Tensor, used_BN: Tensor
              ) -> tuple[Tensor, Tensor]:
    """Sums of products of pairs of tokens, which add up over ranks, and the covariance of scans'
    means.

    Returns
    -------
    float64 [7, 2] : means within cells times the cells' numbers of tokens, and these numbers: of
        tokens with themselves, in different scans, and in different scans of one modality; at one
        patch, at one patch in one modality; in one scan; at different patches in different scans of
        one modality.
    float64 [D, D] : sum over scans of the square of their means less that of their modality.
    """
    B, N = patch_BN.shape
    # tokens that do not count stay, with weight 0: to leave them out, the host would have to wait
    one_Q = used_BN.flatten().double()
    z_QD = z_BND.flatten(0, 1).double() * one_Q[:, None]
    # what all tokens share is no part of the variance
    z_QD = (z_QD - z_QD.sum(0) / one_Q.sum().clamp(min=1)) * one_Q[:, None]

    def number(cell_BN: Tensor) -> Tensor:
        return _numbered(cell_BN.expand(B, N).flatten())

    modality_B1, scan_B1 = modality_B[:, None], torch.arange(B, device=z_QD.device)[:, None]
    every, kind, scan = number(scan_B1 * 0), number(modality_B1), number(scan_B1)
    patch, both = number(patch_BN), number(patch_BN * len(MODALITIES) + modality_B1)
    token = torch.arange(len(z_QD), device=z_QD.device)

    def squares(group_Q: Tensor, cell_Q: Tensor) -> Tensor:
        """[cells, 2]: squared sums of groups of tokens and squared numbers, by the cells that hold
        the groups."""
        cell_G = torch.zeros_like(token).scatter_(0, group_Q, cell_Q)
        sum_GD = torch.zeros_like(z_QD).index_add_(0, group_Q, z_QD)
        num_G = torch.zeros_like(one_Q).index_add_(0, group_Q, one_Q)
        found_G2 = torch.stack([sum_GD.square().sum(1), num_G.square()], 1)
        return torch.zeros_like(found_G2).index_add_(0, cell_G, found_G2)

    def pairs(cell_Q: Tensor, *without: Tensor) -> Tensor:
        found_C2 = squares(cell_Q, cell_Q)
        num_C = found_C2[:, 1].sqrt()
        for excluded in without:
            found_C2 = found_C2 - excluded
        num_C = num_C * (found_C2[:, 1] > 0.5)
        return torch.stack([num_C @ (found_C2[:, 0] / found_C2[:, 1].clamp(min=1)), num_C.sum()])

    alike = squares(both, kind) - squares(token, kind)  # pairs at one patch
    sums = torch.stack([
        pairs(token), pairs(every, squares(scan, every)), pairs(kind, squares(scan, kind)),
        pairs(patch, squares(token, patch)), pairs(both, squares(token, both)),
        pairs(scan, squares(token, scan)), pairs(kind, squares(scan, kind), alike)])
    return sums, _spread(z_QD, used_BN, modality_B)


def _numbered(cell_Q: Tensor) -> Tensor:
    """The cells' places among all different ones, as of ``unique``, whose size the host awaits."""
    sorted_Q, order_Q = cell_Q.sort()
    begins_Q = sorted_Q.diff(prepend=sorted_Q[:1]) != 0
    return torch.empty_like(order_Q).scatter_(0, order_Q, begins_Q.cumsum(0))


def _spread(z_QD: Tensor, used_BN: Tensor, modality_B: Tensor) -> Tensor:
    """[D, D]: sum over scans of the square of their means less that of their modality."""
    mean_BD = (z_QD.view(*used_BN.shape, -1).sum(1)
               / used_BN.sum(1, keepdim=True).clamp(min=1))
    seen_B = used_BN.any(1).to(z_QD)
    same_BB = (modality_B[:, None] == modality_B) * seen_B * seen_B[:, None]
    mean_BD = mean_BD - same_BB @ mean_BD / same_BB.sum(1, keepdim=True).clamp(min=1)
    return mean_BD.T @ mean_BD


def shares(sums: Tensor, spread: Tensor) -> dict[str, Tensor]:
    """The figures, from what ``pair_sums`` gave; 0 where there is no pair to tell."""
    products, pairs = sums.unbind(1)
    mean = products / pairs.clamp(min=1)
    mean = torch.where(pairs > 0, mean, mean[1])
    own, any_two, modality, place, both, scan, elsewhere = mean
    variance = (own - any_two).clamp(min=1e-12)
    return {"gate_place": (place - any_two) / variance,
            "gate_modality": (modality - any_two) / variance,
            "gate_place_modality": (both - any_two) / variance,
            "gate_person": (scan - elsewhere) / variance,
            "rank_people": spread.trace().square() / spread.square().sum().clamp(min=1e-12)}
