"""kernels: what a step would cost on an H100, counted and not measured (neurojepa/planning).

    eager   one kernel for each operation of torch
    fused   what the compiler of regions joins is one kernel
"""

from __future__ import annotations

from typing import Any

from neurojepa.config import validate
from neurojepa.feed.format import Grid
from neurojepa.model.flops import DEVICES, step_flops
from neurojepa.planning.kernels import Rates, Table, fused, tabulate
from neurojepa.planning.step import step_kernels
from tools.bench.common import print_table

GRID = Grid("MNI 1.5 mm", (108, 132, 108), 1.5)
SCANS = 64
RANKS = 8


def run(quick: bool, official: str | None) -> dict[str, Any]:
    """Tables by kind of operation; returns predicted MFU, milliseconds and GB by size and way."""
    print(f"counted for one H100 and {SCANS} scans, bf16; nothing here was measured")
    found = {}
    for size in ("base",) if quick else ("base", "large"):
        found |= _of_size(size)
    return found


def _of_size(size: str) -> dict[str, Any]:
    config = validate({"data": {"feed": "none"}, "model": {"size": size},
                       "train": {"steps": 1, "global_batch": SCANS, "micro_batch": SCANS},
                       "run": {"dir": "none"}}, "bench")
    rates = Rates.of(DEVICES["H100"])
    kernels = step_kernels(config, GRID)
    ways: dict[str, Table] = {"eager": tabulate(kernels, rates),
                              "fused": tabulate(fused(kernels), rates)}
    print(f"\n{size}")
    kinds = sorted(ways["eager"].kinds, key=lambda kind: -ways["eager"].kinds[kind].seconds)
    rows = []
    for kind in [*kinds, "all"]:
        eager, joined = (table.total if kind == "all" else table.kinds[kind]
                         for table in ways.values())
        rows.append((kind, eager.kernels, eager.bytes / 1e9, eager.seconds * 1e3,
                     joined.kernels, joined.bytes / 1e9, joined.seconds * 1e3))
    print_table(("kind", "kernels", "GB", "ms", "fused: kernels", "GB", "ms"), rows)
    work = step_flops(config, GRID) * SCANS / DEVICES["H100"].flops
    shared_s = (1 - 1 / RANKS) * ways["fused"].phases["update"].seconds
    one_s = ways["fused"].total.seconds - shared_s
    print(f"fused, as one of {RANKS} ranks, which share the update: {one_s * 1e3:.1f} ms, "
          f"an MFU of {work / one_s:.2f}")
    return {f"{size}/{way}": {"mfu": work / table.total.seconds,
                              "ms": table.total.seconds * 1e3, "gb": table.total.bytes / 1e9,
                              "kernels": table.total.kernels,
                              "ms_by_phase": {phase: cost.seconds * 1e3
                                              for phase, cost in table.phases.items()}}
            for way, table in ways.items()}
