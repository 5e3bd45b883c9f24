"""The attentive readout of frozen embeddings: which tokens of a scan tell a label.

attentive.Head is fitted in each outer fold of the cross-validation that linear models go through.
It begins as the linear probe.  A fifth of those who teach choose the penalty of that and after how
many epochs of AdamW to stop (0 is the probe); then all of them teach it so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from neurojepa.downstream.attentive import (
    Head,
    Scan,
    as_probe,
    best_penalty,
    class_weights,
    cost,
    standardise,
    told,
)
from neurojepa.downstream.crossval import INNER, Read, whole_families
from neurojepa.downstream.features import Features
from neurojepa.downstream.finetuned import check_tokens, scans_of
from neurojepa.downstream.labels import People
from neurojepa.downstream.table import vectors
from neurojepa.downstream.targets import Target
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import Feed
from neurojepa.model.sizes import SIZES
from neurojepa.weights import Weights

EPOCHS = 20
BATCH = 16  # people
RATE = 3e-3
QUERY_RATE = 0.05  # tokens are of unit scale: a query of 1 is only beginning to choose
DECAY = 0.05


@dataclass(frozen=True)
class Tokens:
    """The tokens of scans by scan id, all of one modality, and the heads of the encoder."""

    scans: Mapping[str, Scan]
    heads: int


def read_tokens(weights: Weights, feed: Feed, embeddings: pa.Table) -> Tokens:
    """The tokens of embedded scans, by the weights that embedded them.

    Raises
    ------
    ConfigError
        The embeddings are of other weights, or the weights were exported without their feed.
    DataError
        A scan is not in the feed.
    """
    check_tokens(weights.config, "--weights")
    if weights.places is None:
        raise ConfigError("the weights were exported without what tokens are compared with; export "
                          "them again, with their feed")
    row_of = {scan: row for row, scan in enumerate(feed.index["scan_id"].to_pylist())}
    names = embeddings["scan_id"].to_pylist()
    if lost := [scan for scan in names if scan not in row_of]:
        raise DataError(f"{feed.uri}: scan {lost[0]} of the embeddings is not in it, nor are "
                        f"{len(lost) - 1} others; name the feed that was embedded (--feed)")
    found, rows = {}, np.array([row_of[scan] for scan in names])
    scans = scans_of(weights.model, weights.config, feed, rows, weights.places)
    for name, row, scan in zip(names, vectors(embeddings), scans, strict=True):
        mean, pooled = scan.mean(), len(scan.value_TD) > 0
        if mean.shape != row.shape or (pooled and not np.allclose(mean, row, atol=1e-3)):
            raise ConfigError(f"scan {name}: its embedding is not what these weights make of it; "
                              "name the weights that embedded it (--weights), or embed again")
        found[name] = scan
    return Tokens(found, SIZES[weights.config.model.size].heads)


def by_number(people: People) -> Features:
    """Numbers of people [m, 1] in place of features: tokens have no common length."""
    numbers = np.arange(len(people.ids), dtype=float)[:, None]
    return lambda train, test: (numbers[train], numbers[test])


def attentive(tokens: Tokens, people: People) -> Read:
    """A model of ``by_number`` features, which reads these people's tokens."""
    assert people.scans is not None
    units = [[tokens.scans[scan] for scan in each] for each in people.scans]

    def read(target: Target, taught: np.ndarray, tested: np.ndarray, truth: np.ndarray,
             family: np.ndarray) -> np.ndarray:
        teach, test = ([units[int(k)] for k in each[:, 0]] for each in (taught, tested))
        return _fold(target, teach, test, truth, family, tokens.heads)

    return read


def _fold(target: Target, teach: Sequence[Sequence[Scan]], test: Sequence[Sequence[Scan]],
          truth: np.ndarray, family: np.ndarray, heads: int) -> np.ndarray:
    """Predictions [m] or [m, K] of ``test`` by a head that ``teach`` taught."""
    mean, sd = (truth.mean(), truth.std() or 1.0) if target.kind == "regression" else (0.0, 1.0)
    truth = (truth - mean) / sd
    inner, choose = next(iter(whole_families(target.kind, truth, family, max(2, min(
        INNER, len(set(family.tolist())))), seed=0)))
    modality, dim = teach[0][0].modality, teach[0][0].value_TD.shape[1]
    head = Head([modality], dim, heads, 1 if target.kind in ("binary", "regression")
                else len(target.classes))
    head.to(teach[0][0].value_TD.device)
    rows = [[(modality, scan.mean()) for scan in unit] for unit in teach]
    weights = class_weights(target.kind, truth)

    def learn(whom: np.ndarray, penalty: float, epochs: int) -> list[float]:
        """Teach the head; the losses of ``choose`` by epoch."""
        as_probe(head, target.kind, standardise(head, rows, whom)[whom], truth[whom], penalty)
        groups: list[dict[str, Any]] = [{"params": [head.weight, head.bias]},
                                        {"params": [head.query], "lr": QUERY_RATE}]
        adam = torch.optim.AdamW(groups, lr=RATE, weight_decay=DECAY)
        losses = [_loss(head, target, [teach[k] for k in choose], truth[choose], weights)]
        for epoch in range(epochs):
            order = np.random.default_rng(epoch).permutation(whom)
            for start in range(0, len(order), BATCH):
                batch = order[start:start + BATCH]
                adam.zero_grad()
                (_cost(head, target, [teach[k] for k in batch], truth[batch], weights)
                 / len(batch)).backward()
                adam.step()
            losses.append(_loss(head, target, [teach[k] for k in choose], truth[choose], weights))
        return losses

    known = set(truth[inner].tolist())
    if target.kind != "regression" and len(known) < len(target.classes):
        inner = choose = np.arange(len(truth))  # too few of a class to leave some out
    penalty = best_penalty(target.kind, standardise(head, rows, inner), truth, inner, choose)
    epochs = int(np.argmin(learn(inner, penalty, EPOCHS)))
    learn(np.arange(len(truth)), penalty, epochs)
    with torch.no_grad():
        outputs = torch.stack([head(unit) for unit in test]).double().cpu().numpy()
    return mean + sd * told(target.kind, outputs, weights)


def _cost(head: Head, target: Target, units: Sequence[Sequence[Scan]], truth: np.ndarray,
          weights: Sequence[float]) -> torch.Tensor:
    return cost(target.kind, torch.stack([head(unit) for unit in units]), torch.from_numpy(truth),
                weights)


@torch.no_grad()
def _loss(head: Head, target: Target, units: Sequence[Sequence[Scan]], truth: np.ndarray,
          weights: Sequence[float]) -> float:
    return float(_cost(head, target, units, truth, weights)) / len(units)
