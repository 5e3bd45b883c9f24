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
from neurojepa.downstream.attentive import Head, begin
from neurojepa.downstream.commands import print_rows
from neurojepa.downstream.embed import describe, embed, fit_places, select_rows, spread
from neurojepa.downstream.finetune import (
    BATCH,
    RANK,
    RATE,
    STATE,
    TASK,
    Cohort,
    Trainer,
)
from neurojepa.downstream.finetuned import (
    Task,
    check_out,
    check_tokens,
    outputs_of,
    record_of,
    write_finetuned,
)
from neurojepa.downstream.labels import People, join, suspected_codes
from neurojepa.downstream.output import write_task
from neurojepa.downstream.pooling import Places
from neurojepa.downstream.scans import is_feed
from neurojepa.downstream.state import read_state
from neurojepa.downstream.targets import Target, target_of
from neurojepa.downstream.tested import complete, may_test, split_people
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
class _Who:
    """Who is fine-tuned on, which is known before any scan is read."""

    people: People  # without features
    target: Target
    cohort: Cohort
    modalities: list[int]  # indices into MODALITIES, of those that are read
    mean: float  # of numbers who teach
    sd: float
    warnings: list[str]
    notes: list[str]

    def fingerprint(self) -> str:
        """Of who is in which part, with which scans and label."""
        assert self.people.scans is not None
        return sha256(json.dumps([
            self.people.ids.tolist(), self.people.scans.tolist(), self.cohort.truth.tolist(),
            self.cohort.parts.tolist()]).encode())[:16]


def tune(asked: Request, world: World) -> None:
    """Fine-tune, on every rank; rank 0 tests, and writes all.

    Raises
    ------
    ConfigError
        No such feed, column or modality, no positive class, a state with other settings, or ``out``
        holds weights.
    DataError
        Too few people, all of them seen in pretraining, or a scan that cannot be read.
    """
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(
            nowhere) if world.rank else contextlib.nullcontext():
        check_out(asked.out, asked.weights, "finetuned")
        model = load_model(asked.weights, str(world.device))
        feed, rows = _scans(asked, model)
        who = _people(asked, model, feed, rows)
        before = record_of(asked.weights)
        settings = {"weights": before["sha256"], "code": before.get("code", {}).get("sha256"),
                    "pooling": before.get("pooling", {}).get("sha256"),
                    "feed": feed.fingerprint,
                    "label": asked.label, "people": who.fingerprint(), "epochs": asked.epochs,
                    "batch": BATCH, "rate": RATE, "rank": RANK}
        read_state(path_of(asked.out, STATE), settings, TASK)  # to refuse it before scans are read
        places = _places(model, feed, who)
        head, features = _probe(model, feed, who, places, world)
        trainer = Trainer(model.weights.model, model.weights.config, feed, places, head, who.target,
                          who.cohort, world, epochs=asked.epochs, settings=settings)
        trainer.fit(asked.out)
        world.leave()
        if world.rank == 0:
            _finish(asked, model, feed, places, who, features, trainer)


def _scans(asked: Request, model: Model) -> tuple[Feed, np.ndarray]:
    """The feed, and its rows of modalities that are asked for and known."""
    check_tokens(model.weights.config, asked.weights)
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


def _people(asked: Request, model: Model, feed: Feed, rows: np.ndarray) -> _Who:
    """Who has the label and scans, who teaches it, and what is read of them; notes are printed."""
    found = describe(feed, rows, np.zeros((len(rows), 1), np.float32))  # nothing is embedded yet
    table = tables.embedding_table(found, feed, rows, seen_of(
        model.weights.seen, found.participant.tolist(), found.scan_id.tolist()))
    people = join(table, asked.labels, key=asked.key, id_column=asked.id,
                  session_column=asked.session, missing=asked.missing, several=True)
    people, notes = complete(people, [asked.label])
    target = target_of(asked.label, people.column(asked.label), asked.positive)
    notes += suspected_codes(asked.label, people.column(asked.label))
    may, warnings = may_test(people, f"label {asked.label!r}", asked.allow_seen)
    parts = split_people(target, people.family, may)
    row_of = dict(zip(found.scan_id.tolist(), rows.tolist(), strict=True))
    of_row = {row: MODALITIES.index(name)
              for row, name in zip(rows.tolist(), found.modality.tolist(), strict=True)}
    assert people.scans is not None
    units = [[row_of[scan] for scan in each] for each in people.scans]
    read = _read_modalities([{of_row[row] for row in unit} for unit in units], parts, notes)
    units = [[row for row in unit if of_row[row] in read] for unit in units]
    if some := sum(not each for each in units):
        raise DataError(f"{some} people have only scans of modalities that fewer than {LEAST} of "
                        "those who teach have; leave these modalities out (--modality "
                        + " ".join(MODALITIES[m] for m in read) + ")")
    taught = target.truth[parts == "train"]
    mean, sd = ((float(taught.mean()), float(taught.std()) or 1.0)
                if target.kind == "regression" else (0.0, 1.0))
    for line in (*people.notes, *notes, *warnings):
        print(line)
    return _Who(people, target, Cohort((target.truth - mean) / sd, units, parts), read, mean, sd,
                warnings, [*people.notes, *notes])


