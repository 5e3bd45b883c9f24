"""The processes of one attempt, found by what they carry and ended by pid.

Every rank has NEUROJEPA_ATTEMPT=<token> in its environment, and so has what it starts.  A process
is ours exactly if it carries our token, whatever its name, its parent or its number, so another
training of the same user is never touched.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from cluster.rundir import Heartbeat
from neurojepa.errors import ClusterError
from neurojepa.storage.lease import ATTEMPT

TOKEN = ATTEMPT
CLOCK_SLACK_S = 2.0  # /proc gives start times relative to a boot time in whole seconds


def members(token: str) -> list[psutil.Process]:
    """Live processes of an attempt on this machine: launchers, ranks and their helpers."""
    return [process for process in psutil.process_iter()
            if _environment(process).get(TOKEN) == token]


def ranks(token: str) -> list[psutil.Process]:
    """The rank processes of an attempt on this machine, without the helpers they started."""
    found = {process.pid: process for process in members(token) if "RANK" in _environment(process)}
    return [process for process in found.values() if _parent_pid(process) not in found]


def send(processes: list[psutil.Process], signum: int) -> list[int]:
    """Signal processes by pid (start time checked); returns the pids that were there."""
    reached = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signum)
            reached.append(process.pid)
    return reached


def end_members(token: str, wait_s: float) -> list[int]:
    """SIGKILL to all of an attempt on this machine; the pids that do not end.

    Zombies count as ended: in a container nobody may take note of them.
    """
    end = time.monotonic() + wait_s
    while left := members(token):
        send(left, signal.SIGKILL)
        if time.monotonic() > end:
            return [process.pid for process in left]
        time.sleep(0.05)
    return []


def same_process(pid: int, seen_at: float) -> bool:
    """Whether ``pid`` still is the process that was alive at ``seen_at`` (seconds since 1970).

    A number can be used again, but only by a process that started later.
    """
    try:
        process = psutil.Process(pid)
        return bool(process.create_time() <= seen_at + CLOCK_SLACK_S
                    and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def refuse_running(run: str, beats: list[Heartbeat]) -> None:
    """Two trainings in one run directory would overwrite each other's checkpoints.

    Raises
    ------
    ClusterError
        A rank that is heard of there is alive on this machine.
    """
    host = os.uname().nodename
    for beat in beats:
        if beat.host == host and same_process(beat.pid, beat.time):
            raise ClusterError(f"{run}: rank {beat.rank} is being trained by process {beat.pid} "
                               "already; stop that first")


@contextmanager
def signals_to(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """SIGTERM and SIGINT, here and for a while."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, before)  # one that has waited since the start
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return dict(process.environ())
    except (psutil.Error, OSError):  # gone, a zombie, or another user's: not ours
        return {}


def _parent_pid(process: psutil.Process) -> int | None:
    try:
        return int(process.ppid())
    except psutil.NoSuchProcess:
        return None
