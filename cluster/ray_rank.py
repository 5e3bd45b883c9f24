"""One rank on a Ray cluster: an actor that starts it as a process of its own and stays with it.

The actor is detached: it outlives the job that started it, and another supervisor finds it by its
name.  A rank ends with its actor, and an actor with its node.  Like an agent (agent.py), it obeys
no order with a lower fencing token than it has heard, and goes on for a while without a supervisor.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections import deque
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.diagnosis import RankState, stack_of
from cluster.ranks import Rank, Ranks
from neurojepa.messages import ALONE, private_folder
from neurojepa.ports import free_port

TURN_S = 0.05
NEW_S = 60.0  # a socket that is being made refuses for a moment, too
KEPT_LINES = 2000  # of what the rank prints while nobody listens
ENDED_S = 60.0  # so long a rank that has ended waits for somebody to see how
ALONE_S = 10.0  # without a supervisor, until the rank is told
ORPHAN_S = 3600.0  # for so long a rank trains on without a supervisor
GRACE_S = 120.0  # then it gets so long for a checkpoint


class RankActor:
    """What the supervisor calls; none of it waits for the rank."""

    def __init__(self) -> None:
        self._ranks: Ranks | None = None
        self._rank: Rank | None = None
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._fence = 0
        self._looked_at = time.monotonic()
        self._turn = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="rank", daemon=True)
        self._reading = True  # until the end of what it prints
        self._asked_at = 0.0  # when it was asked to stop, as nobody is there

    def where(self) -> dict[str, Any]:
        """The address and name of this node, a free port there, and this actor's group and world.
        """
        import ray

        group = ray.util.get_current_placement_group()
        return {"address": ray.util.get_node_ip_address(), "port": free_port(),
                "host": socket.gethostname(), "node": ray.get_runtime_context().get_node_id(),
                "group": group.id.hex() if group else None,
                "size": self._ranks.size if self._ranks else 0}

    def start(self, fence: int, command: list[str], environment: dict[str, str]) -> None:
        """Start the rank; here, as it dies with the thread that started it."""
        folder = private_folder()
        _clear(folder)
        self._fence = fence
        self._ranks = Ranks(command, {}, [environment], str(folder / f"{uuid.uuid4().hex}.ray"))
        self._rank = next(iter(self._ranks.ranks.values()))
        self._thread.start()

    def look(self, fence: int) -> dict[str, Any]:
        """What is known of the rank, and what it has printed since the last look."""
        if refused := self._refused(fence):
            return {"refused": refused}
        self._looked_at = time.monotonic()
        if self._ranks is None or self._rank is None:
            return {}
        with self._turn:
            row = self._ranks.rows()[0]
            printed = [self._lines.popleft() for _ in range(len(self._lines))]
        return {**row, "size": self._ranks.size, "printed": printed,
                "ended_s": time.monotonic() - self._rank.ended_at}

    def signal(self, fence: int, signum: int) -> None:
        """Signal the rank if it has not ended."""
        if not self._refused(fence) and self._ranks is not None:
            with self._turn:
                self._ranks.signal(signum)

    def state(self) -> dict[str, Any] | None:
        """Where the rank stands, as ``RankState``; None where it has ended."""
        import psutil

        if self._rank is None or self._rank.status is not None:
            return None
        pid = self._rank.process.pid
        try:
            status = psutil.Process(pid).status()
        except psutil.NoSuchProcess:
            return None
        return asdict(RankState(self._rank.rank, pid, status, stack_of(pid)))

    def end(self, fence: int) -> list[int]:
        """SIGKILL to the rank and all that it started; the pids that do not end."""
        if self._refused(fence) or self._ranks is None:
            return []
        with self._turn:
            left = self._ranks.end()
        self._read_out()
        self._over.set()
        self._thread.join()
        _remove(Path(self._ranks.messages.path))
        return left

    def _refused(self, fence: int) -> str:
        if fence < self._fence:
            return f"a later supervisor (fencing token {self._fence}) has taken over"
        self._fence = fence
        return ""

    def _read_out(self) -> None:
        """Take in what the rank has left in its pipe."""
        assert self._rank is not None
        with self._turn:
            for _ in range(100):  # of what was printed at a time
                if (lines := self._rank.lines() if self._reading else None) is None:
                    self._reading = False
                    return
                self._lines.extend(lines)

    # ---- in a thread -----------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._over.wait(TURN_S):
            self._turn_once()
            self._go_on_alone()

    def _turn_once(self) -> None:
        assert self._ranks is not None and self._rank is not None
        with self._turn:
            if self._over.is_set():
                return
            self._ranks.hear()
            self._ranks.reap()
            while self._reading and (lines := self._rank.lines()) != []:
                self._reading = lines is not None
                self._lines.extend(lines or ())

    def _go_on_alone(self) -> None:
        """Without a supervisor for long: a rank that has ended leaves, another one stops first."""
        assert self._ranks is not None and self._rank is not None
        now, ended = time.monotonic(), self._rank.status is not None
        alone = Path(self._ranks.messages.path + ALONE)
        if now - self._looked_at > ALONE_S:
            with suppress(OSError):  # a full or cleared /tmp: the rank trains on, only unseen
                alone.touch()  # then the rank says in the run directory what it does
        else:
            alone.unlink(missing_ok=True)
        if now - self._looked_at <= (ENDED_S if ended else ORPHAN_S):
            return
        if not ended and not self._asked_at:
            with self._turn:
                self._ranks.signal(signal.SIGTERM)
            self._asked_at = now
        if ended or now - self._asked_at > GRACE_S:
            _leave_cluster()


def _clear(folder: Path) -> None:
    """Remove what actors that were killed have left: sockets where nobody listens."""
    for path in folder.glob("*.ray"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                is_new = path.stat().st_mtime > time.time() - NEW_S
                probe.connect(str(path))
            except FileNotFoundError:  # removed by another actor, just now
                continue
            except ConnectionRefusedError:
                if not is_new:
                    _remove(path)


def _remove(messages: Path) -> None:
    for path in (messages, Path(f"{messages}{ALONE}")):
        path.unlink(missing_ok=True)


def _leave_cluster() -> None:
    """Nobody has asked for so long that nobody will: give the room of all ranks back."""
    import ray

    print("no supervisor has asked for this rank; giving its room back", file=sys.stderr)
    ray.util.remove_placement_group(ray.util.get_current_placement_group())
    os._exit(0)  # where the group has been removed by another rank
