"""Segmentation of scans in their own space by a small network that learns from labelled ones.

    scan --brain, scaled--> working grid along the scan's own axes, around the brain
         + three coordinates from the brain's centre, which tell left from right
         --SegResNet on a prior (segment_network.py), sliding window--> a map a label
         --each map interpolated into the scan's grid, the highest wins--> label map

Maps are interpolated, never labels, so the result has the scan's resolution.  It has no
tokens of an encoder; ``tools.bench segment`` measures what they would add.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from neurojepa.downstream import warps
from neurojepa.downstream.images import Image, around_brain, laid, smoothed, stripped
from neurojepa.errors import DataError
from neurojepa.storage import exists, join, read_bytes, read_if_there, sha256, write_bytes

KIND = "neurojepa/segment-model/1"
MARGIN_MM = 8.0  # of the working grid around the brain
COORDINATE_SD = 2.5  # of a brain's voxels along an axis, is 1 in the channels of coordinates
COORDINATE_MM = 100.0  # is 1 there for networks without a prior, as they were first made
OVERLAP = 0.5  # of the windows of apply


@dataclass(frozen=True)
class Recipe:
    """How a network is made and taught; kept beside it."""

    mm: float = 2.0  # working grid
    window: int = 48  # voxels of a training window's edge, a multiple of 4
    filters: int = 16  # of the first layer
    steps: int = 2000
    batch: int = 2  # windows a step
    lr: float = 3e-3
    gamma: float = 0.2  # log sd of the augmentation's gamma
    noise: float = 0.05  # sd of its noise, in sd of the brain
    seed: int = 0
    prior: bool = True  # where labels lie on average is added to what the network finds
    balanced: float = 0.5  # share of training windows around a label drawn first, all alike


@dataclass(frozen=True)
class Working:
    """A scan on the working grid."""

    channels: np.ndarray  # float32 [4, x, y, z]: intensity, then x, y, z from the brain's centre
    affine: np.ndarray
    brain: np.ndarray  # bool [x, y, z]


def prepare(scan: Image, mm: float, prior: bool = True) -> Working:
    """Lay the brain on a grid of ``mm`` along the scan's axes; ``prior`` as in the recipe."""
    assert scan.brain is not None
    affine, extent = around_brain(scan, mm, MARGIN_MM)
    shape = tuple((np.ceil(extent / mm / 4) * 4).astype(int).tolist())
    image, brain = (laid(smoothed(each, scan.spacing, mm), scan.affine, shape, affine)
                    for each in (stripped(scan), scan.brain))
    brain = brain > 0.5
    image = np.where(brain, (image - image[brain].mean()) / max(image[brain].std(), 1e-6), -3)
    points = warps.points_of(shape, affine)
    inside = points[brain]
    sd = np.maximum(inside.std(0), mm)  # that of a single slice is 0
    points = (points - inside.mean(0)) / (COORDINATE_SD * sd if prior else COORDINATE_MM)
    return Working(np.concatenate([image[None], np.moveaxis(points, -1, 0)]).astype(np.float32),
                   affine, brain)


def build(recipe: Recipe, num_labels: int) -> torch.nn.Module:
    """The network, [B, 4, x, y, z] -> [B, num_labels + 1, x, y, z]."""
    from neurojepa.downstream.segment_network import Guided, segresnet

    return (Guided if recipe.prior else segresnet)(recipe.filters, num_labels)


@dataclass(frozen=True)
class Segmenter:
    """A network with what its outputs mean."""

    network: torch.nn.Module
    recipe: Recipe
    codes: list[int]  # of its outputs 1, 2, ...
    names: list[str]

    def maps(self, scan: Image) -> tuple[np.ndarray, np.ndarray]:
        """float32 [labels + 1, x, y, z] logits on the working grid, and its affine."""
        work = prepare(scan, self.recipe.mm, self.recipe.prior)
        return predict(self.network, work, self.recipe), work.affine

    def segment(self, scan: Image) -> np.ndarray:
        """int32 [x, y, z]: codes on the scan's grid."""
        ranks = highest(*self.maps(scan), scan)
        return np.array([0, *self.codes], np.int32)[ranks]


