"""The processes of one attempt on all its hosts: started here, or adopted from a supervisor.

Ranks are ended by pid (processes.py).  The exit of a launcher that was started here is known at
once; that of adopted processes as soon as none of them is left on any host.
"""

from __future__ import annotations

import signal
import subprocess
import time
from dataclasses import dataclass, field
from typing import IO

import psutil

from cluster.attempt import ssh_options
from cluster.hosts import HostWatch
from cluster.processes import NOTHING, ask_remote, members, ranks, send
from neurojepa.errors import ClusterError

CLEANUP_S = 20.0  # DeepSpeed's launchers exit 1 to 3 s after their ranks
LOOK_S = 2.0  # between looks for adopted processes on the hosts


@dataclass
class World:
    """One attempt.

    Parameters
    ----------
    token
        What its processes carry in their environment.
    number
        Of the attempt, as in logs/attempt-K.log.
    hosts
        Where its ranks may be, besides this machine.
    """

    token: str
    number: int
    hosts: list[str]
    process: subprocess.Popen[bytes] | None = None  # None: adopted
    unreached: list[str] = field(default_factory=list)
    _looked_at: float = 0.0
    _watches: list[HostWatch] = field(default_factory=list)

    def start(self, command: list[str], environment: dict[str, str], log: IO[bytes]) -> None:
        """Start the launcher in a session of its own."""
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL,
                                        stdout=log, stderr=subprocess.STDOUT,
                                        start_new_session=True)

    def watch_hosts(self) -> None:
        """From now on notice hosts that go away."""
        self._watches = [HostWatch(host, ssh_options()) for host in self.hosts]

    def gone_hosts(self) -> list[str]:
        """Hosts that have not been reached for a while."""
        return [watch.host for watch in self._watches if watch.gone]

    def alive(self) -> bool:
        """Whether the launcher, or for adopted processes any of them, still runs."""
        if self.process is not None:
            return self.process.poll() is None
        if time.monotonic() - self._looked_at < LOOK_S:
            return True
        there = self.somewhere()
        self._looked_at = time.monotonic()
        return there

    def somewhere(self) -> bool:
        """Whether a process of the attempt is on this machine or one of the hosts.

        Hosts that cannot be reached are in ``unreached``; what is on them is not known.
        """
        return bool(members(self.token)) or self._ask(0)

    @property
    def status(self) -> int | None:
        """The launcher's exit status as a shell shows it; None for adopted processes."""
        if self.process is None or self.process.returncode is None:
            return None
        code = self.process.returncode
        return 128 - code if code < 0 else code

    def signal(self, signum: int) -> None:
        """Signal the ranks on all hosts."""
        send(ranks(self.token), signum)
        self._ask(signum)
        if self.unreached:
            print(f"cannot reach by ssh: {', '.join(self.unreached)}", flush=True)

    def end(self) -> None:
        """End what is left: the ranks, then, if it lingers, the launcher.

        Raises
        ------
        ClusterError
            A process does not end on SIGKILL.
        """
        for watch in self._watches:
            watch.close()
        self.signal(signal.SIGKILL)
        if self.process is not None:
            try:
                self.process.wait(CLEANUP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        left = members(self.token)
        send(left, signal.SIGKILL)
        _, alive = psutil.wait_procs(left, timeout=CLEANUP_S)
        if alive:
            raise ClusterError(f"processes {[item.pid for item in alive]} of the attempt do not "
                               "end on SIGKILL; check the machine's devices and storage")

    def _ask(self, signum: int) -> bool:
        answers = ask_remote(self.hosts, self.token, signum, ssh_options()) if self.hosts else {}
        self.unreached = [host for host, status in answers.items() if status not in (0, NOTHING)]
        return 0 in answers.values()
