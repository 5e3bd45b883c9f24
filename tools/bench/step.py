"""step: a training step, ours beside the official one, with equal shapes and equal tokens.

Ours is the trainer's own step: loading, views, masks, forward, backward, the engine's update, EMA,
router bias, metrics.  The official step is built from the official package's public parts and
leaves loading out.  Each side runs in a process of its own, one after the other.  On a CPU our
training lets the C library keep freed memory; the official step is timed as it comes, and so too.

    parity         all tokens, three masks, dense L1 loss: exactly the official work
    checkpointed   the same, with activation checkpointing of every block
    budget         what we recommend: the token budget and the sparse code

MFU is FLOPs of a step by neurojepa/model/flops.py (recomputation not counted) times volumes per
second over the rate of a large matrix product on this machine, on a CPU the faster of MKL and
oneDNN.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from neurojepa.feed.format import Grid
from neurojepa.model.flops import step_flops
from tools.bench.common import brains, machine, print_table

GRID_MM = 1.75
BATCH = {"small": 2, "base": 2, "large": 1}


def run(quick: bool, official: str | None) -> dict[str, Any]:
    """Both sides on this machine; returns ratio_vs_official and mfu."""
    import torch

    cuda = torch.cuda.is_available()
    print(machine())
    rate = gemm_rate(cuda)
    print(f"{'bf16' if cuda else 'fp32, one thread'}: matrix products run at {rate / 1e9:.0f} "
          "GFLOP/s here; MFU = FLOPs of a volume's step * volumes per second / that")
    sizes = ["small-official"] if quick else ["small-official", "base"]
    rows, found = [], {}
    for size in sizes:
        sides = {kind: _child(kind, size, None) for kind in ("parity", "checkpointed", "budget")}
        if official:
            sides["official"] = _child("official", size, official)
            if not cuda:
                sides["official, memory kept"] = _child("official-kept", size, official)
        for kind, side in sides.items():
            ratio, kept = (
                side["volumes_per_s"] / sides[other]["volumes_per_s"] if other in sides else None
                for other in ("official", "official, memory kept"))
            share = side.get("flops", 0) * side["volumes_per_s"] / rate
            rows.append((size, kind, side["tokens"], 1 / side["volumes_per_s"],
                         side["volumes_per_s"], ratio, kept, share or None, side["peak_mib"]))
            found[f"{size}/{kind}"] = {"ratio": ratio, "ratio_memory_kept": kept,
                                       "mfu": share or None}
    per = "s" if cuda else "CPU-s"
    print_table(("size", "side", "tokens", f"{per}/volume", f"volumes/{per}", "vs official",
                 "vs official, memory kept", "MFU", "peak MiB"), rows)
    main = found[f"{sizes[-1]}/parity"]
    return {"ratio_vs_official": main["ratio"], "mfu": main["mfu"], "all": found}


def gemm_rate(cuda: bool) -> float:
    """FLOP/s of a large matrix product in the type that training uses."""
    import time

    import torch

    from neurojepa.model.linear import linear

    n, dtype, device = (8192, torch.bfloat16, "cuda") if cuda else (1536, torch.float32, "cpu")
    if not cuda:
        torch.set_num_threads(1)
    a = torch.randn(n, n, dtype=dtype, device=device)
    times = []
    for product in [torch.matmul] * 5 + [linear] * 5:
        begin = time.perf_counter() if cuda else time.process_time()
        product(a, a).sum().item()
        times.append((time.perf_counter() if cuda else time.process_time()) - begin)
    return 2 * n**3 / min(times)


# ---- one side, in a process of its own -----------------------------------------------------------

def _child(kind: str, size: str, official: str | None) -> dict[str, Any]:
    environment = dict(os.environ)
    if not _has_cuda():
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "tools.bench.step", kind, size, *([official] if official
                                                                      else [])]
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _measure(step: Any, batch: int, steps: int) -> dict[str, float]:
    import resource
    import time

    import torch

    cuda = _has_cuda()
    step()  # warm up
    times = []
    for _ in range(steps):
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter() if cuda else time.process_time()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() if cuda else time.process_time()) - begin)
    peak = (torch.cuda.max_memory_allocated() >> 20 if cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
    return {"volumes_per_s": batch / min(times), "peak_mib": peak}


def _official(size: str, checkout: str) -> dict[str, Any]:
    from tools.bench.official import SHAPES, official_step

    cuda, batch = _has_cuda(), _batch(size)
    step = official_step(checkout, SHAPES[size], batch, "cuda" if cuda else "cpu",
                         "bf16" if cuda else "fp32")
    grid, patch = SHAPES[size].grid, SHAPES[size].patch
    tokens = grid[0] * grid[1] * grid[2] // patch**3
    return _measure(step, batch, 3) | {"tokens": tokens}


def _batch(size: str) -> int:
    return 48 if _has_cuda() else 2


def _ours(kind: str, size: str) -> dict[str, Any]:
    from neurojepa.config import validate
    from neurojepa.model import sizes
    from neurojepa.train.loop import Run
    from neurojepa.train.world import leave_world, start_world
    from tools.bench.official import SHAPES

    shape, batch, steps = SHAPES[size], _batch(size), 3
    name = size
    if size == "small-official":  # the small shape that the official step is timed at
        name = "small"
        sizes.SIZES["small"] = sizes.Size(
            **{field.name: getattr(shape, field.name) for field in fields(sizes.Size)})
    parity = kind != "budget"
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        feed = write_feed(folder, shape.grid)
        config = validate({
            "data": {"feed": feed},
            "model": {"size": name, "patch_voxels": shape.patch, "head_gate": True,
                      "token_budget": None if parity else 320,
                      "activation_checkpointing": int(kind == "checkpointed")},
            "objective": {"sparse": {"code": "identity"}, "spread": 0.0,
                          "tissue_weight": 0.0} if parity else {},
            "train": {"steps": steps + 2, "global_batch": batch, "micro_batch": batch,
                      "dtype": "bf16" if _has_cuda() else "fp32", "checkpoint_every": 10**6,
                      "log_every": 10**6},
            "run": {"dir": str(Path(folder) / "run")}}, "bench")
        run = Run(config, start_world())
        found = _measure(run._train_step, batch, steps)
        tokens = config.model.token_budget or (
            shape.grid[0] * shape.grid[1] * shape.grid[2] // shape.patch**3)
        run.close()
        leave_world()
    return found | {"tokens": tokens,
                    "flops": step_flops(config, Grid("bench", shape.grid, GRID_MM))}


def write_feed(folder: str, shape: tuple[int, int, int], count: int = 8) -> str:
    """A feed of a few brains on a grid of this shape."""
    import pyarrow as pa

    from data_prep.pack import coarsen, placed_table, write_tar
    from neurojepa.feed.format import (
        LABELS_SCHEMA,
        MaskCode,
        commit_feed,
        encode_array,
        quantise,
    )
    from neurojepa.storage import join, write_bytes

    grid, uri, samples = Grid("bench", shape, GRID_MM), str(Path(folder) / "feed"), []
    for number, (image, mask) in enumerate(brains(count)):
        image, mask, _ = coarsen(image, mask=mask, label=None, grid=grid)
        row = {"scan_id": f"{number:024x}", "participant": f"p{number}", "family": f"p{number}",
               "session": "1", "cohort": "bench", "modality": "T1w", "site": "a",
               "split": "train", "num_foreground": int((mask == MaskCode.BRAIN).sum())}
        samples.append((row, encode_array(quantise(image, mask)), None))
    data, rows = write_tar(samples)
    write_bytes(join(uri, "shards/0.tar"), data)
    commit_feed(uri, grid, rows=placed_table(rows, "shards/0.tar"),
                labels=pa.Table.from_pylist([], schema=LABELS_SCHEMA))
    return uri


if __name__ == "__main__":
    side, of_size, *rest = sys.argv[1:]
    if side == "official-kept":
        from neurojepa.train.world import keep_memory

        keep_memory()
    print(json.dumps(_official(of_size, rest[0]) if rest else _ours(side, of_size)))
