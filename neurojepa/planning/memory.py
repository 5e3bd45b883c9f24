"""What a training step keeps in a device's memory, counted tensor by tensor without one.

A micro-step runs forward and backward on tensors without contents, and every storage is followed
from the operation that makes it to its end.  So the peak holds what autograd saves, what is
recomputed and what operations need on their way; only an allocator's rounding is not in it.
Steps are counted as they run uncompiled; a compiler recomputes more and keeps less.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neurojepa.config import RootConfig
from neurojepa.feed.format import Grid
from neurojepa.planning.step import Label, hollow_model, hollow_views


class Live(TorchDispatchMode):
    """Bytes of the storages that were made below it and are still alive: ``now`` and ``peak``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        given = {_storage(tensor)._cdata for tensor in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = _storage(tensor)
            if storage._cdata not in self._known and storage._cdata not in given:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def step_bytes(config: RootConfig, grid: Grid, label: Label | None = None) -> float:
    """Largest number of bytes that a micro-step of ``config`` needs besides weights, their
    gradients' sums and the optimizer's state."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = hollow_model(config, grid).bfloat16()  # the type in which torch knows grouped_mm
    live = Live()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        for parameter in model.parameters():
            if parameter.requires_grad:  # as the engine, which takes each away once it is there
                parameter.register_post_accumulate_grad_hook(_forget)
        with live:
            views = hollow_views(config, grid, label)
            loss, _ = model(views, 0.0)
            loss.backward()
    codes = (1 + bool(config.data.cross_modal)) * config.train.micro_batch * math.prod(grid.shape)
    # twice the codes: the next batch is there before it is needed
    return (2.0 if config.train.dtype == "fp32" else 1.0) * live.peak + 2 * codes


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()