@torch.no_grad()
def predict(network: torch.nn.Module, work: Working, recipe: Recipe,
            call: Callable[[torch.Tensor, np.ndarray], torch.Tensor] | None = None) -> np.ndarray:
    """float32 [labels + 1, x, y, z]: logits of windows that overlap by half, weighted towards each
    window's middle.

    ``call`` : how the network is called with one window and its corner.
    """
    size, edge = np.array(work.brain.shape), recipe.window
    pad = [(0, int(n)) for n in np.maximum(edge - size, 0)]
    x = np.pad(work.channels, [(0, 0), *pad], mode="edge")
    ramp = 1 - np.abs((np.arange(edge) + 0.5) / edge * 2 - 1) * 0.9
    weight = (ramp[:, None, None] * ramp[:, None] * ramp).astype(np.float32)
    device = next(network.parameters()).device
    total: np.ndarray | None = None
    seen = np.zeros(x.shape[1:], np.float32)
    for corner in _corners(np.array(x.shape[1:]), edge):
        box = tuple(slice(c, c + edge) for c in corner)
        part = torch.from_numpy(x[:, *box])[None].to(device)
        found = (network(part) if call is None else call(part, corner))[0].cpu().numpy()
        if total is None:
            total = np.zeros((len(found), *x.shape[1:]), np.float32)
        total[:, *box] += found * weight
        seen[box] += weight
    assert total is not None
    return (total / seen)[:, :size[0], :size[1], :size[2]]


def _corners(size: np.ndarray, edge: int) -> Iterator[np.ndarray]:
    step = max(int(edge * (1 - OVERLAP)), 1)
    starts = [sorted({*range(0, int(n) - edge, step), int(n) - edge}) for n in size]
    for x in starts[0]:
        for y in starts[1]:
            for z in starts[2]:
                yield np.array([x, y, z])


def highest(maps: np.ndarray, grid: np.ndarray, scan: Image) -> np.ndarray:
    """int64 [x, y, z] on the scan's grid: which of the maps [m, ...] on the grid ``grid``,
    interpolated linearly, is highest; 0 outside it."""
    best = np.full(scan.data.shape, -np.inf, np.float32)
    found = np.zeros(scan.data.shape, np.int64)
    for number, each in enumerate(maps):
        value = laid(each, grid, scan.data.shape, scan.affine,
                     outside=-1e9 if number else 0.0)
        better = value > best
        found[better], best[better] = number, value[better]
    return found


# ---- model on disk -------------------------------------------------------------------------------

def save_model(out: str, model: Segmenter, about: dict[str, Any]) -> None:
    """Write model.safetensors and, last, config.json; what was kept on the way goes."""
    from safetensors.torch import save

    from neurojepa.storage import remove

    data = save({name: value.contiguous() for name, value in model.network.state_dict().items()})
    write_bytes(join(out, "model.safetensors"), data)
    write_bytes(join(out, "config.json"), json.dumps({
        "schema": KIND, "method": "network", "recipe": asdict(model.recipe),
        "codes": model.codes, "names": model.names, "sha256": sha256(data), **about},
        indent=1).encode())
    if exists(join(out, "state.safetensors")):
        remove(join(out, "state.safetensors"))


def load_segmenter(uri: str) -> Segmenter:
    """The model that ``save_model`` wrote.

    Raises
    ------
    DataError
        There is none, or it is damaged.
    """
    from safetensors.torch import load

    config = read_config(uri)
    if config is None:
        raise DataError(f"{uri}: no segmentation model here; name a folder that segment fit wrote")
    data = read_bytes(join(uri, "model.safetensors"))
    if config.get("sha256") not in (None, sha256(data)):  # the first models had none
        raise DataError(f"{join(uri, 'model.safetensors')}: does not match the sha256 in "
                        "config.json; fit again")
    recipe = Recipe(**{"prior": False} | config["recipe"])  # the first networks had none
    network = build(recipe, len(config["codes"]))
    try:
        network.load_state_dict(load(data))
    except RuntimeError as error:
        raise DataError(f"{uri}: model.safetensors does not hold this network ({error}); fit it "
                        "again") from error
    network.eval()
    return Segmenter(network, recipe, config["codes"], config["names"])


def read_config(uri: str) -> dict[str, Any] | None:
    """config.json of a segmentation model; None where there is none, or one of something else."""
    data = read_if_there(join(uri, "config.json"))
    try:
        found = json.loads(data or b"{}")
    except ValueError as error:
        raise DataError(f"{join(uri, 'config.json')}: is no JSON ({error}); fit again") from error
    return found if found.get("schema") == KIND else None
