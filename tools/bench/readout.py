"""readout: the main rows of the quality table under the pooling of today and under the plain mean.

The same recipe of people, the same key, steps and learning rates as the table of quality.py, but
the first 120 of its 200 people, two seeds, no dense JEPA, and no CNN, whose own head reads it out.
So it takes about an hour on a core.  Every run keeps a folder below --work (default
build/bench-readout); what is finished is not done again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tools.bench import quality
from tools.bench.common import ROOT

RATES = {"sparse JEPA": 5e-4, "tissue head alone": 5e-4, "MAE": 2e-3,
         "MAE with tissue head": 2e-3}  # chosen on val for the table of 2026-11-26
FULL = replace(quality.FULL, people=120, seeds=(0, 1), rates=(), methods=tuple(RATES), ablations=())
QUICK = replace(quality.QUICK, rates=(), methods=("sparse JEPA", "MAE"), ablations=())


def run(quick: bool, official: str | None, work: str | None = None) -> dict[str, Any]:
    """Make what is missing and print the tables; returns them."""
    plan = QUICK if quick else FULL
    folder = Path(work or ROOT / "build" / "bench-readout") / ("quick" if quick else "full")
    feed = quality.prepared(plan, folder)
    rates = {method: RATES[method] for method in plan.methods}
    quality.Runs(plan, feed.uri).make(list(quality.remaining(plan, folder, rates)))
    return quality.tables(plan, folder, rates)
