"""Whether a GPU can do what a recipe asks of it, before the first step finds out, and how ranks on
such GPUs sum their gradients."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import nn

from neurojepa.config import RootConfig
from neurojepa.errors import ConfigError
from neurojepa.feed.format import Grid
from neurojepa.model.flops import known_device
from neurojepa.planning.reduction import Reduction, choose_reduction
from neurojepa.train.world import World

GIB = 2**30


def check_device(config: RootConfig, grid: Grid, device: torch.device, ranks: int) -> None:
    """Refuse a GPU without bf16 where that is asked for, or too small for what lies between steps.

    Raises
    ------
    ConfigError
        Says what is there, what is needed, part by part, and what to set.
    """
    if device.type != "cuda":
        return
    facts = torch.cuda.get_device_properties(device)
    if config.train.dtype == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(f"train.dtype bf16: {facts.name} (compute capability {facts.major}."
                          f"{facts.minor}) computes no bf16, which begins with 8.0; set "
                          "train.dtype=fp32 or use another GPU")
    from neurojepa.dry_run import resting_bytes

    parts = resting_bytes(config, grid, ranks, known_device(facts.name))
    needed = sum(parts.values())
    if needed > facts.total_memory:
        listed = " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        raise ConfigError(
            f"model.size {config.model.size} on {ranks} rank(s): {listed} = {needed / GIB:.1f} GiB "
            f"under train.zero {config.train.zero}, without any scan; {facts.name} has "
            f"{facts.total_memory / GIB:.1f}; use more ranks, train.zero=3, train.offload or a "
            "smaller model; --dry-run says what fits")


def reduction_of(config: RootConfig, grid: Grid, model: nn.Module, world: World,
                 micro_steps: int) -> Reduction:
    """What the plan chooses for the ranks of a run; rank 0's GPU counts.  Collective."""
    device = None
    if world.device.type == "cuda":
        device = known_device(torch.cuda.get_device_name(world.device))
    way = choose_reduction(config, grid, model, ranks=world.size, micro_steps=micro_steps,
                           device=device)
    return Reduction(**world.settle(asdict(way), lambda ways: ways[0]))
