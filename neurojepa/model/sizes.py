"""The one dial of the network: its widths, depths and experts by name.

``base`` has the official base shape; in every size top_k + num_shared experts together are as wide
as the dense MLP they stand for (4 x dim), so a dense and an MoE model cost the same per token.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
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
    "tiny": Size(
        dim=96, depth=4, heads=3, predictor_dim=64, predictor_depth=2, predictor_heads=2,
        num_experts=4, top_k=2, num_shared=1, expert_hidden=128),
    "small": Size(
        dim=384, depth=12, heads=6, predictor_dim=192, predictor_depth=6, predictor_heads=6,
        num_experts=8, top_k=2, num_shared=1, expert_hidden=512),
    "base": Size(
        dim=768, depth=12, heads=12, predictor_dim=384, predictor_depth=12, predictor_heads=12,
        num_experts=16, top_k=6, num_shared=2, expert_hidden=384),
    "large": Size(
        dim=1024, depth=24, heads=16, predictor_dim=512, predictor_depth=12, predictor_heads=16,
        num_experts=32, top_k=6, num_shared=2, expert_hidden=512),
    "huge": Size(
        dim=1280, depth=32, heads=16, predictor_dim=640, predictor_depth=12, predictor_heads=20,
        num_experts=64, top_k=6, num_shared=2, expert_hidden=640),
}
