"""One run as the page sees it.

A thread reads the run while somebody looks at the page, and rests otherwise: a local run every two
seconds, one in an object store every five.  Answers come from memory.  A run of 500,000 rows takes
24 MB there (6 numbers of 8 bytes a row); docs/operations.md says what that costs in time.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from cluster.dashboard.around import around
from cluster.dashboard.columns import Columns
from cluster.follow import Follower, Rows
from cluster.levels import level
from cluster.rundir import RunDir
from cluster.signs import Signs
from cluster.status import summarise
from neurojepa.errors import NeurojepaError
from neurojepa.storage import join

METRICS = ("loss", "volumes_per_s", "effective_rank", "data_wait", "step_s")
LOCAL_S, REMOTE_S = 2.0, 5.0  # between looks
IDLE_S = 30.0  # after the last question it stops looking
TREND_ROWS = 400
MOST_EVENTS = 1000  # that a page gets, checkpoints not counted
SHOWN = ("state", "step", "steps", "loss", "volumes_per_s", "step_s", "eta_s", "last_checkpoint",
         "checkpoint_age_s", "disk_free", "restarts", "goodput", "seconds", "lost_steps", "slow")
OF_RANKS = ("rank", "host", "pid", "step", "state", "own_s", "data_s", "step_s",
            "age_s")


class RunView:
    """What was read of one run, and how to read on."""

    def __init__(self, uri: str) -> None:
        self.run_dir = RunDir(uri)
        self._lock = threading.Lock()
        self._events, self._columns = Rows(), Columns(METRICS)
        self._followers = [
            Follower(join(uri, name), taker, self._lock)
            for name, taker in (("events.jsonl", self._events), ("metrics.jsonl", self._columns))]
        self._config: dict[str, Any] = {}
        self._status: dict[str, Any] = {}
        self._signs = Signs(self.run_dir)
        self._problem = ""
        self._looked = self._asked = 0.0
        self._thread: threading.Thread | None = None

    # ---- reading ---------------------------------------------------------------------------------

    def ask(self) -> None:
        """Somebody looks at the page."""
        self._asked = time.monotonic()
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def _work(self) -> None:
        every_s = REMOTE_S if self.run_dir.local_path is None else LOCAL_S
        while time.monotonic() - self._asked < IDLE_S:
            self.look()
            time.sleep(every_s)

    def look(self) -> None:
        """Read what has come since; what cannot be read is told on the page."""
        try:
            for follower in self._followers:
                follower.refresh()
            if not self._config or self._is_new_start():
                self._config = self.run_dir.config()
            now = time.time()
            status = summarise(self.run_dir, self._told(), self._signs.look(now), self._last_rows(),
                               self._config, now)
            self._status, self._problem = status, ""
        except NeurojepaError as error:
            self._problem = str(error)
        self._looked = time.monotonic()

    def _is_new_start(self) -> bool:
        return any(row.get("event") in ("start", "resume") and row.get("time", 0) > time.time() - 60
                   for row in self._events.rows[-20:])

    def _told(self) -> list[dict[str, Any]]:
        """Whole rows of events.jsonl."""
        return [row for row in self._events.rows
                if isinstance(row.get("time"), int | float) and isinstance(row.get("event"), str)]

    def _last_rows(self) -> list[dict[str, Any]]:
        with self._lock:
            names = ("loss", "volumes_per_s")
            columns = [self._columns.last_values(name, TREND_ROWS) for name in names]
            rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
            return [*rows[:-1], self._columns.last] if rows else []

    # ---- answers ---------------------------------------------------------------------------------

    def overview(self) -> dict[str, Any]:
        """The state of the run and of its ranks, and how much was read."""
        status = self._status
        return {
            "uri": self.run_dir.uri, "name": self.run_dir.uri.rstrip("/").rpartition("/")[2],
            "problem": self._problem, "rows": len(self._columns),
            "num_events": len(self._events.rows),
            "read_age_s": round(time.monotonic() - self._looked, 1) if self._looked else None,
            **{key: status.get(key) for key in SHOWN},
            "ranks": [{key: rank.get(key) for key in OF_RANKS} for rank in status.get("ranks", [])]}

    def series(self, first: int, last: int, most: int) -> dict[str, list[list[float | None]]]:
        """Points [step, mean, least, greatest] by figure, of steps ``first`` to ``last``."""
        saved = Columns(("seconds",))
        with self._lock:
            rows = [row for row in self._events.rows if row.get("event") == "checkpoint"]
            for row in sorted(rows, key=lambda row: row.get("step") or 0):  # some come again
                saved.add(row)
            found = self._columns.points(first, last, most)
        return {**found, "checkpoint_s": saved.points(first, last, most)["seconds"]}

    def events(self) -> dict[str, Any]:
        """The newest events, by number; of checkpoints there is a chart."""
        rows = [(number, row) for number, row in enumerate(list(self._events.rows))
                if row.get("event") != "checkpoint" and isinstance(row.get("time"), int | float)]
        return {"older": max(0, len(rows) - MOST_EVENTS), "events": [
            {"number": number, "time": row["time"], "event": str(row.get("event")),
             "step": row.get("step"), "level": level(row)}
            for number, row in rows[-MOST_EVENTS:]]}

    def around(self, number: int) -> dict[str, Any] | None:
        """One event with what surrounds it; None where there is no such number.

        Raises
        ------
        NeurojepaError
            Logs or feed cannot be read.
        """
        rows = list(self._events.rows)
        if not 0 <= number < len(rows):
            return None
        return around(self.run_dir, rows, number, self._config)
