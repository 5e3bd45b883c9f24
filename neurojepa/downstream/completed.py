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

from neurojepa.downstream.completion import Completion, missing, volume_of
from neurojepa.downstream.embed import tokens_of
from neurojepa.downstream.finetuned import record_of, write_with
from neurojepa.downstream.native import Maps, Shown, shown
from neurojepa.downstream.pooling import Places, Tokens
from neurojepa.downstream.scans import Scans
from neurojepa.downstream.sources import spoken
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

    who: Shown  # of the first source that was there
    path: str  # of the image, below the folder
    names: list[str]  # of the sources that were there
    scan_ids: list[str]  # theirs
    slices: list[np.ndarray]  # [x, y], the middle of each of these, and of the completed image


def write_completion(out: str, weights: Weights, source: str, places: Places,
                     completion: Completion, taught: list[str], about: dict[str, Any]) -> None:
    """Write a completion; ``about`` says ``from``, ``sources``, ``to``, ``latents`` and how
    good it is."""
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
    tensors, about = load(data), record["completes"]
    about = {"sources": [about["from"]], **about}  # there was a single one once
    completion = Completion(weights.grid.shape, tensors["line"].shape[-1],
                            weights.config.model.patch_voxels, len(about["sources"]))
    completion.load_state_dict(tensors, strict=True)
    device = next(weights.model.parameters()).device
    return completion.to(device).requires_grad_(False), about


@torch.no_grad()
def complete_scans(weights: Weights, completion: Completion, about: dict[str, Any], feed: Feed,
                   groups: np.ndarray, scans: Scans | None, out: str,
                   progress: Callable[[int], None] = lambda done: None) -> list[Completed]:
    """Write the completed image of each group of rows [m, K], on the grid of its first source that
    is there, and their latents.

    latents.parquet has a row for each: the target's embedding, as ``embed`` would have it, told
    from the sources' tokens.
    """
    assert weights.places is not None
    reader, maps, found = SampleReader(feed), Maps(out, feed.grid, scans), []
    latents = []
    tokens = tokens_of(weights.model, weights.config, feed, groups[groups >= 0])
    for group in groups:
        images = [volume_of(reader.image(row)) if row >= 0 else missing(feed.grid.shape)
                  for row in group.tolist()]
        found_in = [_differences(weights.places, next(tokens)) if row >= 0 else None
                    for row in group]
        patch_T, latent_TD = completion.told(found_in)
        told = completion.complete(images, patch_T, latent_TD if about["latents"] else None)
        there = [shown(feed, row, scans) for row in group[group >= 0].tolist()]
        names, scan_ids = [who.modality for who in there], [who.scan_id for who in there]
        path = maps.write(there[0], told, about["to"], "synthetic", {
            "Synthetic": True, "Description": f"{about['to']} made by a network from the "
            f"{spoken(names)} of the same visit; it was not acquired", "Units": "arbitrary, 0 to 1",
            "Sources": scan_ids}, MARK)
        middle = told.shape[2] // 2
        found.append(Completed(there[0], path, names, scan_ids, [
            *(image.value_XYZ[..., middle] for image, row in zip(images, group, strict=True)
              if row >= 0), told[..., middle]]))
        latents.append((latent_TD.sum(0) / max(len(latent_TD), 1)).cpu().numpy())
        progress(len(found))
    first = np.array([group[group >= 0][0] for group in groups])
    columns: dict[str, Any] = {name: feed.index[name].take(first).combine_chunks()
                               for name in ("participant", "session", "scan_id")}
    write_bytes(join(out, "latents.parquet"), parquet_bytes(pa.table({
        **columns, "modality": [about["to"]] * len(found), "synthetic": [True] * len(found),
        "from": [" ".join(each.names) for each in found],
        "embedding": pa.array(latents, pa.list_(pa.float32()))})))
    return found


def _differences(places: Places, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    return places.patches(tokens, 0), places.values(tokens, 0)[1]
