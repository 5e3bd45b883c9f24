"""Fine-tune exported weights to a label: adapters in the encoder and a head, on a packed feed.

    people with the label -> train, val, test by family, nobody tested who was seen in pretraining
    -> the head as a linear probe -> epochs over train, until val gets no better -> the best epoch

A person (or visit) is all scans that are there of the modalities that were asked for; see
attentive.py.  Scans go through the encoder one by one, with all their brain, and as they are: the
augmentation of pretraining moves embeddings by more than people differ, so that the first epochs
went into undoing what it did to the probe.  The order of people follows from seed and epoch alone,
and the state is written after each epoch in one piece, so that a killed run goes on to the same
bits.  Over several ranks each one
takes its part of every batch and gradients are summed: all have the same head, which is checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neurojepa.config import RootConfig
from neurojepa.downstream.attentive import Head, Scan, class_weights, cost
from neurojepa.downstream.embed import with_all_brain, without_augmentation
from neurojepa.downstream.finetuned import outputs_of
from neurojepa.downstream.lora import adapt, merge
from neurojepa.downstream.pooling import Places, Tokens
from neurojepa.downstream.state import packed, read_state, restore, tensors_of
from neurojepa.downstream.targets import Target
from neurojepa.errors import DataError
from neurojepa.feed.format import MODALITIES, Feed
from neurojepa.feed.loader import Batch, SampleReader
from neurojepa.model.averaged import Averaged
from neurojepa.model.moe import MoE
from neurojepa.objective.views import make_views, patch_numbers
from neurojepa.storage import join, sha256, write_bytes
from neurojepa.train.world import World

PATIENCE = 5  # epochs without a better loss on val
BATCH = 8  # people of a step, over all ranks
RATE = 1e-3
DECAY = 0.01
CLIP = 1.0
RANK = 8  # of adapters
SEED = 0
STATE = "state/finetune.safetensors"
TASK = "fine-tuning"
LOOK = "look for damaged scans: python -m data_prep verify FEED"


@dataclass(frozen=True)
class Cohort:
    """Who is fine-tuned on: n people, or visits."""

    truth: np.ndarray  # float64 [n]: numbers scaled by those of train, or the place of the class
    units: Sequence[Sequence[int]]  # the rows of the feed of each one's scans
    parts: np.ndarray  # str [n]

    def of(self, part: str) -> np.ndarray:
        """Indices of a part."""
        return np.flatnonzero(self.parts == part)


class Trainer:
    """Adapters and a head, and how they learn; ``head`` is a probe already (attentive.begin).

    Parameters
    ----------
    settings : what a run must have in common with the state that it goes on from
    """

    def __init__(self, model: Averaged, config: RootConfig, feed: Feed, places: Places, head: Head,
                 target: Target, cohort: Cohort, world: World, *, epochs: int,
                 settings: dict[str, Any]) -> None:
        self.model, self.feed, self.places, self.head = model, feed, places, head
        self.target, self.cohort, self.world, self.epochs = target, cohort, world, epochs
        self.weights = class_weights(target.kind, cohort.truth[cohort.of("train")])
        self.config = without_augmentation(config)
        self.reader, self.device = SampleReader(feed), next(head.parameters()).device
        self.named = dict([*((f"encoder.{name}", each) for name, each
                             in adapt(model.target, RANK, SEED)),
                           *((f"head.{name}", each) for name, each in head.named_parameters())])
        self.adam = torch.optim.AdamW(self.named.values(), lr=RATE, weight_decay=DECAY)
        self.history: list[dict[str, float]] = []  # of each epoch; the first is the probe
        self.best = self._copied()
        self.settings = settings

    @property
    def best_epoch(self) -> int:
        """0 is the probe, before anything was fine-tuned."""
        return int(np.argmin([each["val"] for each in self.history]))

    def finished(self) -> bool:
        """Whether all epochs are done, or val got no better for a while."""
        done = len(self.history) - 1
        return done >= self.epochs or done - self.best_epoch >= PATIENCE

    def fit(self, out: str) -> None:
        """Train to the end, from the state in ``out`` where there is one; the best epoch stays.

        Raises
        ------
        ConfigError
            The state is of a run with other settings.
        DataError
            A loss is no number, or a scan cannot be read.
        """
        self._resume(join(out, STATE))
        if not self.history:
            self.history.append({"val": self._validate()})
            self._store(join(out, STATE))
        while not self.finished():
            loss = self._epoch(len(self.history))
            self.history.append({"train": loss, "val": self._validate()})
            if self.best_epoch == len(self.history) - 1:
                self.best = self._copied()
            self._store(join(out, STATE))
            if self.world.rank == 0:
                print(f"epoch {len(self.history) - 1}: loss {loss:.4f}, of val "
                      f"{self.history[-1]['val']:.4f} (probe {self.history[0]['val']:.4f})",
                      flush=True)
        with torch.no_grad():
            for name, each in self.named.items():
                each.copy_(self.best[name])
        merge(self.model.target)
        for layer in self.model.target.modules():
            if isinstance(layer, MoE):
                layer.load.zero_()  # what was counted in training, here since the last start

    # ---- an epoch --------------------------------------------------------------------------------

    def _epoch(self, number: int) -> float:
        """One pass over train; returns the mean loss."""
        train = self.cohort.of("train")
        order = np.random.default_rng([SEED, number]).permutation(train)
        steps, total = math.ceil(len(train) / BATCH), 0.0
        for step in range(steps):
            at = (number - 1) * steps + step
            warm = min(1.0, (at + 1) / steps)
            rate = RATE * warm * 0.5 * (1 + math.cos(math.pi * at / (self.epochs * steps)))
            total += self._step(order[step * BATCH:(step + 1) * BATCH], number, rate)
        return total / len(train)

    def _step(self, batch: np.ndarray, epoch: int, rate: float) -> float:
        """One step on the people of a batch, over all ranks; returns the sum of their losses."""
        mine = batch[self.world.rank::self.world.size]
        total = torch.zeros((), device=self.device)
        with ThreadPoolExecutor(4) as pool:
            rows = [row for k in mine for row in self.cohort.units[k]]
            images = dict(zip(rows, pool.map(self.reader.image, rows), strict=True))
        for k in mine:
            scans = [self._scan(images[row], row) for row in self.cohort.units[k]]
            loss = cost(self.target.kind, self.head(scans)[None],
                        torch.from_numpy(self.cohort.truth[[k]]), self.weights)
            (loss / len(batch)).backward()
            total += loss.detach()
        gradient = self.world.sum_(torch.cat([
            total[None], *(torch.zeros_like(each).flatten() if each.grad is None
                           else each.grad.flatten() for each in self.named.values())]))
        if not torch.isfinite(gradient).all():
            raise DataError(f"{self.feed.uri}: the loss of a step of epoch {epoch} is no number; "
                            + LOOK)
        gradient[1:] *= (CLIP / (gradient[1:].norm() + 1e-6)).clamp(max=1)
        parts = gradient[1:].split([each.numel() for each in self.named.values()])
        for each, part in zip(self.named.values(), parts, strict=True):
            each.grad = part.view_as(each)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad()
        return float(gradient[0])

    def _scan(self, image: np.ndarray, row: int) -> Scan:
        """A scan's tokens with their gradient."""
        modality = MODALITIES.index(self.reader.value("modality", row))
        batch = Batch(
            voxels=torch.from_numpy(image)[None], modality=torch.tensor([modality]),
            position=torch.zeros(1, dtype=torch.int64),
            weight=torch.ones(1), scan_ids=[self.reader.value("scan_id", row)]).to(self.device)
        views = make_views(batch, with_all_brain(self.config, batch.voxels), self.feed.grid, SEED)
        z_BND = self.model.latents_with_gradient(views)
        patch_BN = patch_numbers(views.coords_BN3, self.feed.grid, self.config.model.patch_voxels)
        tokens = Tokens(z_BND, patch_BN, views.foreground_BN, views.modality_B)
        return Scan(*self.places.values(tokens, 0), modality)

    def _validate(self) -> float:
        """Mean loss of val."""
        val = self.cohort.of("val")
        mine, total = val[self.world.rank::self.world.size], torch.zeros((), dtype=torch.float64)
        if len(mine):
            outputs = outputs_of(self.model, self.config, self.feed,
                                 [self.cohort.units[k] for k in mine], self.places, self.head)
            total += cost(self.target.kind, torch.from_numpy(outputs),
                          torch.from_numpy(self.cohort.truth[mine]), self.weights)
        found = float(self.world.sum_(total.to(self.device))) / len(val)
        if not math.isfinite(found):
            raise DataError(f"{self.feed.uri}: the loss of val is no number; {LOOK}")
        return found

    # ---- state -----------------------------------------------------------------------------------

    def _copied(self) -> dict[str, Tensor]:
        return {name: each.detach().clone() for name, each in self.named.items()}

    def _store(self, uri: str) -> None:
        """Write the last and the best state in one piece; ranks whose heads differ are an error."""
        data = packed(tensors_of(self.named, self.best, self.adam),
                      {"settings": self.settings, "history": self.history})
        self.world.settle(sha256(data), _same)
        if self.world.rank == 0:
            write_bytes(uri, data)

    def _resume(self, uri: str) -> None:
        state = read_state(uri, self.settings, TASK)
        self.world.settle(state[0]["history"] if state else None, _one_state)
        if state is None:
            return
        self.best = restore(state[1], self.named, self.adam)
        self.history = state[0]["history"]
        if self.world.rank == 0:
            print(f"goes on after epoch {len(self.history) - 1}", flush=True)


def _one_state(histories: list[Any]) -> None:
    if any(each != histories[0] for each in histories):
        raise DataError(f"{len(histories)} ranks read different states of --out; name a folder "
                        "that all hosts share")


def _same(hashes: list[str]) -> None:
    if len(set(hashes)) > 1:
        raise DataError(f"the heads of {len(hashes)} ranks differ after an epoch; are the ranks on "
                        "unlike processors or versions of torch?")
