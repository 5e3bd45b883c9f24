"""Weights and feeds as commands name them: exported ones, or an architecture at random."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import numpy as np

from neurojepa.errors import ConfigError

if TYPE_CHECKING:
    from neurojepa.feed.format import Feed
    from neurojepa.weights import Weights


def open_weights(uri: str) -> Weights:
    """Exported weights."""
    from neurojepa.weights import load

    return load(uri)


def open_random(arguments: argparse.Namespace, feed: str) -> Weights:
    """The architecture of ``--config`` on the grid of a feed, untrained."""
    from neurojepa.config import load_config
    from neurojepa.feed.format import open_feed
    from neurojepa.weights import untrained

    if not arguments.config:
        raise ConfigError("--weights random needs --config RECIPE: whose architecture?")
    config = load_config(arguments.config, [f"data.feed={feed}", "run.dir=unused"])
    return untrained(config, open_feed(feed).grid)


def open_both(arguments: argparse.Namespace) -> tuple[Feed, Weights]:
    """Of ``--feed`` and ``--weights``.

    Raises
    ------
    ConfigError
        They are of different grids.
    """
    from neurojepa.feed.format import open_feed

    feed = open_feed(arguments.feed)
    if arguments.weights == "random":
        return feed, open_random(arguments, arguments.feed)
    weights = open_weights(arguments.weights)
    if not np.array_equal(weights.grid.affine, feed.grid.affine):
        raise ConfigError(f"--feed {arguments.feed} is packed at grid {feed.grid.name}, the "
                          f"weights were trained at {weights.grid.name}; pack the archive with "
                          f"--grid {weights.grid.name}")
    return feed, weights
