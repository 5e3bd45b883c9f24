"""Sparse latent prediction: predictor output -> non-negative code h -> Decoder(h) ~ target latent.

With code "relu" the code has more atoms than the latent has dimensions, and per target token

    h = ReLU(W y + b),    L = mean_d (z - Decoder(h))^2 + l1 * ||h||_1

The decoder's atoms have unit norm, else it could shrink h and grow its atoms to evade the penalty.
Code "gated" decides apart which atoms are active and how strongly, so that the penalty does not
shrink the strengths (Rajamanoharan et al. 2024, equations 5 to 8):

    pi = W y + b,    h = [pi > 0] * ReLU(exp(r) * W y + m)
    L = mean_d (z - Decoder(h))^2 + l1 * ||ReLU(pi)||_1 + mean_d (z - Decoder'(ReLU(pi)))^2

where Decoder' gets no gradient.  With code "identity" it is the plain dense JEPA loss, L1 or L2, by
a linear map to the latent.

An atom that no token uses gets no gradient through a ReLU and would stay dead.  It is revived by
the gradient of the loss at h = 0 projected onto h >= 0: where a little of the atom would lower the
error by more than it costs, its pre-activation is raised.  See ``_Rectify``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurojepa.config import SparseConfig
from neurojepa.model.layers import INIT_STD
from neurojepa.model.linear import Linear, linear

USAGE_DECAY = 0.99  # per step in which an atom was silent
DEAD_USAGE = 0.1  # so an atom silent for 230 steps counts as dead


class Coded(NamedTuple):
    """Prediction and loss parts per token, all float32."""

    predicted: Tensor  # [..., D]
    error: Tensor  # [...] distance to the target
    penalty: Tensor  # [...] L1 norm of the code, of a gated one that of ReLU(pi); 0 for a dense one
    num_active: Tensor  # [...] ||h||_0
    gate_error: Tensor | None  # [...] distance of Decoder'(ReLU(pi)) to the target, if gated


class Decoder(nn.Module):
    """Linear map of codes to latents whose atoms (rows) always have unit norm."""

    def __init__(self, atoms: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(atoms, dim))
        nn.init.normal_(self.weight)

    def atoms(self) -> Tensor:
        """[A, D] unit vectors."""
        return F.normalize(self.weight.float(), dim=1).to(self.weight.dtype)

    def forward(self, h_A: Tensor, frozen: bool = False) -> Tensor:
        """Latents of codes [..., A]; when frozen, gradients reach the code, not the atoms."""
        atoms = self.atoms()
        return linear(h_A, (atoms.detach() if frozen else atoms).t())


class SparseCode(nn.Module):
    """Code and decoder, on the predictor's output or on any token.

    Buffers [A], float32: ``usage``, 1 for an atom that was active in the last step and decaying
    since for others, alike on all ranks; ``active``, the tokens in which each atom was active since
    the last ``update_usage``, of this rank's samples.
    """

    usage: Tensor
    active: Tensor

    def __init__(self, sparse: SparseConfig, *, input_dim: int, dim: int) -> None:
        super().__init__()
        self.dense_loss, self.revive = sparse.dense_loss, sparse.revive
        self.is_sparse, self.is_gated = sparse.code != "identity", sparse.code == "gated"
        atoms = (sparse.atoms or 4 * dim) if self.is_sparse else dim
        self.encode = Linear(input_dim, atoms, bias=not self.is_gated)
        nn.init.trunc_normal_(self.encode.weight, std=INIT_STD)
        if self.is_gated:
            self.gate_bias = nn.Parameter(torch.zeros(atoms))  # b
            self.log_scale = nn.Parameter(torch.zeros(atoms))  # r
            self.magnitude_bias = nn.Parameter(torch.zeros(atoms))  # m
        else:
            nn.init.zeros_(self.encode.bias)
        self.decoder: Decoder | None = None
        if self.is_sparse:
            self.decoder = Decoder(atoms, dim)
            self.register_buffer("usage", torch.ones(atoms))
            # always zero between steps, so in no checkpoint
            self.register_buffer("active", torch.zeros(atoms), persistent=False)

    def forward(self, predicted: Tensor, target: Tensor, valid: Tensor) -> Coded:
        """Compare predictions with target latents.

        Parameters
        ----------
        predicted : [..., input dim]
        target : float32 [..., D]
        valid : bool [...], False for tokens that must not count as use of an atom.
        """
        if self.decoder is None:
            code = self.encode(predicted).float()
            error = (code - target).abs() if self.dense_loss == "l1" else (code - target).square()
            none = torch.zeros_like(error[..., 0])
            return Coded(predicted=code, error=error.mean(-1), penalty=none,
                         num_active=none + code.shape[-1], gate_error=None)
        h, gate = self.activations(predicted)
        active = h.detach() > 0
        if torch.is_grad_enabled():
            self.active += (active & valid[..., None]).flatten(0, -2).sum(0)
        z_hat, gate_error = self.decoder(h).float(), None
        if self.is_gated:
            z_gate = self.decoder(gate, frozen=True).float()
            gate_error = (z_gate - target).square().mean(-1)
        return Coded(predicted=z_hat, error=(z_hat - target).square().mean(-1),
                     penalty=gate.float().sum(-1), num_active=active.sum(-1).float(),
                     gate_error=gate_error)

    def activations(self, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """Code h and what the penalty falls on, both [..., A]; the same but for a gated code."""
        code = self.encode(predicted)
        if not self.is_gated:
            h = self._rectify(code)
            return h, h
        pi = code + self.gate_bias
        magnitude = self._rectify(code * self.log_scale.exp() + self.magnitude_bias)
        return magnitude * (pi.detach() > 0), self._rectify(pi)

    def _rectify(self, x: Tensor) -> Tensor:
        if not self.revive:
            return F.relu(x)
        return _Rectify.apply(x, self.usage < DEAD_USAGE)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def update_usage(self, active: Tensor, applied: bool) -> None:
        """Take up a step's ``active``, summed over ranks and micro-steps; nothing if dropped."""
        if applied:
            self.usage.copy_(torch.where(active > 0, 1.0, USAGE_DECAY * self.usage))
        self.active.zero_()

    def dead_share(self) -> Tensor:
        """Share of atoms that no recent token used; 0 for a dense code."""
        if self.decoder is None:
            return torch.zeros((), device=self.encode.weight.device)
        return (self.usage < DEAD_USAGE).float().mean()


class _Rectify(torch.autograd.Function):
    """ReLU that lets dead atoms see when they are wanted.

    The loss of a sparse code is least where no inactive atom has a negative derivative, error and
    penalty together (the optimality condition of the lasso).  For a dead atom such derivatives pass
    on to its pre-activation, those that would keep it at zero do not.  Values are those of a ReLU,
    and so are gradients of atoms that are not dead.  Chosen over an auxiliary loss on the residual
    (Gao et al. 2024): it costs no matrix product, has no weight to set, and revived more.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dead_A: Tensor) -> Tensor:
        h = F.relu(x)
        ctx.save_for_backward(h, dead_A)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        h, dead_A = ctx.saved_tensors
        return torch.where((h > 0) | (dead_A & (grads[0] < 0)), grads[0], 0), None


def sparse_code(model: nn.Module) -> SparseCode | None:
    """The sparse code of a model, if it has one."""
    return next((module for module in model.modules()
                 if isinstance(module, SparseCode) and module.is_sparse), None)
