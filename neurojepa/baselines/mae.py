"""Masked autoencoder in 3D (He et al. 2022): the same encoder, trained to fill in voxels.

    visible tokens -> encoder -> narrow decoder -> voxels of the hidden tokens

Encoder, tokens, coordinates and the decoder's width and depth are the JEPA's; what differs is one
uniform mask per scan and the target, voxels standardised within each patch.  The tissue head, off
unless ``objective.tissue_weight`` is set, is the JEPA's: what a prior does for both can be told
apart from the objective.

Of the shape letters (neurojepa/__init__.py): C are the visible and T the hidden tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurojepa.config import RootConfig
from neurojepa.feed.format import Grid
from neurojepa.model.averaged import Averaged
from neurojepa.model.flops import encoder_flops, predictor_flops, tokens_per_volume
from neurojepa.model.layers import INIT_STD
from neurojepa.model.linear import Linear
from neurojepa.model.predictor import Predictor
from neurojepa.model.sizes import SIZES
from neurojepa.model.tissue import tissue_head, with_tissue
from neurojepa.objective.losses import sample_sums, take, token_weights
from neurojepa.objective.views import Views

EPSILON = 1e-6  # of the variance within a patch, as published; air alone becomes zero


class MAE(Averaged):
    """Encoder, its moving average, and a decoder to voxels."""

    def __init__(self, config: RootConfig, grid: Grid) -> None:
        super().__init__(config, grid)
        size = SIZES[config.model.size]
        self.background_weight = config.objective.background_weight
        self.decoder = Predictor(size)
        self.voxels = Linear(size.predictor_dim, config.model.patch_voxels**3)
        nn.init.trunc_normal_(self.voxels.weight, std=INIT_STD)
        nn.init.zeros_(self.voxels.bias)
        self.tissue = tissue_head(config.objective, size.dim)

    def forward(self, views: Views, l1: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch and its metrics, as of ``SparseJEPA.forward``; no ``l1`` here."""
        visible_BC, hidden_BT = views.context_BMC[:, 0], views.target_BMT[:, 0]
        order_BN = torch.cat([visible_BC, hidden_BT], -1)
        coords_BN3, valid_BN = _take(views.coords_BN3, order_BN), _take(views.valid_BN, order_BN)
        C = visible_BC.shape[1]
        y_BCD = self.encoder(_take(views.tokens_BNP, visible_BC), coords_BN3[:, :C],
                             valid_BN[:, :C], views.all_scanned)
        decoded_BTd = self.decoder(y_BCD, coords_BN3, valid_BN, views.modality_B, views.all_scanned)
        return self.losses(views, y_BCD=y_BCD, decoded_BTd=decoded_BTd)

    def losses(self, views: Views, *, y_BCD: Tensor, decoded_BTd: Tensor
               ) -> tuple[Tensor, dict[str, Tensor]]:
        """What ``forward`` returns, of latents of the visible tokens and what fills the hidden."""
        visible_BC, hidden_BT = views.context_BMC[:, 0], views.target_BMT[:, 0]
        filled_BTP = self.voxels(decoded_BTd)
        truth_BTP = _standardised(_take(views.tokens_BNP, hidden_BT))
        error_BT = (filled_BTP.float() - truth_BTP).square().mean(-1)
        weight_BT = token_weights(_take(views.foreground_BN, hidden_BT),
                                  _take(views.valid_BN, hidden_BT), self.background_weight)
        prediction_B = (weight_BT * error_BT).sum(-1)
        total_B, told = with_tissue(self.tissue, prediction_B, views,
                                    index_BMC=visible_BC[:, None], latent_VCD=y_BCD)
        loss_B = views.weight_B * total_B
        return loss_B.sum(), sample_sums(views, loss_B.detach(),
                                         {"prediction": prediction_B, **told})

    @staticmethod
    def flops(config: RootConfig, grid: Grid) -> tuple[float, float]:
        """As ``Averaged.flops``; no target encoder, so all of it is trained."""
        tokens = tokens_per_volume(config, grid)
        targets = round(tokens * config.objective.masks.target_share)
        head = 2 * targets * SIZES[config.model.size].predictor_dim * config.model.patch_voxels**3
        trained = (encoder_flops(config.model, tokens - targets)
                   + predictor_flops(config.model, tokens=tokens, targets=targets) + head)
        return trained, trained


def _take(x: Tensor, index: Tensor) -> Tensor:
    return take(x, index[:, None])[:, 0]


def _standardised(token_BTP: Tensor) -> Tensor:
    variance, mean = torch.var_mean(token_BTP, -1, keepdim=True)
    return (token_BTP - mean) / (variance + EPSILON).sqrt()
