"""heartbeat/rank-R.json: what this rank does, for whoever watches from outside.

A thread of its own writes it every few seconds, so a rank that waits for its store says so; on a
local disk each step writes it as well.  ``time`` is when the last step ended and ``seen`` when the
file was written, both by this host's clock: readers compare only the two, so clocks need not agree.
Telling is not training: what cannot be written is said once and training goes on.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from neurojepa.errors import DataError
from neurojepa.storage import Patience, join, local_path, write_bytes
from neurojepa.train.hooks import Hook
from neurojepa.train.pace import Pace

if TYPE_CHECKING:
    from neurojepa.train.loop import Run

BEAT_S = 2.0  # between beats that no step made
PUT_S = 5.0  # shortest time between puts to an object store


class Heartbeat(Hook):
    """The beats of one rank.

    Parameters
    ----------
    attempt
        What the ranks of this world have in common and no other world has.
    world
        Number of ranks.
    patiences
        Whose waiting for a store is told.
    pace
        Whose times are told.
    """

    def __init__(self, run_dir: str, rank: int, *, attempt: str = "", world: int = 1,
                 patiences: Sequence[Patience] = (), pace: Pace | None = None) -> None:
        self._uri = join(run_dir, "heartbeat", f"rank-{rank}.json")
        self._path = local_path(self._uri)
        self._facts = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(),
                       "attempt": attempt, "world": world}
        self._patiences, self._pace = patiences, pace
        self._step, self._time = 0, time.time()
        self._stepped = False
        self._problem = ""
        self._turn = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)
        self._thread.start()

    def after_attempt(self, run: Run) -> None:
        self.beat(run.step)

    def beat(self, step: int) -> None:
        """A step has ended."""
        self._step, self._time, self._stepped = step, time.time(), True
        if self._path is not None:
            self._telling(self._write_file)

    def close(self) -> None:
        """Say where it ended, and let go of the thread."""
        self._ended.set()
        self._thread.join(PUT_S)

    def _work(self) -> None:
        every_s = BEAT_S if self._path is not None else PUT_S
        while True:
            ended = self._ended.wait(every_s if self._stepped else 0.1)
            if self._stepped:  # until then an earlier world's beats are not replaced
                self._telling(self._write_file if self._path is not None else self._put)
            if ended:
                return

    def _row(self) -> bytes:
        waits = [left for patience in self._patiences if (left := patience.left_s) is not None]
        state: dict[str, Any] = {"state": "step"}
        if waits:
            state = {"state": "waiting for store", "wait_left_s": round(max(waits), 1)}
        if self._pace is not None and self._pace.own_s is not None:
            state |= {"own_s": self._pace.own_s, "data_s": self._pace.data_s}
        return json.dumps({**self._facts, "step": self._step, "time": self._time,
                           "seen": time.time(), **state}).encode()

    def _write_file(self) -> None:
        assert self._path is not None
        with self._turn:
            new = self._path + ".new"
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            with open(new, "wb") as file:  # no fsync: it only has to be seen, not kept
                file.write(self._row())
            os.replace(new, self._path)

    def _put(self) -> None:
        write_bytes(self._uri, self._row())

    def _telling(self, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, DataError) as error:
            if not self._problem:
                self._problem = str(error)
                print(f"{self._uri}: cannot be written ({error}); training goes on, but whoever "
                      "watches takes this rank for silent", file=sys.stderr, flush=True)
