"""scaling: step time and memory by ZeRO stage and ranks and by activation checkpointing, weak
scaling, and the loader by threads.

Each measurement is the trainer's own step on this machine.  Where other work shares the cores, CPU
seconds say more than wall seconds: an overhead of ranks shows as CPU-s per volume that rise.
state is what the engine holds in masters, moments and EMA, beside what the dry run says.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from tools.bench.common import machine, print_table
from tools.bench.ranks import in_ranks

GRID = (108, 132, 108)


def run(quick: bool, official: str | None) -> dict[str, Any]:
    """All tables; returns weak_scaling, memory and loader figures."""
    from tools.bench.step import _feed

    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as folder:
        feed = _feed(folder, GRID)
        steps = 3 if quick else 5
        stages = [(2, 1), (3, 2)] if quick else [(z, r) for z in (1, 2, 3) for r in (1, 2)]
        found = {}
        for zero, ranks in stages:
            print(f"zero {zero}, {ranks} rank(s) ...", flush=True)
            found[zero, ranks] = in_ranks(ranks, "tools.bench.scaling:measure", feed=feed,
                                          zero=zero, global_batch=2 * ranks, steps=steps)
        print_table(("zero", "ranks", "scans a step", "s a step", "CPU-s a volume and rank",
                     "state MiB a rank", "dry run", "weights MiB", "dry run", "peak RSS MiB"),
                    [(zero, ranks, 2 * ranks, each["step_s"], each["cpu_s"], each["state_mib"],
                      each["planned_state_mib"], each["weights_mib"], each["planned_weights_mib"],
                      each["rss_mib"]) for (zero, ranks), each in found.items()])
        weak = None
        if not quick:
            weak = {zero: found[zero, 1]["step_s"] / found[zero, 2]["step_s"] for zero in (1, 2, 3)}
            cpu = {zero: found[zero, 1]["cpu_s"] / found[zero, 2]["cpu_s"] for zero in (1, 2, 3)}
            print_table(("weak scaling 1 -> 2 ranks", "by wall time", "by CPU time"),
                        [(f"zero {zero}", weak[zero], cpu[zero]) for zero in (1, 2, 3)])
        blocks = {every: in_ranks(1, "tools.bench.scaling:measure", feed=feed, zero=1,
                                  global_batch=2, steps=steps, every=every) for every in (0, 2, 1)}
        print_table(("activation checkpointing", "s a step", "CPU-s a volume", "peak RSS MiB",
                     "activations, dry run MiB"),
                    [({0: "none", 1: "all blocks"}.get(every, f"every {every}nd block"),
                      each["step_s"], each["cpu_s"], each["rss_mib"],
                      each["planned_activations_mib"])
                     for every, each in blocks.items()])
        threads = [_loader(feed, count, 64 if quick else 400) for count in (1, 2, 3, 4)]
        print_table(("read threads", "volumes/s", "CPU-ms a volume"),
                    [(row["threads"], row["volumes_per_s"], row["cpu_ms"]) for row in threads])
        waits = [in_ranks(1, "tools.bench.scaling:measure", feed=feed, zero=1, global_batch=2,
                          steps=steps, threads=count)["data_wait"] for count in (1, 2, 3, 4)]
        print_table(("read threads", "data wait, share of the step"),
                    list(zip((1, 2, 3, 4), waits, strict=True)))
    return {"weak_scaling": weak, "data_wait": waits, "activation_checkpointing": blocks,
            "loader_volumes_per_s": {row["threads"]: row["volumes_per_s"] for row in threads},
            "stages": {f"zero {zero}, {ranks} rank(s)": each
                       for (zero, ranks), each in found.items()}}


def _config(feed: str, run_dir: str, zero: int, global_batch: int, threads: int,
            every: int = 0) -> Any:
    from neurojepa.config import validate

    return validate({
        "data": {"feed": feed, "read_threads": threads},
        "model": {"size": "small", "patch_voxels": 12, "token_budget": 320,
                  "activation_checkpointing": every},
        "train": {"steps": 10**4, "global_batch": global_batch, "micro_batch": 2, "zero": zero,
                  "dtype": "fp32", "checkpoint_every": 10**6, "log_every": 10**6},
        "run": {"dir": run_dir}}, "bench")


def measure(feed: str, zero: int, global_batch: int, steps: int, threads: int = 4,
            every: int = 0) -> dict[str, float]:
    """One rank's part; times are the median of steps, of the slowest rank."""
    import resource
    import statistics

    from neurojepa.dry_run import plan
    from neurojepa.train.loop import Run
    from neurojepa.train.world import leave_world, start_world

    with tempfile.TemporaryDirectory() as folder:
        config = _config(feed, f"{folder}/run", zero, global_batch, threads, every)
        run = Run(config, start_world())
        walls, cpus = [], []
        for step in range(steps + 1):
            run.world.gather(None)
            wall, cpu = time.perf_counter(), time.process_time()
            run._train_step()
            if step:  # the first one warms up
                walls.append(time.perf_counter() - wall)
                cpus.append(time.process_time() - cpu)
            else:
                waited = run.loader.wait_s
        waits = (run.loader.wait_s - waited) / sum(walls)
        here = [statistics.median(walls),
                statistics.median(cpus) * run.world.size / global_batch, _state_mib(run),
                _weights_mib(run), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, waits]
        step_s, cpu_s, state, weights, rss, waits = (
            max(values) for values in zip(*run.world.gather(here), strict=True))
        planned = plan(config, run.feed, run.world.size, "h100", 0.4)
        run.close()
        leave_world()
    return {"step_s": step_s, "cpu_s": cpu_s, "state_mib": state,
            "planned_state_mib": planned.memory[zero]["state"] / 2**20, "weights_mib": weights,
            "planned_weights_mib": planned.memory[zero]["weights"] / 2**20, "rss_mib": rss,
            "planned_activations_mib": planned.activations[every] / 2**20, "data_wait": waits}


def _state_mib(run: Any) -> float:
    return sum(tensor.nbytes for fragment in run.engine.fragments
               for tensor in run.engine.tensors(fragment).values()) / 2**20


def _weights_mib(run: Any) -> float:
    """What this rank holds of the parameters between steps."""
    held = [getattr(param, "ds_tensor", param) for param in run.engine.module.parameters()]
    return sum(tensor.nbytes for tensor in held) / 2**20


def _loader(feed: str, threads: int, count: int) -> dict[str, float]:
    """The loader alone, a consumer that takes no time behind it."""
    from neurojepa.feed.format import open_feed
    from neurojepa.feed.loader import Loader

    loader = Loader(open_feed(feed), _config(feed, str(Path(feed).parent / "run"), 1, 2, threads),
                    rank=0, world=1, first_step=0)
    batches = iter(loader)
    next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count // 2):
        next(batches)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    loader.close()
    return {"threads": threads, "volumes_per_s": count / wall, "cpu_ms": cpu / count * 1e3}
