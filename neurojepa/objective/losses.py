"""Loss weights of target tokens, little for air and none for the unscanned; the spread of latents;
sums for metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from neurojepa.feed.format import MODALITIES
from neurojepa.objective.views import Views

VARIANCE_EPSILON = 1e-4
COVARIANCE_WEIGHT = 0.04  # beside the variance, as published: 1 to 25


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


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens, [B, N, ...] by [B, M, C] -> [B, M, C, ...], or T.

    Only for tensors that need no gradient: the backward of a gather adds with atomics on a GPU.
    """
    rows_B11 = torch.arange(len(x), device=x.device)[:, None, None]
    return x[rows_B11, index]


def divergence(share: Tensor, logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence of softmax(logits) from shares that sum to 1, [..., K] -> [...].

    It has the gradient of the cross-entropy, and is 0 where the shares are told exactly.
    """
    told = torch.log_softmax(logits.float(), -1)
    return (torch.special.xlogy(share, share) - share * told).sum(-1)


def crowding(latent_BND: Tensor, valid_BN: Tensor) -> Tensor:
    """float32 [B]: how far the latents of a scan are from filling their dimensions; 0 if they do.

    VICReg's variance and covariance terms (Bardes et al. 2022, eq. 1 to 4): what the standard
    deviation of each dimension lacks of 1, on average, and the squared covariances of different
    dimensions by dimension.  Over the tokens of one scan, where VICReg has the batch: so it does
    not depend on how a batch is cut into micro-batches and ranks.

    Parameters
    ----------
    latent_BND : latents of a scan's tokens, those of all masks in a row.
    valid_BN : tokens that count; a scan with fewer than two gets 1.
    """
    valid_BN1 = valid_BN[..., None].float()
    count_B11 = valid_BN1.sum(1, keepdim=True).clamp(min=2)
    x_BND = latent_BND.float() * valid_BN1
    x_BND = (x_BND - x_BND.sum(1, keepdim=True) / count_B11) * valid_BN1
    covariance_BDD = x_BND.transpose(1, 2) @ x_BND / (count_B11 - 1)
    variance_BD = covariance_BDD.diagonal(dim1=1, dim2=2)
    lack_B = torch.relu(1 - (variance_BD + VARIANCE_EPSILON).sqrt()).mean(1)
    shared_B = covariance_BDD.square().sum((1, 2)) - variance_BD.square().sum(1)
    return lack_B + COVARIANCE_WEIGHT * shared_B / variance_BD.shape[1]


def sample_sums(views: Views, loss_B: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over samples: weight, each part [B] by weight; loss and weight of each modality.

    The modality is that of the targets.  ``cross`` are the samples whose targets come from a scan
    of another modality.
    """
    weight_B = views.weight_B
    metrics = {"weight": weight_B.sum()}
    metrics |= {name: (weight_B * part_B.detach()).sum() for name, part_B in parts.items()}
    parts_B = {name: views.target_modality_B == index for index, name in enumerate(MODALITIES)}
    parts_B["cross"] = views.target_modality_B != views.modality_B
    for name, of_B in parts_B.items():
        metrics[f"loss/{name}"] = (of_B * loss_B).sum()
        metrics[f"weight/{name}"] = (of_B * weight_B).sum()
    return metrics
