"""Teaching a segmentation network: windows of labelled scans, one step after another.

Steps draw from (seed, step) alone, and optimiser and weights are kept on the way, so a fit that was
stopped goes on, and on a CPU ends in the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from neurojepa.downstream import warps
from neurojepa.downstream.images import Image
from neurojepa.downstream.segment import Recipe, Working, build, prepare
from neurojepa.errors import DataError
from neurojepa.storage import exists, join, read_bytes, write_bytes

SAVE_EVERY = 50  # steps


@dataclass(frozen=True)
class Taught:
    """A scan to learn from: its working grid, and ranks of labels on it (0 for none)."""

    scan: Working
    target: np.ndarray  # int64 [x, y, z]


def taught(scan: Image, labels: Image, codes: np.ndarray, mm: float) -> Taught:
    """Labels [codes], of any grid in the scan's space, on the scan's working grid.

    Raises
    ------
    DataError
        No label lies in the scan's brain.
    """
    work = prepare(scan, mm)
    still = np.zeros((*work.brain.shape, 3), np.float32)
    carried = warps.labels_through(labels, still, work.affine)
    known = np.isin(carried, codes)
    if not (known & work.brain).any():
        raise DataError(f"--labels {labels.name}: no label lies in the brain of {scan.name}; it "
                        "must be in that scan's space")
    return Taught(work, np.where(known, np.searchsorted(codes, carried) + 1, 0))


def started(people: Sequence[Taught], recipe: Recipe, num_labels: int) -> torch.nn.Module:
    """A network before its first step, with the prior of these people if the recipe has one."""
    torch.manual_seed(recipe.seed)
    network = build(recipe, num_labels)
    if recipe.prior:
        from neurojepa.downstream.segment_network import prior_of

        network.load_state_dict({"prior": prior_of(
            [(person.scan.channels[1:], person.target) for person in people], num_labels)},
            strict=False)
    return network


def fit(network: torch.nn.Module, people: Sequence[Taught], recipe: Recipe, out: str,
        progress: Callable[[int, float], None] = lambda step, loss: None,
        call: Callable[[torch.Tensor, Any], torch.Tensor] | None = None) -> None:
    """Teach the network; goes on from what an earlier fit left in ``out``.

    Parameters
    ----------
    progress : called with the step done and its loss
    call : how the network is called with windows and where they are, [(person, corner)]
    """
    optimiser = torch.optim.AdamW(network.parameters(), lr=recipe.lr)
    start = _resume(network, optimiser, out)
    network.train()
    device = next(network.parameters()).device
    for step in range(start, recipe.steps):
        x, y, where = windows(people, recipe, step)
        x, y = x.to(device), y.to(device)
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * (0.5 + 0.5 * np.cos(np.pi * step / recipe.steps)) + 1e-6
        logits = network(x) if call is None else call(x, where)
        loss = F.cross_entropy(logits, y) + _dice_loss(logits, y)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        progress(step + 1, float(loss.detach()))
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < recipe.steps:
            _save_state(network, optimiser, out, step + 1)
    network.eval()


def windows(people: Sequence[Taught], recipe: Recipe, step: int
            ) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, np.ndarray]]]:
    """Windows of a step around random brain voxels, intensity augmented: float32 [B, 4, w, w, w],
    int64 [B, w, w, w], and person and corner of each."""
    rng = np.random.default_rng([recipe.seed, step])
    xs, ys, where = [], [], []
    for _ in range(recipe.batch):
        number = int(rng.integers(len(people)))
        person = people[number]
        size = np.array(person.target.shape)
        corner = _middle(person, recipe, rng) - recipe.window // 2
        corner = np.clip(corner, 0, np.maximum(size - recipe.window, 0))
        box = tuple(slice(c, c + recipe.window) for c in corner)
        short = np.maximum(recipe.window - size, 0)
        pad = [(0, int(n)) for n in short]
        x = np.pad(person.scan.channels[:, *box], [(0, 0), *pad], mode="edge")
        x[0] = _augmented(x[0], rng, recipe)
        xs.append(x)
        ys.append(np.pad(person.target[box], pad))
        where.append((number, corner))
    return torch.from_numpy(np.stack(xs)), torch.from_numpy(np.stack(ys)), where


def _middle(person: Taught, recipe: Recipe, rng: np.random.Generator) -> np.ndarray:
    """[3] a voxel of the brain, or of a label drawn first, so that small ones come up as often."""
    where = person.scan.brain
    if rng.random() < recipe.balanced:
        there = np.unique(person.target)
        where = person.target == rng.choice(there[there > 0])
    inside = np.flatnonzero(where)
    return np.array(np.unravel_index(inside[rng.integers(len(inside))], where.shape))


def _augmented(image: np.ndarray, rng: np.random.Generator, recipe: Recipe) -> np.ndarray:
    brain = image > -3
    unit = np.clip((image + 3) / 6, 1e-3, None) ** np.exp(rng.normal(0, recipe.gamma))
    noise = rng.standard_normal(image.shape, np.float32) * abs(rng.normal(0, recipe.noise))
    return np.where(brain, unit * 6 - 3 + noise, -3).astype(np.float32)


def _dice_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 less the mean soft Dice of labels that are in the windows."""
    share = logits.softmax(1)
    truth = F.one_hot(target, logits.shape[1]).movedim(-1, 1).to(share.dtype)
    axes = (0, 2, 3, 4)
    both, total = (share * truth).sum(axes), (share + truth).sum(axes)
    there = truth.sum(axes)[1:] > 0
    dice = (2 * both / total.clamp_min(1e-6))[1:][there]
    return 1 - dice.mean() if len(dice) else logits.sum() * 0


# ---- kept on the way -----------------------------------------------------------------------------

def _save_state(network: torch.nn.Module, optimiser: torch.optim.Optimizer, out: str,
                step: int) -> None:
    from safetensors.torch import save

    tensors = {f"model.{name}": value.contiguous() for name, value in network.state_dict().items()}
    for number, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{number}.{name}": value.contiguous()
                    for name, value in state.items()}
    write_bytes(join(out, "state.safetensors"), save(tensors, {"step": str(step)}))


def _resume(network: torch.nn.Module, optimiser: torch.optim.Optimizer, out: str) -> int:
    """The step to go on with; 0 where nothing was kept."""
    from safetensors.torch import load

    uri = join(out, "state.safetensors")
    if not exists(uri):
        return 0
    raw = read_bytes(uri)
    step = int(json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["step"])
    tensors = load(raw)
    network.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items()
                             if name.startswith("model.")})
    states: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, number, what = name.split(".")
            states.setdefault(int(number), {})[what] = value
    optimiser.load_state_dict({"state": states,
                               "param_groups": optimiser.state_dict()["param_groups"]})
    return step
