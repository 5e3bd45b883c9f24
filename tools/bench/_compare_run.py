"""One run of the comparison: train by the loop, embed, predict; in a process of its own.

    python -m tools.bench._compare_run FOLDER

FOLDER holds recipe.yaml and run.json (_recipes.py); it gets scores.npz, written last, with
predictions, so that the tables can resample people without the model.  With --cost it prints the
CPU seconds of a step instead.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
from scipy.special import gammaln

from neurojepa.config import RootConfig, load_config
from neurojepa.downstream.embed import Embeddings, tokens_in
from neurojepa.downstream.probe import probe
from neurojepa.downstream.sessions import drop_rare
from neurojepa.errors import DataError, run_command
from neurojepa.feed.format import Feed, open_feed
from neurojepa.feed.labels import as_numbers
from neurojepa.model.averaged import Averaged
from neurojepa.model.jepa import SparseJEPA
from neurojepa.weights import load
from tools.bench import _recipes, _session
from tools.bench._quality_readout import Read, read_out
from tools.bench._quality_run import Arrays, finish, segmented, stored, trained
from tools.bench._quality_table import PLAIN
from tools.bench._recipes import SessionMAE
from tools.bench.common import device_here, spent_s

ATOMS = "atoms: "  # before the names of what is read from the code
SYNTHETIC = ("age", "diagnosis", "sex", "small_vessel", "lesion_ml", "t1w_contrast", "texture")
FEW = 100  # people to learn from
CANDIDATES = 100  # scans among which the other one of a session is looked for
NEIGHBOURS = 10
DICE_SCANS = 150  # of a split
TIMINGS, TIMED_STEPS = 5, 5


def main(folder: Path, cost: bool) -> None:
    config = load_config(folder / "recipe.yaml")
    feed = open_feed(config.data.feed)
    changes = json.loads((folder / "run.json").read_text())
    _recipes.apply(changes, feed.grid, config.model.patch_voxels)
    if cost:
        print(json.dumps(cost_of_step(config)))
        return
    model, code_s, active = trained(config, folder).to(device_here()), 0.0, {}
    if changes.get("unread"):  # the first stage of others
        finish(folder, {"train_cpu_s": np.array(spent_on(folder))})
        return
    if changes.get("code"):
        began = spent_s()
        model = load(changes["teacher"]).model.to(device_here())
        kept = _session.remember(model, Path(changes["teacher"]).parent / "latents")
        code = _session.fit(model, config, feed, _session.KINDS[changes["code"]])
        code_s = spent_s() - began + kept.saved_s
        _session.read_through(model, code)
        active = {"active": np.array(code.active)} if code.kind.sparse else {}
    scores = read(model, config, feed) | active
    if isinstance(model, SparseJEPA) and model.visible:
        scores |= {ATOMS + name: value for name, value in read(
            model, config, feed, partial(tokens_in, atoms=True)).items()}
    scores |= segmented(model, config, feed, DICE_SCANS)
    if isinstance(model, SessionMAE) and not changes.get("code"):
        scores |= {ATOMS + name: value for name, value in
                   read_head(model, config, feed).items()}
    finish(folder, scores | {"train_cpu_s": np.array(spent_on(folder) + code_s)})


def read_head(model: SessionMAE, config: RootConfig, feed: Feed) -> Arrays:
    """As ``main`` reads tokens: h of the session code that was trained with the encoder."""
    z_QD, _, share_Q = _session.taught(model, config, feed)
    code = model.head.requires_grad_(False)
    active = drop_rare(code, z_QD[share_Q >= _session.POOLED])
    model.session_code = code
    return (read(model, config, feed) | segmented(model, config, feed, DICE_SCANS)
            | {"active": np.array(active)})


def spent_on(folder: Path) -> float:
    """CPU seconds of training."""
    spent = folder / "train_cpu_s"
    return float(spent.read_text()) if spent.exists() else 0.0


def cost_of_step(config: RootConfig) -> float:
    """CPU seconds of a training step: the least of ``TIMINGS`` means, for other work on the
    machine makes steps dearer, never cheaper."""
    from neurojepa.train.loop import Run
    from neurojepa.train.world import start_world

    run, spent = Run(config, start_world()), []
    try:
        for _ in range(1 + TIMINGS):  # the first warms up
            began = spent_s()
            for _ in range(TIMED_STEPS):
                run._train_step()
            spent.append(spent_s() - began)
    finally:
        run.close()
    return min(spent[1:]) / TIMED_STEPS


def read(model: Averaged, config: RootConfig, feed: Feed, tokens: Read = tokens_in) -> Arrays:
    """Predictions from pooled tokens, and what people and tokens differ by."""
    found = feed.index["modality"].to_pylist()
    modalities = tuple(name for name in ("T1w", "T2w", "FLAIR") if name in found)

    def probed(embeddings: Embeddings, prefix: str) -> Arrays:
        return {} if prefix == PLAIN else read_people(embeddings, feed)

    scores = read_out(model, config, feed, modalities, probed, tokens)
    return {name: value for name, value in scores.items() if not name.startswith(PLAIN)}


# ---- predictions about people --------------------------------------------------------------------

def read_people(embeddings: Embeddings, feed: Feed) -> Arrays:
    """Predictions of labels, from T1w on T1w and across modalities, from all people and few."""
    labels = labels_of(embeddings, feed)
    few = only_few(embeddings)
    ways = [(name, embeddings, name, "T1w") for name in labels]
    ways += [(f"{name}, {FEW} people", few, name, "T1w") for name in ("age", "diagnosis")]
    ways += [(f"age on {other}", embeddings, "age", other) for other in ("T2w", "FLAIR")
             if other in embeddings.modality]
    scores: Arrays = {}
    for way, taught, name, modality in ways:
        if name not in labels:
            continue
        try:
            result = probe(taught, name, labels[name][taught is few], "test", "T1w", modality)
        except DataError as error:
            print(f"{way}: left out: {error}", flush=True)
            continue
        known = ((labels[name][taught is few] != "") & (taught.split == "test")
                 & (taught.modality == modality))
        scores |= stored(way, result.truth, result.predicted, taught.participant[known],
                         taught.family[known])
    if "age" in labels and as_numbers(labels["age"][0]) is not None:
        scores |= nearest(embeddings, labels["age"][0])
    return scores | retrieved(embeddings)


def labels_of(embeddings: Embeddings, feed: Feed) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Labels of all scans and of those of ``only_few``; lesions as log(1 + ml)."""
    table = feed.labels()
    names = set(table["name"].to_pylist())
    found = {}
    for name in (SYNTHETIC if set(SYNTHETIC) <= names else sorted(names)):
        values = embeddings.labels(table, name)
        if name == "lesion_ml":
            values = np.array([value and repr(float(np.log1p(float(value)))) for value in values])
        found[name] = values, values[few_rows(embeddings)]
    return found


