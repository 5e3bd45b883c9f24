"""A session code: what the scans of one session have in common, told sparsely from any one of them.

    token z of a scan -> linear, GELU, linear, ReLU -> h -> Decoder(h) ~ the mean over the session's
                                                           scans of their tokens at the same patch

    L = mean_d (mean - Decoder(h))^2 + l1 * ||h||_1

A T1w scan and a T2w scan of one session show one head, so what h can tell of their mean is anatomy,
and contrast is left out.  The decoder's atoms have unit norm, as in sparse.py.  A session code is a
second stage: it is learnt on a frozen encoder (downstream/sessions.py), and a model that has one
gives h in place of latents (``Averaged.session_code``).

Shape letters: D width of the encoder, A atoms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurojepa.model.sparse import Decoder


class SessionCode(nn.Module):
    """h of tokens, and what it tells of their session."""

    def __init__(self, encode: nn.Sequential, decoder: Decoder) -> None:
        super().__init__()
        self.encode, self.decoder = encode, decoder
        self.offset = nn.Parameter(torch.zeros(decoder.weight.shape[1]))

    @classmethod
    def sized(cls, dim: int, hidden: int, atoms: int) -> SessionCode:
        """A code that has learnt nothing, for tokens of this width."""
        return cls(nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, atoms)),
                   Decoder(atoms, dim))

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> SessionCode:
        """The code of a ``state_dict``."""
        hidden, dim = tensors["encode.0.weight"].shape
        with torch.random.fork_rng(devices=[]):
            code = cls.sized(dim, hidden, len(tensors["decoder.weight"]))
        code.load_state_dict(tensors, strict=True)
        return code.requires_grad_(False)

    @property
    def atoms(self) -> int:
        """How many there are."""
        return len(self.decoder.weight)

    def forward(self, z: Tensor) -> Tensor:
        """h, [..., D] -> [..., A]"""
        return F.relu(self.encode(z))

    def told(self, h: Tensor) -> Tensor:
        """The session's mean token as h tells it, [..., A] -> [..., D]"""
        found: Tensor = self.decoder(h)
        return found + self.offset

    def error(self, z_QD: Tensor, mean_QD: Tensor, l1: float) -> Tensor:
        """The loss of tokens and the means of their sessions."""
        h_QA = self(z_QD)
        return (self.told(h_QA) - mean_QD).square().mean() + l1 * h_QA.sum(-1).mean()

    def keep(self, used_A: Tensor) -> None:
        """Drop all other atoms; bool [A]."""
        keep_rows(self.encode[-1], used_A)
        keep_rows(self.decoder, used_A)


def keep_rows(layer: nn.Module, used_A: Tensor) -> None:
    """Leave a layer these rows of its weight, and of its bias; they learn no more."""
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(parameter[used_A], requires_grad=False))
