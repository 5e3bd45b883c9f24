"""Sparse mixture of experts: each token goes to its top-k routed experts and to the shared one.

    tokens -> router (float32) -> top-k of score + bias -> rows (token, choice) sorted by expert
    -> a grouped matrix product, GELU, weights, another one -> rows in token order -> sum over k

Shapes are static, nothing is read back to the host, and there is no loop over experts.  The order
is undone by its inverse, also in the backward, so no gradient is accumulated with atomics: results
are bit-reproducible on a GPU too.  Padding tokens are not routed: their rows lie behind the last
expert's, weigh 0 in forward and backward, and count for no load.

Experts are balanced without an auxiliary loss (DeepSeek-V3; Wang et al. 2024): ``bias`` only enters
the choice, and ``update_router_bias`` raises it for experts that got too little.

Of the shape letters (neurojepa/__init__.py): Q = B * N tokens, S = Q * k rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MoE(nn.Module):
    """Routed and shared experts in place of an MLP.

    Buffers (float32): ``bias`` [E] of the choice; ``load`` [E], tokens routed to each expert since
    the last ``update_router_bias``, which the encoder adds up once per forward.
    """

    bias: Tensor
    load: Tensor

    def __init__(self, dim: int, *, num_experts: int, top_k: int, hidden: int,
                 shared: nn.Module) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Parameter(torch.empty(num_experts, dim))
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.shared = shared
        self.register_buffer("bias", torch.zeros(num_experts))
        self.register_buffer("load", torch.zeros(num_experts))

    def forward(self, x_BND: Tensor, valid_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output [B, N, D] and the valid tokens that each expert got [E]."""
        x_QD, valid_Q1 = x_BND.flatten(0, 1), valid_BN.reshape(-1, 1)
        weight_Qk, expert_Qk = self.route(x_QD)
        weight_Qk = weight_Qk * valid_Q1
        num_experts = len(self.router)
        # rows of padding sort behind all others and weigh 0: they pass the last expert in vain
        key_S = torch.where(valid_Q1, expert_Qk, num_experts).flatten()
        order_S = key_S.sort(stable=True).indices
        experts_E = torch.arange(num_experts, device=key_S.device)
        load_E = (key_S[:, None] == experts_E).sum(0, dtype=torch.int32)
        ends_E = F.pad(load_E.cumsum(0, dtype=torch.int32)[:-1], (0, 1), value=float(len(key_S)))
        # made once for the ways there and back, and for their backwards
        token_S, back_Qk = order_S // self.top_k, _inverse(order_S).view(-1, self.top_k)

        rows_SD = _Rows.apply(x_QD, token_S, back_Qk, True)  # type: ignore[no-untyped-call]
        weight_S1 = _Permute.apply(  # type: ignore[no-untyped-call]
            weight_Qk.flatten(), order_S, back_Qk.flatten())[:, None]
        out_SD = self.experts(rows_SD, weight_S1, ends_E)
        y_QD = _Rows.apply(out_SD, token_S, back_Qk, False)  # type: ignore[no-untyped-call]
        return self.shared(x_BND) + y_QD.view_as(x_BND), load_E.float()

    def experts(self, rows_SD: Tensor, weight_S1: Tensor, ends_E: Tensor) -> Tensor:
        """What each expert makes of its rows, which end at ``ends_E``, times their weights."""
        hidden_SH = F.gelu(grouped_matmul(rows_SD, self.w1, ends_E))
        # weighted here and not behind w2: these rows are the narrower ones
        return grouped_matmul(hidden_SH * weight_S1.to(hidden_SH.dtype), self.w2, ends_E)

    def route(self, x_QD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [Q, k] that sum to k, and experts [Q, k].

        The mean weight of 1 makes the layer start as a dense MLP of width top_k * hidden would.
        """
        precise = torch.promote_types(x_QD.dtype, torch.float32)  # bf16 would flip close choices
        score_QE = F.linear(x_QD.to(precise), self.router.to(precise)).softmax(-1)
        expert_Qk = self.choose(score_QE)
        # a one-hot product, since the backward of a gather adds with atomics
        chosen_QkE = expert_Qk[..., None] == torch.arange(len(self.router), device=x_QD.device)
        score_Qk = (score_QE[:, None] * chosen_QkE).sum(-1)
        return score_Qk * (self.top_k / score_Qk.sum(-1, keepdim=True)), expert_Qk

    def choose(self, score_QE: Tensor) -> Tensor:
        """Experts [Q, k] of each token."""
        return (score_QE.detach() + self.bias).topk(self.top_k, dim=-1).indices


class _Rows(torch.autograd.Function):
    """Tokens to rows (``spread``) or back, where a token's rows add up: each is the other's
    backward.

    ``token_S`` is each row's token, ``back_Qk`` the places of each token's rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_S: Tensor, back_Qk: Tensor, spread: bool) -> Tensor:
        ctx.save_for_backward(token_S, back_Qk)
        ctx.spread = spread
        return x[token_S] if spread else x[back_Qk].sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        token_S, back_Qk = ctx.saved_tensors
        return grads[0][back_Qk].sum(1) if ctx.spread else grads[0][token_S], None, None, None


