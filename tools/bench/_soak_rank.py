"""What a soak adds to the ranks and commands on its hosts, from their sitecustomize.

Ranks note their samples (as the victims of ``recovery`` do) and rest before each micro-batch; on
a host whose address is in ``clocks/`` the clock is off, and a rank in ``slow/`` takes longer.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

NAP_S, SLOW_S, CLOCK_OFF_S = 0.15, 0.3, 300.0


def begin() -> None:
    """Called by every Python process that carries the mark."""
    folder = Path(os.environ["NEUROJEPA_SOAK"])
    given = folder / "environment.json"
    if given.exists():
        os.environ.update(json.loads(given.read_text()))
    if (folder / "clocks" / os.environ.get("HOST_ADDRESS", "none")).exists():
        true_time = time.time
        time.time = lambda: true_time() + CLOCK_OFF_S
    if "RANK" in os.environ:
        _note(folder, int(os.environ["RANK"]))


def _note(folder: Path, rank: int) -> None:
    from neurojepa.train import loop
    from tools.bench.victim import Notes, watch

    watch(Notes(folder, rank), [])
    make_views, slow = loop.make_views, folder / "slow" / str(rank)

    def rested(*arguments: Any) -> Any:
        time.sleep(NAP_S + (SLOW_S if slow.exists() else 0.0))
        return make_views(*arguments)

    if not (folder / "hurry").exists():
        loop.make_views = rested
