"""What teaches a completion (completion.py): visits with the target and a source (sources.py).

    part train -> mean map, polynomials, the linear map of latents, networks
    part val   -> the penalty of the map, the best epoch of each network

Where there are several sources, a network learns from half of the visits of an epoch with some of
their sources left out, so that it can do without them.  Crops and what is left out follow from seed
and epoch alone.  The folder ``keep`` has what needs no network, and each network after each epoch,
so that a killed fit goes on to the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neurojepa.downstream.completion import (
    Completion,
    Volume,
    brain_of,
    members,
    missing,
    terms,
    volume_of,
)
from neurojepa.downstream.embed import tokens_of
from neurojepa.downstream.pooling import Places
from neurojepa.downstream.sources import Visits
from neurojepa.downstream.state import packed, read_state, restore, tensors_of
from neurojepa.downstream.stats import Score, of_people
from neurojepa.feed.format import Feed
from neurojepa.feed.loader import SampleReader
from neurojepa.storage import join, write_bytes
from neurojepa.weights import Weights

CROP = 32  # voxels
CROPS = 4  # of a visit in each epoch, a step each
RATE = 2e-3
SEED = 0
LEFT_OUT = 0.5  # of the visits of an epoch: a part of their sources, where they have several
TASK = "completion"


class Teacher:
    """Fits a completion on part train.

    Parameters
    ----------
    keep : folder for states, to go on from
    settings : what a fit must have in common with the states that it goes on from
    """

    def __init__(self, weights: Weights, places: Places, feed: Feed, visits: Visits, keep: str,
                 settings: dict[str, Any]) -> None:
        self.weights, self.places, self.feed, self.visits = weights, places, feed, visits
        self.keep = keep
        self.settings = settings | {"crop": CROP, "crops": CROPS, "rate": RATE}
        if len(visits.names) > 1:
            self.settings["left_out"] = LEFT_OUT
        self.reader = SampleReader(feed)
        self.device = next(weights.model.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.completion = Completion(feed.grid.shape, places.width,
                                         weights.config.model.patch_voxels,
                                         len(visits.names)).to(self.device)

    def volumes(self, k: int) -> tuple[list[Volume], Volume]:
        """Sources and target of a visit."""
        return self.images(self.visits.sources[k]), self.target(k)

    def target(self, k: int) -> Volume:
        """That of a visit."""
        return volume_of(self.reader.image(int(self.visits.target[k])))

    def images(self, rows: np.ndarray) -> list[Volume]:
        """Those of the rows [K] of a visit's sources."""
        return [volume_of(self.reader.image(row)) if row >= 0 else missing(self.feed.grid.shape)
                for row in rows.tolist()]

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
        for k in self.visits.of("train"):
            target = self.target(k)
            total += target.value_XYZ
            count += target.brain_XYZ
        mean = total / np.maximum(count, 1)
        mean[count == 0] = total.sum() / max(count.sum(), 1)
        self.completion.mean_map.copy_(torch.from_numpy(mean))
        for pattern in self.completion.patterns:
            self._fit_polynomials(pattern, mean)

    def _fit_polynomials(self, pattern: int, mean: np.ndarray) -> None:
        """Those of a pattern, at voxels where all of its sources show brain."""
        of = members(pattern)
        weights = {name: self.completion.of_pattern(name, pattern) for name in ("cubic", "first")}
        square = {name: 1e-6 * np.eye(len(weight)) for name, weight in weights.items()}
        product = {name: np.zeros(len(weight)) for name, weight in weights.items()}
        for k in self.visits.of("train"):
            sources, target = self.volumes(k)
            where = target.brain_XYZ & np.all([sources[s].brain_XYZ for s in of], 0)
            value_vK = np.zeros((int(where.sum()), len(sources)), np.float32)
            for s in of:
                value_vK[:, s] = sources[s].value_XYZ[where]
            for name in weights:
                design = terms(value_vK, mean[where], name)
                square[name] += design.T @ design
                product[name] += design.T @ target.value_XYZ[where].astype(float)
        for name, weight in weights.items():
            weight.copy_(torch.from_numpy(np.linalg.solve(square[name], product[name])))

    # ---- latents ---------------------------------------------------------------------------------

    def fit_latents(self) -> None:
        """The linear map of tokens of each pattern, whose penalty val chooses."""
        moments = {part: self._moments(self.visits.of(part)) for part in ("train", "val")}
        for pattern in self.completion.patterns:
            xx, xy, _ = moments["train"][pattern]
            scale = float(xx.diagonal().mean())
            best = (np.inf, torch.zeros_like(xy))
            for penalty in 10.0 ** np.arange(-4, 4):
                line = torch.linalg.solve(
                    xx + penalty * scale * torch.eye(len(xx), dtype=xx.dtype, device=xx.device), xy)
                loss = _residual(line, *moments["val"][pattern])
                best = min(best, (loss, line), key=lambda each: each[0])
            whole = self.completion.of_pattern("line", pattern)
            for place, k in enumerate(members(pattern)):
                D = whole.shape[1]
                whole[k * D:(k + 1) * D].copy_(best[1][place * D:(place + 1) * D])

    def _moments(self, whom: np.ndarray) -> dict[int, tuple[Tensor, Tensor, float]]:
        """By pattern: sums of products of its sources' tokens, with the target's, and of the
        target's, at patches where it has all of them."""
        D = self.completion.dim
        found = {pattern: [torch.zeros(len(members(pattern)) * D, width, dtype=torch.float64,
                                       device=self.device)
                           for width in (len(members(pattern)) * D, D)]
                 for pattern in self.completion.patterns}
        yy = dict.fromkeys(found, 0.0)
        for pattern_T, x_TKD, y_TD in self._joined(whom):
            for pattern, (xx, xy) in found.items():
                at = (pattern_T & pattern) == pattern
                x, y = x_TKD[at][:, members(pattern)].flatten(1), y_TD[at]
                xx += x.T @ x
                xy += x.T @ y
                yy[pattern] += float(y.square().sum())
        return {pattern: (xx, xy, yy[pattern]) for pattern, (xx, xy) in found.items()}

    def _joined(self, whom: np.ndarray) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each visit, at the patches that the target and a source have: the pattern [T], the
        sources' tokens [T, K, D] and the target's [T, D]."""
        for sources, (other, y_TD) in zip(
                self.tokens_of_sources(self.visits.sources[whom]),
                self.tokens(self.visits.target[whom]), strict=True):
            patch_T, pattern_T, x_TKD = self.completion.joined(sources)
            common = torch.isin(patch_T, other)
            yield (pattern_T[common], x_TKD[common].double(),
                   y_TD[torch.isin(other, patch_T)].double())

    def tokens_of_sources(self, rows: np.ndarray) -> Iterator[list[tuple[Tensor, Tensor] | None]]:
        """Patches and differences of the rows [m, K] of sources; None where one is missing."""
        found = self.tokens(rows[rows >= 0])
        for each in rows:
            yield [next(found) if row >= 0 else None for row in each]

    def latents_of(self, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Patches [T] and predicted differences [T, D] of the target, of the rows [m, K] of
        sources."""
        return map(self.completion.told, self.tokens_of_sources(rows))

    def latent_scores(self) -> dict[str, Score]:
        """Shares of what differs from the place that are told of part test."""
        test = self.visits.of("test")
        sums = []
        for (patch_T, told_TD), (other, y_TD) in zip(
                self.latents_of(self.visits.sources[test]), self.tokens(self.visits.target[test]),
                strict=True):
            told, y = (told_TD[torch.isin(patch_T, other)].double(),
                       y_TD[torch.isin(other, patch_T)].double())
            sums.append([float(value) for value in (
                (y - told).square().sum(), y.square().sum(),
                (y.mean(0) - told.mean(0)).square().sum(), y.mean(0).square().sum())])
        values = np.array(sums)

        def share(rest: int) -> Score:
            return of_people(lambda drawn: float(1 - values[drawn, rest].sum()
                                                 / values[drawn, rest + 1].sum()),
                             np.arange(len(test)), self.visits.participant[test],
                             self.visits.family[test])

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
        order = rng.permutation(self.visits.of("train"))
        rows = _left_out(self.visits.sources[order], rng)
        told = self.latents_of(rows) if latents else None
        for k, row in zip(order, rows, strict=True):
            sources, target = self.images(row), self.target(k)
            patch_T, latent_TD = next(told) if told else (torch.zeros(0), None)
            where = brain_of(sources) & target.brain_XYZ
            planes = net.planes(sources)
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

    def completed(self, net: Completion, latents: bool, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The target as a network makes it of the rows [m, K] of sources."""
        told = self.latents_of(rows) if latents else None
        for row in rows:
            patch_T, latent_TD = next(told) if told else (torch.zeros(0), None)
            yield net.complete(self.images(row), patch_T, latent_TD)

    def loss(self, net: Completion, latents: bool) -> float:
        """Mean squared error of val."""
        val, errors = self.visits.of("val"), []
        for k, told in zip(val, self.completed(net, latents, self.visits.sources[val]),
                           strict=True):
            sources, target = self.volumes(k)
            where = brain_of(sources) & target.brain_XYZ
            errors.append(np.square(told[where] - target.value_XYZ[where]).mean())
        return float(np.mean(errors))


def _copied(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in tensors.items()}


def _residual(line: Tensor, xx: Tensor, xy: Tensor, yy: float) -> float:
    return yy - 2 * float((line * xy).sum()) + float((line * (xx @ line)).sum())


def _left_out(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows [m, K] of sources, -1 for those that are left out; one at least is kept of each."""
    found = rows.copy()
    if rows.shape[1] == 1:
        return found
    for each in found:
        there = np.flatnonzero(each >= 0)
        if len(there) > 1 and rng.random() < LEFT_OUT:
            each[rng.permutation(there)[rng.integers(1, len(there)):]] = -1
    return found


def _crop(where: np.ndarray, rng: np.random.Generator) -> tuple[slice, ...]:
    """A box of at most ``CROP`` voxels an edge around a voxel of a mask."""
    inside = np.argwhere(where)
    middle = inside[rng.integers(len(inside))] if len(inside) else np.array(where.shape) // 2
    starts = [int(np.clip(at - CROP // 2, 0, max(size - CROP, 0)))
              for at, size in zip(middle, where.shape, strict=True)]
    return tuple(slice(start, start + CROP) for start in starts)
