"""What every trained model is: an encoder, and a copy of it that follows by a moving average.

The trainer keeps the copy, ``target``; embeddings come from it.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurojepa.model.moe import MoE
from neurojepa.objective.views import Views


class Averaged(nn.Module):
    """An encoder of tokens with its frozen ``target``, an exponential moving average."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.target = copy.deepcopy(encoder).requires_grad_(False)

    @torch.no_grad()
    def latents(self, views: Views) -> Tensor:
        """float32 [B, N, D]: layer-normed output of the target encoder for every token."""
        for target, source in zip(_moes(self.target), _moes(self.encoder), strict=True):
            target.bias.copy_(source.bias)  # routing follows the encoder; only weights are averaged
        z_BND = self.target(views.tokens_BNP, views.coords_BN3, views.valid_BN)
        return F.layer_norm(z_BND.float(), z_BND.shape[-1:])

    @torch.no_grad()
    def embed(self, views: Views) -> Tensor:
        """float32 [B, D]: mean over a scan's valid tokens of ``latents``."""
        valid_BN1 = views.valid_BN[..., None].float()
        return (self.latents(views) * valid_BN1).sum(1) / valid_BN1.sum(1).clamp(min=1)


def _moes(encoder: nn.Module) -> list[MoE]:
    return [layer for layer in encoder.modules() if isinstance(layer, MoE)]
