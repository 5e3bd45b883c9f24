"""The one dial of the network: its widths, depths and experts by name.

``base`` has the official base shape; in every size top_k + num_shared experts together are as wide
as the dense MLP they stand for (4 x dim), so a dense and an MoE model cost the same per token.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Shape of encoder and predictor; ``top_k`` of ``num_experts`` are active for each token."""

    dim: int
    depth: int
    heads: int
    predictor_dim: int
    predictor_depth: int
    predictor_heads: int
    num_experts: int
    top_k: int
    num_shared: int
    expert_hidden: int


SIZES = {
    #             dim depth heads  predictor     E  k  shared hidden
    "tiny": Size(96, 4, 3, 64, 2, 2, 4, 2, 1, 128),
    "small": Size(384, 12, 6, 192, 6, 6, 8, 2, 1, 512),
    "base": Size(768, 12, 12, 384, 12, 12, 16, 6, 2, 384),
    "large": Size(1024, 24, 16, 512, 12, 16, 32, 6, 2, 512),
    "huge": Size(1280, 32, 16, 640, 12, 20, 64, 6, 2, 640),
}
