"""How much of a run's time went into steps that count, from its events alone.

    started .. start, resume     starting (launcher, imports, reading the checkpoint)
    start, resume .. exit        training; the share of steps after the checkpoint that the next
                                 attempt continues from is lost
    exit .. started              down (waiting, or nobody has started it again)

A training without a supervisor writes no exit when it is killed; what follows its last event then
counts as down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BEGINS = ("start", "resume")
ENDS = ("stop", "finish", "exit")


@dataclass
class Goodput:
    """Seconds by use since the first event, and steps that were done in vain."""

    productive_s: float = 0.0
    starting_s: float = 0.0
    lost_s: float = 0.0
    down_s: float = 0.0
    lost_steps: int = 0

    def add(self, use: str, seconds: float) -> None:
        """Count time as ``starting`` or ``down``."""
        setattr(self, f"{use}_s", getattr(self, f"{use}_s") + seconds)

    @property
    def share(self) -> float | None:
        """Of all time, what was productive; None before the first second."""
        total = self.productive_s + self.starting_s + self.lost_s + self.down_s
        return self.productive_s / total if total > 0 else None


def goodput(events: list[dict[str, Any]], step: int, now: float, running: bool) -> Goodput:
    """Account for a run's time.

    Parameters
    ----------
    events
        Rows of events.jsonl, oldest first.
    step
        The step it is at.
    now
        Seconds since 1970; what runs now counts up to it.
    """
    found, phase, since = Goodput(), "down", events[0]["time"] if events else now
    begun_at = reached = 0
    trained_s = 0.0  # of the attempt, not yet judged
    for row in events:
        name, passed, at = row["event"], max(0.0, row["time"] - since), int(row["step"] or 0)
        if name in (*BEGINS, "started"):
            # training that was killed without a word: what it did since is not known
            found.add("down" if phase == "training" else phase, passed)
            if name in BEGINS:
                _judge(found, trained_s, begun_at, reached, at)
                begun_at = reached = at
                trained_s = 0.0
            phase = "starting" if name == "started" else "training"
        elif phase == "training":
            trained_s += passed
            reached = max(reached, at)
            phase = "down" if name in ENDS else phase
        elif phase == "starting" and name in ENDS:
            found.add(phase, passed)
            phase = "down"
        else:
            continue
        since = row["time"]
    left = max(0.0, now - since) if running else 0.0
    if phase == "training":
        trained_s, reached = trained_s + left, max(reached, step)
    else:
        found.add(phase, left)
    _judge(found, trained_s, begun_at, reached, reached)
    return found


def _judge(found: Goodput, trained_s: float, begun_at: int, reached: int, kept: int) -> None:
    """Split an attempt's training where the next one continues."""
    lost = max(0, reached - max(kept, begun_at))
    share = lost / (reached - begun_at) if reached > begun_at else 0.0
    found.lost_steps += lost
    found.lost_s += trained_s * share
    found.productive_s += trained_s * (1 - share)
