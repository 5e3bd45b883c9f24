"""One run of the quality table: train by the loop, embed, predict; in a process of its own.

    python -m tools.bench._quality_run FOLDER

FOLDER holds recipe.yaml and run.json ({"scrambled": bool, "head_alone": bool}); it gets scores.npz,
written last.  What is stored are predictions, so that the table can resample people without the
model.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.synth import codes
from neurojepa.baselines.cnn import CNN, Labels
from neurojepa.config import RootConfig, load_config
from neurojepa.downstream import embed as embedding
from neurojepa.downstream.embed import Embeddings, select_rows
from neurojepa.downstream.probe import probe
from neurojepa.errors import DataError, run_command
from neurojepa.feed.format import Feed, Grid, open_feed
from neurojepa.feed.loader import SampleReader
from neurojepa.model.averaged import Averaged
from neurojepa.model.jepa import SparseJEPA
from neurojepa.objective.losses import crowding, sample_sums, take
from neurojepa.objective.views import (
    Views,
    make_views,
    patch_centres_mm,
    patch_numbers,
    patchify,
)
from neurojepa.storage import read_rows, write_bytes
from neurojepa.weights import export, load, untrained
from tools.bench._quality_readout import read_out
from tools.bench.common import spent_s

LABELS = {"age": "age", "diagnosis": "diagnosis", "sex": "sex", "lesions": "lesion_ml"}
CROSSED = ("T2w", "FLAIR")  # tested by what was learnt on T1w
STRUCTURES = {"ventricles": codes.VENTRICLES, "hippocampi": codes.HIPPOCAMPI,
              "cortex": codes.CORTEX, "white matter": codes.WHITE, "deep grey": codes.DEEP_GREY,
              "outer fluid": (codes.FLUID,), "lesions": (codes.LESION,)}
PENALTIES = 10.0 ** np.arange(-3, 4)  # per token, of standardised features
Arrays = dict[str, np.ndarray]


def main(folder: Path) -> None:
    config = load_config(folder / "recipe.yaml")
    changes = json.loads((folder / "run.json").read_text())
    if changes["scrambled"]:
        scramble(open_feed(config.data.feed).grid, config.model.patch_voxels)
    if changes["head_alone"]:
        SparseJEPA.forward = head_alone  # type: ignore[method-assign, assignment]
    model = trained(config, folder)
    spent = folder / "train_cpu_s"
    train_s = float(spent.read_text()) if spent.exists() else 0.0
    feed = open_feed(config.data.feed)
    if isinstance(model, CNN):
        scores = predicted_by(model, config, feed)
    else:
        scores = read_out(model, config, feed, ("T1w", *CROSSED),
                          lambda embeddings, prefix: probed(embeddings, feed, prefix))
        scores |= segmented(model, config, feed)
    finish(folder, scores | {"train_cpu_s": np.array(train_s)})


def finish(folder: Path, scores: Arrays) -> None:
    """Write scores.npz."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **scores)
    write_bytes(str(folder / "scores.npz"), buffer.getvalue())


def trained(config: RootConfig, folder: Path) -> Averaged:
    """The model after ``train.steps`` steps, or as it begins where there are none to take."""
    feed = open_feed(config.data.feed)
    if (folder / "untrained").exists():
        return untrained(config, feed.grid).model
    if not (folder / "weights" / "config.json").exists():
        from neurojepa.train.loop import train

        began = spent_s()
        if stopped := train(config):  # by a signal: half a training is no result
            sys.exit(stopped)
        events = read_rows(config.run.dir + "/events.jsonl")
        whole = all(row["event"] != "resume" for row in events)  # else others did a part of it
        spent = spent_s() - began if whole else np.nan
        (folder / "train_cpu_s").write_text(str(spent))
        export(config.run.dir, str(folder / "weights"))
        shutil.rmtree(Path(config.run.dir) / "checkpoints")
    return load(str(folder / "weights")).model


def scramble(grid: Grid, patch: int) -> None:
    """Let every patch carry the coordinates of another one, the same for all scans.

    The control for what coordinates are good for: a bug of this kind was published.
    """
    centres = patch_centres_mm(grid, patch)
    order = torch.randperm(len(centres), generator=torch.Generator().manual_seed(0))
    from neurojepa.train import loop

    def scrambled(batch: Any, config: RootConfig, grid: Grid, seed: int) -> Views:
        views = make_views(batch, config, grid, seed)
        views.coords_BN3 = centres[order][patch_numbers(views.coords_BN3, grid, patch)]
        return views

    loop.make_views = embedding.make_views = scrambled  # type: ignore[assignment]


