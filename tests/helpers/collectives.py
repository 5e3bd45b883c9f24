"""What a rank sends in a step, and the gradient that comes of it.

    python -m tests.helpers.collectives JOBS.json OUT.json   with RANK, ... in the environment

JOBS is a list of {"config": path, "way": fields of a ``Reduction``}; rank 0 writes a list of
{"set": what DeepSpeed took, "sent": [collective, elements, type] of the second step, "gradient":
its own part of the first step's, before clipping, "order": of gathers that are waited for and of
modules that run in the second step, "loss": of the last step}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from neurojepa.config import load_config
from neurojepa.errors import run_command
from neurojepa.planning.reduction import Reduction
from neurojepa.train import gathers, loop
from neurojepa.train.world import World, start_world

COLLECTIVES = ("all_reduce", "all_gather_into_tensor")


def main() -> int:
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    world = start_world()
    found = [_trained(job, world) for job in jobs]
    if world.rank == 0:
        out.write_text(json.dumps(found))
    world.leave()
    return 0


def _trained(job: dict[str, Any], world: World) -> dict[str, Any]:
    way, gradient, sent = Reduction(**job["way"]), [], []
    with mock.patch.object(loop, "reduction_of", lambda *_: way):
        run = loop.Run(load_config(job["config"]), world)
    engine: Any = run.engine
    zero, clip = engine._zero, engine._clip_gradients

    def clipped(parts: list[torch.Tensor], norm: torch.Tensor) -> None:
        gradient.extend(value for part in parts for value in part.tolist())
        clip(parts, norm)

    zero.unscale_and_clip_grads = clipped
    run._train_step()
    first = list(gradient)

    def noted(name: str) -> Any:
        original = getattr(dist, name)

        def collective(*arguments: Any, **named: Any) -> Any:
            tensor = arguments[0] if arguments else named["tensor"]
            sent.append([name, tensor.numel(), str(tensor.dtype)])
            return original(*arguments, **named)
        return collective

    with (mock.patch.multiple(dist, **{name: noted(name) for name in COLLECTIVES}),
          _watched(engine) as order):
        run._train_step()
    while run.step < run.config.train.steps:
        run._train_step()
    run._flush()
    took = {"overlap": zero.overlap_comm, "bucket": zero.reduce_bucket_size,
            "width": zero.communication_data_type.itemsize}
    result = {"set": took, "sent": sent, "gradient": first, "order": order,
              "loss": run.metrics.last_row["loss"]}
    run.close()
    return result


@contextmanager
def _watched(engine: Any) -> Iterator[list[str]]:
    """What is waited for and what runs meanwhile, in order."""
    order: list[str] = []
    names = {id(works): f"part {part}" for part, works in enumerate(engine._gathers.target)}
    names[id(engine._gathers.weights)] = "weights"
    awaited = gathers._await

    def noted(works: list[dist.Work]) -> None:
        if works:
            order.append(names[id(works)])
        awaited(works)

    modules = {"encoder": engine.module.encoder, **{
        f"block {i}": block for i, block in enumerate(engine.module.target.blocks)}}
    with ExitStack() as watching:
        watching.enter_context(mock.patch.object(gathers, "_await", noted))
        for name, module in modules.items():  # behind the hooks that wait
            hook = module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
            watching.callback(hook.remove)
        yield order


if __name__ == "__main__":
    run_command(main, teardown=False)
