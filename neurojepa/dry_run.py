"""What a run will cost, before a cluster is booked: ``python -m neurojepa.pretrain ... --dry-run``.

The model is built without memory and a step runs on tensors without contents, so that even ``huge``
takes seconds; of the feed only the index is read.  Memory follows from how the engine keeps its
state: 12 bytes of fp32 master and moments per trained weight and 4 of EMA per weight of the
encoder, split over ranks, besides weights, gradients and the peak of a micro-step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from torch import nn

from neurojepa.config import RootConfig
from neurojepa.errors import ConfigError
from neurojepa.feed.format import Feed, Grid, open_feed
from neurojepa.feed.order import Order
from neurojepa.methods import METHODS
from neurojepa.model.flops import DEVICES, Device, step_flops, tokens_per_volume
from neurojepa.model.moe import MoE
from neurojepa.planning.memory import step_bytes
from neurojepa.planning.reduction import choose_reduction, stage_run
from neurojepa.planning.scaling import render_scaling
from neurojepa.planning.step import Label, hollow_model, num_masks

# Reading, hash and decoding of one volume of the 1.5 mm grid on one core, ms: tools/bench feed.
LOADER_MS, LOADER_VOXELS = 3.0, 108 * 132 * 108
GIB = 2**30
# Of a device's memory that a step may fill, assumed: CUDA and the allocator's losses take the rest.
FILLED = 0.92
Recompute = int | str  # model.activation_checkpointing


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Numbers of parameters and buffers; ``active`` are those that one token uses."""

    parts: dict[str, int]  # trained
    active: dict[str, int]
    buffers: int

    @property
    def trained(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimates for a run on ``gpus`` devices.  Sizes in bytes, times in seconds."""

    weights: Weights
    tokens: tuple[int, int, int]  # per volume: all, context, target
    flops_per_volume: float
    micro_steps: int
    filled: float  # share of the micro-batches that are samples, not fill-up
    memory: dict[int, dict[str, float]]  # by ZeRO stage: weights, gradients, state, buckets
    activations: dict[Recompute, float]  # peak of a micro-step, by model.activation_checkpointing
    host: dict[str, float]  # per rank: start, checkpoint, offloaded
    checkpoint: float
    volumes_per_s: float
    loader_cores: float  # of all ranks together
    step_s: float
    total_s: float
    epochs: float


def plan(config: RootConfig, feed: Feed, gpus: int, device: str, mfu: float) -> Plan:
    """Estimate a run.

    Parameters
    ----------
    device : str
        A name in ``DEVICES``, in any case: h100, a100, ...
    mfu : float
        Share of the device's bf16 peak that training reaches.

    Raises
    ------
    ConfigError
        An unknown device, a share outside (0, 1], more ranks than samples in a step, or a model
        that does not fit the feed's grid.
    """
    train = config.train
    facts = _device(device)
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu}: a share of the peak lies in (0, 1]; 0.4 is usual")
    if not 1 <= gpus <= train.global_batch:
        raise ConfigError(f"--gpus {gpus}: at least 1, and each of train.global_batch = "
                          f"{train.global_batch} scans goes to one rank")
    model = hollow_model(config, feed.grid)
    weights, tokens = _weights(model), tokens_per_volume(config, feed.grid)
    targets = round(tokens * config.objective.masks.target_share)
    flops = step_flops(config, feed.grid)
    micro_steps = math.ceil(train.global_batch / (gpus * train.micro_batch))
    filled = train.global_batch / (gpus * train.micro_batch * micro_steps)
    rate = gpus * facts.flops * mfu * filled / flops
    state = state_bytes(weights)
    modes = dict.fromkeys((0, config.model.activation_checkpointing, "selective"))
    memory = {stage: _memory(config, feed.grid, stage, gpus, facts) for stage in (1, 2, 3)}
    offloaded = {stage: _offload(parts, stage, train.offload) for stage, parts in memory.items()}
    return Plan(
        weights=weights, tokens=(tokens, tokens - targets, targets), flops_per_volume=flops,
        micro_steps=micro_steps, filled=filled,
        memory=memory,
        activations={every: activation_bytes(config, feed, every) for every in modes},
        host={"start": 4.0 * (weights.trained + weights.parts["encoder"]),
              "checkpoint": state / gpus, "offloaded": offloaded[train.zero]},
        checkpoint=state + 4 * weights.buffers, volumes_per_s=rate,
        loader_cores=(rate * (1 + config.data.cross_modal) * LOADER_MS / 1e3
                      * math.prod(feed.grid.shape) / LOADER_VOXELS),
        step_s=train.global_batch / rate, total_s=train.steps * train.global_batch / rate,
        epochs=train.steps * train.global_batch / Order(feed.index, config.data,
                                                        train.seed).num_samples)


def state_bytes(weights: Weights) -> float:
    """Masters, moments and EMA of all ranks together, as a checkpoint holds them."""
    return 12.0 * weights.trained + 4.0 * weights.parts["encoder"]


def activation_bytes(config: RootConfig, feed: Feed, every: Recompute,
                     micro_batch: int | None = None) -> float:
    """The most that a micro-step needs at a time, besides what is there between steps.

    Parameters
    ----------
    every : as ``model.activation_checkpointing``.
    micro_batch : in place of ``train.micro_batch``.
    """
    micro_batch = micro_batch or config.train.micro_batch
    config = config.model_copy(update={
        "model": config.model.model_copy(update={"activation_checkpointing": every}),
        "train": config.train.model_copy(update={"micro_batch": micro_batch})})
    return step_bytes(config, feed.grid, _label(config, feed))


def largest_micro_batch(config: RootConfig, feed: Feed, every: Recompute, room: float
                        ) -> tuple[int, float]:
    """The most scans of a micro-batch whose step needs no more than ``room`` bytes, and what it
    needs; 0 scans where none fits.

    A step needs the most of several sums of a constant and a part for each scan, at one moment or
    another.  So a line through two counts never ends below the answer, and from above it is found.
    """
    @cache  # a count takes a second
    def needed(scans: int) -> float:
        return activation_bytes(config, feed, every, scans)

    two, four = needed(2), needed(4)
    scans = max(0, math.floor((room - two) / (four - two) * 2) + 2)
    while scans and (most := needed(scans)) > room:
        each = most - (needed(scans - 1) if scans > 1 else 0.0)
        scans = max(0, scans - math.ceil((most - room) / each))
    return scans, needed(scans) if scans else 0.0


def resting_bytes(config: RootConfig, grid: Grid, ranks: int, device: Device | None
                  ) -> dict[str, float]:
    """What a rank's device holds whatever the batch: weights, gradients, state, buckets."""
    parts = _memory(config, grid, config.train.zero, ranks, device)
    _offload(parts, config.train.zero, config.train.offload)
    return parts


def render_fit(config: RootConfig, feed: Feed, gpus: int, device: str) -> list[str]:
    """Lines on the largest micro-batch, by what is computed anew."""
    facts = _device(device)
    memory = facts.memory_gib * GIB
    state = sum(resting_bytes(config, feed.grid, gpus, facts).values())
    room = FILLED * memory - state
    lines = [f"largest micro-batch on {gpus} x {device} ({memory / GIB:.0f} GiB, of which "
             f"{FILLED:.0%} may be filled and {state / GIB:.1f} GiB hold the state)"]
    for every in dict.fromkeys((0, config.model.activation_checkpointing, "selective")):
        scans, needed = largest_micro_batch(config, feed, every, room)
        found = (f"train.micro_batch={scans}, {(state + needed) / GIB:.1f} GiB" if scans else
                 "none: use more ranks, or a train.zero or train.offload that keeps less here")
        lines.append(f"  model.activation_checkpointing={every}: {found}")
    return lines


def render(config: RootConfig, feed: Feed, gpus: int, device: str, mfu: float) -> str:
    """The plan as text."""
    found = plan(config, feed, gpus, device, mfu)
    train, weights = config.train, found.weights
    memory = _device(device).memory_gib
    lines = [
        f"model {config.model.size}: {weights.trained / 1e6:.1f} M trained parameters, "
        f"{sum(weights.active.values()) / 1e6:.1f} M active per token; target copy "
        f"{weights.parts['encoder'] / 1e6:.1f} M"]
    lines += [f"  {part:10} {count / 1e6:10.1f} M   active {weights.active[part] / 1e6:8.1f} M"
              for part, count in weights.parts.items()]
    tokens, context, targets = found.tokens
    lines += [
        f"tokens per volume: {tokens}" + (
            "" if METHODS[config.objective.method].whole_volumes else
            f" ({context} context, {targets} target in each of {num_masks(config)} mask(s))"),
        f"compute: {found.flops_per_volume / 1e9:.1f} GFLOPs a volume, "
        f"{found.flops_per_volume * train.global_batch / 1e12:.2f} TFLOPs a step of "
        f"{train.global_batch} scans",
        f"ranks: {gpus}, {found.micro_steps} micro-step(s) of {train.micro_batch}" + (
            "" if found.filled == 1 else f"; {1 - found.filled:.1%} of the compute fills up "
            "micro-batches: choose a train.micro_batch that divides "
            f"{train.global_batch / gpus:g}"), "",
        f"memory per rank in GiB ({device} has {memory}); activations of {train.micro_batch} "
        "scans by model.activation_checkpointing",
        f"  {'zero':6}{'weights':>9}{'gradients':>11}{'optimizer+EMA':>15}{'buckets':>9}"
        + "".join(f"{f'total ({every})':>12}" for every in found.activations)]
    for stage, parts in found.memory.items():
        totals = "".join(f"{_total(parts, activations, memory, found.micro_steps):>12}"
                         for activations in found.activations.values())
        mark = " <" if stage == train.zero else ""
        lines.append(f"  {stage:<6}{parts['weights'] / GIB:9.2f}{parts['gradients'] / GIB:11.2f}"
                     f"{parts['state'] / GIB:15.2f}{parts['buckets'] / GIB:9.2f}{totals}{mark}")
    lines += [
        "  activations: " + ", ".join(f"({every}) {size / GIB:.2f}"
                                      for every, size in found.activations.items())
        + "; ! does not fit, < is configured",
        f"host memory per rank: {found.host['start'] / GIB:.1f} GiB at the start, "
        f"{found.host['checkpoint'] / GIB:.1f} GiB for the copy of a checkpoint, "
        f"{found.host['offloaded'] / GIB:.1f} GiB for train.offload {train.offload}", "",
        f"checkpoint: {found.checkpoint / GIB:.2f} GiB; {train.keep_last + 1} at most, besides "
        f"milestones: {(train.keep_last + 1) * found.checkpoint / GIB:.1f} GiB",
        f"at an MFU of {mfu:.0%}: {found.volumes_per_s:.0f} volumes/s, "
        f"{found.volumes_per_s * tokens:.0f} tokens/s, {found.step_s:.3f} s a step, a checkpoint "
        f"every {_duration(found.step_s * train.checkpoint_every)}",
        f"loader: {found.loader_cores:.1f} cores over all ranks ({LOADER_MS:g} ms a volume of the "
        "1.5 mm grid)",
        f"run: {train.steps} steps, {found.epochs:.1f} epochs, "
        f"{_duration(found.total_s)} ({found.total_s * gpus / 3600:.0f} device hours)"]
    return "\n".join(lines)


def dry_run(config: RootConfig, gpus: int | None = None, device: str = "h100", mfu: float = 0.4,
            network: str | None = None, fit: bool = False) -> int:
    """Print the plan; ``gpus`` is run.ranks where it is not given.

    With a ``network``, how the step scales on it too; with ``fit``, the largest micro-batch.
    """
    feed, ranks = open_feed(config.data.feed), gpus or config.run.ranks
    lines = [] if network is None else ["", *render_scaling(
        config, feed.grid, _device(device), network, label=_label(config, feed),
        micro_steps=math.ceil(config.train.global_batch / (ranks * config.train.micro_batch)))]
    if fit:
        lines += ["", *render_fit(config, feed, ranks, device)]
    print("\n".join([render(config, feed, ranks, device, mfu), *lines]))
    return 0


# ---- pieces --------------------------------------------------------------------------------------

def _device(name: str) -> Device:
    for known, facts in DEVICES.items():
        if known.lower() == name.lower():
            return facts
    raise ConfigError(f"--device {name}: not known; one of {', '.join(DEVICES)}")


def _label(config: RootConfig, feed: Feed) -> Label | None:
    labels = METHODS[config.objective.method].load().labels(feed, config)
    if labels is None:
        return None
    scan_ids = feed.index["scan_id"].to_pylist() * config.train.micro_batch
    return lambda views: labels.attach(views, scan_ids[:config.train.micro_batch])


def _weights(model: nn.Module) -> Weights:
    parts = {name: _count(part) for name, part in model.named_children() if name != "target"}
    idle = sum((1 - layer.top_k / len(layer.router)) * (layer.w1.numel() + layer.w2.numel())
               for layer in model.modules()
               if isinstance(layer, MoE) and layer.router.requires_grad)
    active = {**parts, "encoder": round(parts["encoder"] - idle)}
    buffers = sum(tensor.numel() for name, tensor in model.named_buffers()
                  if not name.startswith("target."))
    return Weights(parts=parts, active=active, buffers=buffers)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _memory(config: RootConfig, grid: Grid, stage: int, ranks: int, device: Device | None
            ) -> dict[str, float]:
    """Bytes per rank of what does not depend on the batch, under a stage of ZeRO."""
    train, model = config.train, hollow_model(config, grid)
    weights, width = _weights(model), 2.0 if train.dtype == "bf16" else 4.0
    trained = float(weights.trained)
    held = width * (trained + weights.parts["encoder"])  # and the target
    staged = config.model_copy(update={"train": train.model_copy(update={"zero": stage})})
    way = choose_reduction(staged, grid, model, ranks=ranks, device=device,
                           micro_steps=math.ceil(train.global_batch / (ranks * train.micro_batch)))
    # one bucket fills while another travels
    bucket = width * way.bucket * (2 if way.overlap and stage < 3 else 1)
    if way.width > width:
        bucket += way.width * min(trained, way.bucket)
    return {"weights": held / (ranks if stage == 3 else 1),
            "gradients": 4.0 * trained / (1 if stage_run(stage, train.dtype) == 1 else ranks),
            "state": state_bytes(weights) / ranks, "buckets": bucket}


def _offload(parts: dict[str, float], stage: int, what: str) -> float:
    """Move to the host what ``train.offload`` does; returns how many bytes of a rank."""
    moved = {"none": (), "optimizer": ("gradients", "state"),
             "all": ("gradients", "state", *(["weights"] if stage == 3 else []))}[what]
    size = sum(parts[name] for name in moved)
    parts |= dict.fromkeys(moved, 0.0)
    return size


def peak_bytes(parts: dict[str, float], activations: float, micro_steps: int) -> float:
    """The most that a rank holds at a time, of what ``Plan.memory`` and ``activations`` list.

    Gradients grow while activations go; only those of earlier micro-steps are there before.
    """
    passing = parts["gradients"] + parts["buckets"]
    return parts["weights"] + parts["state"] + (
        max(activations, passing) if micro_steps == 1 else activations + passing)


def _total(parts: dict[str, float], activations: float, memory: int, micro_steps: int) -> str:
    total = peak_bytes(parts, activations, micro_steps) / GIB
    return f"{total:.1f}{'!' if total > memory else ''}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
