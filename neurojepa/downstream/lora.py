"""Low-rank adapters: what fine-tuning learns of an encoder (LoRA, Hu et al. 2021).

Every linear layer W of the blocks becomes W + B A, with A [rank, in] drawn at random and B
[out, rank] zero at first, so that fine-tuning begins at the pretrained network to the bit.  Few
people cannot move much of it; what is stored after each epoch, and summed over ranks in each step,
is a hundredth of the encoder.  That is why adapters were chosen, and not rates that fall from layer
to layer.  Routers and routed experts stay as they are, the shared expert is adapted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from neurojepa.model.linear import linear


class LowRank(nn.Module):
    """A linear layer and what is added to it."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        drawn = torch.randn(rank, base.in_features, generator=generator)
        place = base.weight.device
        self.down = nn.Parameter((drawn / math.sqrt(base.in_features)).to(place))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=place))

    def forward(self, x: Tensor) -> Tensor:
        """As the layer, [..., out] of x [..., in]."""
        found: Tensor = self.base(x) + linear(linear(x, self.down), self.up)
        return found


def adapt(encoder: nn.Module, rank: int, seed: int) -> list[tuple[str, nn.Parameter]]:
    """Put adapters into the blocks of an encoder; all else is frozen.

    Parameters
    ----------
    seed : of A, which depends on nothing else

    Returns
    -------
    the parameters to be trained, by name
    """
    encoder.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent, name, layer in _layers(encoder, nn.Linear):
        assert isinstance(layer, nn.Linear)
        setattr(parent, name, LowRank(layer, rank, generator))
    return [(name, parameter) for name, parameter in encoder.named_parameters()
            if parameter.requires_grad]


@torch.no_grad()
def merge(encoder: nn.Module) -> None:
    """Add what adapters learnt to the layers that they stand for, and take them out."""
    for parent, name, layer in _layers(encoder, LowRank):
        assert isinstance(layer, LowRank)
        layer.base.weight += layer.up @ layer.down
        setattr(parent, name, layer.base)


def _layers(encoder: nn.Module, kind: type[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """The layers of a kind in the blocks, each with its parent and its name there."""
    blocks = encoder.get_submodule("blocks")
    return [(parent, name, layer) for parent in list(blocks.modules())
            if not isinstance(parent, kind)
            for name, layer in list(parent.named_children()) if isinstance(layer, kind)]
