"""Many ranks in one process: a thread each, with a state that is a pure function of its place.

They save and read real checkpoints and settle things through a real store; only the model and the
device are missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from neurojepa.train.control import Control
from neurojepa.train.engine import SOURCE, Fragment
from neurojepa.train.world import World

OFFSETS = {"master": 0.0, "exp_avg": 0.25, "exp_avg_sq": 0.5, "ema": 0.75}


def fake_worlds(size: int, store: Callable[[], Any] | None = None,
                timeout_s: float = 60) -> list[World]:
    """Worlds of ``size`` ranks; ``store()`` gives each its connection, without it they share one.
    """
    shared = HashStore()
    return [World(rank=rank, size=size, device=torch.device("cpu"),
                  control=None if size == 1 else Control(
                      store() if store else shared, rank, size, timedelta(seconds=timeout_s)))
            for rank in range(size)]


def on_all(worlds: list[World], work: Callable[[World], Any]) -> list[Any]:
    """``work`` on each rank at once; what they return, an exception where it raised one."""
    def tried(world: World) -> Any:
        try:
            return work(world)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(worlds)) as pool:
        return list(pool.map(tried, worlds))


class FakeEngine:
    """A rank's share of parameters, as ZeRO 3 splits them (each), or 1 and 2 (one flat)."""

    adam_step = 7

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], world: World, zero: int) -> None:
        self.shapes = dict(shapes)
        self.world = world
        split = _each if zero == 3 else _flat
        self.fragments = list(split(shapes, world.rank, world.size))

    def tensors(self, fragment: Fragment) -> dict[str, Tensor]:
        """Element i of a parameter is i, plus what tells the keys apart."""
        return {key: values_of(fragment, key) for key in OFFSETS
                if key != "ema" or fragment.name.startswith(SOURCE)}

    def buffers(self) -> dict[str, Tensor]:
        return {"router.bias": torch.arange(4.0)}


def values_of(fragment: Fragment, key: str) -> Tensor:
    """What a ``FakeEngine`` has there."""
    return torch.arange(fragment.start, fragment.start + fragment.length) + OFFSETS[key]


def _each(shapes: Mapping[str, tuple[int, ...]], rank: int, size: int) -> Any:
    for name, shape in shapes.items():
        total = math.prod(shape)
        each = -(-total // size)
        if (length := min(total - each * rank, each)) > 0:
            yield Fragment(name=name, shape=shape, start=each * rank, length=length, flat=0,
                           offset=0)


def _flat(shapes: Mapping[str, tuple[int, ...]], rank: int, size: int) -> Any:
    each = -(-sum(map(math.prod, shapes.values())) // size)
    begin, low, high = 0, each * rank, each * (rank + 1)
    for name, shape in shapes.items():
        end = begin + math.prod(shape)
        first, last = max(begin, low), min(end, high)
        if first < last:
            yield Fragment(name=name, shape=shape, start=first - begin, length=last - first, flat=0,
                           offset=first - low)
        begin = end
