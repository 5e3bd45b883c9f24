"""What this rank does, for whoever watches: messages to its host's agent, or files.

A rank that an agent started (cluster/agent.py) sends it each step, and every few seconds that it
still lives and what it does: starting, compiling, step, checkpoint, evaluation or waiting for
store.  Without an agent, or while the agent has no supervisor, it writes the same into a file of
the run directory; if that is an object store, one rank of each host writes heartbeat/host-R.json
for all of them.

``time`` is when the last step ended and ``seen`` when this was said, both by this host's clock:
readers compare only the two, so clocks need not agree.  Telling is not training: what cannot be
told is said once and training goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurojepa.errors import ClusterError, DataError
from neurojepa.messages import AGENT, ALONE, Messages, private_folder
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
        Whose waiting for a store is told; more may be appended.

    Attributes
    ----------
    pace
        Whose times are told, once there is one.
    step
        The last step that was made.
    """

    def __init__(self, run_dir: str, rank: int, *, attempt: str = "", world: int = 1,
                 device: str = "", patiences: list[Patience] | None = None) -> None:
        self._run_dir = run_dir
        self._uri = join(run_dir, "heartbeat", f"rank-{rank}.json")
        self._path = local_path(self._uri)
        self._facts = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(),
                       "world": world, "device": device}
        agent = os.environ.get(AGENT)
        self._agent = Messages(agent) if agent else None
        self.attempt, self.patiences = attempt, patiences or []
        self.pace: Pace | None = None
        self.step, self._time = 0, time.time()
        self._step_s: float | None = None
        self._state, self._stepped = "starting", False
        self._problem = ""
        self._host: _Host | None = None
        self._turn = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)
        if self._agent:
            self._thread.start()

    def after_attempt(self, run: Run) -> None:
        self.beat(run.step)

    def beat(self, step: int) -> None:
        """A step has ended."""
        now = time.time()
        if self._stepped:
            self._step_s = now - self._time
        elif not self._agent:  # until then an earlier world's beats are not replaced
            self._thread.start()
        self.step, self._time, self._stepped, self._state = step, now, True, "step"
        if self._agent or self._path is not None:
            self._telling(partial(self._tell, in_step=True))

    @contextmanager
    def doing(self, state: str) -> Iterator[None]:
        """Say for a while what is done between steps."""
        before, self._state = self._state, state
        try:
            yield
        finally:
            self._state = before

    def compiling(self) -> None:
        """What comes until the first step has ended."""
        self._state = "compiling"

    def close(self) -> None:
        """Say where it ended, and let go of the thread."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(PUT_S)
        if self._host:
            self._host.close()

    def _work(self) -> None:
        every_s = BEAT_S if self._agent or self._path is not None else PUT_S
        ended = False
        while not ended:
            self._telling(self._tell)
            ended = self._ended.wait(every_s)
        self._telling(self._tell)

    def _row(self) -> dict[str, Any]:
        waits = [left for patience in self.patiences if (left := patience.left_s) is not None]
        state: dict[str, Any] = {"state": self._state}
        if waits:
            state = {"state": "waiting for store", "wait_left_s": round(max(waits), 1)}
        if self.pace is not None and self.pace.own_s is not None:
            state |= {"own_s": self.pace.own_s, "data_s": self.pace.data_s}
        return {**self._facts, "attempt": self.attempt, "step": self.step, "time": self._time,
                "seen": time.time(), "step_s": self._step_s, **state}

    def _tell(self, in_step: bool = False) -> None:
        if self._agent:
            self._agent.send(self._row())
            if not os.path.exists(self._agent.path + ALONE):
                return  # the supervisor writes for all
        if self._path is not None:
            self._write_file(self._path)
        elif not in_step:
            if self._host is None:
                self._host = _Host(f"{self._run_dir} {self.attempt}")
            self._host.tell(join(self._run_dir, "heartbeat"), self._row())

    def _write_file(self, path: str) -> None:
        with self._turn:
            new = path + ".new"
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(new, "wb") as file:  # no fsync: it only has to be seen, not kept
                file.write(json.dumps(self._row()).encode())
            os.replace(new, path)

    def _telling(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        except (OSError, DataError, ClusterError) as error:
            if not self._problem:
                self._problem = str(error)
                where = self._agent.path if self._agent else self._uri
                print(f"{where}: cannot be written ({error}); training goes on, but whoever "
                      "watches takes this rank for silent", file=sys.stderr, flush=True)


class _Host:
    """The ranks of a world on this host: whoever is first writes for all, the others tell it."""

    def __init__(self, world: str) -> None:
        name = hashlib.sha256(world.encode()).hexdigest()[:24]
        self._messages = Messages(str(private_folder() / f"{name}.ranks"))
        self._writes = self._messages.listen()
        self._rows: dict[int, dict[str, Any]] = {}

    def tell(self, folder: str, row: dict[str, Any]) -> None:
        if not self._writes:
            self._messages.send(row)
            return
        self._rows |= {other["rank"]: other for other in [*self._messages.heard(), row]}
        write_bytes(join(folder, f"host-{row['rank']}.json"),
                    json.dumps({"ranks": list(self._rows.values())}).encode())

    def close(self) -> None:
        if self._writes:
            Path(self._messages.path).unlink(missing_ok=True)  # somebody may have cleared /tmp
            self._writes = False
