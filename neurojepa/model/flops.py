"""FLOPs of a training step, counted from the config: what MFU is a share of.

A matrix product of n x m by m x k costs 2 n m k; attention over n tokens of width d costs 4 n^2 d.
The backward costs twice the forward; the target encoder has no backward.  Norms, activations,
rotations and the optimizer are left out, as is usual, and so is recomputation.  A method puts its
forward together from the parts here.

    MFU = step_flops * volumes per second / (ranks * peak of the device in bf16)
"""

from __future__ import annotations

import math

from neurojepa.config import ModelConfig, RootConfig
from neurojepa.feed.format import Grid
from neurojepa.methods import METHODS
from neurojepa.model.sizes import SIZES

# Dense bf16 FLOP/s by a part of the name that CUDA gives the device, from the makers' data sheets;
# the first that matches counts.  Memory is that of the device in GiB.
DEVICES = {
    "B200": (2250e12, 180),
    "GH200": (989e12, 96),
    "H200": (989e12, 141),
    "H100 PCIe": (756e12, 80),
    "H100 NVL": (835e12, 94),
    "H100": (989e12, 80),
    "A100": (312e12, 80),
    "L40S": (362e12, 48),
    "A40": (150e12, 48),
}


def peak_flops(device: str) -> float | None:
    """The bf16 peak of a device by its name; None where it is not known, as for CPUs."""
    return next((peak for part, (peak, _) in DEVICES.items() if part in device), None)


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
