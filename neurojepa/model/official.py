"""The encoder of the official Neuro-JEPA code, for weights that were converted from it.

It differs from ``Encoder`` in what its weights were trained with, and nothing of that can be
changed afterwards:

    - voxels in [0, 1] instead of standardised ones;
    - queries and keys are not normalised; LayerNorm adds 1e-6 to the variance; heads are gated;
    - experts have biases, and their weights are the scores of the softmax as they are;
    - positions are patch numbers, decoded along other axes than they were counted along, and the
      channels of a pair turn by different angles (``turned``).  So attention depends on where
      tokens lie, and not on their distances alone.

Both faults of the last point are in the official code, and the weights have learnt with them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurojepa.config import ModelConfig, RootConfig
from neurojepa.errors import ConfigError
from neurojepa.feed.format import Grid
from neurojepa.model.averaged import Averaged
from neurojepa.model.encoder import Encoder
from neurojepa.model.flops import encoder_flops, tokens_per_volume
from neurojepa.model.layers import Attention, Block, init_weights, residual_outputs
from neurojepa.model.moe import MoE, grouped_matmul
from neurojepa.objective.views import (
    INTENSITY_MEAN,
    INTENSITY_STD,
    Views,
    patch_counts,
    patch_numbers,
)

EPS = 1e-6  # of LayerNorm
BASE = 10000.0  # of the wavelengths


class Official(Averaged):
    """The encoder alone: there is neither a predictor nor a loss."""

    @staticmethod
    def make_encoder(config: RootConfig, grid: Grid) -> nn.Module:
        return OfficialEncoder(config.model, grid)

    def forward(self, views: Views, l1: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        raise ConfigError("model.official: converted weights have no predictor, so they are not "
                          "trained further here, and what they would predict cannot be shown; "
                          "embed, probe and finetune take them; to train, leave model.official "
                          "out")

    def latents_with_gradient(self, views: Views) -> Tensor:
        """float32 [B, N, D]: the encoder's output as the official code's own tasks read it, whose
        last norm has learnt weights; no further one follows."""
        z_BND = self.target(views.tokens_BNP, views.coords_BN3, views.valid_BN,
                            views.all_scanned).float()
        if self.session_code is None:
            return z_BND
        h_BNA: Tensor = self.session_code(z_BND)
        return h_BNA

    @staticmethod
    def flops(config: RootConfig, grid: Grid) -> tuple[float, float]:
        return encoder_flops(config.model, tokens_per_volume(config, grid)), 0.0


class OfficialEncoder(Encoder):
    """``Encoder`` with the parts above in place of its own."""

    def __init__(self, model: ModelConfig, grid: Grid) -> None:
        super().__init__(model)
        self.grid, self.patch_voxels = grid, model.patch_voxels
        dim = self.norm.normalized_shape[0]
        self.norm = nn.LayerNorm(dim, eps=EPS)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.norm1, block.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
            block.attention = OfficialAttention(dim, block.attention.heads)
            if isinstance(block.mlp, MoE):
                block.mlp = OfficialMoE(block.mlp)
        init_weights(self, dim, residual_outputs(self.blocks))

    def forward(self, tokens_BNP: Tensor, coords_BN3: Tensor, valid_BN: Tensor,
                all_scanned: bool = False) -> Tensor:
        """As ``Encoder.forward``; the coordinates have to be centres of the grid's patches."""
        # what was not scanned carries exactly 0 (objective/views.py); there it was black
        bright = tokens_BNP * INTENSITY_STD + INTENSITY_MEAN
        return super().forward(torch.where(tokens_BNP == 0, 0, bright), coords_BN3, valid_BN,
                               all_scanned)

    def turn(self, coords_BN3: Tensor) -> Tensor:
        """float32 [B, N, 1, head_dim, 2]: cosine and sine of every channel, for ``turned``.

        A third of the channels goes to each coordinate; what is left over to none.
        """
        decoded = self.decoded(patch_numbers(coords_BN3, self.grid, self.patch_voxels))
        pairs = self.head_dim // 3 // 2
        rate = 1 / BASE ** (torch.arange(pairs, device=coords_BN3.device) / pairs)
        # the angles of the first half of an axis's channels come again for the second half
        angle = torch.cat([(each[..., None] * rate).repeat(1, 1, 2) for each in decoded], -1)
        angle = F.pad(angle, (0, self.head_dim - 6 * pairs))[:, :, None]
        return torch.stack([angle.cos(), angle.sin()], -1)

    def decoded(self, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The coordinates, in patches, that a patch's number is taken for.

        Numbers run z fastest over X x Y x Z patches; they are decoded as if the grid were of
        any x X x Y.  That is right on cubes alone.
        """
        x, y, _ = patch_counts(self.grid, self.patch_voxels)
        return number // (x * y), number % (x * y) // y, number % (x * y) % y

    def mistaken(self) -> float:
        """The share of the grid's patches that are taken for others."""
        counts = patch_counts(self.grid, self.patch_voxels)
        true = torch.cartesian_prod(*(torch.arange(count) for count in counts))
        taken = torch.stack(self.decoded(torch.arange(len(true))), -1)
        return float((taken != true).any(-1).float().mean())


def turned(x_BNhc: Tensor, turn_BN1c2: Tensor) -> Tensor:
    """x cos + x' sin, where x' is (-b, a) of the channel pair (a, b); computed in float32.

    ``turn_BN1c2`` holds an angle for every channel, so that a pair is no rotation.
    """
    x = x_BNhc.float()
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn_BN1c2.unbind(-1)
    return (x * cos + torch.stack([-b, a], -1).flatten(-2) * sin).to(x_BNhc.dtype)


class OfficialAttention(Attention):
    """Gated heads; queries and keys as they are."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads, head_gate=True)
        self.q_norm = self.k_norm = nn.Identity()

    def rotate(self, x_BNhc: Tensor, turn_BN1p2: Tensor) -> Tensor:
        return turned(x_BNhc, turn_BN1p2)


class OfficialMoE(MoE):
    """Experts with biases, ``b1`` [E, H] and ``b2`` [E, D]."""

    def __init__(self, like: MoE) -> None:
        num_experts, dim, hidden = like.w1.shape
        super().__init__(dim, num_experts=num_experts, top_k=like.top_k, hidden=hidden,
                         shared=like.shared)
        self.b1 = nn.Parameter(torch.zeros(num_experts, hidden))
        self.b2 = nn.Parameter(torch.zeros(num_experts, dim))

    def experts(self, rows_SD: Tensor, weight_S1: Tensor, ends_E: Tensor) -> Tensor:
        number_S = torch.arange(len(rows_SD), dtype=ends_E.dtype, device=rows_SD.device)
        expert_S = torch.searchsorted(ends_E, number_S, right=True).clamp(max=len(self.b1) - 1)
        hidden_SH = F.gelu(grouped_matmul(rows_SD, self.w1, ends_E) + self.b1[expert_S])
        weight_S1 = weight_S1.to(hidden_SH.dtype)
        out_SD = grouped_matmul(hidden_SH * weight_S1, self.w2, ends_E)
        return out_SD + self.b2[expert_S] * weight_S1

    def route(self, x_QD: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [Q, k] and experts [Q, k]; ``w2`` and ``b2`` hold the factor that scores had."""
        precise = torch.promote_types(x_QD.dtype, torch.float32)
        score_QE = F.linear(x_QD.to(precise), self.router.to(precise)).softmax(-1)
        expert_Qk = self.choose(score_QE)
        return score_QE.gather(1, expert_Qk), expert_Qk
