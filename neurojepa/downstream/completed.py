"""A completion on disk, and what it makes of scans: images that are marked as synthetic.

    completion.safetensors    completion.Completion, beside weights as finetuned.write_with has them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from neurojepa.downstream.completion import Completion, volume_of
from neurojepa.downstream.embed import tokens_of
from neurojepa.downstream.finetuned import record_of, write_with
from neurojepa.downstream.native import Maps, Shown, shown
from neurojepa.downstream.pooling import Places
from neurojepa.downstream.scans import Scans
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import Feed
from neurojepa.feed.loader import SampleReader
from neurojepa.storage import join, parquet_bytes, read_bytes, sha256, write_bytes
from neurojepa.weights import Weights, place_of

FILE = "completion.safetensors"
MARK = "SYNTHETIC, not acquired: neurojepa complete"  # in the header of every image


@dataclass(frozen=True)
class Completed:
    """A scan that was completed."""

    who: Shown  # of the source
    path: str  # of the image, below the folder
    slices: tuple[np.ndarray, np.ndarray]  # the middle of source and completed image, [x, y]


def write_completion(out: str, weights: Weights, source: str, places: Places,
                     completion: Completion, taught: list[str], about: dict[str, Any]) -> None:
    """Write a completion; ``about`` says ``from``, ``to``, ``latents`` and how good it is."""
    from safetensors.torch import save

    data = save({name: tensor.contiguous().cpu()
                 for name, tensor in completion.state_dict().items()})
    write_with(out, weights, source, places, taught, {"completion": (FILE, data)},
               {"completes": about}, f"""- make a synthetic {about['to']} from a {about['from']}
- how good it is on people who taught nothing: evaluation/report.html
- use: `neurojepa complete apply C SCANS --out O`
- what they make is not acquired: use it to fill a gap for a method that needs {about['to']}, never
  to look for findings""")


def read_completion(uri: str, weights: Weights) -> tuple[Completion, dict[str, Any]]:
    """The completion beside weights, and what is said of it.

    Raises
    ------
    ConfigError
        These weights complete nothing.
    DataError
        The file is missing or damaged.
    """
    from safetensors.torch import load

    record = record_of(uri)
    if "completes" not in record:
        raise ConfigError(f"{uri}: these weights complete no modality; make such with: neurojepa "
                          "complete fit FEED --weights W --from T1w --to FLAIR --out C")
    data = read_bytes(join(place_of(uri), FILE))
    if sha256(data) != record["completion"]["sha256"]:
        raise DataError(f"{join(uri, FILE)}: does not match the sha256 in config.json; fit again")
    tensors = load(data)
    completion = Completion(weights.grid.shape, len(tensors["line"]),
                            weights.config.model.patch_voxels)
    completion.load_state_dict(tensors, strict=True)
    device = next(weights.model.parameters()).device
    return completion.to(device).requires_grad_(False), record["completes"]


@torch.no_grad()
def complete_scans(weights: Weights, completion: Completion, about: dict[str, Any], feed: Feed,
                   rows: np.ndarray, scans: Scans | None, out: str,
                   progress: Callable[[int], None] = lambda done: None) -> list[Completed]:
    """Write the completed image of each row, of the source's modality, and their latents.

    latents.parquet has a row for each: the target's embedding, as ``embed`` would have it, told
    from the source's tokens.
    """
    assert weights.places is not None
    reader, maps, found = SampleReader(feed), Maps(out, feed.grid, scans), []
    latents = []
    for row, tokens in zip(rows.tolist(), tokens_of(weights.model, weights.config, feed, rows),
                           strict=True):
        source = volume_of(reader.image(row))
        patch_T = weights.places.patches(tokens, 0)
        latent_TD = weights.places.values(tokens, 0)[1] @ completion.line
        told = completion.complete(source, patch_T, latent_TD if about["latents"] else None)
        who = shown(feed, row, scans)
        path = maps.write(who, told, about["to"], "synthetic", {
            "Synthetic": True, "Description": f"{about['to']} made by a network from the "
            f"{about['from']} of the same visit; it was not acquired", "Units": "arbitrary, 0 to 1",
            "Sources": [who.scan_id]}, MARK)
        middle = told.shape[2] // 2
        found.append(Completed(who, path, (source.value_XYZ[..., middle], told[..., middle])))
        latents.append((latent_TD.sum(0) / max(len(latent_TD), 1)).cpu().numpy())
        progress(len(found))
    names = ("participant", "session", "scan_id")
    columns: dict[str, Any] = {name: feed.index[name].take(rows).combine_chunks() for name in names}
    write_bytes(join(out, "latents.parquet"), parquet_bytes(pa.table({
        **columns, "modality": [about["to"]] * len(rows), "synthetic": [True] * len(rows),
        "embedding": pa.array(latents, pa.list_(pa.float32()))})))
    return found
