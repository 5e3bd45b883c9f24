"""From a config to its model."""

from __future__ import annotations

import torch

from neurojepa.config import RootConfig
from neurojepa.errors import ConfigError
from neurojepa.feed.format import Grid
from neurojepa.methods import METHODS
from neurojepa.model.averaged import Averaged
from neurojepa.model.layers import Block
from neurojepa.model.official import Official


def build_model(config: RootConfig, grid: Grid) -> Averaged:
    """The model of ``objective.method``; its initial weights are a function of the config alone.

    Raises
    ------
    ConfigError
        The patch does not divide the grid, or the budget exceeds its tokens.
    """
    check_shapes(config, grid)
    build = Official if config.model.official else METHODS[config.objective.method].load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = build(config, grid)
    for block in model.modules():
        if isinstance(block, Block):
            block.selective = config.model.activation_checkpointing == "selective"
    return model


def check_shapes(config: RootConfig, grid: Grid) -> None:
    """Refuse a patch or a token budget that cannot work on the grid."""
    patch, budget = config.model.patch_voxels, config.model.token_budget
    for axis, length in zip("xyz", grid.shape, strict=True):
        if length % patch:
            raise ConfigError(
                f"model.patch_voxels = {patch} does not divide axis {axis} of grid {grid.name!r} "
                f"{grid.shape}: {length} = {length // patch} x {patch} + {length % patch}; choose "
                "a common divisor of its axes")
    counts = [length // patch for length in grid.shape]
    tokens = counts[0] * counts[1] * counts[2]
    if budget is not None and budget > tokens:
        raise ConfigError(
            f"model.token_budget = {budget} exceeds the {tokens} tokens of grid {grid.name!r} "
            f"({' x '.join(map(str, counts))} patches of {patch} voxels); set at most {tokens}, "
            "or null for all")