def _read_modalities(have: Sequence[set[int]], parts: np.ndarray, notes: list[str]) -> list[int]:
    """The modalities that enough people of part train ``have``."""
    number_of = {m: sum(m in each for each, part in zip(have, parts, strict=True)
                        if part == "train") for m in sorted(set().union(*have))}
    read = [m for m, number in number_of.items() if number >= LEAST]
    notes += [f"{MODALITIES[m]} is not read: {number} of those who teach have it, {LEAST} are "
              "needed" for m, number in number_of.items() if number < LEAST]
    if not read:
        raise DataError(f"no modality is had by {LEAST} of those who teach: " + ", ".join(
            f"{MODALITIES[m]} by {number}" for m, number in number_of.items()))
    return read


def _places(model: Model, feed: Feed, who: _Who) -> Places:
    """Of the weights; where they were exported without, of scans of people of part train."""
    weights = model.weights
    if weights.places is not None:
        return weights.places.to(model.device)
    names = np.array(feed.index["modality"].to_pylist())
    train = np.array([row for k in who.cohort.of("train") for row in who.cohort.units[k]])
    return fit_places(weights.model, weights.config, feed, np.concatenate(
        [spread(train[names[train] == MODALITIES[m]]) for m in who.modalities]))


def _probe(model: Model, feed: Feed, who: _Who, places: Places,
           world: World) -> tuple[Head, np.ndarray]:
    """A head that is a linear probe of embeddings, and the features that this reads."""
    rows = np.unique([row for unit in who.cohort.units for row in unit])
    names = feed.index["modality"].take(rows).to_pylist()
    scan = {row: (MODALITIES.index(name), value) for row, name, value in zip(
        rows.tolist(), names, _embedded(model, feed, rows, places, world), strict=True)}
    size = SIZES[model.weights.config.model.size]
    outputs = len(who.target.classes) if who.target.kind == "multiclass" else 1
    head = Head(who.modalities, places.width, size.heads, outputs).to(model.device)
    return head, begin(head, who.target.kind, [[scan[row] for row in unit]
                                               for unit in who.cohort.units],
                       who.cohort.truth, who.cohort.of("train"), who.cohort.of("val"))


def _embedded(model: Model, feed: Feed, rows: np.ndarray, places: Places,
              world: World) -> np.ndarray:
    """Float32 [scans, D]; every rank embeds its part, and all have the same."""
    mine = np.arange(len(rows))[world.rank::world.size]
    values = torch.zeros(len(rows), places.width, device=model.device)
    if len(mine):
        part = embed(model.weights.model, model.weights.config, feed, rows[mine], places)
        values[mine] = torch.from_numpy(part.values).to(model.device)
    return world.sum_(values).cpu().numpy()


def _finish(asked: Request, model: Model, feed: Feed, places: Places, who: _Who,
            features: np.ndarray, trainer: Trainer) -> None:
    """Test the best epoch, and write model and page."""
    target, people, head = who.target, who.people.replaced(features), trainer.head
    units, parts, test = who.cohort.units, who.cohort.parts, who.cohort.of("test")
    outputs = outputs_of(model.weights.model, model.weights.config, feed,
                         [units[k] for k in test], places, head)
    task = Task(target.name, target.kind, target.classes, tuple(trainer.weights), who.mean, who.sd,
                asked.session is not None)
    told = task.predictions(outputs)
    predicted = np.full((len(parts), 1, *told.shape[1:]), np.nan)
    predicted[test, 0] = told
    rows, gains = pages.scored(target, people, parts, predicted)
    names = feed.index["modality"].to_pylist()
    of_each = [{names[row] for row in unit} for unit in units]
    read = [MODALITIES[m] for m in who.modalities]
    found = pages.Finding(
        target, people, parts, rows, gains, trainer.history, trainer.best_epoch,
        {name: sum(name in each for each in of_each) for name in read},
        sum(len(each) == len(read) for each in of_each), who.warnings, who.notes)
    print_rows(target.name, rows, ())
    record: dict[str, Any] = {
        "input": asked.feed, "weights": asked.weights, "labels": asked.labels,
        "label": asked.label, "session": asked.session, "allow_seen": asked.allow_seen,
        "notes": [], **pages.record_of(found)}
    assert people.scans is not None
    taught = [name for k in np.flatnonzero(parts != "test")
              for name in (people.participant[k], *people.scans[k])]
    write_finetuned(asked.out, model.weights, asked.weights, places, head, task, taught,
                    {"weights_from": os.path.basename(asked.weights.rstrip("/")),
                     "began_at": record_of(asked.weights)["sha256"], "people": record["people"],
                     "scores": record["scores"], "best_epoch": trainer.best_epoch})
    write_task(path_of(asked.out, "evaluation"), "finetune/1", record,
               methods=partial(pages.methods, found), page=partial(pages.finetune_page, found),
               predictions=pages.predictions_of(found))
