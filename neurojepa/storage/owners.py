"""Who owns a run directory: the claims that were made, and what their owners said since.

    lease/00000007.json        claim 7, created only if it is not there: who, where, since when
    lease/00000007.alive.json  rewritten by its owner every few seconds: a count, what it runs
    lease/00000007.stop.json   somebody asks the owner to stop

The claim with the highest number owns the directory.  Claims are never removed.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass, fields
from typing import Any

from neurojepa.errors import DataError
from neurojepa.storage.files import join, list_names, read_if_there, write_bytes


@dataclass(frozen=True)
class Owner:
    """Who made a claim."""

    token: int
    id: str
    kind: str  # supervisor or training
    host: str
    pid: int
    pid_space: str
    process: int | None  # when the process began, in ticks since the boot of its machine
    time: float
    adopts: str | None = None

    def __str__(self) -> str:
        since = time.strftime("%F %T", time.localtime(self.time))
        return f"{self.kind} on {self.host} (process {self.pid}, since {since})"

    @property
    def is_here(self) -> bool:
        """Whether its process number means something on this machine."""
        return bool(self.pid_space) and self.pid_space == pid_space()

    def same_process(self, other: Owner) -> bool:
        """Whether both claims are of one process."""
        return (self.pid_space, self.pid, self.process) == \
            (other.pid_space, other.pid, other.process)

    @property
    def process_ended(self) -> bool:
        """Whether it ran on this machine and its process is gone."""
        return self.is_here and process_start(self.pid) != self.process


def newest(run_dir: str) -> Owner | None:
    """The owner of the highest claim, None where there was never one."""
    tokens = [int(name[:8]) for name in list_names(join(run_dir, "lease"))
              if len(name) == 13 and name[:8].isdigit() and name.endswith(".json")]
    return claim(run_dir, max(tokens)) if tokens else None


def facts(run_dir: str, owner: Owner) -> dict[str, Any]:
    """What an owner said when it renewed last: ``state`` (held, released), ``beat``, and more."""
    try:
        found = json.loads(read_if_there(lease_uri(run_dir, owner.token, "alive")) or b"{}")
    except ValueError:  # an operator's edit, or a store that shows half an object
        found = {}
    return found if isinstance(found, dict) else {}


def ask_to_stop(run_dir: str, owner: Owner, now: bool) -> None:
    """Ask an owner to stop: with a checkpoint, or ``now`` without one."""
    write_bytes(lease_uri(run_dir, owner.token, "stop"),
                json.dumps({"now": now, "by": socket.gethostname(), "time": time.time()}).encode())


def lease_uri(run_dir: str, token: int, what: str = "") -> str:
    """Where a claim lies, or what belongs to it: ``what`` is alive or stop."""
    return join(run_dir, "lease", f"{token:08d}{'.' + what if what else ''}.json")


def claim(run_dir: str, token: int) -> Owner | None:
    """The claim of a token; None if nobody has made it."""
    uri = lease_uri(run_dir, token)
    if (data := read_if_there(uri)) is None:
        return None
    try:
        row = json.loads(data)
        return Owner(**{field.name: row[field.name] for field in fields(Owner)})
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{uri}: is no claim ({error}); when nothing trains in {run_dir}, delete "
                        "the folder lease/ there") from error


def pid_space() -> str:
    """What distinguishes sets of process numbers: the boot of a machine and the PID namespace.

    Empty where the system has no /proc.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def process_start(pid: int) -> int | None:
    """When a process of this machine began, in ticks since the boot; None if it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            values = file.read().rpartition(")")[2].split()  # the name may hold anything
    except OSError:
        return None
    return None if values[0] in "ZX" else int(values[19])