def few_rows(embeddings: Embeddings) -> np.ndarray:
    """bool [n]: scans of the tested, and of ``FEW`` people of train by a hash of their names."""
    people = sorted(set(embeddings.participant[embeddings.split == "train"].tolist()),
                    key=lambda person: hashlib.sha256(person.encode()).digest())
    return (embeddings.split != "train") | np.isin(embeddings.participant, people[:FEW])


def only_few(embeddings: Embeddings) -> Embeddings:
    return chosen_rows(embeddings, few_rows(embeddings))


def chosen_rows(embeddings: Embeddings, chosen: np.ndarray) -> Embeddings:
    """Those of ``chosen``, bool [n] or row numbers."""
    return Embeddings(**{name: None if value is None else value[chosen]
                         for name, value in vars(embeddings).items()})


def standardised(embeddings: Embeddings, modality: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a modality, and their values by mean and deviation of its scans of train."""
    rows = np.flatnonzero(embeddings.modality == modality)
    train = embeddings.values[rows[embeddings.split[rows] == "train"]]
    values = (embeddings.values[rows] - train.mean(0)) / (train.std(0) + 1e-6)
    return rows, values / (np.linalg.norm(values, axis=1, keepdims=True) + 1e-9)


def nearest(embeddings: Embeddings, age: np.ndarray) -> Arrays:
    """Age as the mean over the most similar people of train."""
    rows, values = standardised(embeddings, "T1w")
    known = age[rows] != ""
    rows, values = rows[known], values[known]
    train, test = (embeddings.split[rows] == split for split in ("train", "test"))
    if train.sum() < NEIGHBOURS or not test.any():
        return {}
    found = np.argsort(-values[test] @ values[train].T, axis=1)[:, :NEIGHBOURS]
    truth = age[rows].astype(float)
    return stored("age, nearest", truth[test], truth[train][found].mean(1),
                  embeddings.participant[rows[test]], embeddings.family[rows[test]])


def retrieved(embeddings: Embeddings) -> Arrays:
    """For each T1w scan of test, the chance that the T2w scan of its session is the most similar
    among ``CANDIDATES`` of the tested people's.

    Exact over all draws of the other candidates: with r of m others more similar, none of them may
    be among those drawn.
    """
    parts = []
    for modality in ("T1w", "T2w"):
        if not ((embeddings.modality == modality) & (embeddings.split == "train")).any():
            return {}
        rows, values = standardised(embeddings, modality)
        tested = embeddings.split[rows] == "test"
        sessions = np.char.add(np.char.add(embeddings.participant[rows[tested]], "/"),
                               embeddings.session[rows[tested]])
        first = np.unique(sessions, return_index=True)[1]
        parts.append((sessions[first], rows[tested][first], values[tested][first]))
    (ours, rows, values), (theirs, _, others) = parts
    both = np.intersect1d(ours, theirs)
    ours_at, theirs_at = np.searchsorted(ours, both), np.searchsorted(theirs, both)
    alike = values[ours_at] @ others[theirs_at].T
    better = (alike > alike.diagonal()[:, None]).sum(1)
    others_num, drawn = len(both) - 1, min(CANDIDATES, len(both)) - 1
    left = np.maximum(others_num - better, 0)
    chance = np.exp(_log_ways(left, drawn) - _log_ways(np.array(others_num), drawn))
    chosen = rows[ours_at]
    return stored("retrieval", np.ones(len(both)), np.where(left >= drawn, chance, 0.0),
                  embeddings.participant[chosen], embeddings.family[chosen])


def _log_ways(n: np.ndarray, k: int) -> np.ndarray:
    """Logarithm of n over k; of k over k where n is less."""
    n = np.maximum(n, k)
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


if __name__ == "__main__":
    run_command(lambda: main(Path(sys.argv[1]), "--cost" in sys.argv), teardown=False)
