"""Linear layers on a CPU against PyTorch's own, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neurojepa.model.linear import Linear, linear


def gradients(apply, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The output and the gradient of each input under a fixed, uneven gradient of the output."""
    inputs = [each.detach().requires_grad_() for each in (x, weight, bias) if each is not None]
    y = apply(inputs[0], inputs[1], inputs[2] if len(inputs) == 3 else None)
    g = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * g).sum(), inputs)]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (1, 7), (2, 5, 7), (300, 64), (2, 3, 4, 96)])
def test_values_and_gradients(shape: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(24, shape[-1])
    bias = torch.randn(24) if with_bias else None
    exact = gradients(F.linear, *(each if each is None else each.double()
                                  for each in (x, weight, bias)))
    for found, expected in zip(gradients(linear, x, weight, bias), exact, strict=True):
        assert found.shape == expected.shape
        # float32, not a shorter type: bf16 would be off by 1e-2
        assert (found - expected).abs().max() < 3e-6 * max(1, expected.abs().max())


def test_any_strides_and_a_frozen_weight() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 50, 32).transpose(0, 1), torch.randn(32, 10).t()
    inputs = [x.requires_grad_(), x.detach().double().requires_grad_()]
    outputs = [linear(inputs[0], weight), F.linear(inputs[1], weight.double())]
    given, expected = (torch.autograd.grad(y.square().sum(), each)[0]
                       for y, each in zip(outputs, inputs, strict=True))
    assert given.stride() == torch.empty(50, 6, 32).stride()
    assert (given - expected).abs().max() < 3e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_pytorchs(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 8, dtype=dtype), torch.randn(3, 8, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_it_can_be_switched_off() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(300, 768), torch.randn(64, 768)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_no_rows_and_rows_of_a_wrong_width() -> None:
    layer = Linear(8, 3)
    assert layer(torch.zeros(0, 8)).shape == (0, 3)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(4, 7))
    with pytest.raises(RuntimeError):
        linear(torch.zeros(4, 8), torch.zeros(3, 8), torch.zeros(2))
