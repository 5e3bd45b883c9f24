"""What teaches a completion (completion.py): visits with both modalities of a feed.

    part train -> mean map, polynomials, the linear map of latents, networks
    part val   -> the penalty of the map, the best epoch of each network

Crops follow from seed and epoch alone.  ``keep`` in a folder has what needs no network, and each
network after each epoch, so that a killed fit goes on to the same bits.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neurojepa.downstream.completion import Completion, Volume, terms, volume_of
from neurojepa.downstream.embed import tokens_of
from neurojepa.downstream.pooling import Places
from neurojepa.downstream.state import packed, read_state, restore, tensors_of
from neurojepa.downstream.stats import Score, of_people
from neurojepa.downstream.targets import Target
from neurojepa.downstream.tested import split_people
from neurojepa.errors import DataError
from neurojepa.feed.format import Feed
from neurojepa.feed.loader import SampleReader
from neurojepa.storage import join, sha256, write_bytes
from neurojepa.weights import Weights

CROP = 32  # voxels
CROPS = 4  # of a visit in each epoch, a step each
RATE = 2e-3
SEED = 0
TASK = "completion"


@dataclass(frozen=True)
class Pairs:
    """n visits with both modalities; the first scan of each counts."""

    source: np.ndarray  # rows of the feed
    target: np.ndarray
    participant: np.ndarray
    family: np.ndarray
    parts: np.ndarray  # str: train, val or test

    def of(self, part: str) -> np.ndarray:
        """Indices of a part."""
        return np.flatnonzero(self.parts == part)

    def fingerprint(self) -> str:
        """Of who is in which part, with which scans."""
        return sha256(json.dumps([each.tolist() for each in (
            self.source, self.target, self.participant, self.parts)]).encode())[:16]


def pairs_of(feed: Feed, rows: np.ndarray, source: str, target: str, seen: np.ndarray) -> Pairs:
    """Visits of the feed with both modalities.

    Parameters
    ----------
    rows, seen : [k] of the feed, and whether each one's person was seen in pretraining

    Raises
    ------
    DataError
        Too few people.
    """
    columns = {name: np.array(feed.index[name].to_pylist())[rows] for name in (
        "participant", "family", "session", "modality")}
    first: dict[tuple[str, str, str], int] = {}
    for k in range(len(rows)):
        first.setdefault((columns["participant"][k], columns["session"][k],
                          columns["modality"][k]), k)
    both = [(k, first[person, session, target])
            for (person, session, modality), k in sorted(first.items())
            if modality == source and (person, session, target) in first]
    if not both:
        raise DataError(f"{feed.uri}: no visit has both {source} and {target}; it has "
                        f"{', '.join(sorted(set(columns['modality'].tolist())))}")
    one, other = (np.array(part) for part in zip(*both, strict=True))
    family = columns["family"][one]
    parts = split_people(Target(f"{target} from {source}", "regression", np.zeros(len(one))),
                         family, ~(seen[one] | seen[other]))
    return Pairs(rows[one], rows[other], columns["participant"][one], family, parts)


class Teacher:
    """Fits a completion on part train.

    Parameters
    ----------
    keep : folder for states, to go on from
    settings : what a fit must have in common with the states that it goes on from
    """

    def __init__(self, weights: Weights, places: Places, feed: Feed, pairs: Pairs, keep: str,
                 settings: dict[str, Any]) -> None:
        self.weights, self.places, self.feed, self.pairs = weights, places, feed, pairs
        self.keep = keep
        self.settings = settings | {"crop": CROP, "crops": CROPS, "rate": RATE}
        self.reader = SampleReader(feed)
        self.device = next(weights.model.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.completion = Completion(feed.grid.shape, places.width,
                                         weights.config.model.patch_voxels).to(self.device)

    def volumes(self, k: int) -> tuple[Volume, Volume]:
        """Source and target of a visit."""
        one, other = (volume_of(self.reader.image(int(rows[k])))
                      for rows in (self.pairs.source, self.pairs.target))
        return one, other

    def tokens(self, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Patches [T] and differences [T, D] of scans."""
        for tokens in tokens_of(self.weights.model, self.weights.config, self.feed, rows):
            yield self.places.patches(tokens, 0), self.places.values(tokens, 0)[1]

    # ---- without a network -----------------------------------------------------------------------

    def begin(self) -> None:
        """All that needs no network, from its state where there is one.

        Raises
        ------
        ConfigError
            The state is of a fit with other settings.
        DataError
            It is damaged, or a scan cannot be read.
        """
        uri = join(self.keep, "start.safetensors")
        if (state := read_state(uri, self.settings, TASK)) is not None:
            self.completion.load_state_dict(state[1])
            return
        self.fit_intensities()
        self.fit_latents()
        write_bytes(uri, packed(self.completion.state_dict(), {"settings": self.settings}))

    def fit_intensities(self) -> None:
        """The mean map and the polynomials."""
        total = np.zeros(self.feed.grid.shape)
        count = np.zeros(self.feed.grid.shape)
        for k in self.pairs.of("train"):
            _, target = self.volumes(k)
            total += target.value_XYZ
            count += target.brain_XYZ
        mean = total / np.maximum(count, 1)
        mean[count == 0] = total.sum() / max(count.sum(), 1)
        self.completion.mean_map.copy_(torch.from_numpy(mean))
        for kind, weight in (("cubic", self.completion.cubic), ("first", self.completion.first)):
            size = len(weight)
            square, product = 1e-6 * np.eye(size), np.zeros(size)
            for k in self.pairs.of("train"):
                source, target = self.volumes(k)
                where = source.brain_XYZ & target.brain_XYZ
                design = terms(source.value_XYZ[where], mean[where], kind)
                square += design.T @ design
                product += design.T @ target.value_XYZ[where].astype(float)
            weight.copy_(torch.from_numpy(np.linalg.solve(square, product)))

    # ---- latents ---------------------------------------------------------------------------------

    def fit_latents(self) -> None:
        """The linear map of tokens, whose penalty val chooses."""
        moments = {part: self._moments(self.pairs.of(part)) for part in ("train", "val")}
        xx, xy, _ = moments["train"]
        scale = float(xx.diagonal().mean())
        best = (np.inf, torch.zeros_like(xy))
        for penalty in 10.0 ** np.arange(-4, 4):
            line = torch.linalg.solve(
                xx + penalty * scale * torch.eye(len(xx), dtype=xx.dtype, device=xx.device), xy)
            loss = _residual(line, *moments["val"])
            best = min(best, (loss, line), key=lambda each: each[0])
        self.completion.line.copy_(best[1])

    def _moments(self, whom: np.ndarray) -> tuple[Tensor, Tensor, float]:
        """Sums of products of the source's tokens, with the target's, and of the target's."""
        D = len(self.completion.line)
        xx, xy = (torch.zeros(D, D, dtype=torch.float64, device=self.device) for _ in range(2))
        yy = 0.0
        for x_TD, y_TD in self._both(whom):
            xx += x_TD.T @ x_TD
            xy += x_TD.T @ y_TD
            yy += float(y_TD.square().sum())
        return xx, xy, yy

    def _both(self, whom: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens [T, D] of both scans of each visit, at the patches that both have."""
        for (one, x_TD), (other, y_TD) in zip(
                self.tokens(self.pairs.source[whom]), self.tokens(self.pairs.target[whom]),
                strict=True):
            common = torch.isin(one, other), torch.isin(other, one)
            yield x_TD[common[0]].double(), y_TD[common[1]].double()

    def latent_scores(self) -> dict[str, Score]:
        """Shares of what differs from the place that are told of part test."""
        test = self.pairs.of("test")
        line = self.completion.line.double()
        sums = np.array([[float(value) for value in (
            (y - x @ line).square().sum(), y.square().sum(),
            (y.mean(0) - (x @ line).mean(0)).square().sum(), y.mean(0).square().sum())]
            for x, y in self._both(test)])

        def share(rest: int) -> Score:
            return of_people(lambda drawn: float(1 - sums[drawn, rest].sum()
                                                 / sums[drawn, rest + 1].sum()),
                             np.arange(len(test)), self.pairs.participant[test],
                             self.pairs.family[test])

        return {"tokens": share(0), "embedding": share(2)}

    # ---- the network -----------------------------------------------------------------------------

    def fit_network(self, latents: bool, epochs: int) -> tuple[Completion, list[float]]:
        """A network, the best of its epochs on val, and the losses of val; 0 is the first guess.
        It goes on from its state, where there is one."""
        net = copy.deepcopy(self.completion)
        adam, learning = torch.optim.AdamW(net.parameters(), lr=RATE), dict(net.named_parameters())
        uri = join(self.keep, f"{'latents' if latents else 'plain'}.safetensors")
        if (state := read_state(uri, self.settings, TASK)) is not None:
            best, losses = restore(state[1], learning, adam), state[0]["losses"]
            print(f"{uri}: goes on after epoch {len(losses) - 1}", flush=True)
        else:
            best, losses = _copied(learning), [self.loss(net, latents)]
        for epoch in range(len(losses) - 1, epochs):
            self._epoch(net, adam, latents, epoch)
            losses.append(self.loss(net, latents))
            if losses[-1] == min(losses):
                best = _copied(learning)
            write_bytes(uri, packed(tensors_of(learning, best, adam),
                                    {"settings": self.settings, "losses": losses}))
        net.load_state_dict(best, strict=False)  # what does not learn stays
        return net, losses

    def _epoch(self, net: Completion, adam: torch.optim.Optimizer, latents: bool,
               epoch: int) -> None:
        """``CROPS`` steps on each visit of train."""
        rng = np.random.default_rng([SEED, epoch])
        order = rng.permutation(self.pairs.of("train"))
        told = self.latents_of(order) if latents else None
        for k in order:
            source, target = self.volumes(k)
            patch_T, latent_TD = next(told) if told else (torch.zeros(0), None)
            where = source.brain_XYZ & target.brain_XYZ
            planes = net.planes(source)
            for _ in range(CROPS):
                x, y, z = _crop(where, rng)
                laid = net.laid(where.shape, patch_T, latent_TD)
                found = net(planes[:, :, x, y, z], laid[:, :, x, y, z])[0]
                truth = torch.from_numpy(target.value_XYZ[x, y, z]).to(found)
                mask = torch.from_numpy(where[x, y, z]).to(found)
                loss = ((found - truth).square() * mask).sum() / mask.sum().clamp(min=1)
                adam.zero_grad()
                loss.backward()
                adam.step()

    def latents_of(self, whom: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Patches [T] and predicted differences [T, D] of the target, of each visit."""
        for patch_T, x_TD in self.tokens(self.pairs.source[whom]):
            yield patch_T, x_TD @ self.completion.line

    def completed(self, net: Completion, latents: bool, whom: np.ndarray) -> Iterator[np.ndarray]:
        """The target of each visit as a network makes it."""
        told = self.latents_of(whom) if latents else None
        for k in whom:
            patch_T, latent_TD = next(told) if told else (torch.zeros(0), None)
            yield net.complete(self.volumes(k)[0], patch_T, latent_TD)

    def loss(self, net: Completion, latents: bool) -> float:
        """Mean squared error of val."""
        val, errors = self.pairs.of("val"), []
        for k, told in zip(val, self.completed(net, latents, val), strict=True):
            source, target = self.volumes(k)
            where = source.brain_XYZ & target.brain_XYZ
            errors.append(np.square(told[where] - target.value_XYZ[where]).mean())
        return float(np.mean(errors))


def _copied(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in tensors.items()}


def _residual(line: Tensor, xx: Tensor, xy: Tensor, yy: float) -> float:
    return yy - 2 * float((line * xy).sum()) + float((line * (xx @ line)).sum())


def _crop(where: np.ndarray, rng: np.random.Generator) -> tuple[slice, ...]:
    """A box of at most ``CROP`` voxels an edge around a voxel of a mask."""
    inside = np.argwhere(where)
    middle = inside[rng.integers(len(inside))] if len(inside) else np.array(where.shape) // 2
    starts = [int(np.clip(at - CROP // 2, 0, max(size - CROP, 0)))
              for at, size in zip(middle, where.shape, strict=True)]
    return tuple(slice(start, start + CROP) for start in starts)
