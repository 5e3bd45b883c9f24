"""The supervisor's connection to the agent of one host; made again when it breaks."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from contextlib import suppress
from typing import IO, Any

from cluster import hosts
from cluster.launcher import Attempt, Printed
from cluster.ssh import module_on

GONE_S = 20.0  # after ssh has noticed, which takes 8 s; a flap of the network is shorter
AGAIN_S = 1.0
ASK_S = 10.0  # ssh gives up on a dead host after 5 s


class Link(threading.Thread):
    """What is known of the ranks on one host, and the way for orders to them.

    Parameters
    ----------
    host
        Empty for this machine.
    first
        The order to begin with, until an agent answers: ``start`` or ``attach``.
    log
        Takes what the ranks print.

    Attributes
    ----------
    ranks : dict
        By rank, the agent's last row about it and when it changed, by our clock.
    absent : str or None
        Why no agent of the attempt is there, where that is so; its ranks are dead.
    refused : str
        Why the agent obeys somebody else.
    size : int
        Ranks of the whole world, as the agent knows it; 0 until it has answered.
    left : list of int or None
        After ``end``: the processes that do not end; None until the agent has answered.
    """

    def __init__(self, host: str, attempt: Attempt, first: dict[str, Any], log: IO[bytes],
                 gone_s: float = GONE_S) -> None:
        super().__init__(name=f"agent-{host or 'here'}", daemon=True)
        self.host, self.attempt = host, attempt
        self.ranks: dict[int, tuple[dict[str, Any], float]] = {}
        self.absent: str | None = None
        self.refused = ""
        self.left: list[int] | None = None
        self.size = 0
        self._first, self._log, self._gone_s = first, log, gone_s
        self._print = Printed(log).write
        self._turn = threading.Lock()  # of the relay's standard input
        self._relay: subprocess.Popen[bytes] | None = None
        self._lost_at: float | None = None
        self._signum = 0  # asked for last
        self._ending = False
        self._closed = False
        self._wake = threading.Event()
        self.start()

    @property
    def gone(self) -> bool:
        """Whether the host has been away for so long that it will not come back by itself."""
        lost_at = self._lost_at
        return lost_at is not None and time.monotonic() - lost_at > self._gone_s

    def signal(self, signum: int) -> None:
        """Signal the ranks there; again after a connection that broke."""
        self._signum = signum
        self._send(self._order("signal", signum=signum))

    def end(self) -> None:
        """Ask the agent to end all that is left; ``left`` is the answer."""
        self._ending = True
        self._send(self._order("end"))
        self._wake.set()

    def close(self) -> None:
        """Let go of the agent."""
        self._closed = True
        self._wake.set()
        with self._turn:
            relay = self._relay
            if relay is not None:
                relay.kill()

    def run(self) -> None:
        order = self._first
        while not self._closed:
            try:
                self._talk(order)
            except OSError as error:  # no process can be started just now
                self._print(f"{self.host or 'this machine'}: {error}\n".encode())
            if self.refused or self.left is not None:
                return
            if self._lost_at is None and self.absent is None:
                self._lost_at = time.monotonic()
            time.sleep(0.1)
            # where there is no agent, the next order is to end what may be left
            self._wake.wait(AGAIN_S if self.absent is None else None)
            if self._ending:
                order = self._order("end")
            elif self.size:  # until then it may not have heard of the start
                order = self._order("attach")

    def _talk(self, order: dict[str, Any]) -> None:
        """Until the connection ends."""
        relay = subprocess.Popen(module_on(self.host, "cluster.agent"), stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, stderr=self._log, start_new_session=True)
        assert relay.stdin and relay.stdout
        with self._turn:
            self._relay = relay
            if self._closed:  # a moment ago, when there was none to kill
                relay.kill()
        self._send(order)
        # what was asked for while there was no connection, or is perhaps lost
        if self._ending:
            self._send(self._order("end"))
        elif self._signum:
            self._send(self._order("signal", signum=self._signum))
        with relay.stdout:
            for line in relay.stdout:
                if (row := _row(line)) is not None:
                    self._lost_at = None
                    self._take(row)
                else:
                    self._print(line)
        with self._turn:
            self._relay = None
            with suppress(BrokenPipeError):
                relay.stdin.close()
        relay.wait()

    def _order(self, what: str, **more: Any) -> dict[str, Any]:
        return {"do": what, "token": self.attempt.token, "host": self.host,
                "fence": self.attempt.fence, **more}

    def _send(self, order: dict[str, Any]) -> None:
        with self._turn:
            relay = self._relay
            if relay is not None and relay.stdin:
                with suppress(BrokenPipeError):  # it broke: what counts is sent again
                    relay.stdin.write(json.dumps(order).encode() + b"\n")
                    relay.stdin.flush()

    def _take(self, row: dict[str, Any]) -> None:
        if "ranks" in row:
            self.size = row["size"]
            now = time.monotonic()
            for item in row["ranks"]:
                known = self.ranks.get(item["rank"])
                if known is None or known[0] != item:
                    self.ranks[item["rank"]] = item, now
        elif "printed" in row:
            rank, line = row["printed"]
            self._print(f"[rank {rank}] {line}\n".encode() if rank >= 0
                            else f"{line}\n".encode())
        elif "none" in row:
            self.absent = row["none"] or "its agent is gone"
            self._print(f"{self.host or 'this machine'}: {self.absent}\n".encode())
        elif "refused" in row:
            self.refused = row["refused"]
        elif "ended" in row:
            self.left = row["ended"]


def _row(line: bytes) -> dict[str, Any] | None:
    """What an agent says; None for what a shell there prints, or a line that a lost connection cut.
    """
    if not line.startswith(b"{") or not line.endswith(b"\n"):
        return None
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return row


def ask(there: list[str], attempt: Attempt) -> bool:
    """Whether an agent of an attempt is on any of the hosts; those that do not answer count not."""
    answers = hosts.ask({host: json.dumps({"do": "ask", "token": attempt.token, "host": host})
                         for host in there}, "cluster.agent", [], ASK_S)
    return any("ranks" in (_row(f"{line}\n".encode()) or {})
               for answer in answers.values() for line in answer.lines)
