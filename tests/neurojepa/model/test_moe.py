"""Mixture of experts against a plain loop, and its bookkeeping."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neurojepa.config import ModelConfig
from neurojepa.model import moe
from neurojepa.model.encoder import Encoder
from neurojepa.model.layers import MLP
from neurojepa.model.moe import (
    MoE,
    expert_balance,
    grouped_matmul,
    moe_layers,
    update_router_bias,
)


def make_moe(dtype: torch.dtype = torch.float64, experts: int = 5, top_k: int = 2) -> MoE:
    torch.manual_seed(0)
    layer = MoE(16, num_experts=experts, top_k=top_k, hidden=24, shared=MLP(16, 24))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.to(dtype)


def plain_loop(layer: MoE, x_BND: torch.Tensor, valid_BN: torch.Tensor) -> torch.Tensor:
    out = []
    for x_D, valid in zip(x_BND.flatten(0, 1), valid_BN.flatten(), strict=True):
        y_D = layer.shared(x_D)
        if valid:
            score_E = (layer.router @ x_D).softmax(-1)
            chosen = (score_E + layer.bias).topk(layer.top_k).indices.tolist()
            total = sum(score_E[e] for e in chosen)
            for e in chosen:
                weight = layer.top_k * score_E[e] / total
                y_D = y_D + weight * (F.gelu(x_D @ layer.w1[e]) @ layer.w2[e])
        out.append(y_D)
    return torch.stack(out).view_as(x_BND)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("empty", [False, True], ids=["all", "empty-expert"])
def test_equals_a_loop_forward_and_backward(dtype: torch.dtype, tolerance: float, empty: bool):
    layer = make_moe(dtype)
    if empty:
        layer.bias[2] = -10.0  # never chosen
    x = torch.randn(2, 9, 16, dtype=dtype, requires_grad=True)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    probe = torch.randn(2, 9, 16, dtype=dtype)
    results = []
    for run in (lambda: layer(x, valid)[0], lambda: plain_loop(layer, x, valid)):
        y = run()
        grads = torch.autograd.grad((y * probe).sum(), [x, *layer.parameters()])
        results.append([y, *grads])
    for ours, loop in zip(*results, strict=True):
        torch.testing.assert_close(ours, loop, atol=tolerance, rtol=tolerance)
    load = layer(x, valid)[1]
    assert load.sum() == 2 * valid.sum() and (load[2] == 0) == empty


def test_grouped_kernel_and_fallback_agree(monkeypatch: pytest.MonkeyPatch):
    x, w = torch.randn(20, 8), torch.randn(4, 8, 16)
    ends = torch.tensor([6, 6, 15, 20], dtype=torch.int32)
    kernel = grouped_matmul(x, w, ends)
    monkeypatch.setattr(moe, "_has_grouped_kernel", lambda *_: False)
    torch.testing.assert_close(grouped_matmul(x, w, ends), kernel)


@pytest.mark.parametrize("loads", [
    [6, 0, 9, 5], [0, 0, 0, 300], [300, 0, 0, 0], [16, 8, 24, 1], [0, 0, 0, 1], [1000, 3, 7, 2]])
def test_blocks_equal_a_loop_over_experts(loads: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(moe, "_has_grouped_kernel", lambda *_: False)
    x = torch.randn(sum(loads), 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(len(loads), 6, 10, dtype=torch.float64, requires_grad=True)
    probe, ends = torch.randn(len(x), 10, dtype=torch.float64), torch.tensor(loads).cumsum(0)
    looped = torch.cat([part @ w[e] for e, part in enumerate(x.split(loads))])
    ours = grouped_matmul(x, w, ends.int())
    torch.testing.assert_close(ours, looped)
    for found, expected in zip(*(torch.autograd.grad((y * probe).sum(), (x, w))
                                 for y in (ours, looped)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("rows", "experts"), [(100_000, 16), (40_000, 32), (123_456, 64)])
def test_blocks_add_little_work_to_that_of_the_rows(rows: int, experts: int):
    for ends in (torch.arange(1, experts + 1) * rows // experts, torch.full((experts,), rows)):
        place, expert, block = moe._blocks(ends.int(), rows)
        assert len(expert) * block < 1.13 * rows
        assert len(place.unique()) == rows and int(place.max()) < len(expert) * block


def test_padding_is_not_routed_and_changes_nothing():
    layer = make_moe(torch.float32)
    x, valid = torch.randn(1, 10, 16), torch.ones(1, 10, dtype=torch.bool)
    valid[0, 7:] = False
    poisoned = x.clone()
    poisoned[0, 7:] = 1e4
    y, load = layer(x, valid)
    z, poisoned_load = layer(poisoned, valid)
    assert torch.equal(y[:, :7], z[:, :7]) and torch.equal(load, poisoned_load)
    assert load.sum() == 7 * layer.top_k
    y_all_padding, load = layer(x, torch.zeros_like(valid))
    assert load.sum() == 0 and torch.equal(y_all_padding, layer.shared(x))


def test_bf16_routes_in_float32_and_keeps_counts():
    layer = make_moe(torch.float32).to(torch.bfloat16)
    layer.bias, layer.load = layer.bias.float(), layer.load.float()
    x = torch.randn(4, 300, 16).bfloat16().requires_grad_()
    y, load = layer(x, torch.ones(4, 300, dtype=torch.bool))
    y.square().mean().backward()
    assert y.dtype == torch.bfloat16 and load.dtype == torch.float32 and load.sum() == 2400
    assert layer.w1.grad is not None and bool(layer.w1.grad.isfinite().all())


@pytest.mark.parametrize("every", [1, 2])
def test_load_is_counted_once_under_recomputation(every: int):
    encoders = []
    for checkpointing in (0, every):
        torch.manual_seed(0)
        encoders.append(Encoder(ModelConfig(size="tiny", patch_voxels=2,
                                            activation_checkpointing=checkpointing)))
    tokens, coords = torch.randn(2, 30, 8), 100 * torch.randn(2, 30, 3)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[0, 25:] = False
    for encoder in encoders:
        encoder(tokens, coords, valid).square().mean().backward()
    plain, recomputed = encoders
    for a, b in zip(moe_layers(plain), moe_layers(recomputed), strict=True):
        assert torch.equal(a.load, b.load) and a.load.sum() == valid.sum() * a.top_k
    for p, q in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert p.grad is not None and torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    with torch.no_grad():
        plain(tokens, coords, valid)
    assert torch.equal(moe_layers(plain)[0].load, moe_layers(recomputed)[0].load)


def test_bias_update_balances_a_lopsided_router():
    layer = make_moe(torch.float32)
    with torch.no_grad():
        layer.router *= 0.1
    layer.bias[0] = 0.3  # every token goes to expert 0
    x, valid = torch.randn(8, 64, 16), torch.ones(8, 64, dtype=torch.bool)
    first = layer(x, valid)[1]
    for _ in range(200):
        load = layer(x, valid)[1]
        layer.load += load
        update_router_bias([layer], load[None], rate=5e-3)
    last = layer(x, valid)[1]
    assert first.max() / first.mean() > 2.2 and last.max() / last.mean() < 1.3
    assert not layer.load.any() and abs(float(layer.bias.mean())) < 1e-6
    bias = layer.bias.clone()
    update_router_bias([layer], last[None], rate=0.0)
    torch.testing.assert_close(layer.bias, bias)


def test_balance_of_known_loads():
    even = expert_balance(torch.tensor([[5.0, 5, 5, 5], [3, 3, 3, 3]]))
    assert even["expert_max_load"] == 1 and float(even["expert_entropy"]) == pytest.approx(1)
    one = expert_balance(torch.tensor([[0.0, 8, 0, 0], [2, 2, 2, 2]]))
    assert one["expert_max_load"] == 4 and float(one["expert_entropy"]) == pytest.approx(0.5)
    half = expert_balance(torch.tensor([[4.0, 4, 0, 0]]))
    assert half["expert_max_load"] == 2 and float(half["expert_entropy"]) == pytest.approx(0.5)
    none = expert_balance(torch.zeros(1, 4))  # only samples of weight zero
    assert all(value == 0 for value in none.values())


def router_gradient(dtype: torch.dtype, chosen: torch.Tensor | None = None
                    ) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a layer with close choices, which are also returned; ``chosen`` takes their place."""
    layer, (x, valid) = make_moe(torch.float32, experts=16, top_k=6), some_tokens()
    layer, x, said = layer.to(dtype), x.to(dtype), []
    layer.bias = layer.bias.float()
    route = layer.route

    def routed(x_QD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if chosen is not None:  # a bias that leaves no other choice, token by token
            layer.bias = F.one_hot(chosen, 16).sum(1) * 10.0
        weight_Qk, expert_Qk = route(x_QD)
        said.append(expert_Qk)
        return weight_Qk, expert_Qk

    layer.route = routed  # type: ignore[method-assign]
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (layer(x, valid)[0].float() - target).square().sum().backward()
    assert layer.router.grad is not None
    return layer.router.grad.float(), said[0]


def some_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Few enough for two that choose otherwise to count, as they do with this seed."""
    generator = torch.Generator().manual_seed(6)
    return torch.randn(1, 48, 16, generator=generator), torch.ones(1, 48, dtype=torch.bool)


def test_bf16_differs_where_tokens_choose_other_experts_and_else_by_rounding() -> None:
    exact, choices = router_gradient(torch.float32)
    own, others = router_gradient(torch.bfloat16)
    same, _ = router_gradient(torch.bfloat16, choices)
    assert (choices.sort(-1).values != others.sort(-1).values).any(-1).sum() == 2
    by_choice, by_rounding = (float((found - exact).norm() / exact.norm())
                              for found in (own, same))
    assert by_rounding < 2**-7 and by_choice > 4 * by_rounding
