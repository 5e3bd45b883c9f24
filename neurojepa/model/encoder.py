"""Vision transformer over a set of 3D patches: voxels and coordinates in, latents out.

Any subset of patches in any order will do: positions come with the tokens, in millimetres.  The
encoder is told no modality, so that all modalities share one space.  Every second block is a
mixture of experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neurojepa.config import ModelConfig
from neurojepa.model.layers import Block, init_weights, readable, residual_outputs
from neurojepa.model.linear import Linear
from neurojepa.model.moe import MoE
from neurojepa.model.rope import rotation
from neurojepa.model.sizes import SIZES


class Encoder(nn.Module):
    """Linear patch embedding, blocks, final norm."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        size = SIZES[model.size]
        self.head_dim = size.dim // size.heads
        every = model.activation_checkpointing
        self.checkpoint_every = 0 if every == "selective" else every
        self.patch = Linear(model.patch_voxels**3, size.dim)
        self.blocks = nn.ModuleList(
            Block(size.dim, size.heads, model.head_gate, size if model.moe and i % 2 else None)
            for i in range(size.depth))
        self.norm = nn.LayerNorm(size.dim)
        init_weights(self, size.dim, residual_outputs(self.blocks))

    def forward(self, tokens_BNP: Tensor, coords_BN3: Tensor, valid_BN: Tensor,
                all_scanned: bool = False) -> Tensor:
        """Encode tokens.

        Parameters
        ----------
        tokens_BNP : standardised voxels of each patch, any float dtype.
        coords_BN3 : patch centres, mm.
        valid_BN : False for padding and what was not scanned: neither read nor routed.
        all_scanned : in every scan all tokens are valid, or none are.

        Returns
        -------
        [B, N, D] in the dtype of the parameters
        """
        x_BND = self.patch(tokens_BNP.to(self.patch.weight.dtype))
        turn_BN1p2 = self.turn(coords_BN3)
        readable_B11N = None if all_scanned else readable(valid_BN)
        for i, block in enumerate(self.blocks):
            if torch.is_grad_enabled() and self.checkpoint_every and i % self.checkpoint_every == 0:
                x_BND, load_E = checkpoint(block, x_BND, turn_BN1p2, valid_BN, readable_B11N,
                                           use_reentrant=False,
                                           preserve_rng_state=False)  # nothing here is drawn
            else:
                x_BND, load_E = block(x_BND, turn_BN1p2, valid_BN, readable_B11N)
            if load_E is not None and torch.is_grad_enabled():
                # out here and not in the layer: a recomputed block would count its tokens twice
                _moe_of(block).load += load_E
        return self.norm(x_BND)

    def turn(self, coords_BN3: Tensor) -> Tensor:
        """How positions turn queries and keys, as attention takes it."""
        return rotation(coords_BN3, self.head_dim)


def _moe_of(block: nn.Module) -> MoE:
    assert isinstance(block, Block) and isinstance(block.mlp, MoE)
    return block.mlp
