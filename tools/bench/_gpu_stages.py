"""The stages of ``tools.bench gpu``: each takes a dict and returns one, in its own process."""

from __future__ import annotations

import copy
import json
import multiprocessing
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from neurojepa import pretrain
from neurojepa.config import RootConfig, dump_config, validate
from neurojepa.errors import run_command
from neurojepa.feed.format import open_feed
from neurojepa.feed.loader import Loader
from neurojepa.model.build import build_model
from neurojepa.model.flops import DEVICES, known_device, peak_flops, step_flops
from neurojepa.objective.views import make_views
from neurojepa.planning.kernels import Rates, fused, tabulate
from neurojepa.planning.step import step_kernels
from neurojepa.storage import read_rows
from neurojepa.train import compiling
from neurojepa.train.loop import Run
from neurojepa.train.world import leave_world, start_world
from tools.bench.gpu import TINY_SHAPE, TRAINING_SHAPE, start_method
from tools.bench.step import gemm_rate, write_feed

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def answer(function: str, given: dict[str, Any], result: Path) -> None:
    """Run a stage and write what it found to a file, as JSON."""
    if given["tiny"] and not CUDA:
        compiling.BACKENDS["cpu"] = "eager"  # rehearsed: traced, and run as it is
    result.write_text(json.dumps(globals()[function](given)))
    if torch.distributed.is_initialized():
        leave_world()


def versions(given: dict[str, Any]) -> dict[str, Any]:
    """Packages, device and the rate of a large matrix product."""
    import deepspeed

    return {"torch": torch.__version__, "deepspeed": deepspeed.__version__,
            "device": torch.cuda.get_device_name() if CUDA else "cpu", "flops": gemm_rate(CUDA)}


def make_feed(given: dict[str, Any]) -> dict[str, Any]:
    """Brains for all stages."""
    write_feed(given["work"], TINY_SHAPE if given["tiny"] else TRAINING_SHAPE,
               2 if given["tiny"] else 8)
    return {}


def speed(given: dict[str, Any]) -> dict[str, Any]:
    """Steps of the trainer one after the other, without a wait between them."""
    config = config_of(given, "speed")
    run, steps = Run(config, start_world()), 2 if given["tiny"] else 10
    begin = time.perf_counter()
    for _ in range(3):
        run._train_step()
    first_s = _now() - begin
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    waited, begin = run.loader.wait_s, _now()
    for _ in range(steps):
        run._train_step()
    step_s = (_now() - begin) / steps
    work = step_flops(config, run.feed.grid) * config.train.global_batch / step_s
    peak = peak_flops(torch.cuda.get_device_name()) if CUDA else None
    found = {"step_ms": 1e3 * step_s, "volumes_per_s": config.train.global_batch / step_s,
             "mfu": work / peak if peak else None,
             "mfu_of_matrix_rate": work / given["rate"] if given["rate"] else None,
             "data_wait": (run.loader.wait_s - waited) / steps / step_s,
             "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else None,
             "waits": _waits(run) if CUDA else None, "first_three_s": first_s}
    run.close()
    return found


