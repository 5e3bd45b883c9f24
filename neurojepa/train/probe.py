"""A cheap look during training at what the embeddings hold: probes.jsonl.

Every ``train.probe_every`` steps the target encoder embeds the same scans, one each of up to 64
people of split ``train`` and of ``val``; the ranks share the work.  Tokens are compared with those
of the former (downstream/pooling.py), and a ridge on the former predicts age, sex and diagnosis of
the latter, where the feed has these labels.  Beside the scores stand ``participation``, in how many
directions people differ, and which share of the variance of tokens is that between ``place``s of
the brain and between places of each modality.  Nothing of the training changes, so a run is
bit-equal with and without.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from neurojepa.config import RootConfig
from neurojepa.downstream.embed import embed, fit_places
from neurojepa.downstream.pooling import Places
from neurojepa.downstream.stats import (
    auroc,
    mean_absolute_error,
    participation_ratio,
    r_squared,
)
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import Feed
from neurojepa.feed.labels import as_numbers, scan_labels
from neurojepa.model.averaged import Averaged
from neurojepa.storage import join, read_rows, write_rows
from neurojepa.train.hooks import Hook
from neurojepa.train.metrics import Metrics
from neurojepa.train.ownership import Ownership
from neurojepa.train.world import World

if TYPE_CHECKING:
    from neurojepa.train.loop import Run

TARGETS = ("age", "sex", "diagnosis")
MAX_PEOPLE = 64  # of a split
LEAST_PEOPLE = 4
PENALTIES = 10.0 ** np.arange(-1, 6)


class OnlineProbe(Hook):
    """The scans and labels of a run's probes.

    Raises
    ------
    ConfigError
        The feed has too few people of a split with any of ``TARGETS``.
    """

    def __init__(self, config: RootConfig, feed: Feed, world: World) -> None:
        self.config, self.feed, self.world = config, feed, world
        column = {name: np.array(feed.index[name].to_pylist())
                  for name in ("participant", "session", "split", "modality")}
        taught, tested = (_choose(feed, config, split) for split in ("train", "val"))
        comparable = np.isin(column["modality"][tested], column["modality"][taught])
        self.rows = np.concatenate([taught, tested[comparable]])
        self.train = column["split"][self.rows] == "train"
        table = feed.labels()
        self.truth: dict[str, np.ndarray] = {}
        for target in TARGETS:
            try:
                labels = scan_labels(table, target,
                                     people=column["participant"][self.rows].tolist(),
                                     sessions=column["session"][self.rows].tolist())
            except DataError:  # no one has it
                continue
            truth = _as_truth(labels)
            if truth is not None and all(_varies(truth[part]) for part in (self.train,
                                                                           ~self.train)):
                self.truth[target] = truth
        if not self.truth:
            raise ConfigError(f"train.probe_every = {config.train.probe_every}: fewer than "
                              f"{LEAST_PEOPLE} people of split train or val have a label that "
                              f"varies among {', '.join(TARGETS)}; set it to 0")

    def after_step(self, run: Run) -> None:
        if run.step % self.config.train.probe_every == 0:
            with run.heartbeat.doing("evaluation"), run.engine.aside():
                self.run(run.engine.module, run.step, run.metrics)

    def run(self, model: nn.Module, step: int, metrics: Metrics) -> None:
        """Probe after ``step``; collective."""
        began = time.perf_counter()
        values, places = self._embed(model)
        if self.world.rank:
            return
        scores = {f"{target}/{name}": value for target, truth in self.truth.items()
                  for name, value in _score(values, truth, self.train).items()}
        scores["participation"] = participation_ratio(values)
        if places is not None:
            total, place, modality = places.variance()
            scores |= {"place": place / total, "place_and_modality": modality / total}
        scores["seconds"] = time.perf_counter() - began
        metrics.patience(lambda: self._write({"step": step, **scores}, metrics.owner))
        metrics.event("probe", step, **scores)

    def _write(self, row: dict[str, Any], owner: Ownership) -> None:
        uri = join(self.config.run.dir, "probes.jsonl")
        kept = [old for old in read_rows(uri) if old["step"] < row["step"]]  # or rolled back
        with owner.writing():
            write_rows(uri, [*kept, row])

    def _embed(self, model: nn.Module) -> tuple[np.ndarray, Places | None]:
        """[n, D] embeddings of all scans, on every rank, and what their tokens were compared with.
        """
        size, batch = self.world.size, self.config.train.micro_batch
        each = -(-len(self.rows) // size)  # alike on all ranks: a sharded forward is collective
        mine = np.resize(self.rows, each * size)[self.world.rank::size]
        assert isinstance(model, Averaged)
        was_training = model.training
        places = None
        if self.config.objective.method != "cnn":  # which has no tokens
            places = fit_places(model, self.config, self.feed, self.rows[self.train],
                                batch_size=batch)
        values = embed(model, self.config, self.feed, mine, places, batch_size=batch).values
        model.train(was_training)
        shares = torch.zeros(each, size, values.shape[1], dtype=torch.float64,
                             device=self.world.device)
        shares[:, self.world.rank] = torch.from_numpy(values)
        whole = self.world.sum_(shares).cpu().numpy().astype(values.dtype)
        return whole.reshape(each * size, -1)[:len(self.rows)], places


def _choose(feed: Feed, config: RootConfig, split: str) -> np.ndarray:
    """Rows of one scan each of up to ``MAX_PEOPLE`` people, by a hash of their pseudonyms."""
    first: dict[str, int] = {}
    for row, (person, of_split, modality) in enumerate(zip(
            *(feed.index[name].to_pylist() for name in ("participant", "split", "modality")),
            strict=True)):
        if of_split == split and modality in (config.data.modalities or [modality]):
            first.setdefault(person, row)
    people = sorted(first, key=lambda person: hashlib.sha256(person.encode()).digest())
    return np.array([first[person] for person in people[:MAX_PEOPLE]], dtype=np.int64)


def _as_truth(labels: np.ndarray) -> np.ndarray | None:
    """Numbers, or 0 and 1 for two names, nan where unknown; None for more names."""
    known = labels != ""
    truth = np.full(len(labels), np.nan)
    numbers, names = as_numbers(labels[known]), sorted(set(labels[known].tolist()))
    if numbers is not None:
        truth[known] = numbers
    elif len(names) == 2:
        truth[known] = labels[known] == names[1]
    else:
        return None
    return truth


def _varies(truth: np.ndarray) -> bool:
    known = truth[np.isfinite(truth)]
    return len(known) >= LEAST_PEOPLE and np.ptp(known) > 0


def _score(values: np.ndarray, truth: np.ndarray, train: np.ndarray) -> dict[str, float]:
    from sklearn.linear_model import RidgeCV

    known = np.isfinite(truth)
    fit, test = known & train, known & ~train
    mean, std = values[fit].mean(0), values[fit].std(0) + 1e-6
    model = RidgeCV(PENALTIES).fit((values[fit] - mean) / std, truth[fit])
    predicted = model.predict((values[test] - mean) / std)
    if set(truth[known]) == {0.0, 1.0}:
        return {"auroc": auroc(truth[test], predicted)}
    return {"mae": mean_absolute_error(truth[test], predicted),
            "r2": r_squared(truth[test], predicted)}