def head_alone(model: SparseJEPA, views: Views, l1: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The JEPA's loss without its prediction, in place of ``SparseJEPA.forward``: the tissue head
    and the spread are left, and predictor, code and target are idle.

    The control for what latent prediction adds to the head.
    """
    valid_BMC, head = take(views.valid_BN, views.context_BMC), model.tissue
    assert head is not None
    y_VCD = model.encoder(take(views.tokens_BNP, views.context_BMC).flatten(0, 1),
                          take(views.coords_BN3, views.context_BMC).flatten(0, 1),
                          valid_BMC.flatten(0, 1))
    B, D = len(views.weight_B), y_VCD.shape[-1]
    parts = {"crowding": crowding(y_VCD.reshape(B, -1, D), valid_BMC.reshape(B, -1)),
             "tissue": head.error(views, index_BMC=views.context_BMC, latent_VCD=y_VCD)}
    loss_B = views.weight_B * (model.spread * parts["crowding"] + head.weighs * parts["tissue"])
    # the engine wants a gradient of every parameter
    idle = [0 * parameter.sum() for part in (model.predictor, model.code)
            for parameter in part.parameters()]
    return loss_B.sum() + torch.stack(idle).sum(), sample_sums(views, loss_B.detach(), parts)


# ---- predictions ---------------------------------------------------------------------------------

def targets(embeddings: Embeddings, feed: Feed) -> Arrays:
    """Each target's labels, str [n]; the lesion load as log(1 + ml)."""
    table = feed.labels()
    found = {name: embeddings.labels(table, label) for name, label in LABELS.items()}
    found["lesions"] = np.array([value and repr(float(np.log1p(float(value))))
                                 for value in found["lesions"]])
    return found


def probed(embeddings: Embeddings, feed: Feed, prefix: str = "") -> Arrays:
    """Predictions of every target from T1w on T1w, and of age and sex across modalities.

    Their names begin with ``prefix``.
    """
    scores: Arrays = {}
    labels = targets(embeddings, feed)
    ways = [(name, name, "T1w", "test") for name in labels]
    ways += [("val age", "age", "T1w", "val")]
    ways += [(f"{name} on {other}", name, other, "test")
             for name in ("age", "sex") for other in CROSSED if other in embeddings.modality]
    for way, name, modality, split in ways:
        try:
            result = probe(embeddings, name, labels[name], split, "T1w", modality)
        except DataError as error:
            print(f"{prefix}{way}: left out: {error}", flush=True)
            continue
        tested = ((labels[name] != "") & (embeddings.split == split)
                  & (embeddings.modality == modality))
        scores |= stored(prefix + way, result.truth, result.predicted,
                         embeddings.participant[tested], embeddings.family[tested])
    return scores


def stored(way: str, truth: np.ndarray, predicted: np.ndarray, people: np.ndarray,
           groups: np.ndarray) -> Arrays:
    return {f"{way}/truth": truth, f"{way}/predicted": predicted, f"{way}/people": people,
            f"{way}/groups": groups}


@torch.no_grad()
def predicted_by(model: CNN, config: RootConfig, feed: Feed) -> Arrays:
    """What the network's own head says of the T1w scans of split test (age: also of val)."""
    name = next(key for key, label in LABELS.items() if label == config.objective.label)
    labels = Labels(feed, config)
    scores: Arrays = {}
    for way, split in ((name, "test"), *([("val age", "val")] if name == "age" else [])):
        rows = select_rows(feed, "T1w", None)
        rows = rows[np.array(feed.index["split"].to_pylist())[rows] == split]
        truth, predicted, weight = [], [], []
        for batch in embedding.batches(feed, rows, 8):
            views = labels.attach(make_views(batch, embedding.without_augmentation(config),
                                             feed.grid, 0), batch.scan_ids)
            predicted.append(model.predict(views).double().numpy())
            truth.append(views.label_B.double().numpy())
            weight.append(views.weight_B.numpy())
        known = np.concatenate(weight) > 0
        people, groups = (np.array(feed.index[column].to_pylist())[rows][known]
                          for column in ("participant", "family"))
        said = [np.concatenate(values)[known] * labels.std + labels.mean
                for values in (truth, predicted)]
        if name == "lesions":  # as the probes have it
            said = [np.log1p(values.clip(0)) for values in said]
        scores |= stored(way, said[0], said[1], people, groups)
    return scores


# ---- segmentation --------------------------------------------------------------------------------

@torch.no_grad()
def segmented(model: Averaged, config: RootConfig, feed: Feed,
              most: int | None = None) -> Arrays:
    """Overlap of true and predicted shares of each structure in each patch, of T1w scans.

    A linear map from a frozen token to the share of its patch's voxels that each structure fills,
    ridge, its penalty chosen on val.  A scan's overlap is the fuzzy Dice over all patches of the
    grid, 2 sum min(p, q) / sum (p + q); tokens outside the budget count as predictions of 0.

    ``atlas`` is the mean share of each patch over train, which knows places only.  ``placed`` is
    told the place: it maps how a token differs from the mean token of its patch over train to how
    the shares differ from the atlas.

    Of each split ``most`` scans, spread over the feed; None: all.
    """
    parts = {split: tokens_and_shares(model, config, feed, split, most)
             for split in ("train", "val", "test")}
    if not all(len(part.rows) for part in parts.values()):
        print("segmentation: left out: a split has no label maps", flush=True)
        return {}
    train, test = parts["train"], parts["test"]
    atlas = train.shares.mean(0)
    column = [np.array(feed.index[name].to_pylist())[test.rows]
              for name in ("participant", "family")]
    guesses = {"segmentation": mapped(parts, train.values.mean((0, 1)), np.zeros_like(atlas)),
               "placed": mapped(parts, mean_tokens(train), atlas),
               "atlas": np.broadcast_to(atlas, test.shares.shape)}
    scores: Arrays = {}
    for name, guess in guesses.items():
        scores |= stored(name, test.shares.sum(1), overlap(test.shares, guess), *column)
    return scores


@dataclass
class Part:
    """The labelled T1w scans of a split."""

    values: np.ndarray  # [s, N, D] tokens
    number: np.ndarray  # [s, N] patch of each token
    shares: np.ndarray  # [s, n, structures], of every patch of the grid
    rows: np.ndarray  # [s] of the feed's index

    def at_tokens(self) -> np.ndarray:
        """[s, N, structures] shares of the tokens' patches."""
        return np.take_along_axis(self.shares, self.number[..., None], 1)


def mapped(parts: dict[str, Part], origin: np.ndarray, base: np.ndarray) -> np.ndarray:
    """[s, n, structures] shares that tokens of test predict: ``base`` and a linear map of what a
    token differs by from ``origin``, [D] or [n, D]."""
    def differing(part: Part) -> np.ndarray:
        return part.values - (origin if origin.ndim == 1 else origin[part.number])

    train = parts["train"]
    x = differing(train).reshape(-1, train.values.shape[-1]).astype(np.float64)
    y = (train.at_tokens() - base[train.number]).reshape(len(x), -1)
    scale, offset = x.std(0) + 1e-6, y.mean(0)
    gram = (x / scale).T @ (x / scale) / len(x)
    right = (x / scale).T @ (y - offset) / len(x)

    def predict(part: Part, penalty: float) -> np.ndarray:
        weight = np.linalg.solve(gram + penalty * np.eye(len(gram)), right)
        found = base[part.number] + differing(part) / scale @ weight + offset
        guess = np.repeat(base[None], len(part.rows), 0)
        np.put_along_axis(guess, part.number[..., None], found.clip(0, 1), 1)
        return guess

    errors = [np.square(predict(parts["val"], penalty) - parts["val"].shares).mean()
              for penalty in PENALTIES]
    return predict(parts["test"], PENALTIES[int(np.argmin(errors))])


def mean_tokens(part: Part) -> np.ndarray:
    """[n, D] mean token of each patch; that of all where a patch never was a token."""
    n, D = part.shares.shape[1], part.values.shape[-1]
    total, count = np.zeros((n, D)), np.zeros((n, 1))
    np.add.at(total, part.number.ravel(), part.values.reshape(-1, D))
    np.add.at(count, part.number.ravel(), 1)
    return np.where(count > 0, total / np.maximum(count, 1), part.values.mean((0, 1)))


def overlap(shares: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """[scans, structures] fuzzy Dice; nan where a scan has none of a structure."""
    total = (shares + guess).sum(1)
    dice = 2 * np.minimum(shares, guess).sum(1) / np.maximum(total, 1e-9)
    return np.where(shares.sum(1) > 0, dice, np.nan)


def tokens_and_shares(model: Averaged, config: RootConfig, feed: Feed, split: str,
                      most: int | None = None) -> Part:
    """Tokens and shares of the T1w scans of a split that have a label map."""
    index = feed.index
    rows = np.array([row for row, (modality, of_split, length) in enumerate(zip(
        *(index[name].to_pylist() for name in ("modality", "split", "label_length")),
        strict=True)) if modality == "T1w" and of_split == split and length], dtype=np.int64)
    rows = rows[::max(1, -(-len(rows) // most))] if most else rows
    patch, reader = config.model.patch_voxels, SampleReader(feed)
    none = np.zeros((0, 1, 1))
    values, shares, numbers = [none], [none], [none[..., 0].astype(np.int64)]
    plain = embedding.without_augmentation(config)
    for batch in embedding.batches(feed, rows, 8):
        batch = batch.to(next(model.parameters()).device)
        true_places = make_views(batch, plain, feed.grid, 0)
        views = embedding.make_views(batch, plain, feed.grid, 0)  # maybe scrambled
        values.append(model.latents(views).cpu().numpy())
        numbers.append(patch_numbers(true_places.coords_BN3, feed.grid, patch).cpu().numpy())
    for row in rows.tolist():
        label = patchify(torch.from_numpy(reader.label(row).astype(np.int32))[None], patch)
        shares.append(torch.stack([torch.isin(label, torch.tensor(of)).double().mean(-1)
                                   for of in STRUCTURES.values()], -1).numpy())
    first = int(len(rows) > 0)  # without the empty one, whose shape is not theirs
    return Part(*(np.concatenate(each[first:]) for each in (values, numbers, shares)), rows)


if __name__ == "__main__":
    run_command(lambda: main(Path(sys.argv[1])), teardown=False)
