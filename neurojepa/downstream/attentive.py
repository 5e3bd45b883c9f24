"""A head on the tokens of a session's scans: what it attends to, and what it makes of that.

    tokens of a scan  -> softmax over its tokens, apart for each head of channels
                      -> weighted mean of how they differ from their place (pooling.py), scaled
    scans of a session -> softmax over the scans that are there -> sum of a linear map for each
                      modality

A scan that is missing has no token and no share in either softmax: nothing stands in for it.
Queries begin at zero, where every token weighs the same and a scan's row is its embedding; so the
head begins as a linear probe (``begin``), from which fine-tuning goes on.

Shape letters: T tokens of a scan, D width, h heads, c channels of a head, m modalities, n people,
K outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from neurojepa.downstream.crossval import least
from neurojepa.downstream.targets import Kind


@dataclass(frozen=True)
class Scan:
    """The tokens of one scan that are pooled, as ``Places.values`` gives them."""

    z_TD: Tensor  # layer-normed
    value_TD: Tensor  # how they differ from what is expected of them
    modality: int  # index into MODALITIES

    def mean(self) -> np.ndarray:
        """Float32 [D], as a head without queries pools it; zeros where none of its tokens is."""
        found: np.ndarray = (self.value_TD.sum(0) / max(len(self.value_TD), 1)).cpu().numpy()
        return found


class Head(nn.Module):
    """From the scans of a session to K outputs.

    Parameters
    ----------
    modalities : indices into MODALITIES, of the scans that it can read
    heads : at most; as many as divide ``dim``, which atoms of a session code need not
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, modalities: Sequence[int], dim: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        number, heads = len(self.modalities), math.gcd(dim, heads)
        self.query = nn.Parameter(torch.zeros(heads, dim // heads))
        self.trust = nn.Parameter(torch.zeros(number))
        self.weight = nn.Parameter(torch.zeros(number, dim, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("mean", torch.zeros(number, dim))
        self.register_buffer("scale", torch.ones(number, dim))

    def forward(self, scans: Sequence[Scan]) -> Tensor:
        """Float32 [K] of the scans that are there, at least one."""
        of_m = torch.tensor([self.modalities.index(scan.modality) for scan in scans],
                            device=self.bias.device)
        row_SD = torch.stack([self.pool(scan) for scan in scans])
        row_SD = (row_SD - self.mean[of_m]) / self.scale[of_m]
        share_S = self.trust[of_m].softmax(0)
        told: Tensor = torch.einsum("s,sd,sdk->k", share_S, row_SD, self.weight[of_m]) + self.bias
        return told

    def pool(self, scan: Scan) -> Tensor:
        """Float32 [D] of one scan; zeros where none of its tokens is pooled."""
        heads, channels = self.query.shape
        score_Th = (scan.z_TD.unflatten(-1, (heads, channels)) * self.query).sum(-1)
        share_Th = (score_Th / math.sqrt(channels)).softmax(0)
        value_Thc = scan.value_TD.unflatten(-1, (heads, channels))
        return (value_Thc * share_Th[..., None]).sum(0).flatten()


def begin(head: Head, kind: Kind, rows: Sequence[Sequence[tuple[int, np.ndarray]]],
          truth: np.ndarray, teach: np.ndarray, choose: np.ndarray) -> np.ndarray:
    """Set a head to the linear probe of embeddings.

    Parameters
    ----------
    rows : of n people, the modality and embedding [D] of each scan
    truth : [n], scaled where it is a regression
    teach, choose : indices of who the probe is fitted on, and of who the penalty is chosen by

    Returns
    -------
    float64 [n, m * D], the features that the probe read: 0 for modalities that are missing
    """
    features = standardise(head, rows, teach)
    penalty = best_penalty(kind, features, truth, teach, choose)
    as_probe(head, kind, features[teach], truth[teach], penalty)
    return features


@torch.no_grad()
def standardise(head: Head, rows: Sequence[Sequence[tuple[int, np.ndarray]]],
                teach: np.ndarray) -> np.ndarray:
    """Scale a head's rows by those who teach; returns the features [n, m * D] of ``begin``."""
    number, dim, _ = head.weight.shape
    for m, modality in enumerate(head.modalities):
        of_m = np.array([row for k in teach for which, row in rows[k] if which == modality])
        std = of_m.std(0)
        std = np.where(std > 1e-9 * max(std.max(), 1e-30), std, np.inf)
        head.mean[m] = torch.from_numpy(of_m.mean(0))
        head.scale[m] = torch.from_numpy(std * math.sqrt(dim))
    mean, scale = head.mean.cpu().numpy(), head.scale.cpu().numpy()
    features = np.zeros((len(rows), number, dim))
    for k, scans in enumerate(rows):
        for modality, row in scans:
            m = head.modalities.index(modality)
            features[k, m] += (row - mean[m]) / scale[m] / len(scans)
    return features.reshape(len(rows), -1)


def best_penalty(kind: Kind, features: np.ndarray, truth: np.ndarray, teach: np.ndarray,
                 choose: np.ndarray) -> float:
    """The penalty of least loss on ``choose``."""
    weights = class_weights(kind, truth[teach])

    def loss(penalty: float) -> float:
        weight, bias = _fitted(kind, features[teach], truth[teach], penalty)
        outputs = torch.from_numpy(features[choose] @ weight + bias)
        return float(cost(kind, outputs, torch.from_numpy(truth[choose]), weights))

    return least(lambda penalties: np.array([loss(each) for each in penalties]))


@torch.no_grad()
def as_probe(head: Head, kind: Kind, features: np.ndarray, truth: np.ndarray,
             penalty: float) -> None:
    """Set a head that ``standardise`` scaled to the linear probe of these people."""
    weight, bias = _fitted(kind, features, truth, penalty)
    head.weight.copy_(torch.from_numpy(weight.reshape(head.weight.shape)))
    head.bias.copy_(torch.from_numpy(bias))
    head.query.zero_()
    head.trust.zero_()


def _fitted(kind: Kind, features: np.ndarray, truth: np.ndarray,
            penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights [D, K] and bias [K] of a linear model; classes count alike, whatever their number."""
    from sklearn.linear_model import LogisticRegression, Ridge

    if kind == "regression":
        line = Ridge(alpha=penalty).fit(features, truth)
        return line.coef_[:, None], np.array([line.intercept_])
    model = LogisticRegression(C=1 / penalty, class_weight="balanced", max_iter=5000)
    model.fit(features, truth)
    return model.coef_.T, model.intercept_


def cost(kind: Kind, told_nK: Tensor, truth_n: Tensor, weights: Sequence[float]) -> Tensor:
    """Sum over people of squared errors, or of minus log probabilities times the class's weight."""
    truth_n = truth_n.to(told_nK)
    if kind == "regression":
        return (told_nK[:, 0] - truth_n).square().sum()
    weight_n = torch.tensor(weights).to(told_nK)[truth_n.long()]
    if kind == "binary":
        each_n = nn.functional.binary_cross_entropy_with_logits(told_nK[:, 0], truth_n,
                                                                reduction="none")
    else:
        each_n = nn.functional.cross_entropy(told_nK, truth_n.long(), reduction="none")
    return (weight_n * each_n).sum()


def class_weights(kind: Kind, truth: np.ndarray) -> list[float]:
    """What each class weighs, so that all count alike; their mean over people is 1."""
    if kind == "regression":
        return []
    counts = np.bincount(truth.astype(int))
    return [float(len(truth) / (np.count_nonzero(counts) * count)) if count else 0.0
            for count in counts]


def told(kind: Kind, outputs_nK: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Predictions [n] or [n, K] of outputs [n, K]: probabilities under the classes' shares of who
    taught, which weighing the classes had made alike (Elkan 2001); numbers as they are."""
    if kind == "regression":
        return outputs_nK[:, 0]
    if kind == "binary":
        odds = outputs_nK[:, 0] - math.log(weights[1] / weights[0])
        return 1 / (1 + np.exp(-odds))
    logits = outputs_nK - np.log(weights)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)
