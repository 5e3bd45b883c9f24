"""From a feed, weights and a table to a fine-tuned model and its page (finetune.py says how).

    OUT/model.safetensors, head.safetensors, ...    the model (finetuned.py)
    OUT/evaluation/                                 results.json, report.html, predictions.csv
    OUT/state/                                      last and best state, to go on from
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from neurojepa.downstream import finetune_page as pages
from neurojepa.downstream import table as tables
from neurojepa.downstream.api import Model, load_model, seen_of
from neurojepa.downstream.attentive import Head, begin, class_weights
from neurojepa.downstream.commands import print_rows
from neurojepa.downstream.embed import describe, embed, fit_places, reference_rows, select_rows
from neurojepa.downstream.finetune import Cohort, Trainer, split_people
from neurojepa.downstream.finetuned import Task, outputs_of, record_of, write_finetuned
from neurojepa.downstream.labels import People, join, suspected_codes
from neurojepa.downstream.output import write_task
from neurojepa.downstream.pooling import Places
from neurojepa.downstream.scans import is_feed
from neurojepa.downstream.targets import Target, target_of
from neurojepa.downstream.tested import complete, may_test
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import MODALITIES, Feed, open_feed
from neurojepa.model.sizes import SIZES
from neurojepa.storage import join as path_of
from neurojepa.storage import sha256
from neurojepa.train.world import World

LEAST = 5  # people of part train who have a modality, for it to be read


@dataclass(frozen=True)
class Request:
    """What the command was asked for."""

    feed: str
    weights: str
    out: str
    labels: str
    label: str
    id: str
    session: str | None
    missing: list[str]
    key: str | None
    positive: list[str]
    modality: list[str] | None
    cohort: str | None
    epochs: int
    allow_seen: bool


@dataclass(frozen=True)
class _Ready:
    """All that is known before training."""

    people: People  # with the features of the probe
    target: Target
    parts: np.ndarray
    units: list[list[int]]
    head: Head
    task: Task
    truth: np.ndarray  # as Cohort.truth
    warnings: list[str]
    notes: list[str]

    def fingerprint(self) -> str:
        """Of who is in which part, with which scans and label."""
        assert self.people.scans is not None
        return sha256(json.dumps([self.people.ids.tolist(), self.people.scans.tolist(),
                                  self.truth.tolist(), self.parts.tolist()]).encode())[:16]


def tune(asked: Request, world: World) -> None:
    """Fine-tune, on every rank; rank 0 tests, and writes all.

    Raises
    ------
    ConfigError
        No such feed, column or modality, no positive class, or a state with other settings.
    DataError
        Too few people, all of them seen in pretraining, or a scan that cannot be read.
    """
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(
            nowhere) if world.rank else contextlib.nullcontext():
        model = load_model(asked.weights, str(world.device))
        feed, rows = _scans(asked, model)
        places, ready = _prepare(asked, model, feed, rows, world)
        settings = {"weights": record_of(asked.weights)["sha256"], "feed": feed.fingerprint,
                    "label": asked.label, "people": ready.fingerprint()}
        trainer = Trainer(model.weights.model, model.weights.config, feed, places, ready.head,
                          ready.target, Cohort(ready.truth, ready.units, ready.parts), world,
                          epochs=asked.epochs, settings=settings)
        trainer.fit(asked.out)
        world.leave()
        if world.rank == 0:
            _finish(asked, model, feed, places, ready, trainer)


def _scans(asked: Request, model: Model) -> tuple[Feed, np.ndarray]:
    """The feed, and its rows of modalities that are asked for and known."""
    if model.weights.config.objective.method == "cnn":
        raise ConfigError(f"{asked.weights}: a cnn has no tokens to attend to; "
                          "take weights of a jepa or mae")
    inside = path_of(asked.feed, "scans", "feed")
    uri = next((each for each in (asked.feed, inside) if is_feed(each)), None)
    if uri is None:
        raise ConfigError(f"{asked.feed}: neither a packed feed nor a folder that embed wrote from "
                          "scans (it would have scans/feed); name one, or embed the scans first: "
                          "neurojepa embed SCANS --weights W --out E")
    feed = open_feed(uri)
    model.check_grid(feed)
    rows, _ = model.known(feed, select_rows(feed, None, asked.cohort))
    if asked.modality:
        names = np.array(feed.index["modality"].to_pylist())[rows]
        if lacking := set(asked.modality) - set(names.tolist()):
            raise ConfigError(f"--modality {' '.join(sorted(lacking))}: {uri} has "
                              f"{', '.join(sorted(set(names.tolist())))} that the weights know")
        rows = rows[np.isin(names, asked.modality)]
    return feed, rows


def _prepare(asked: Request, model: Model, feed: Feed, rows: np.ndarray,
             world: World) -> tuple[Places, _Ready]:
    weights = model.weights
    places = (weights.places.to(model.device) if weights.places else fit_places(
        weights.model, weights.config, feed, reference_rows(feed, rows)))
    values = _embedded(model, feed, rows, places, world)
    found = describe(feed, rows, values)
    table = tables.embedding_table(found, feed, rows, seen_of(
        weights.seen, found.participant.tolist(), found.scan_id.tolist()))
    people = join(table, asked.labels, key=asked.key, id_column=asked.id,
                  session_column=asked.session, missing=asked.missing, several=True)
    people, notes = complete(people, [asked.label])
    target = target_of(asked.label, people.column(asked.label), asked.positive)
    notes += suspected_codes(asked.label, people.column(asked.label))
    may, warnings = may_test(people, f"label {asked.label!r}", asked.allow_seen)
    parts = split_people(target, people.family, may)
    row_of = {scan: number for number, scan in enumerate(found.scan_id.tolist())}
    assert people.scans is not None
    scans = [[row_of[scan] for scan in each] for each in people.scans]
    modality = np.array([MODALITIES.index(name) for name in found.modality.tolist()])
    read = _read_modalities(scans, modality, parts, notes)
    scans = [[number for number in each if modality[number] in read] for each in scans]
    if some := sum(not each for each in scans):
        raise DataError(f"{some} people have only scans of modalities that fewer than {LEAST} of "
                        "those who teach have; leave these modalities out (--modality "
                        + " ".join(MODALITIES[m] for m in read) + ")")
    teach = np.flatnonzero(parts == "train")
    mean, sd = ((float(target.truth[teach].mean()), float(target.truth[teach].std()))
                if target.kind == "regression" else (0.0, 1.0))
    truth = (target.truth - mean) / sd
    outputs = len(target.classes) if target.kind == "multiclass" else 1
    size = SIZES[weights.config.model.size]
    head = Head(read, size.dim, size.heads, outputs).to(model.device)
    features = begin(head, target.kind, [[(int(modality[k]), values[k]) for k in each]
                                         for each in scans], truth, teach,
                     np.flatnonzero(parts == "val"))
    for line in (*people.notes, *notes, *warnings):
        print(line)
    task = Task(target.name, target.kind, target.classes,
                tuple(class_weights(target.kind, truth[teach])), mean, sd,
                asked.session is not None)
    return places, _Ready(people.replaced(features), target, parts,
                          [[int(rows[k]) for k in each] for each in scans], head, task, truth,
                          warnings, [*people.notes, *notes])


def _embedded(model: Model, feed: Feed, rows: np.ndarray, places: Places,
              world: World) -> np.ndarray:
    """Float32 [scans, D]; every rank embeds its part, and all have the same."""
    mine = np.arange(len(rows))[world.rank::world.size]
    width = SIZES[model.weights.config.model.size].dim
    values = torch.zeros(len(rows), width, device=model.device)
    if len(mine):
        part = embed(model.weights.model, model.weights.config, feed, rows[mine], places)
        values[mine] = torch.from_numpy(part.values).to(model.device)
    return world.sum_(values).cpu().numpy()


def _read_modalities(scans: Sequence[Sequence[int]], modality: np.ndarray, parts: np.ndarray,
                     notes: list[str]) -> list[int]:
    """The modalities that enough people of part train have."""
    have = {m: sum(m in modality[each] for each, part in zip(scans, parts, strict=True)
                   if part == "train") for m in sorted(set(modality.tolist()))}
    read = [m for m, number in have.items() if number >= LEAST]
    notes += [f"{MODALITIES[m]} is not read: {number} of those who teach have it, {LEAST} are "
              "needed" for m, number in have.items() if number < LEAST]
    if not read:
        raise DataError(f"no modality is had by {LEAST} of those who teach: " + ", ".join(
            f"{MODALITIES[m]} by {number}" for m, number in have.items()))
    return read


def _finish(asked: Request, model: Model, feed: Feed, places: Places, ready: _Ready,
            trainer: Trainer) -> None:
    """Test the best epoch, and write model and page."""
    target, people, parts = ready.target, ready.people, ready.parts
    test = np.flatnonzero(parts == "test")
    outputs = outputs_of(model.weights.model, model.weights.config, feed,
                         [ready.units[k] for k in test], places, ready.head)
    told = ready.task.predictions(outputs)
    predicted = np.full((len(parts), 1, *told.shape[1:]), np.nan)
    predicted[test, 0] = told
    rows, gains = pages.scored(target, people, parts, predicted)
    names = feed.index["modality"].to_pylist()
    of_each = [{names[row] for row in unit} for unit in ready.units]
    read = [MODALITIES[m] for m in ready.head.modalities]
    found = pages.Finding(
        target, people, parts, rows, gains, trainer.history, trainer.best_epoch,
        {name: sum(name in each for each in of_each) for name in read},
        sum(len(each) == len(read) for each in of_each), ready.warnings, ready.notes)
    print_rows(target.name, rows, ())
    record: dict[str, Any] = {
        "input": asked.feed, "weights": asked.weights, "labels": asked.labels,
        "label": asked.label, "session": asked.session, "allow_seen": asked.allow_seen,
        "notes": [], **pages.record_of(found)}
    assert people.scans is not None
    taught = [name for k in np.flatnonzero(parts != "test")
              for name in (people.participant[k], *people.scans[k])]
    write_finetuned(asked.out, model.weights, asked.weights, places, ready.head, ready.task, taught,
                    {"weights_from": os.path.basename(asked.weights.rstrip("/")),
                     "began_at": record_of(asked.weights)["sha256"], "people": record["people"],
                     "scores": record["scores"], "best_epoch": trainer.best_epoch})
    write_task(path_of(asked.out, "evaluation"), "finetune/1", record,
               methods=partial(pages.methods, found), page=partial(pages.finetune_page, found),
               predictions=pages.predictions_of(found))
