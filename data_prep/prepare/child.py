"""A child process that is watched: a call that crashes, hangs or grows ends the child, not us.

A worker keeps one child and reuses it, so its imports are paid once.  The child is ended with all
that it started (converters, external tools), and it dies with its parent.

    child = Child()
    end = child.call(function, *arguments, seconds=600, memory_bytes=8 << 30)
    if isinstance(end, Death): ...
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import psutil

from data_prep.scan import ScanError
from neurojepa.errors import ConfigError, DataError

_LOOK_EVERY_S = 0.5
_START_S = 600.0  # to start and import, on a machine or a file system that is very busy
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
ONE_THREAD = {name: "1" for name in (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")}


@dataclass(frozen=True)
class Death:
    """Why a call has no result: a reason for the quarantine table, and one line."""

    reason: str  # worker_crashed, worker_timeout, worker_memory, worker_failed
    message: str


class Child:
    """One child process, started when it is first needed and again after a death."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float,
             memory_bytes: int) -> Any:
        """``function(*arguments)`` in the child; its value, or a Death.

        Memory is what child and descendants have resident; it is looked at twice a second.  The
        time to start a child and to import ``function`` does not count.

        Raises
        ------
        DataError
            Raised by the call itself, or the child lacks a module: this would fail for all.
        """
        process, pipe = self._started()
        try:
            pipe.send((function, arguments))
            death = (self._watch(process, pipe, _START_S, memory_bytes)
                     or pipe.recv() or self._watch(process, pipe, seconds, memory_bytes))
            if death:
                self.end()
                return death
            kind, value = pipe.recv()
        except (EOFError, OSError):
            self.end()
            return Death("worker_crashed", _how_it_ended(process.returncode))
        if kind == "error":
            raise DataError(value)
        return value

    def _watch(self, process: subprocess.Popen[bytes], pipe: Connection, seconds: float,
               memory_bytes: int) -> Death | None:
        """Wait until the child says something; a Death where it goes beyond a limit."""
        began = time.monotonic()
        while not pipe.poll(_LOOK_EVERY_S):
            if time.monotonic() - began > seconds:
                return Death("worker_timeout", f"not done after {seconds:.0f} s")
            used = _resident(process.pid)
            if used > memory_bytes:
                return Death("worker_memory", f"took {used / 2**30:.2f} GiB, "
                             f"{memory_bytes / 2**30:.2f} are allowed")
        return None

    def end(self) -> None:
        """Kill the child and what it started."""
        if self._process is None or self._pipe is None:
            return
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._pipe.close()
        self._process = self._pipe = None

    def _started(self) -> tuple[subprocess.Popen[bytes], Connection]:
        if self._process is None or self._pipe is None:
            self._pipe, theirs = Pipe()
            path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()], start_new_session=True, stdin=subprocess.DEVNULL,
                # libraries print paths there, which hold ids
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env={**os.environ, **ONE_THREAD, "PYTHONPATH": path})
            theirs.close()  # or its end would not be seen
        return self._process, self._pipe


def _resident(pid: int) -> int:
    """Bytes of memory that a process and its descendants hold; 0 once it is gone."""
    total = 0
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _how_it_ended(status: int) -> str:
    if status < 0:
        return f"the process died of {signal.Signals(-status).name}"
    return f"the process ended with status {status}"


# ---- in the child --------------------------------------------------------------------------------

def serve(pipe: Connection) -> None:
    """Answer calls until the parent goes."""
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        except (ImportError, AttributeError) as error:  # the function is not known here
            pipe.send(None)
            pipe.send(("error", str(error)))
            continue
        pipe.send(None)  # from here on the time counts
        pipe.send(_answer(function, arguments))


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "value", function(*arguments)
    except MemoryError as error:
        return "value", Death("worker_memory", f"no memory was left ({error})")
    except ImportError as error:
        return "error", f"the worker lacks a module ({error}); install the same version everywhere"
    except ConfigError as error:  # a tool that this node does not have
        return "error", str(error)
    except DataError as error:
        if not isinstance(error, ScanError):
            return "error", str(error)
        return "value", Death("worker_failed", _one_line(error))
    except Exception as error:  # whatever one person's scans do must not end the job
        return "value", Death("worker_failed", _one_line(error))


def _one_line(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {text} ({os.path.basename(place.filename)}:{place.lineno})"


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the line above
        sys.exit(1)


if __name__ == "__main__":
    from data_prep.prepare import child

    _die_with(int(sys.argv[2]))
    child.serve(Connection(int(sys.argv[1])))
