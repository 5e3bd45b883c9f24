"""Loss weights of target tokens: little for air, none for what was not scanned."""

from __future__ import annotations

import torch
from torch import Tensor


def token_weights(foreground: Tensor, valid: Tensor, background_weight: float) -> Tensor:
    """Weights that sum to 1 over the last axis (to 0 where no token is valid).

    A token weighs ``background_weight + (1 - background_weight) * foreground``.

    Parameters
    ----------
    foreground : [..., T] share of brain voxels of each target token.
    valid : bool [..., T].
    background_weight : weight of an all-air token beside an all-brain one.
    """
    weight = (background_weight + (1 - background_weight) * foreground) * valid
    return weight / weight.sum(-1, keepdim=True).clamp(min=1e-6)


def take(x_BNd: Tensor, index_BMk: Tensor) -> Tensor:
    """Gather tokens, [B, N, ...] by [B, M, k] -> [B, M, k, ...].

    Only for tensors that need no gradient: the backward of a gather adds with atomics on a GPU.
    """
    rows_B11 = torch.arange(len(x_BNd), device=x_BNd.device)[:, None, None]
    return x_BNd[rows_B11, index_BMk]
