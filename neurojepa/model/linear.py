"""Linear layers that use the faster of the CPU's two matrix libraries.

PyTorch multiplies float32 matrices on a CPU by MKL, which leaves half of what newer AMD processors
can do (wide vectors) unused; oneDNN, which comes with PyTorch too, does not.  Both are plain
float32.  Everywhere else, and with ``torch.backends.mkldnn`` off, these are PyTorch's own layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """``nn.Linear`` by ``linear``."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias: ``F.linear``, also its errors."""
    onednn = torch.backends.mkldnn
    # a compiler, which is asked first, chooses its products itself
    if (not torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel()
            and x.dtype == weight.dtype == torch.float32
            and onednn.is_available() and onednn.enabled):
        return _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return F.linear(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """Forward and backward of a linear layer by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_rows, x_rows = grads[0].reshape(-1, len(weight)), x.reshape(-1, x.shape[-1])
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (_product(grads[0], weight.t()) if to_x else None,
                _product(grad_rows.t(), x_rows.t()) if to_weight else None,
                grad_rows.sum(0) if to_bias else None)
