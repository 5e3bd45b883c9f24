"""What waits for the device in a whole training step, and whether the encoder compiles at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from neurojepa.config import ModelConfig
from neurojepa.model.encoder import Encoder
from tests.helpers.feeds import write_feed

STEP = """
import collections, json, sys, tempfile, traceback
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from neurojepa.train.loop import Run
from neurojepa.train.world import leave_world, start_world
from tests.helpers.feeds import tiny_config

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique"}
found = collections.Counter()

class Waits(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().removeprefix("aten::").split(".")[0] in WAITS:
            frames = [f.filename for f in traceback.extract_stack()[:-1]]
            frames = [f for f in frames if "/torch/" not in f and f != "<string>"]
            package = "deepspeed" if "/deepspeed/" in frames[-1] else "neurojepa"
            found[f"{package}: {Path(frames[-1]).name}"] += 1
        return func(*args, **(kwargs or {}))

run = Run(tiny_config(sys.argv[1], sys.argv[2]), start_world())
run._train_step()
with Waits():
    assert run._train_step()
print(json.dumps(found))
run.close()
leave_world()
"""


@pytest.mark.slow(7)
def test_a_training_step_of_ours_never_waits(run_cli, tmp_path: Path):
    """Views, masks, forward, loss, backward, EMA, router bias and metrics read nothing back."""
    feed = write_feed(str(tmp_path / "feed"))
    result = run_cli("-c", STEP, feed, str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert [name for name in found if name.startswith("neurojepa")] == []
    assert found and sum(found.values()) <= 12, found  # DeepSpeed's: norm and clipping


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
