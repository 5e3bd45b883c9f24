"""Sparse latent prediction: predictor output -> non-negative code h -> Decoder(h) ~ target latent.

With code "relu" the code has more atoms than the latent has dimensions, and per target token

    L = mean_d (z - Decoder(h))^2 + l1 * ||h||_1

The decoder's atoms have unit norm, else it could shrink h and grow its atoms to evade the penalty.
With code "identity" it is the plain dense JEPA loss, L1 or L2, by a linear map to the latent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurojepa.config import SparseConfig
from neurojepa.model.layers import INIT_STD

USAGE_DECAY = 0.99  # per forward: an atom silent for a few hundred forwards counts as dead
DEAD_USAGE = 0.1


class Coded(NamedTuple):
    """Prediction and loss parts per token, all float32."""

    predicted: Tensor  # [..., D]
    error: Tensor  # [...] distance to the target
    norm_h: Tensor  # [...] ||h||_1, 0 for a dense code
    num_active: Tensor  # [...] ||h||_0


class Decoder(nn.Module):
    """Linear map of codes to latents whose atoms (rows) always have unit norm."""

    def __init__(self, atoms: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(atoms, dim))
        nn.init.normal_(self.weight)

    def atoms(self) -> Tensor:
        """[A, D] unit vectors."""
        return F.normalize(self.weight.float(), dim=1).to(self.weight.dtype)

    def forward(self, h_A: Tensor) -> Tensor:
        return h_A @ self.atoms()


class SparseCode(nn.Module):
    """Code and decoder on the predictor's output.

    The buffer ``usage`` [A] is a decaying count of the tokens in which each atom was active, of
    this rank's samples; it only feeds the share of dead atoms.
    """

    usage: Tensor

    def __init__(self, sparse: SparseConfig, predictor_dim: int, dim: int) -> None:
        super().__init__()
        self.dense_loss = sparse.dense_loss
        self.is_sparse = sparse.code == "relu"
        atoms = (sparse.atoms or 4 * dim) if self.is_sparse else dim
        self.encode = nn.Linear(predictor_dim, atoms)
        nn.init.trunc_normal_(self.encode.weight, std=INIT_STD)
        nn.init.zeros_(self.encode.bias)
        self.decoder: Decoder | None = None
        if self.is_sparse:
            self.decoder = Decoder(atoms, dim)
            self.register_buffer("usage", torch.ones(atoms))

    def forward(self, predicted: Tensor, target: Tensor) -> Coded:
        """Compare predictions [..., predictor dim] with float32 target latents [..., D]."""
        code = self.encode(predicted)
        if self.decoder is None:
            error = (code.float() - target).abs() if self.dense_loss == "l1" else (
                code.float() - target).square()
            none = torch.zeros_like(error[..., 0])
            return Coded(code.float(), error.mean(-1), none, none + code.shape[-1])
        h = F.relu(code)
        active = h.detach() > 0
        if torch.is_grad_enabled():
            self.usage.mul_(USAGE_DECAY).add_(active.flatten(0, -2).sum(0))
        z_hat = self.decoder(h).float()
        return Coded(z_hat, (z_hat - target).square().mean(-1), h.float().sum(-1),
                     active.sum(-1).float())

    def dead_share(self) -> Tensor:
        """Share of atoms that no recent token used; 0 for a dense code."""
        if self.decoder is None:
            return torch.zeros((), device=self.encode.weight.device)
        return (self.usage < DEAD_USAGE).float().mean()
