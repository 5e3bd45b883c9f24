"""The processes of one attempt, found by what they carry and ended by pid.

The launcher starts every rank with NEUROJEPA_ATTEMPT=<token> in its environment, on this machine
and, through pdsh, on all others.  A process is ours exactly if it carries our token, whatever its
name, its parent or its number, so another DeepSpeed job of the same user is never touched.

The launcher is not sent SIGTERM: DeepSpeed's pdsh runner would answer it with a ``pkill`` by name
on all hosts.  Its ranks are ended instead; then it cleans up and exits by itself.

``python -m cluster.processes TOKEN SIGNAL CALLER`` signals the ranks of an attempt on the machine
it runs on; the supervisor calls it on all hosts by ssh.  It does nothing where the supervisor
itself runs (CALLER is that machine's ``pid_space``), so that no rank is signalled twice.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time

import psutil

from neurojepa.storage.lease import ATTEMPT
from neurojepa.storage.owners import pid_space

TOKEN = ATTEMPT
NOTHING = 3  # exit status: no process of the attempt is there
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


def ask_remote(hosts: list[str], token: str, signum: int, ssh_options: str,
               timeout_s: float = 20) -> dict[str, int]:
    """Signal the ranks of an attempt on other hosts, all at once; with 0, only look.

    Returns
    -------
    dict
        By host: 0; ``NOTHING`` if a look found no process; else ssh's status of a host that could
        not be reached.
    """
    options = shlex.split(ssh_options)
    command = (f"cd {shlex.quote(os.getcwd())} && {shlex.quote(sys.executable)} "
               f"-m cluster.processes {token} {int(signum)} {pid_space()}")
    calls = {host: subprocess.Popen(["ssh", *options, host, command], stdin=subprocess.DEVNULL,
                                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
             for host in hosts}
    statuses = {}
    end = time.monotonic() + timeout_s
    for host, call in calls.items():
        try:
            statuses[host] = call.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            call.kill()
            statuses[host] = call.wait()
    return statuses


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


def main(argv: list[str] | None = None) -> int:
    token, signum, caller = sys.argv[1:] if argv is None else argv
    if caller == pid_space():  # the caller does it, or counts them, itself
        return 0 if int(signum) else NOTHING
    # SIGKILL also ends a launcher whose connection is gone
    found = ranks(token) if int(signum) == signal.SIGTERM else members(token)
    if int(signum):
        send(found, int(signum))
    return 0 if found or int(signum) else NOTHING


if __name__ == "__main__":
    sys.exit(main())