class _Permute(torch.autograd.Function):
    """Rows in a given order; the backward is the inverse permutation, not an accumulation."""

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, order_S: Tensor, back_S: Tensor) -> Tensor:
        ctx.save_for_backward(back_S)
        return x_SD[order_S]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (back_S,) = ctx.saved_tensors
        return grads[0][back_S], None, None


def _inverse(order_S: Tensor) -> Tensor:
    positions_S = torch.arange(len(order_S), device=order_S.device)
    return torch.empty_like(order_S).scatter_(0, order_S, positions_S)


def grouped_matmul(x_SD: Tensor, w_EDH: Tensor, ends_E: Tensor) -> Tensor:
    """Rows ends[e-1]..ends[e] times w[e]: one kernel where torch has it, else ``_Blocked``."""
    if _has_grouped_kernel(x_SD, w_EDH):
        return F.grouped_mm(x_SD, w_EDH, offs=ends_E)
    out_SH: Tensor = _Blocked.apply(x_SD, w_EDH, ends_E)  # type: ignore[no-untyped-call]
    return out_SH


def grouped_kernel(layer: MoE) -> str:
    """What multiplies the rows of a layer's experts, in words."""
    if _has_grouped_kernel(layer.w1, layer.w1):
        return "torch's grouped product"
    return "batched product of padded blocks: torch has no grouped one for this device and type"


class _Blocked(torch.autograd.Function):
    """The grouped product for float64 and for GPUs before Hopper: a batched one of padded blocks.

    Each expert's rows are laid out from the start of a block on.  A block is about an eighth of an
    expert's mean share, so that padding adds about as much to the work, whatever the loads are.
    Shapes are static and nothing is read by the host.  An expert's blocks are summed by a product,
    since atomics would make sums differ from run to run.
    """

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, w_EDH: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_SD, w_EDH, ends_E)
        place_S, expert_K, block = _blocks(ends_E, len(x_SD))
        out_KbH = _padded(x_SD, place_S, len(expert_K), block) @ w_EDH[expert_K]
        return out_KbH.flatten(0, 1)[place_S]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_SD, w_EDH, ends_E = ctx.saved_tensors
        place_S, expert_K, block = _blocks(ends_E, len(x_SD))
        grad_KbH = _padded(grads[0], place_S, len(expert_K), block)
        to_x_KbD = grad_KbH @ w_EDH[expert_K].mT
        to_w_KDH = _padded(x_SD, place_S, len(expert_K), block).mT @ grad_KbH
        of_expert_EK = expert_K == torch.arange(len(w_EDH), device=x_SD.device)[:, None]
        to_w_EDH = of_expert_EK.to(to_w_KDH.dtype) @ to_w_KDH.flatten(1)
        return to_x_KbD.flatten(0, 1)[place_S], to_w_EDH.view_as(w_EDH), None


