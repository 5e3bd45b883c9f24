"""explain: do maps of what a readout reads find what was planted?

Synthetic people on the training grid (_people.py), in two tasks:

    lesions   a readout of the logarithm of their volume; label maps say where they are; people with
              at least 2 ml are mapped
    spots     a ball of 16 mm radius, half brighter than its place, in the white matter of every
              second scan, and a readout of whether there is one: the positive control

The readout is taught by embeddings of split train.  For people of split test the area under the ROC
curve tells how much larger values of a map are in the lesion, or spot, than elsewhere in the brain,
by their size and, as *signed*, by what they add to the score.  Beside the map stand

    unusual          scan less usual scan, smoothed alike: what is unusual; no model at all
    random encoder   the same readout's map after all weights were drawn anew
    noise            smooth noise: chance

With --weights W (exported on the feed's grid) these are explained; without, an untrained encoder.
--feed takes a feed that has label maps and the label lesion_ml in place of making one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from data_prep.synth import codes as labels
from neurojepa.config import validate
from neurojepa.downstream.embed import embed, fit_places
from neurojepa.downstream.readout import Readout, readout
from neurojepa.downstream.saliency import (
    ALL,
    SMOOTH,
    Explainer,
    rank_correlation,
    smoothed,
    usual_scan,
)
from neurojepa.downstream.stats import auroc, r_squared, score
from neurojepa.downstream.targets import Target
from neurojepa.errors import ConfigError
from neurojepa.feed.format import MODALITIES, Feed, is_brain, open_feed
from neurojepa.feed.loader import SampleReader
from neurojepa.objective.anatomy import grid_mm, tissue_priors
from neurojepa.weights import Weights, load, untrained
from tools.bench._people import Cohort, make_people
from tools.bench.common import ROOT, print_table

LEAST_ML = 2.0
SPOT_MM, BRIGHTER = 16.0, 1 / 2
SHOWN = ("FLAIR", "T1w")
FULL, QUICK = Cohort(train=160, val=2, test=60, flair_every=1), Cohort(
    train=40, val=2, test=16, flair_every=1)
TESTED, TESTED_QUICK = 30, 6  # scans mapped of each modality


@dataclass(frozen=True)
class Scans:
    """Scans of a modality, their weights, and the rows that teach and are tested."""

    feed: Feed
    weights: Weights
    modality: str
    train: np.ndarray
    test: np.ndarray
    most: int

    @property
    def code(self) -> int:
        return MODALITIES.index(self.modality)


def run(quick: bool, official: str | None, work: str | None = None, feed: str | None = None,
        weights: str | None = None) -> dict[str, Any]:
    """Make the people if need be, and print the table; returns it."""
    folder = Path(work or ROOT / "build" / "bench-explain") / ("quick" if quick else "full")
    opened = open_feed(feed or make_people(QUICK if quick else FULL, folder, 2))
    results = {}
    for modality in SHOWN:
        scans = _scans(opened, weights, modality, TESTED_QUICK if quick else TESTED)
        for task, measure in (("lesions", _lesions), ("spots", _spots)):
            results[f"{task}, {modality}"] = measure(scans)
    print_table(["", *next(iter(results.values()))],
                [[name, *row.values()] for name, row in results.items()])
    return {"weights": weights or "untrained", "feed": opened.fingerprint, **results}


def _scans(feed: Feed, uri: str | None, modality: str, most: int) -> Scans:
    column = {name: np.array(feed.index[name].to_pylist()) for name in ("modality", "split")}
    train, test = (np.flatnonzero((column["modality"] == modality) & (column["split"] == split))
                   for split in ("train", "test"))
    if uri is None:
        weights = untrained(validate({
            "data": {"feed": feed.uri}, "model": {"size": "tiny", "patch_voxels": 6,
                                                  "token_budget": 416},
            "train": {"dtype": "fp32"}, "run": {"dir": "unused"}}, "bench"), feed.grid)
    else:
        weights = load(uri)
    places = fit_places(weights.model, weights.config, feed, train[::max(1, len(train) // 80)])
    return Scans(feed, replace(weights, places=places), modality, train, test, most)


def _lesions(scans: Scans) -> dict[str, Any]:
    feed, weights = scans.feed, scans.weights
    found = embed(weights.model, weights.config, feed, np.r_[scans.train, scans.test],
                  weights.places)
    ml = found.labels(feed.labels(), "lesion_ml").astype(float)
    teach = np.arange(len(ml)) < len(scans.train)
    read = readout(Target("log lesion ml", "regression", np.log(ml[teach])),
                   found.values[teach].astype(float), found.family[teach])
    told = score(r_squared, np.log(ml[~teach]), read(found.values[~teach]),
                 found.participant[~teach])
    rows = scans.test[ml[~teach] >= LEAST_ML]
    reader, of_person = SampleReader(feed), {
        person: row for row, (person, length) in enumerate(zip(
            feed.index["participant"].to_pylist(), feed.index["label_length"].to_pylist(),
            strict=True)) if length is not None}

    def planted() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for row in rows[::-(-len(rows) // scans.most)].tolist():
            truth = reader.label(of_person[reader.value("participant", row)]) == labels.LESION
            yield reader.image(row), truth

    return {"readout": f"R2 {told}", **_areas(scans, read, planted())}


def _spots(scans: Scans) -> dict[str, Any]:
    reader, blank = SampleReader(scans.feed), Explainer(
        scans.weights, Readout(np.zeros(1), 0.0))
    white, mm = tissue_priors(scans.feed.grid)[2], grid_mm(scans.feed.grid)

    def spotted(row: int) -> tuple[np.ndarray, np.ndarray]:
        """A scan with a spot, and where that is."""
        scan, rng = reader.image(row), np.random.default_rng([row, 1])
        inside = np.argwhere((white > 0.8) & is_brain(scan))
        place = mm[tuple(inside[rng.integers(len(inside))])]
        spot = (((mm - place) ** 2).sum(-1) < SPOT_MM**2) & is_brain(scan)
        bright = np.clip(np.rint(scan * (1 + BRIGHTER)), 1, 254).astype(np.uint8)
        return np.where(spot, bright, scan), spot

    def told(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = [blank.embedding(spotted(row)[0] if number % 2 else reader.image(row), scans.code)
                  for number, row in enumerate(rows.tolist())]
        return np.stack(values).astype(float), np.arange(len(rows)) % 2.0

    (taught, truth), (tested, known) = told(scans.train[:160]), told(scans.test[:60])
    family = np.array([reader.value("family", row) for row in scans.train[:160].tolist()])
    read = readout(Target("spot", "binary", truth, ("no", "yes")), taught, family)
    area = score(auroc, known, read(tested), np.arange(len(known)))
    rows = scans.test[1:60:2][:scans.most]
    return {"readout": f"AUROC {area}",
            **_areas(scans, read, (spotted(row) for row in rows.tolist()))}


def _areas(scans: Scans, read: Readout,
           planted: Iterator[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Areas under the curve over scans with where something was planted, by column."""
    explainer, rng = Explainer(scans.weights, read), np.random.default_rng(0)
    other = next(each for part, each in explainer.randomised() if part == ALL)
    rows = []
    for codes, truth in planted:
        brain = is_brain(codes)
        inside = truth[brain].astype(float)
        if not inside.any():
            continue
        own, drawn = (each(codes, scans.code).map[brain] for each in (explainer, other))
        unusual = smoothed(codes.astype(float) - usual_scan(codes, explainer.priors), brain,
                           SMOOTH * explainer.config.model.patch_voxels)[brain]
        noise = gaussian_filter(rng.normal(size=codes.shape), 1)[brain]
        rows.append([*(auroc(inside, each) for each in (
            np.abs(own), own, np.abs(unusual), unusual, np.abs(drawn), drawn, np.abs(noise))),
            rank_correlation(own, drawn)])
    if not rows:
        raise ConfigError(f"{scans.feed.uri}: nobody of split test has {LEAST_ML:g} ml of lesions "
                          f"and a {scans.modality} scan with a label map")
    people = np.arange(len(rows))

    def mean(values: np.ndarray) -> str:
        return str(score(lambda truth, _: float(truth.mean()), values, values, people))

    names = ("map", "map, signed", "unusual", "unusual, signed", "random encoder",
             "random, signed", "noise", "rank with random")
    return {"mapped": len(rows), **{name: mean(column) for name, column in zip(
        names, np.array(rows).T, strict=True)}}
