"""explain: do maps of what a readout reads find the lesions that were planted?

Synthetic people on the training grid (_people.py), whose label maps say where their lesions are.  A
linear readout of the lesions' volume is taught by embeddings of split train; for people of split
test with at least 2 ml the area under the ROC curve tells how much larger absolute values of a map
are in the lesion than elsewhere in the brain.  Beside it stand

    scan less usual scan   what is unusual, whatever is read: no model at all
    random encoder         the same readout's map after all weights were drawn anew
    noise                  smooth noise: chance

With --weights W (exported on the feed's grid) these are explained; without, an untrained encoder.
--feed takes a feed that has label maps and the label lesion_ml in place of making one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from data_prep.synth import codes as labels
from neurojepa.config import validate
from neurojepa.downstream.embed import embed, fit_places
from neurojepa.downstream.readout import readout
from neurojepa.downstream.saliency import Explainer, rank_correlation, usual_scan
from neurojepa.downstream.stats import auroc, r_squared, score
from neurojepa.downstream.targets import Target
from neurojepa.errors import ConfigError
from neurojepa.feed.format import MODALITIES, Feed, is_brain, open_feed
from neurojepa.feed.loader import SampleReader
from neurojepa.weights import Weights, load, untrained
from tools.bench._people import Cohort, make_people
from tools.bench.common import ROOT, print_table

LEAST_ML = 2.0
SHOWN = ("FLAIR", "T1w")
FULL, QUICK = Cohort(train=160, val=2, test=60, flair_every=1), Cohort(
    train=40, val=2, test=16, flair_every=1)
TESTED, TESTED_QUICK = 30, 6  # people of each modality


def run(quick: bool, official: str | None, work: str | None = None, feed: str | None = None,
        weights: str | None = None) -> dict[str, Any]:
    """Make the people if need be, and print the table; returns it."""
    folder = Path(work or ROOT / "build" / "bench-explain") / ("quick" if quick else "full")
    opened = open_feed(feed or make_people(QUICK if quick else FULL, folder, 2))
    rows, results = [], {}
    for modality in SHOWN:
        measured = _measure(opened, weights, modality, TESTED_QUICK if quick else TESTED)
        results[modality] = measured
        rows.append([modality, *measured.values()])
    print_table(["", *next(iter(results.values()))], rows)
    return {"weights": weights or "untrained", "feed": opened.fingerprint, **results}


def _measure(feed: Feed, uri: str | None, modality: str, most: int) -> dict[str, Any]:
    """A row of the table, by column."""
    columns = {name: np.array(feed.index[name].to_pylist())
               for name in ("participant", "modality", "split", "label_length")}
    of_label = {person: row for row, (person, length) in enumerate(zip(
        columns["participant"], columns["label_length"], strict=True)) if length is not None}
    rows = np.flatnonzero(columns["modality"] == modality)
    train = rows[columns["split"][rows] == "train"]
    weights = _weights(feed, uri, train)
    found = embed(weights.model, weights.config, feed, rows, weights.places)
    ml = found.labels(feed.labels(), "lesion_ml").astype(float)
    teach = found.split == "train"
    read = readout(Target("log lesion ml", "regression", np.log(ml[teach])),
                   found.values[teach].astype(float), found.family[teach])
    test = found.split == "test"
    explainer, reader = Explainer(weights, read), SampleReader(feed)
    *_, (_, other) = explainer.randomised()
    rng, areas, ranks = np.random.default_rng(0), [], []
    chosen = np.flatnonzero(test & (ml >= LEAST_ML))
    chosen = chosen[::-(-len(chosen) // most)]
    for number in chosen:
        scan = reader.image(int(rows[number]))
        brain = is_brain(scan)
        truth = reader.label(of_label[found.participant[number]])[brain] == labels.LESION
        if not truth.any():
            continue
        own, drawn = (each(scan, MODALITIES.index(modality)).map for each in (explainer, other))
        noise = gaussian_filter(rng.normal(size=scan.shape), 1)
        unusual = scan.astype(float) - usual_scan(scan, explainer.priors)
        areas.append([auroc(truth.astype(float), np.abs(volume[brain]))
                      for volume in (own, unusual, drawn, noise)])
        ranks.append(rank_correlation(own[brain], drawn[brain]))
    if not areas:
        raise ConfigError(f"{feed.uri}: nobody of split test has {LEAST_ML:g} ml of lesions and a "
                          f"{modality} scan with a label map")
    table, people = np.array(areas), np.arange(len(areas))

    def told(values: np.ndarray) -> str:
        return str(score(lambda truth, _: float(truth.mean()), values, values, people))

    r2 = score(r_squared, np.log(ml[test]), read(found.values[test]), found.participant[test])
    return {"people": len(areas), "readout R2": str(r2), "map": told(table[:, 0]),
            "map over unusual": told(table[:, 0] - table[:, 1]),
            "scan less usual scan": told(table[:, 1]), "random encoder": told(table[:, 2]),
            "noise": told(table[:, 3]), "rank with random encoder": told(np.array(ranks))}


def _weights(feed: Feed, uri: str | None, train: np.ndarray) -> Weights:
    """Exported or untrained weights that know what is usual in these scans of split train."""
    if uri is None:
        weights = untrained(validate({
            "data": {"feed": feed.uri}, "model": {"size": "tiny", "patch_voxels": 6,
                                                  "token_budget": 416},
            "train": {"dtype": "fp32"}, "run": {"dir": "unused"}}, "bench"), feed.grid)
    else:
        weights = load(uri)
    return replace(weights, places=fit_places(weights.model, weights.config, feed, train))
