"""What waits for the device in a whole training step, and whether the encoder compiles at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from neurojepa.config import ModelConfig
from neurojepa.model.encoder import Encoder
from tests.helpers.feeds import write_feed

STEP = """
import collections, json, sys, traceback
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from neurojepa.train import gates
from neurojepa.train.loop import Run
from neurojepa.train.world import start_world
from tests.helpers.feeds import tiny_config

# what reads the device, and what sends a number of Python there, for which the host waits as well
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2",
         "lift_fresh"}

class Waits(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().removeprefix("aten::").split(".")[0] in WAITS:
            frames = [f.filename for f in traceback.extract_stack()[:-1]]
            frames = [f for f in frames if "/torch/" not in f and f != "<string>"]
            package = "deepspeed" if "/deepspeed/" in frames[-1] else "neurojepa"
            found[f"{package}: {Path(frames[-1]).name}"] += 1
        return func(*args, **(kwargs or {}))

reads = []
for name in ("item", "tolist"):
    setattr(torch.Tensor, name, lambda tensor, read=getattr(torch.Tensor, name): (
        reads.append(tensor), read(tensor))[1])
gates.EVERY = 4  # the fourth step looks at them, too
world, results = start_world(), []
for folder, train in json.loads(sys.argv[2]).items():
    run = Run(tiny_config(sys.argv[1], folder, **train), world)
    run._train_step()
    run._train_step()  # ZeRO-3 has learnt the order of modules
    for _ in range(3):  # the second one looks at them
        found = collections.Counter()
        with Waits():
            assert run._train_step()
        step = {name: count for name, count in found.items() if "loader.py" not in name}
        reads.clear()
        run._flush()
        results.append([step, len(reads)])
    run.close()
print(json.dumps(results))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow(9)
def test_a_step_waits_for_the_device_once(run_cli: Any, tmp_path: Path) -> None:
    """Views, masks, forward, loss, backward, norm, clipping, EMA, router bias, gates and metrics
    read nothing back; the engine looks at the norm.  A flush reads all rows at once."""
    feed = write_feed(str(tmp_path / "feed"))
    kinds = [("fp32", 1), ("bf16", 2), ("bf16", 3)]
    result = run_cli("-c", STEP, feed, json.dumps({
        str(tmp_path / f"{dtype}-{zero}"): {"dtype": dtype, "zero": zero}
        for dtype, zero in kinds}))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == [[{"deepspeed: utils.py": 1}, 1]] * 3 * len(kinds)


@pytest.mark.slow(5)
def test_the_encoder_is_one_graph():
    """Forward and backward of the bare encoder compile without a break, and compute the same."""
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(size="tiny", patch_voxels=2, head_gate=True))
    for parameter in encoder.parameters():  # torch traces the grouped product in bf16 alone
        parameter.data = parameter.data.bfloat16()
    tokens, coords = torch.randn(2, 30, 8), 100 * torch.randn(2, 30, 3)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[0, 25:] = False
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)  # a break is an error
    results = []
    for run in (encoder, compiled):
        encoder.zero_grad()
        y = run(tokens, coords, valid)
        y.square().mean().backward()
        results.append([y, *(p.grad for p in encoder.parameters())])
    for plain, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, plain)
