"""FLOPs of a training step, counted from the config: what MFU is a share of.

A matrix product of n x m by m x k costs 2 n m k; attention over n tokens of width d costs 4 n^2 d.
The backward costs twice the forward; the target encoder has no backward.  Norms, activations,
rotations and the optimizer are left out, as is usual, and so is recomputation.  A method puts its
forward together from the parts here.

    MFU = step_flops * volumes per second / (ranks * peak of the device in bf16)
"""

from __future__ import annotations

import math
from typing import NamedTuple

from neurojepa.config import ModelConfig, RootConfig
from neurojepa.feed.format import Grid
from neurojepa.methods import METHODS
from neurojepa.model.sizes import SIZES


class Device(NamedTuple):
    """What the maker's data sheet says."""

    flops: float  # dense, bf16, a second
    memory_gib: int
    bandwidth: float  # of the memory, bytes a second


# By a part of the name that CUDA gives the device; the first that matches counts.
DEVICES = {
    "B200": Device(2250e12, 180, 8.0e12),
    "GH200": Device(989e12, 96, 4.0e12),
    "H200": Device(989e12, 141, 4.8e12),
    "H100 PCIe": Device(756e12, 80, 2.0e12),
    "H100 NVL": Device(835e12, 94, 3.9e12),
    "H100": Device(989e12, 80, 3.35e12),
    "A100": Device(312e12, 80, 2.0e12),
    "L40S": Device(362e12, 48, 0.86e12),
    "A40": Device(150e12, 48, 0.7e12),
}


def known_device(name: str) -> Device | None:
    """A device by the name that CUDA gives it; None where it is not known, as for CPUs."""
    return next((facts for part, facts in DEVICES.items() if part in name), None)


def peak_flops(name: str) -> float | None:
    """The bf16 peak of a device by its name; None where it is not known."""
    device = known_device(name)
    return device.flops if device else None


def tokens_per_volume(config: RootConfig, grid: Grid) -> int:
    """Tokens that each scan contributes: the budget, or all patches of the grid."""
    return config.model.token_budget or math.prod(
        length // config.model.patch_voxels for length in grid.shape)


def step_flops(config: RootConfig, grid: Grid) -> float:
    """FLOPs of one volume's forward and backward."""
    forward, trained = METHODS[config.objective.method].load().flops(config, grid)
    return forward + 2 * trained


def encoder_flops(model: ModelConfig, tokens: int) -> float:
    """FLOPs of the encoder's forward over so many tokens of a scan."""
    size = SIZES[model.size]
    hidden = 4 * size.dim
    if model.moe:  # half of the blocks: shared and routed experts, and the router
        experts = (size.num_shared + size.top_k) * size.expert_hidden
        router = size.num_experts / 2
    else:
        experts, router = hidden, 0
    mlp = (hidden + experts) / 2 * 2 + router
    block = tokens * size.dim * (4 * size.dim + mlp) * 2 + 4 * tokens * tokens * size.dim
    return size.depth * block + 2 * tokens * model.patch_voxels**3 * size.dim


def predictor_flops(model: ModelConfig, *, tokens: int, targets: int) -> float:
    """FLOPs of the predictor's forward over ``tokens``, of which so many are targets."""
    size = SIZES[model.size]
    width, context = size.predictor_dim, tokens - targets
    block = tokens * width * 12 * width * 2 + 4 * tokens * tokens * width
    unread = context * width * 9 * width * 2 + 4 * context * tokens * width  # of the last block
    return size.predictor_depth * block - unread + 2 * context * size.dim * width
