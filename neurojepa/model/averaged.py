"""What every trained model is: an encoder, and a copy of it that follows by a moving average.

The trainer keeps the copy, ``target``; embeddings come from it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurojepa.config import RootConfig
from neurojepa.feed.format import Feed, Grid
from neurojepa.model.encoder import Encoder
from neurojepa.model.moe import MoE
from neurojepa.model.session_code import SessionCode
from neurojepa.objective.views import Views


class Averaged(nn.Module, ABC):
    """An encoder of tokens with its frozen ``target``, an exponential moving average.

    The class of a method (methods.py) adds what its loss needs.  Its ``forward(views, l1)`` returns
    the loss of a micro-batch, a sum over samples, and sums for the metrics: see ``SparseJEPA``.
    It runs ``encoder`` before it uses trained weights of its own: on several ranks all of them may
    still be on their way, and the encoder's forward waits for them (train/gathers.py).
    What follows the network is best a method ``losses``: it is compiled to one graph.
    """

    def __init__(self, config: RootConfig, grid: Grid) -> None:
        super().__init__()
        self.encoder = self.make_encoder(config, grid)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        self.session_code: SessionCode | None = None  # a second stage, which exports may have

    @staticmethod
    def make_encoder(config: RootConfig, grid: Grid) -> nn.Module:
        """The encoder; called as ``Encoder`` is where ``latents`` and ``embed`` stay as they are.
        """
        return Encoder(config.model)

    @staticmethod
    @abstractmethod
    def flops(config: RootConfig, grid: Grid) -> tuple[float, float]:
        """FLOPs of one volume's forward, and the part of them that has a backward."""

    @staticmethod
    def labels(feed: Feed, config: RootConfig) -> Any:
        """What attaches labels to views (as ``baselines.cnn.Labels``); None for a method without.
        """
        return None

    @torch.no_grad()
    def latents(self, views: Views) -> Tensor:
        """float32 [B, N, D]: layer-normed output of the target encoder for every token; or h of
        the session code, [B, N, A], where there is one."""
        return self.latents_with_gradient(views)

    def latents_with_gradient(self, views: Views) -> Tensor:
        """As ``latents``, and differentiable in the tokens."""
        # routing follows the encoder; only weights are averaged
        if layers := _moes(self.target):
            torch._foreach_copy_([layer.bias for layer in layers],
                                 [layer.bias for layer in _moes(self.encoder)])
        z_BND = self.target(views.tokens_BNP, views.coords_BN3, views.valid_BN,
                            views.all_scanned)
        z_BND = F.layer_norm(z_BND.float(), z_BND.shape[-1:])
        if self.session_code is None:
            return z_BND
        h_BNA: Tensor = self.session_code(z_BND)
        return h_BNA

    @torch.no_grad()
    def embed(self, views: Views) -> Tensor:
        """float32 [B, D]: mean over a scan's valid tokens of ``latents``."""
        valid_BN1 = views.valid_BN[..., None].float()
        return (self.latents(views) * valid_BN1).sum(1) / valid_BN1.sum(1).clamp(min=1)


def _moes(encoder: nn.Module) -> list[MoE]:
    return [layer for layer in encoder.modules() if isinstance(layer, MoE)]
