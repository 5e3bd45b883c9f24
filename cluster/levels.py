"""How much an event matters to whoever looks at a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Level = Literal["problem", "warning", ""]
PROBLEMS = ("give_up", "diverged", "collapse", "hang", "host_lost", "disk_full", "no_room")
WARNINGS = ("skip", "rollback", "restart", "exit", "host_excluded", "host_odd", "straggler",
            "damaged", "store_retry", "takeover", "stop", "stopped", "tracker", "accepted")


def level(row: Mapping[str, Any]) -> Level:
    """The level of a row of events.jsonl; an attempt that ended well is none."""
    name = row.get("event")
    if name == "exit" and row.get("status") == 0:
        return ""
    return "problem" if name in PROBLEMS else "warning" if name in WARNINGS else ""