def of_step(given: dict[str, Any]) -> dict[str, Any]:
    """A side of ``tools.bench step`` at base."""
    command = [sys.executable, "-m", "tools.bench.step", given["side"], "base"]
    done = subprocess.run(command + [given["official"]] * (given["side"] == "official"), text=True,
                          stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def profile(given: dict[str, Any]) -> dict[str, Any]:
    """The costliest kernels of a step, and what the count predicts by kind."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    # one stage that compiles is rehearsal enough
    config = config_of({**given, "compile": "off" if given["tiny"] else "auto"}, "profile")
    run = Run(config, start_world())
    for _ in range(3):
        run._train_step()
    _now()
    with watch(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]) as seen:
        run._train_step()
        _now()
    rows = [(event.key[:120], event.count,
             (event.self_device_time_total if CUDA else event.self_cpu_time_total) / 1e3)
            for event in seen.key_averages()]
    rows.sort(key=lambda row: -row[2])
    device = known_device(torch.cuda.get_device_name()) if CUDA else None
    table = tabulate(fused(step_kernels(config, run.feed.grid)),
                     Rates.of(device or DEVICES["H100"]))
    for name, count, ms in rows[:40]:
        print(f"{ms:9.3f} ms {count:6} x {name}")
    run.close()
    return {"kernels_ms": sum(row[2] for row in rows), "predicted_ms": table.total.seconds * 1e3,
            "costliest": rows[:40],
            "predicted": {kind: cost.seconds * 1e3 for kind, cost in table.kinds.items()}}


def agreement(given: dict[str, Any]) -> dict[str, Any]:
    """The same positions on the CPU and here, float32: largest differences."""
    config = config_of({**given, "dtype": "fp32", "size": "tiny" if given["tiny"] else "small",
                        "micro": 4}, "agreement")
    feed = open_feed(config.data.feed)
    loader = Loader(feed, config, rank=0, world=1, first_step=0)
    batch = next(iter(loader))
    there, here = (make_views(batch.to(device), config, feed.grid, 0)
                   for device in (torch.device("cpu"), DEVICE))
    loader.close()
    masks_equal, tokens = True, 0.0
    for name, value in vars(there).items():
        if isinstance(value, torch.Tensor) and value.numel():
            other = getattr(here, name).cpu()
            if value.is_floating_point():
                tokens = max(tokens, float((value - other).abs().max()))
            else:
                masks_equal &= torch.equal(value, other)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = build_model(config, feed.grid)
    twin = copy.deepcopy(model).to(DEVICE)
    losses = [net(views, 1e-3)[0] for net, views in ((model, there), (twin, here))]
    for loss in losses:
        loss.backward()
    gradients = max(float((a.grad - b.grad.cpu()).abs().max() / a.grad.abs().max().clamp(min=1e-9))
                    for a, b in zip(model.parameters(), twin.parameters(), strict=True)
                    if a.grad is not None and b.grad is not None)
    return {"masks_equal": masks_equal, "views_differ_by": tokens,
            "loss_differs_by": abs(losses[0].item() - losses[1].item()),
            "gradients_differ_by": gradients}


def killed(given: dict[str, Any]) -> dict[str, Any]:
    """A run killed and continued beside one left alone; the cost of determinism."""
    found: dict[str, Any] = {}
    for kind in ("deterministic",) if given["tiny"] else ("deterministic", "free"):
        calm, hit = (_recipe(given, f"{kind}-{name}", kind == "deterministic")
                     for name in ("calm", "killed"))
        _finish(_pretrain(calm))
        victim = _pretrain(hit)
        while victim.is_alive() and _last_step(hit) < 5:
            time.sleep(0.02)
        victim.kill()
        _finish(victim, status=-signal.SIGKILL)
        at, begin = _last_step(hit), time.monotonic()
        _finish(_pretrain(hit))
        rows, again = (read_rows(f"{recipe.parent}/run/metrics.jsonl") for recipe in (calm, hit))
        ends = [read_rows(f"{recipe.parent}/run/events.jsonl")[-1] for recipe in (calm, hit)]
        found |= {f"{kind}_equal": [row["loss"] for row in rows] == [row["loss"] for row in again]
                  and ends[0]["state_sha256"] == ends[1]["state_sha256"],
                  f"{kind}_killed_at": at, f"{kind}_second_run_s": time.monotonic() - begin,
                  f"{kind}_step_s": min(row["step_s"] for row in rows)}
    return found


def zero(given: dict[str, Any]) -> dict[str, Any]:
    """Losses of the third step under every stage, offloading and float32."""
    world, found = start_world(), {}
    for name, changes in {"zero1": {"zero": 1}, "zero2": {"zero": 2}, "zero3": {"zero": 3},
                          "zero3-offloaded": {"zero": 3, "offload": "all"},
                          "fp32": {"zero": 2, "dtype": "fp32"}}.items():
        config = config_of({**given, "size": "tiny" if given["tiny"] else "small", "micro": 4,
                            "compile": "off", **changes}, f"zero-{name}")
        run = Run(config, world)
        for _ in range(3):
            run._train_step()
        run._flush()
        found[name] = float(run.metrics.last_row["loss"])
        run.close()
    return found


def checkpoint(given: dict[str, Any]) -> dict[str, Any]:
    """Seconds that training waits for a checkpoint, and that one takes."""
    config = config_of({**given, "compile": "off", "steps": 6, "checkpoint_every": 3},
                       "checkpoint")
    run = Run(config, start_world())
    run.to_end()
    run.close()
    first = next(row for row in read_rows(f"{config.run.dir}/events.jsonl")
                 if row["event"] == "checkpoint")
    return {"stalled_s": first["stalled_s"], "checkpoint_s": first["seconds"]}


# ---- what stages share ---------------------------------------------------------------------------

def config_of(given: dict[str, Any], name: str) -> RootConfig:
    """The recipe of a stage; ``given`` may name size, micro and keys of ``train``."""
    tiny, size = given["tiny"], given.get("size", "tiny" if given["tiny"] else "base")
    micro = given.get("micro", 2 if tiny else 64)
    keys = ("compile", "dtype", "zero", "offload", "steps", "checkpoint_every")
    return validate({
        "data": {"feed": f"{given['work']}/feed", "read_threads": 2 if tiny else 12},
        "model": {"size": size, "patch_voxels": 6 if tiny else 12,
                  "token_budget": 32 if tiny else 320},
        "optim": {"warmup_steps": 2},
        "train": {"steps": 10**5, "global_batch": micro, "micro_batch": micro, "log_every": 10**6,
                  "checkpoint_every": 10**6, "dtype": "bf16" if CUDA else "fp32",
                  **{key: given[key] for key in keys if key in given}},
        "run": {"dir": f"{given['work']}/{name}-{size}-{micro}-{given.get('compile', '')}"}},
        "bench gpu")


def _recipe(given: dict[str, Any], name: str, deterministic: bool) -> Path:
    tiny = given["tiny"]
    config = config_of({**given, "micro": 2 if tiny else 32, "checkpoint_every": 3,
                        "steps": 12 if tiny else 24, "compile": "off" if tiny else "auto"}, name)
    folder = Path(given["work"]) / name
    folder.mkdir()
    tree = config.model_dump(mode="json")
    tree["train"]["log_every"] = 1
    tree["run"] |= {"dir": str(folder / "run"), "deterministic": deterministic}
    recipe = folder / "recipe.yaml"
    recipe.write_text(dump_config(validate(tree, "bench gpu")))
    return recipe


def _pretrain(recipe: Path) -> Any:
    process = multiprocessing.get_context(start_method()).Process(
        target=run_command, name=recipe.parent.name,
        args=(partial(pretrain.main, ["--config", str(recipe)]), False))
    process.start()
    return process


def _finish(process: Any, status: int = 0) -> None:
    process.join()
    if process.exitcode != status:
        raise RuntimeError(f"{process.name}: ended with status {process.exitcode}, not {status}")


def _last_step(recipe: Path) -> int:
    """Of the rows that are whole."""
    file = recipe.parent / "run/metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def _waits(run: Run) -> int:
    """Reads in a step for which the host waits."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run._train_step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in said)


def _now() -> float:
    """When all that was asked of the device is done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()
