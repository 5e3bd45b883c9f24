"""FLOPs of a training step, counted from the config: what MFU is a share of.

A matrix product of n x m by m x k costs 2 n m k; attention over n tokens of width d costs 4 n^2 d.
The backward costs twice the forward; the target encoder has no backward.  Norms, activations,
rotations and the optimizer are left out, as is usual.
"""

from __future__ import annotations

from neurojepa.config import RootConfig
from neurojepa.model.sizes import SIZES


def step_flops(config: RootConfig, tokens: int) -> float:
    """FLOPs of one volume's forward and backward, recomputation left out."""
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
        block = n * size.predictor_dim * 12 * size.predictor_dim * 2 + 4 * n * n * size.predictor_dim
        return size.predictor_depth * block + 2 * (n - targets) * size.dim * size.predictor_dim

    sparse = config.objective.sparse
    atoms = (sparse.atoms or 4 * size.dim) if sparse.code != "identity" else 0
    head = 2 * targets * (size.predictor_dim * (atoms or size.dim) + atoms * size.dim)
    trained = masks * (encoder(tokens - targets) + predictor(tokens) + head)
    return encoder(tokens) + 3 * trained
