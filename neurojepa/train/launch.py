"""Start the ranks of a run: as processes of this machine, or under a supervisor on a Ray cluster.

``launch`` is called by the entry point when no launcher has set RANK yet and ``run.launcher`` is
``local`` or ``ray``.  Every rank then runs the same entry point with the same arguments and with
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment, just as ``deepspeed``
or ``torchrun`` would start it; so there is one training code and three ways to start it.

A rank that fails ends the others: nobody waits in a collective for a rank that is gone.  A local
launcher that is killed takes its ranks along, so the next start finds the run directory its own.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from neurojepa.config import RootConfig
from neurojepa.errors import ConfigError
from neurojepa.ports import free_port

GRACE_S = 5.0  # the peers of a dead rank notice by themselves in well under a second
POLL_S = 0.1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def launch(config: RootConfig, module: str, argv: list[str]) -> int:
    """Run ``run.ranks`` ranks of the training to their end.

    Parameters
    ----------
    config
        The resolved configuration; ``run.launcher`` and ``run.ranks`` are read.
    module
        The entry point, whose ``main(argv)`` returns a status.
    argv
        Its arguments, handed to every rank unchanged.

    Returns
    -------
    int
        0, or the status of the first rank that failed (128 + N if signal N ended it).  Under Ray
        it does not return.

    Raises
    ------
    ConfigError
        ``run.launcher`` starts none.
    """
    if config.run.launcher == "local":
        return _local(config.run.ranks, [sys.executable, "-u", "-m", module, *argv])
    if config.run.launcher == "ray":
        # in this process's place: the job is what watches the supervisor on the cluster
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-u", "-m", "cluster.ray_job", *argv])
    raise ConfigError(f"run.launcher={config.run.launcher}: starts no ranks; use local or ray")


# ---- processes of this machine -------------------------------------------------------------------

def _local(num_ranks: int, command: list[str]) -> int:
    common = {**os.environ, "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port())}
    ranks: list[subprocess.Popen[bytes]] = []
    with _forwarded_signals(ranks):
        try:
            for rank in range(num_ranks):
                # own session: Ctrl-C reaches a rank once, through us
                ranks.append(subprocess.Popen(
                    command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    start_new_session=True, preexec_fn=partial(_die_with, os.getpid())))
            status = _wait_for_first_failure(ranks)
            if status:
                _wait_all(ranks, GRACE_S)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()
    return status


def _die_with(launcher: int) -> None:
    """In the child, before it becomes a rank: SIGKILL when the launcher is gone."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # gone already
            os._exit(1)


def _wait_for_first_failure(ranks: list[subprocess.Popen[bytes]]) -> int:
    """The first status that is not 0 (a shell's number), or 0 when all have ended well."""
    while True:
        statuses = [process.poll() for process in ranks]
        failed = [status for status in statuses if status]
        if failed:
            return 128 - failed[0] if failed[0] < 0 else failed[0]
        if all(status == 0 for status in statuses):
            return 0
        time.sleep(POLL_S)


def _wait_all(ranks: list[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.poll() is None for process in ranks):
        time.sleep(POLL_S)


@contextmanager
def _forwarded_signals(ranks: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Hand SIGTERM and SIGINT on to the ranks, who agree on a step and stop there."""
    def forward(signum: int, _frame: object) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signum)

    before = {number: signal.signal(number, forward)
              for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