def _blocks(ends_E: Tensor, num_rows: int) -> tuple[Tensor, Tensor, int]:
    """Each row's place among the rows of K blocks, each block's expert, and a block's rows."""
    num_experts, last_E = len(ends_E), ends_E.long()
    block = 1 << max(3, (num_rows // (8 * num_experts)).bit_length() - 1)
    rows_S = torch.arange(num_rows, device=ends_E.device)
    expert_S = torch.searchsorted(last_E, rows_S, right=True)
    first_E = F.pad(last_E[:-1], (1, 0))
    blocks_E = (last_E - first_E + block - 1) // block
    behind_E = blocks_E.cumsum(0)
    place_S = (behind_E - blocks_E)[expert_S] * block + rows_S - first_E[expert_S]
    number_K = torch.arange(num_rows // block + num_experts, device=ends_E.device)
    expert_K = torch.searchsorted(behind_E, number_K, right=True).clamp(max=num_experts - 1)
    return place_S, expert_K, block


def _padded(x_SD: Tensor, place_S: Tensor, num_blocks: int, block: int) -> Tensor:
    """[K, block, D]: the rows at their places, zeros elsewhere."""
    empty = x_SD.new_zeros(num_blocks * block, x_SD.shape[1])
    return empty.index_copy(0, place_S, x_SD).view(num_blocks, block, -1)


def _has_grouped_kernel(x_SD: Tensor, w_EDH: Tensor) -> bool:
    """Whether F.grouped_mm takes these types, and without reading group sizes on the host."""
    aligned = all(size * x_SD.element_size() % 16 == 0 for size in w_EDH.shape[1:])
    if x_SD.device.type == "cpu":  # torch cannot trace it in float32
        return aligned and (x_SD.dtype == torch.bfloat16 or (
            x_SD.dtype == torch.float32 and not torch.compiler.is_compiling()))
    return (aligned and x_SD.dtype == torch.bfloat16 and x_SD.device.type == "cuda"
            and torch.cuda.get_device_capability(x_SD.device) >= (9, 0))


def moe_layers(model: nn.Module) -> list[MoE]:
    """The trained MoE layers in order; those of a frozen target encoder are not among them."""
    return [layer for layer in model.modules()
            if isinstance(layer, MoE) and layer.router.requires_grad]


@torch.no_grad()
def expert_balance(load_LE: Tensor) -> dict[str, Tensor]:
    """How evenly tokens were spread over the experts of the layers; 1 and 1 are perfect balance.

    ``expert_max_load``: tokens of the busiest expert over the mean, in the most uneven layer (Wang
    et al. 2024: MaxVio + 1).  ``expert_entropy``: entropy of the loads over log E, mean over
    layers.

    Parameters
    ----------
    load_LE : [L, E] tokens per expert.
    """
    share_LE = load_LE / load_LE.sum(1, keepdim=True).clamp(min=1)
    entropy_L = -torch.special.xlogy(share_LE, share_LE).sum(1)
    num_experts = load_LE.shape[1]
    return {"expert_max_load": share_LE.max() * num_experts,
            "expert_entropy": entropy_L.mean() / math.log(num_experts)}


@torch.no_grad()
def update_router_bias(layers: list[MoE], load_LE: Tensor, rate: float) -> None:
    """Move each expert's bias by ``rate`` towards balance and zero the layers' ``load``.

    Parameters
    ----------
    layers : as returned by ``moe_layers``.
    load_LE : [L, E] tokens per expert of the step, summed over ranks and micro-batches.
    rate : step of the bias; 0 only forgets the load, as after a skipped step.
    """
    bias_LE = torch.stack([layer.bias for layer in layers])
    bias_LE += rate * torch.sign(load_LE.mean(1, keepdim=True) - load_LE)
    bias_LE -= bias_LE.mean(1, keepdim=True)
    torch._foreach_copy_([layer.bias for layer in layers], bias_LE.unbind())
    torch._foreach_zero_([layer.load for layer in layers])
