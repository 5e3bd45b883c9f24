"""FLOPs of a training step, counted from the config: what MFU is a share of.

A matrix product of n x m by m x k costs 2 n m k; attention over n tokens of width d costs 4 n^2 d.
The backward costs twice the forward; the target encoder has no backward.  Norms, activations,
rotations and the optimizer are left out, as is usual, and so is recomputation.

    MFU = step_flops * volumes per second / (ranks * peak of the device in bf16)
"""

from __future__ import annotations

import math

from neurojepa.config import RootConfig
from neurojepa.feed.format import Grid
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


def step_flops(config: RootConfig, tokens: int) -> float:
    """FLOPs of one volume's forward and backward."""
    forward, trained = forward_flops(config, tokens)
    return forward + 2 * trained


def forward_flops(config: RootConfig, tokens: int) -> tuple[float, float]:
    """FLOPs of one volume's forward, and the part of them that has a backward.

    Of the JEPA or the masked autoencoder; a CNN's are not counted, it gets the JEPA's.
    """
    size, masks = SIZES[config.model.size], len(config.objective.masks.scales)
    targets = round(tokens * config.objective.masks.target_share)
    voxels = config.model.patch_voxels**3
    hidden = 4 * size.dim
    if config.model.moe:  # half of the blocks: shared and routed experts, and the router
        experts = (size.num_shared + size.top_k) * size.expert_hidden
        router = size.num_experts / 2
    else:
        experts, router = hidden, 0

    def encoder(n: int) -> float:
        mlp = (hidden + experts) / 2 * 2 + router
        block = n * size.dim * (4 * size.dim + mlp) * 2 + 4 * n * n * size.dim
        return size.depth * block + 2 * n * voxels * size.dim

    def predictor(n: int) -> float:
        width = size.predictor_dim
        block = n * width * 12 * width * 2 + 4 * n * n * width
        return size.predictor_depth * block + 2 * (n - targets) * size.dim * width

    if config.objective.method == "mae":  # one mask, no target encoder, voxels as output
        voxel_head = 2 * targets * size.predictor_dim * voxels
        trained = encoder(tokens - targets) + predictor(tokens) + voxel_head
        return trained, trained
    sparse = config.objective.sparse
    atoms = (sparse.atoms or 4 * size.dim) if sparse.code != "identity" else 0
    decodings = 2 if sparse.code == "gated" else 1  # its second has half a backward: a trifle
    head = 2 * targets * (size.predictor_dim * (atoms or size.dim)
                          + decodings * atoms * size.dim)
    trained = masks * (encoder(tokens - targets) + predictor(tokens) + head)
    return encoder(tokens) + trained, trained
