"""The ranks of an attempt on one host: started, heard, signalled and ended by its agent.

Ranks die with the agent, and what they start becomes the agent's when they end, so nothing of an
attempt is left when the agent has ended it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil

from cluster.processes import send
from neurojepa.messages import AGENT, Messages

END_S = 20.0  # a process that has not ended so long after SIGKILL is stuck in the kernel
LONGEST_LINE = 65_536
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


@dataclass
class Rank:
    """One rank, the end of the pipe that it prints to, and what it said last."""

    rank: int
    process: subprocess.Popen[bytes]
    output: int
    status: int | None = None  # as a shell shows it
    ended_at: float = 0.0  # by time.monotonic
    message: dict[str, Any] | None = None
    cut: bytes = b""  # the begin of a line that is not whole yet

    def lines(self) -> list[str] | None:
        """The lines that are whole since; None at the end."""
        try:
            data = os.read(self.output, LONGEST_LINE)
        except BlockingIOError:
            return []
        *whole, self.cut = (self.cut + data).split(b"\n")
        if self.cut and (not data or len(self.cut) >= LONGEST_LINE):
            whole, self.cut = [*whole, self.cut], b""
        lines = [line.decode(errors="replace") for line in whole]
        return lines if data or lines else None


class Ranks:
    """The ranks that an order names; needs a process of its own.

    ``reap`` takes note of any child's end and ``end`` kills all children, whoever started them.

    Parameters
    ----------
    command
        Of every rank.
    environment
        What they have besides this process's own variables.
    ranks
        Each one's own variables; RANK and WORLD_SIZE are among them.
    socket_path
        Where they send their messages.
    """

    def __init__(self, command: list[str], environment: dict[str, str],
                 ranks: list[dict[str, str]], socket_path: str) -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.messages = Messages(socket_path)
        self.messages.listen()
        common = {**os.environ, **environment, AGENT: socket_path}
        self.size = int(ranks[0]["WORLD_SIZE"])
        self.ranks = {int(own["RANK"]): _start(command, {**common, **own}) for own in ranks}
        self.failed_at: float | None = None
        self._by_pid = {item.process.pid: item for item in self.ranks.values()}

    @property
    def running(self) -> list[Rank]:
        """Those that have not ended."""
        return [item for item in self.ranks.values() if item.status is None]

    def reap(self) -> bool:
        """Take note of processes that have ended; whether a rank is among them."""
        ended = False
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return ended
            if not pid:
                return ended
            if item := self._by_pid.get(pid):
                code = os.waitstatus_to_exitcode(status)
                item.process.returncode = code
                item.status, ended = 128 - code if code < 0 else code, True
                item.ended_at = time.monotonic()
                if item.status and self.failed_at is None:
                    self.failed_at = item.ended_at

    def hear(self) -> bool:
        """Take in the messages that have come; whether there were any."""
        heard = False
        for row in self.messages.heard():
            if (item := self.ranks.get(row["rank"])) is not None:
                item.message, heard = row, True
        return heard

    def signal(self, signum: int) -> None:
        """Signal the ranks that have not ended."""
        for item in self.running:  # not reaped yet, so the number is still this process's
            os.kill(item.process.pid, signum)

    def end(self) -> list[int]:
        """SIGKILL to all that is left, helpers included; the pids that do not end."""
        end = time.monotonic() + END_S
        while True:
            left = psutil.Process().children(recursive=True)
            send(left, signal.SIGKILL)
            self.reap()
            if not left or time.monotonic() > end:
                return [item.pid for item in left]
            time.sleep(0.02)

    def rows(self) -> list[dict[str, Any]]:
        """What is known of each rank."""
        return [{"rank": item.rank, "pid": item.process.pid, "status": item.status,
                 "message": item.message} for item in self.ranks.values()]


def _start(command: list[str], environment: dict[str, str]) -> Rank:
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    try:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL,
                                   stdout=theirs, stderr=theirs, start_new_session=True,
                                   preexec_fn=partial(die_with, os.getpid()))
    finally:
        os.close(theirs)
    return Rank(int(environment["RANK"]), process, ours)


def die_with(agent: int) -> None:
    """In the child, before it becomes a rank: SIGKILL when the agent is gone."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != agent:  # gone already
            os._exit(1)
