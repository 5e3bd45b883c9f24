"""A fine-tuned model: exported weights with the encoder changed, and the head beside them.

    model.safetensors, pooling.safetensors, seen.json, config.json    as neurojepa.weights has them
    head.safetensors                                                  attentive.Head

So it loads, and embeds, like other weights; ``neurojepa.load(M).predict(scans)`` reads the head,
too.  seen.json knows the people who taught the label, beside those of the pretraining.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from neurojepa.config import RootConfig
from neurojepa.downstream.attentive import Head, Scan, told
from neurojepa.downstream.embed import tokens_of
from neurojepa.downstream.pooling import Places
from neurojepa.downstream.targets import Kind
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import MODALITIES, Feed
from neurojepa.model.averaged import Averaged
from neurojepa.model_card import card
from neurojepa.storage import join, local_path, read_bytes, read_if_there, sha256, write_bytes
from neurojepa.weights import CODE, Weights, hashed, place_of

HEAD = "head.safetensors"
# of config.json, what is told of the weights before, or of what was learnt on top of them
OF_BEFORE = ("results", "licence", "about", "finetuned", "head", "completes", "completion")


@dataclass(frozen=True)
class Task:
    """What a head tells, and in which unit."""

    label: str
    kind: Kind
    classes: tuple[str, ...]  # binary: negative, positive
    weights: tuple[float, ...]  # of classes, while it was trained
    mean: float  # of numbers who taught
    sd: float
    by_session: bool  # of a visit, or of a person

    def predictions(self, outputs_nK: np.ndarray) -> np.ndarray:
        """Numbers [n], the probability of the positive class [n], or those of all [n, K]."""
        found = told(self.kind, outputs_nK, self.weights)
        return self.mean + self.sd * found if self.kind == "regression" else found


@torch.no_grad()
def outputs_of(model: Averaged, config: RootConfig, feed: Feed, units: Sequence[Sequence[int]],
               places: Places, head: Head) -> np.ndarray:
    """Float64 [n, K], what a head makes of n people or visits, each of these rows of the feed."""
    rows = np.array([row for unit in units for row in unit], dtype=int)
    scans = scans_of(model, config, feed, rows, places)
    return np.stack([head([next(scans) for _ in unit]).double().cpu().numpy() for unit in units])


def scans_of(model: Averaged, config: RootConfig, feed: Feed, rows: np.ndarray,
             places: Places) -> Iterator[Scan]:
    """The tokens of each scan that are pooled, one scan after the other."""
    for tokens in tokens_of(model, config, feed, rows):
        yield Scan(*places.values(tokens, 0), int(tokens.modality_B[0]))


# ---- the folder ----------------------------------------------------------------------------------

def write_finetuned(out: str, weights: Weights, source: str, places: Places, head: Head,
                    task: Task, taught: Sequence[str], record: dict[str, Any]) -> None:
    """Write a model whose adapters were merged.

    Parameters
    ----------
    source : the weights that fine-tuning began at
    taught : pseudonyms and scan ids of who taught
    record : of the fine-tuning, for config.json
    """
    from safetensors.torch import save

    parts = {"head": (HEAD, save({name: tensor.cpu() for name, tensor
                                  in head.state_dict().items()}))}
    about = {**record, **vars(task), "modalities": [MODALITIES[m] for m in head.modalities]}
    write_with(out, weights, source, places, taught, parts, {"finetuned": about}, _purpose(about))


def write_with(out: str, weights: Weights, source: str, places: Places, taught: Sequence[str],
               parts: dict[str, tuple[str, bytes]], about: dict[str, Any], purpose: str) -> None:
    """Write weights as ``export`` does, with what was learnt on top of them.

    Parameters
    ----------
    source, taught : as of ``write_finetuned``
    parts : more files, by their name in config.json, where their hash comes to stand
    about : more of config.json
    purpose : for the model card: what they tell or make, and how they are used
    """
    from safetensors.torch import save

    model = {name: tensor.contiguous().cpu() for name, tensor in weights.model.state_dict().items()
             if not name.startswith("session_code.")}
    began, data = record_of(source), save(model)
    if weights.model.session_code is not None:
        code = weights.model.session_code.state_dict()
        parts = {**parts, "code": (CODE, save({name: each.cpu() for name, each in code.items()}))}
    parts = {**parts, "pooling": ("pooling.safetensors",
                                  save(places.to(torch.device("cpu")).tensors()))}
    if weights.seen is not None:
        parts["seen"] = ("seen.json", json.dumps(
            sorted(weights.seen | {hashed(name) for name in taught})).encode())
    kept = {name: value for name, value in began.items()
            if name not in OF_BEFORE}
    config = {**kept, "sha256": sha256(data), **about, "purpose": purpose}
    write_bytes(join(out, "model.safetensors"), data)
    for name, (file, content) in parts.items():
        write_bytes(join(out, file), content)
        config[name] = {**config.get(name, {}), "sha256": sha256(content)}
    write_bytes(join(out, "README.md"), card(config).encode())
    write_bytes(join(out, "config.json"), json.dumps(config, indent=1).encode())


def check_out(out: str, source: str, task: str) -> None:
    """Refuse to write over the weights that are learnt from, or over others that do not have this
    task in their config.json.

    Raises
    ------
    ConfigError
        ``out`` holds such weights.
    """
    there = read_if_there(join(out, "config.json"))
    if there is None:
        return
    one, other = (os.path.realpath(local_path(uri) or uri) for uri in (out, source))
    if one == other or task not in json.loads(there):
        raise ConfigError(f"--out {out}: holds weights, which would be written over; choose "
                          "another folder")


def check_tokens(config: RootConfig, name: str) -> None:
    """Raise ConfigError where weights have no tokens to read; ``name`` is theirs."""
    if config.objective.method == "cnn":
        raise ConfigError(f"{name}: a cnn has no tokens to read; take weights of a jepa or "
                          "mae")


def record_of(uri: str) -> dict[str, Any]:
    """What config.json of exported weights says."""
    found: dict[str, Any] = json.loads(read_bytes(join(place_of(uri), "config.json")))
    return found


def read_head(uri: str, weights: Weights) -> tuple[Head, Task]:
    """The head of a fine-tuned model.

    Raises
    ------
    ConfigError
        These weights were not fine-tuned.
    DataError
        The head is missing or damaged.
    """
    from safetensors.torch import load

    record = record_of(uri)
    if "finetuned" not in record:
        raise ConfigError(f"{uri}: these weights were not fine-tuned, so they tell no label; make "
                          "such with: neurojepa finetune fit FEED --weights W --labels TABLE "
                          "--label COLUMN --out M")
    data, about = read_bytes(join(uri, HEAD)), record["finetuned"]
    if sha256(data) != record["head"]["sha256"]:
        raise DataError(f"{join(uri, HEAD)}: does not match the sha256 in config.json; fine-tune "
                        "again")
    tensors = load(data)
    _, dim, outputs = tensors["weight"].shape
    head = Head([MODALITIES.index(name) for name in about["modalities"]], dim,
                len(tensors["query"]), outputs)
    head.load_state_dict(tensors, strict=True)
    device = next(weights.model.parameters()).device
    of_task: dict[str, Any] = {name: about[name] for name in Task.__annotations__}
    of_task |= {name: tuple(of_task[name]) for name in ("classes", "weights")}  # lists in JSON
    task = Task(**of_task)
    return head.to(device).requires_grad_(False), task


def _purpose(about: dict[str, Any]) -> str:
    what = f" ({', '.join(about['classes'])})" if about["classes"] else ""
    of = "a visit" if about["by_session"] else "a person"
    scans = f"{', '.join(about['modalities'])} scans"
    return f"""- tells {about['label']}{what} of {of} from {scans}, some of which may be missing
- fine-tuned from {about['weights_from']} on {about['people']['train']} people, stopped by
  {about['people']['val']}, tested on {about['people']['test']}: evaluation/report.html
- use: `neurojepa finetune apply M SCANS --out O`, in Python `neurojepa.load(M).predict(FILES)`
- evaluation/predictions.csv holds your own ids: leave it out when you hand the model on"""
