"""ranks: what agreeing, manifests and resuming cost at 1,024 ranks, now and before.

Gloo is measured among 2 to 32 processes of this machine.  The way before (a message in each step by
a gloo group of its own) is extrapolated from there by a line, as gloo's ring takes each rank in
turn.  1,024 ranks are threads of one process: with a connection each to a real TCPStore, and
driving the real saver, the order of samples and metrics.  All of them share the cores of this
machine, so their times are upper bounds.

``in_ranks`` is for the other benchmarks: a function in several ranks, and what rank 0 returns.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

from neurojepa.errors import run_command
from tools.bench.common import machine, print_table

RANKS, PARAMETERS, SAVED_PARAMETERS = 1024, 600, 60
STEP_S = 0.3  # a step at this size; agreeing may take a hundredth of it


def run(quick: bool, official: str | None) -> dict[str, Any]:
    """Agreement, sockets, manifests, a checkpoint and a resume; returns all figures."""
    from tools.bench import _many_ranks as many

    print(machine(), flush=True)
    ranks = 64 if quick else RANKS
    real = [many.gloo(size) for size in ((2, 4) if quick else (2, 8, 16, 32))]
    print_table(("gloo ranks", "a message, ms (before)", "the loss alone, ms",
                 "the loss and the flags, ms (now)", "gather by gloo, ms (before)",
                 "settled by the store, ms (now)", "sockets of a group (before)",
                 "of the store (now)"),
                [[each[key] for key in ("ranks", "message_ms", "loss_ms", "loss_and_flags_ms",
                                        "gather_ms", "settle_ms", "sockets_group",
                                        "sockets_store")] for each in real])
    before = {name: _at(ranks, real, f"{name}_ms") for name in ("message", "gather")}
    print(f"by a line through these, at {ranks} ranks before: {before['message']:.0f} ms a step, "
          f"{before['gather']:.0f} ms a gather, {ranks - 1} sockets a rank\n", flush=True)
    store = many.store_of(ranks)
    print_table((f"{ranks} ranks by one TCPStore", "s"), [
        ("barrier", store["barrier_s"]),
        ("each rank's part of a checkpoint", store["checkpoint_s"]),
        ("200 kB of rank 0 to all", store["root_s"])])
    sizes = many.manifests(ranks, PARAMETERS)
    print_table((f"manifest of {PARAMETERS} parameters, ZeRO 3, {ranks} ranks", "MiB",
                 "held by a rank, MiB", "parsed in, s"), [
        (f"one for all, {sizes['rows']} rows (before)",
         *(sizes[f"old_{key}"] for key in ("mib", "held_mib", "parse_s"))),
        ("root (now)", *(sizes[f"new_{key}"] for key in ("mib", "held_mib", "parse_s")))])
    with tempfile.TemporaryDirectory(prefix="bench-ranks-") as folder:
        saved = many.save_and_read(Path(folder), ranks, SAVED_PARAMETERS, ranks * 3 // 4)
        planned = many.order_and_metrics(Path(folder), ranks) | many.watched(Path(folder), ranks)
    print_table((f"a checkpoint by {ranks} savers, {SAVED_PARAMETERS} parameters", ""), [
        ("begin: who holds what, s", saved["begin_s"]),
        ("copy to the host, the slowest rank, s", saved["start_s"]),
        ("agree that all have written, s", saved["agree_s"]),
        ("commit, s", saved["commit_s"]), ("all of it, s", saved["whole_s"]),
        ("files", saved["files"]), ("root, KiB", saved["root_kib"]),
        ("a rank's manifest, KiB", saved["part_kib"]),
        (f"manifests of ranks that a rank of {ranks} reads", saved["same_size_parts"]),
        (f"that a rank of {ranks * 3 // 4} reads", saved["other_size_parts"]),
        ("positions of a step, one rank, ms", planned["plan_ms"]),
        ("20 rows of metrics, ms", planned["flush_20_rows_ms"]),
        ("a look at all heartbeats, local disk, s", planned["look_s"]),
        ("peak memory of this process, MiB", peak := _peak_mib())])
    last = real[-1]
    added = max(0.0, last["loss_and_flags_ms"] - last["loss_ms"]) / 1000
    return {"ranks": ranks, "gloo": real, "before": before, "store": store, "manifests": sizes,
            "checkpoint": saved, "order": planned, "added_s_at_32": added,
            "share_of_step": added / STEP_S, "peak_mib": peak}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _at(ranks: int, real: list[dict[str, Any]], key: str) -> float:
    """A line through measurements, at ``ranks``."""
    import numpy as np

    slope, start = np.polyfit([each["ranks"] for each in real], [each[key] for each in real], 1)
    return float(start + slope * ranks)


def in_ranks(ranks: int, function: str, **arguments: Any) -> Any:
    """``function`` ("module:name") in ``ranks`` processes, started as a training would be.

    Each gets ``arguments`` (JSON); rank 0's result (JSON) comes back.
    """
    from neurojepa.train.launch import _local

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="bench-ranks-") as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        job.write_text(json.dumps([function, arguments, str(result)]))
        status = _local(ranks, [sys.executable, "-u", "-m", "tools.bench.ranks", str(job)])
        if status:
            raise RuntimeError(f"{function}: a rank ended with status {status}")
        return json.loads(result.read_text())


def main(path: str) -> None:
    function, arguments, result = json.loads(Path(path).read_text())
    module, _, name = function.partition(":")
    found = getattr(importlib.import_module(module), name)(**arguments)
    if os.environ["RANK"] == "0":
        Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1]), teardown=False)
