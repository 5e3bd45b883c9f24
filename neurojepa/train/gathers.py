"""Weights on their way to all ranks from those that updated them, and what waits for them.

Below ZeRO-3 every rank computes with whole weights, and updates a part of them.  The parts travel
while the next batch becomes views and the target runs, the most urgent ones first:

    target     by parts of its blocks; the first block of a part waits for that part
    weights    all that is trained; the encoder waits for them, and nothing takes any before it
               (model/averaged.py)

What writes into weights or ends the run waits for all that is still on its way.  A checkpoint reads
masters, moments and the average, and need not.  Every rank comes past the same points in the same
order, so that none waits for a gather that another one never begins.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.distributed as dist
from torch import nn

from neurojepa.planning.network import PARTS


class Gathers:
    """What is on its way, and the hooks of a model that wait for it.

    Parameters
    ----------
    model : nn.Module
        With ``encoder`` and ``target``.
    send : callable
        Begins to gather the trained weights.
    """

    def __init__(self, model: nn.Module, send: Callable[[], list[dist.Work]]) -> None:
        self.target: list[list[dist.Work]] = [[] for _ in range(PARTS)]
        self.weights: list[dist.Work] = []
        self.updated = False  # this rank's part of the weights, and not yet the others'
        self._send = send
        self._wait_where_needed(model)

    def send_weights(self) -> None:
        """Begin to gather the trained weights, where a step has changed them."""
        if self.updated:
            self.weights += self._send()
        self.updated = False

    def await_target(self, *parts: int) -> None:
        """Wait for these parts of the target's weights; for all where none is named."""
        for part in parts or range(PARTS):
            _await(self.target[part])

    def await_weights(self) -> None:
        """Wait for the trained weights."""
        self.send_weights()  # of a step without an average
        _await(self.weights)

    def close(self) -> None:
        """Wait for what has begun; begin nothing, since the other ranks may have ended."""
        self.await_target()
        _await(self.weights)

    def _wait_where_needed(self, model: nn.Module) -> None:
        def before(module: nn.Module, wait: Callable[[], None]) -> None:
            module.register_forward_pre_hook(lambda *_: wait())

        target = model.get_submodule("target")
        before(model.get_submodule("encoder"), self.await_weights)
        before(target, partial(self.await_target, 0))
        seen = {0}
        for i, block in enumerate(getattr(target, "blocks", ())):
            part = part_of(f"encoder.blocks.{i}", model)
            if part not in seen:
                seen.add(part)
                before(block, partial(self.await_target, part))


def _await(gathers: list[dist.Work]) -> None:
    for gather in gathers:
        gather.wait()
    gathers.clear()


def part_of(name: str, model: nn.Module) -> int:
    """Which part of the encoder a weight of that name lies in; 0 also for those of no block."""
    _, kind, number, *_ = [*name.split("."), ""]
    if kind != "blocks":
        return 0
    return int(number) * PARTS // len(list(model.get_submodule("encoder.blocks").children()))
