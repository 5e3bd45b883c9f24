"""How an attempt ended, and whether the next one is worth while."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.launcher import Seen
from cluster.rundir import TRAIN_EVENTS, Heartbeat
from neurojepa.errors import ClusterError

LOG_LINES, LOG_BYTES = 20, 16_384
LONGEST_PAUSE_S = 60.0
FATAL = ("diverged", "collapse")  # last events of trainings that cannot go on


class GaveUp(ClusterError):
    """There will be no other attempt.

    Parameters
    ----------
    step, facts
        Of the event that says so.
    """

    def __init__(self, message: str, step: int | None = None, **facts: Any) -> None:
        super().__init__(message)
        self.step, self.facts = step, facts


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: the status of the first rank that failed, and the slowest one's step.
    """

    status: int
    step: int | None
    heartbeats: list[Heartbeat]
    log_lines: list[str]
    hung: bool
    fatal: str | None  # the event with which the training said that it cannot go on

    def give_up_message(self, run: str, failures: int, committed: int | None) -> str:
        """Why there will be no other attempt, in one line."""
        step = "its start" if self.step is None else f"step {self.step}"
        last = "no checkpoint yet" if committed is None else f"last checkpoint: step {committed}"
        how = "hung" if self.hung else f"status {self.status}"
        cause = next((line for line in reversed(self.log_lines) if "rror" in line), "")
        if self.fatal:
            return (f"{run}: gave up: the training ended with the event {self.fatal} at {step}, to "
                    f"which a restart would lead again ({last}). {cause}").rstrip()
        return (f"{run}: gave up after {failures} failure(s) in a row at {step} ({how}; {last}); "
                f"see logs/ there. {cause}").rstrip()


@dataclass
class Budget:
    """Attempts that fail in a row without a new checkpoint, and when they are too many.

    Parameters
    ----------
    max_restarts, retry_s
        Both have to be used up: so many restarts, and so many seconds since the first failure.  An
        outage of minutes makes many quick failures, a fault of the code only a few slow ones.
    """

    max_restarts: int
    retry_s: float
    clock: Callable[[], float] = time.monotonic
    failures: int = 0
    _since: float = field(default=0.0)

    def failed(self, progressed: bool) -> None:
        """Count an attempt; ``progressed``: it has committed a new checkpoint before it failed."""
        if progressed or not self.failures:
            self.failures, self._since = 0, self.clock()
        self.failures += 1

    @property
    def spent(self) -> bool:
        return self.failures > self.max_restarts and self.clock() - self._since >= self.retry_s

    @property
    def pause_s(self) -> float:
        """How long to wait before the next attempt: twice as long each time, a minute at most."""
        return min(LONGEST_PAUSE_S, 2.0 ** min(self.failures - 1, 10))


def status_of(seen: Seen) -> tuple[int, int | None]:
    """The status of an attempt that is over, and the rank that failed first, where one did.

    Ranks that were not seen to end count as failed.
    """
    for rank, status in seen.statuses.items():
        if status:
            return status, rank
    return int(len(seen.statuses) < max(1, seen.size)), None


def unended(events: list[dict[str, Any]]) -> list[str]:
    """Tokens of attempts that may still run somewhere: nobody has seen them end on all hosts."""
    found: dict[str, None] = {}
    for row in events:
        if row["event"] == "started" and "token" in row:
            found[str(row["token"])] = None
        elif row["event"] == "exit" and not row.get("away"):
            found.pop(str(row.get("token")), None)
    return list(found)


def told(events: list[dict[str, Any]]) -> str:
    """The last of the training's own events since the last attempt started; empty if none."""
    starts = [index for index, row in enumerate(events) if row["event"] == "started"]
    own = [row["event"] for row in events[starts[-1] if starts else 0:]
           if row["event"] in TRAIN_EVENTS]
    return own[-1] if own else ""


def fatal_event(events: list[dict[str, Any]]) -> str | None:
    """The training's last event of the last attempt, if it says that it cannot go on."""
    for row in reversed(events):
        if row["event"] == "started" or row.get("by") != "supervisor":
            return row["event"] if row["event"] in FATAL else None
    return None


def last_lines(log: Path) -> list[str]:
    """The end of a log, without empty lines."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_BYTES))
        text = file.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-LOG_LINES:]
