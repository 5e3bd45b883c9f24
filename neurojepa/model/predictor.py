"""From context latents to one prediction per target token.

The context's latents and one mask token per target, told apart by their coordinates, pass through a
narrower transformer.  A mask token also carries the modality that is to be predicted, which the
encoder never hears of: cross-modal prediction needs no other change.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurojepa.feed.format import MODALITIES
from neurojepa.model.layers import INIT_STD, Block, init_weights, readable, residual_outputs
from neurojepa.model.linear import Linear
from neurojepa.model.rope import rotation
from neurojepa.model.sizes import Size


class Predictor(nn.Module):
    """Narrow dense transformer; ``dim`` is the width of its output."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.dim = size.predictor_dim
        self.head_dim = size.predictor_dim // size.predictor_heads
        self.embed = Linear(size.dim, self.dim)
        self.mask_token = nn.Parameter(torch.empty(self.dim))
        self.modality = Linear(len(MODALITIES), self.dim, bias=False)
        self.blocks = nn.ModuleList(Block(self.dim, size.predictor_heads)
                                    for _ in range(size.predictor_depth))
        self.norm = nn.LayerNorm(self.dim)
        init_weights(self, self.dim, residual_outputs(self.blocks))
        nn.init.trunc_normal_(self.mask_token, std=INIT_STD)

    def forward(self, context_BCD: Tensor, coords_BN3: Tensor, valid_BN: Tensor,
                modality_B: Tensor, all_scanned: bool = False) -> Tensor:
        """Predict the target tokens.

        Parameters
        ----------
        context_BCD : latents of the context tokens.
        coords_BN3, valid_BN : of the C context tokens, followed by the T target tokens.
        modality_B : int64, modality of the targets.
        all_scanned : as of ``Encoder.forward``.

        Returns
        -------
        [B, T, predictor dim]
        """
        x_BCd = self.embed(context_BCD)
        B, C, d = x_BCd.shape
        # a one-hot product: the backward of an embedding adds with atomics on a GPU
        known = torch.arange(len(MODALITIES), device=modality_B.device)
        modality_Bd = self.modality((modality_B[:, None] == known).to(x_BCd.dtype))
        mask_BTd = (self.mask_token + modality_Bd)[:, None].expand(B, coords_BN3.shape[1] - C, d)
        x_BNd = torch.cat([x_BCd, mask_BTd], 1)
        turn_BN1p2, last = rotation(coords_BN3, self.head_dim), len(self.blocks) - 1
        readable_B11N = None if all_scanned else readable(valid_BN)
        for i, block in enumerate(self.blocks):
            x_BNd, _ = block(x_BNd, turn_BN1p2, valid_BN, readable_B11N,
                             first=C if i == last else 0)
        return self.norm(x_BNd)
