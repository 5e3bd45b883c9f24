"""checkpoint: what a checkpoint costs, ours beside DeepSpeed's own and torch's distributed one.

Two ranks train the small model on 320 tokens of a scan each.  Steps are timed undisturbed and with
a checkpoint on its way, the same number and in turns; stall_s is the difference of the best, at
least the time that training is blocked.  So it holds the copy to the host as well as the cycles
that hashing and writing take from training where no core is spare.  interval_s is 50 undisturbed
steps.  All sides write the state of the same engine to the same disk.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.bench.common import machine, print_table
from tools.bench.ranks import in_ranks

INTERVAL = 50  # steps between checkpoints


def run(quick: bool, official: str | None) -> dict[str, Any]:
    """Stall, size, save and load; returns stall_s, interval_s, stall_margin and all figures."""
    from tests.helpers.feeds import write_feed

    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as folder:
        feed = write_feed(f"{folder}/feed")
        found = in_ranks(2, "tools.bench.checkpoint:measure", folder=folder, feed=feed,
                         size="tiny" if quick else "small", steps=4 if quick else 8,
                         rounds=2 if quick else 3)
    undisturbed, saving = found["undisturbed_s"], found["saving_s"]
    interval = INTERVAL * undisturbed / found["steps"]
    stall = max(saving - undisturbed, found["blocked_s"])
    print_table(("2 ranks", "parameters", "a step, s", f"{found['steps']} steps, s",
                 "with a checkpoint, s", "of that blocked, s", "extra CPU-s"),
                [(found["size"], f"{found['parameters'] / 1e6:.1f} M",
                  undisturbed / found["steps"], undisturbed, saving, found["blocked_s"],
                  found["extra_cpu_s"])])
    print_table(("checkpoint of", "training waits, s", "saved after, s", "load, s", "MiB",
                 "pickle", "fsync"),
                [(name, *(side[key] for key in ("wait_s", "save_s", "load_s", "mib")), pickle, sync)
                 for (name, pickle, sync), side in zip(SIDES, found["sides"], strict=True)])
    return {"stall_s": stall, "interval_s": interval, "stall_margin": 0.05 - stall / interval,
            **found}


SIDES = (("neurojepa", "no", "yes"), ("DeepSpeed save_checkpoint", "yes", "no"),
         ("torch DCP save", "metadata", "yes"), ("torch DCP async_save", "metadata", "yes"))


def measure(folder: str, feed: str, size: str, steps: int, rounds: int) -> dict[str, Any]:
    """One rank's part: the slower rank counts."""
    from neurojepa.config import validate
    from neurojepa.train.loop import Run
    from neurojepa.train.world import leave_world, start_world

    config = validate({
        "data": {"feed": feed}, "model": {"size": size, "patch_voxels": 4},
        "train": {"steps": 10**6, "global_batch": 2, "micro_batch": 1, "zero": 2, "dtype": "fp32",
                  "checkpoint_every": 10**6, "log_every": 10**6, "keep_last": 1},
        "run": {"dir": f"{folder}/run"}}, "bench")
    run = Run(config, start_world())
    try:
        for _ in range(2):
            run._train_step()
        run._checkpoint()  # takes the host memory that later ones reuse
        run._committed(run.saver.finish())
        plain, saving, blocked, cpu = [], [], [], []
        for _ in range(rounds):
            plain.append(_steps(run, steps, save=False))
            saving.append(_steps(run, steps, save=True))
            blocked.append(run._stalled_s)
            cpu.append(saving[-1][1] - plain[-1][1])
        sides = [_ours(run), _deepspeed(run, f"{folder}/deepspeed"),
                 *_dcp(run, f"{folder}/dcp")]
        everyone = run.world.gather([min(wall for wall, _ in plain), min(w for w, _ in saving),
                                     statistics.median(blocked), statistics.median(cpu)])
        slowest = [max(values) for values in zip(*everyone, strict=True)]
        parameters = sum(run.world.gather(sum(f.length for f in run.engine.fragments)))
    finally:
        run.close()
    leave_world()
    return {"size": size, "parameters": parameters, "steps": steps,
            "undisturbed_s": slowest[0], "saving_s": slowest[1], "blocked_s": slowest[2],
            "extra_cpu_s": slowest[3], "sides": sides}


def _steps(run: Any, steps: int, save: bool) -> tuple[float, float]:
    """Wall and CPU seconds of some steps, as the loop makes them."""
    run.world.gather(None)
    wall, cpu = time.perf_counter(), time.process_time()
    if save:
        run._checkpoint()
    for _ in range(steps):
        run._train_step()
        if run._agree(applied=False).commit:
            run._committed(run.saver.advance())
    spent = time.perf_counter() - wall, time.process_time() - cpu
    run._committed(run.saver.finish())
    return spent


def _timed(run: Any, work: Callable[[], Any]) -> float:
    """Seconds until all ranks are through."""
    run.world.gather(None)
    began = time.perf_counter()
    work()
    run.world.gather(None)
    return time.perf_counter() - began


def _size_mib(folder: str | Path) -> float:
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 2**20


def _ours(run: Any) -> dict[str, float]:
    from neurojepa.train import checkpoint

    run._train_step()
    waits = _timed(run, run._checkpoint)
    rest = _timed(run, lambda: run._committed(run.saver.finish()))

    def load() -> None:
        found = checkpoint.open_checkpoint(run.config.run.dir, run.step)
        run.engine.load(found.read, found.buffers(), found.manifest["adam_step"])

    return {"wait_s": waits, "save_s": waits + rest, "load_s": _timed(run, load),
            "mib": _size_mib(checkpoint.step_uri(run.config.run.dir, run.step))}


def _deepspeed(run: Any, folder: str) -> dict[str, float]:
    engine = run.engine._engine
    save = _timed(run, lambda: engine.save_checkpoint(folder, tag="a"))
    load = _timed(run, lambda: engine.load_checkpoint(folder, tag="a"))
    return {"wait_s": save, "save_s": save, "load_s": load, "mib": _size_mib(folder)}


def _dcp(run: Any, folder: str) -> list[dict[str, float]]:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    state = {f"{fragment.name}/{run.world.rank}/{key}": tensor.clone()
             for fragment in run.engine.fragments
             for key, tensor in run.engine.tensors(fragment).items()}
    group = dist.new_group(backend="gloo")  # its thread must not meet our own collectives
    save = _timed(run, lambda: dcp.save(state, checkpoint_id=f"{folder}-a", process_group=group))
    load = _timed(run, lambda: dcp.load(state, checkpoint_id=f"{folder}-a", process_group=group))
    sides = [{"wait_s": save, "save_s": save, "load_s": load, "mib": _size_mib(f"{folder}-a")}]
    futures: list[Any] = []
    waits = _timed(run, lambda: futures.append(
        dcp.async_save(state, checkpoint_id=f"{folder}-b", process_group=group)))
    rest = _timed(run, lambda: futures[0].result())
    sides.append({"wait_s": waits, "save_s": waits + rest, "load_s": load,
                  "mib": _size_mib(f"{folder}-b")})
    run.world.gather(None)
    if run.world.rank == 0:
        for part in ("a", "b"):
            shutil.rmtree(f"{folder}-{part}")
    return sides
