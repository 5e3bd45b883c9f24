"""heartbeat/ranks.json: what all ranks of a supervised run do, for whoever looks from outside.

One file, written by the owner every few seconds if there is news, whatever the number of ranks: an
object store sees six writes a minute.  Its times are the owner's, so readers need not mind the
clocks of the hosts.  Telling is not training: what cannot be written is said once, and tried again.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, replace

from cluster.rundir import BOARD, Heartbeat, RunDir
from neurojepa.errors import DataError
from neurojepa.storage import join, write_bytes

LOCAL_S, STORE_S = 0.5, 10.0  # between writes to a disk, to an object store


class Board(threading.Thread):
    """Writes in a thread of its own: a store that hangs holds up nobody."""

    def __init__(self, run_dir: RunDir) -> None:
        super().__init__(name="board", daemon=True)
        self._uri = join(run_dir.uri, "heartbeat", BOARD)
        self._every_s = STORE_S if run_dir.local_path is None else LOCAL_S
        self._beats: dict[int, Heartbeat] = {}
        self._rows: list[Heartbeat] = []
        self._told: list[Heartbeat] = []
        self._problem = ""
        self._ended = threading.Event()
        self.start()

    def show(self, beats: list[Heartbeat], attempt: str) -> None:
        """What is to be written next: each rank's last message, dated by our clock."""
        now, rows = time.time(), {row.rank: row for row in self._rows if row.attempt == attempt}
        for beat in beats:
            if self._beats.get(beat.rank) != beat or beat.rank not in rows:
                rows[beat.rank] = replace(beat, attempt=attempt, seen=now, time=now - beat.quiet_s)
        self._beats = {beat.rank: beat for beat in beats}
        self._rows = [rows[beat.rank] for beat in beats]

    def run(self) -> None:
        while not self._ended.wait(self._every_s):
            self._write()
        self._write()

    def close(self) -> None:
        """Write what was shown last, unless the store hangs."""
        self._ended.set()
        self.join(STORE_S)

    def _write(self) -> None:
        rows = self._rows
        if rows == self._told or not rows:
            return
        try:
            write_bytes(self._uri, json.dumps({"ranks": [asdict(row) for row in rows]}).encode())
            self._told, self._problem = rows, ""
        except DataError as error:
            if not self._problem:
                print(f"{self._uri}: cannot be written ({error}); the run goes on, but whoever "
                      "watches takes its ranks for silent", flush=True)
            self._problem = str(error)
