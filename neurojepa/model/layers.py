"""The transformer block that encoder and predictor share.

Pre-norm attention (QK-norm, 3D RoPE, optional gate per head) and a dense or mixture-of-experts MLP.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from neurojepa.model.linear import Linear
from neurojepa.model.moe import MoE
from neurojepa.model.rope import rotate
from neurojepa.model.sizes import Size

INIT_STD = 0.02
# What selective recomputation keeps: products, which take most of the time, and who goes to which
# expert, which must not change.  Norms, rotations, attention and GELU are computed anew.
_aten = torch.ops.aten
KEPT = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten._grouped_mm.default,
        torch.ops.mkldnn._linear_pointwise.default, _aten.topk.default, _aten.sort.stable}


class Attention(nn.Module):
    """Self-attention over valid tokens; normalised queries and keys keep logits bounded in bf16."""

    def __init__(self, dim: int, heads: int, head_gate: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm: nn.Module = nn.LayerNorm(dim // heads, bias=False)
        self.k_norm: nn.Module = nn.LayerNorm(dim // heads, bias=False)
        self.gate = Linear(dim, heads) if head_gate else None
        self.proj = Linear(dim, dim)

    def forward(self, x_BND: Tensor, turn_BN1p2: Tensor, readable_B11N: Tensor | None,
                first: int = 0) -> Tensor:
        """What the tokens from ``first`` on read from all readable ones, [B, N - first, D].

        None, all of them, leaves torch free to choose its fastest kernels, which know no masks.
        """
        B, N, D = x_BND.shape
        q, k, v = self.qkv(x_BND).view(B, N, 3, self.heads, -1).unbind(2)  # [B, N, h, c]
        q = self.rotate(self.q_norm(q[:, first:]), turn_BN1p2[:, first:])
        k = self.rotate(self.k_norm(k), turn_BN1p2)
        # tokens stay outside heads in memory: what comes out lies as the projection takes it
        y_BNhc = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=readable_B11N
        ).transpose(1, 2)
        if self.gate is not None:
            y_BNhc = y_BNhc * self.gate(x_BND[:, first:]).sigmoid()[..., None]
        return self.proj(y_BNhc.reshape(B, N - first, D))

    def rotate(self, x_BNhc: Tensor, turn_BN1p2: Tensor) -> Tensor:
        """Queries or keys at their places."""
        return rotate(x_BNhc, turn_BN1p2)


class MLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block; ``experts`` makes its MLP a mixture of experts of that shape."""

    selective = False  # whether the backward computes anew all but products

    def __init__(self, dim: int, heads: int, head_gate: bool = False,
                 experts: Size | None = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, head_gate)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp: nn.Module = MLP(dim, 4 * dim) if experts is None else MoE(
            dim, num_experts=experts.num_experts, top_k=experts.top_k, hidden=experts.expert_hidden,
            shared=MLP(dim, experts.num_shared * experts.expert_hidden))

    def forward(self, x_BND: Tensor, turn_BN1p2: Tensor, valid_BN: Tensor,
                readable_B11N: Tensor | None, first: int = 0) -> tuple[Tensor, Tensor | None]:
        """Tokens from ``first`` on (a last block's others go unread), all of which are read from.

        Parameters
        ----------
        turn_BN1p2 : from ``rope.rotation``.
        valid_BN : tokens that are routed.
        readable_B11N : from ``readable``; None for all.

        Returns
        -------
        [B, N - first, D] and, of an MoE block, how many of them were routed to each expert
        """
        if self.selective and torch.is_grad_enabled():
            found: tuple[Tensor, Tensor | None] = checkpoint(
                self._computed, x_BND, turn_BN1p2, valid_BN, readable_B11N, first,
                use_reentrant=False, preserve_rng_state=False, context_fn=partial(
                    create_selective_checkpoint_contexts, _policy))
            return found
        return self._computed(x_BND, turn_BN1p2, valid_BN, readable_B11N, first)

    def _computed(self, x_BND: Tensor, turn_BN1p2: Tensor, valid_BN: Tensor,
                  readable_B11N: Tensor | None, first: int) -> tuple[Tensor, Tensor | None]:
        y = self.attention(self.norm1(x_BND), turn_BN1p2, readable_B11N, first)
        x, load_E = x_BND[:, first:] + y, None
        y = self.norm2(x)
        if isinstance(self.mlp, MoE):
            y, load_E = self.mlp(y, valid_BN[:, first:])
        else:
            y = self.mlp(y)
        return x + y, load_E


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return (CheckpointPolicy.MUST_SAVE if operation in KEPT
            else CheckpointPolicy.PREFER_RECOMPUTE)


def readable(valid_BN: Tensor) -> Tensor:
    """bool [B, 1, 1, N]: the keys that attention may read.

    A scan without one valid token reads them all: a softmax over nothing would be NaN.
    """
    return (valid_BN | ~valid_BN.any(1, keepdim=True))[:, None, None]


def init_weights(module: nn.Module, width: int, depth_of: dict[nn.Module, int]) -> None:
    """Truncated normal weights, zero biases; the outputs of block i shrink by sqrt(2 (i + 1)).

    The usual standard deviation of 0.02 is that of a width of 768; a block of another width starts
    with as strong a signal.  ``depth_of`` gives i for each linear layer or MoE that writes to the
    residual stream, so its variance does not grow with depth (as in GPT-2 and BEiT).
    """
    usual = INIT_STD * math.sqrt(768 / width)
    for child in module.modules():
        std = usual / math.sqrt(2 * (depth_of[child] + 1) if child in depth_of else 1)
        if isinstance(child, nn.Linear):
            nn.init.trunc_normal_(child.weight, std=std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, MoE):
            nn.init.trunc_normal_(child.router, std=usual)
            nn.init.trunc_normal_(child.w1, std=usual)
            nn.init.trunc_normal_(child.w2, std=std)


def residual_outputs(blocks: nn.ModuleList) -> dict[nn.Module, int]:
    """The layers of each block that write to the residual stream, with the block's number."""
    found: dict[nn.Module, int] = {}
    for i, block in enumerate(blocks):
        for name, child in block.named_modules():
            if isinstance(child, MoE) or name.endswith(("proj", "fc2")):
                found[child] = i
    return found
