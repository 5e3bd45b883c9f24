"""One attempt at a run: how it is started, and what its heartbeats say.

``DeepSpeedLaunch`` makes the command and environment; ``Progress`` turns successive heartbeats into
the step of the slowest rank and the time it may stand still before it counts as hung.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from cluster.processes import TOKEN
from cluster.rundir import Heartbeat
from neurojepa.errors import ClusterError, ConfigError
from neurojepa.ports import free_port

# Variables the ranks on other hosts need; DeepSpeed itself sends only PYTHON*.  Credentials stay
# out: they would show on the ssh command line; hosts have their own (~/.aws or an instance role).
EXPORTED = ("OMP_", "DS_", "GLOO_", "NCCL_", "FI_", "TORCH_", "NEUROJEPA_", "SLURM_JOB",
            "LD_LIBRARY_PATH", "WANDB_", "MLFLOW_", "CUDA_HOME",
            "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")
# What is never put on a command line, by its name or because it holds a password
SECRET = re.compile(r"(KEY|KEY_ID|SECRET|TOKEN|PASSWORD|CREDENTIALS?|JWT)$", re.IGNORECASE)
PASSWORD_IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]+@")
# A host that vanishes ends its ssh within 8 s instead of never.
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=5 -o ServerAliveInterval=4 " \
              "-o ServerAliveCountMax=2"


@dataclass(frozen=True)
class DeepSpeedLaunch:
    """The ``deepspeed`` launcher on this machine, or on the hosts of a hostfile through pdsh.

    Parameters
    ----------
    arguments
        What follows ``python -m <module>``: ``--config C [a.b=v ...]``.
    hostfile
        Lines ``HOST slots=N``; None starts ``ranks`` processes on this machine.
    master_addr
        Address of rank 0's host as the others see it; the first host of the hostfile by default.
    without
        Hosts of the hostfile that are left out.
    """

    arguments: list[str]
    ranks: int = 1
    hostfile: str | None = None
    master_addr: str | None = None
    module: str = "neurojepa.pretrain"
    without: frozenset[str] = frozenset()

    def hosts(self) -> list[str]:
        """The hosts to start on, in the hostfile's order; empty for a local start."""
        return [host for host in self.slots() if host not in self.without]

    def slots(self) -> dict[str, int]:
        """Ranks by host, of all hosts of the hostfile.

        Raises
        ------
        ConfigError
            The file cannot be read, or a line of it.
        """
        if self.hostfile is None:
            return {}
        try:
            lines = Path(self.hostfile).read_text().splitlines()
        except OSError as error:
            raise ConfigError(f"{self.hostfile}: cannot read the hostfile "
                              f"({error.strerror})") from error
        slots: dict[str, int] = {}
        for number, line in enumerate(lines, start=1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
            if not match:
                raise ConfigError(f"{self.hostfile}:{number}: {line!r} is not 'HOST slots=N'")
            if match[1] in slots:
                raise ConfigError(f"{self.hostfile}:{number}: {match[1]} stands there twice; "
                                  "give it one line with all its slots")
            slots[match[1]] = int(match[2])
        if not slots:
            raise ConfigError(f"{self.hostfile}: names no host; add lines 'HOST slots=N'")
        return slots

    def command(self) -> list[str]:
        """The launcher's command line; every start takes another free port."""
        start = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port",
                 str(free_port())]
        hosts = self.hosts()
        if not hosts:
            # /dev/null: DeepSpeed would otherwise obey a /job/hostfile that happens to exist
            return [*start, "--hostfile", "/dev/null", "--num_gpus", str(self.ranks),
                    "--module", self.module, *self.arguments]
        # the remote shell splits the command again; DeepSpeed itself quotes those with blanks
        quoted = [item if " " in item else shlex.quote(item) for item in self.arguments]
        left_out = ["--exclude", "@".join(sorted(self.without))] if self.without else []
        # the address that was given is the first host's
        first = self.master_addr if hosts[0] == next(iter(self.slots())) else None
        return [*start, "--hostfile", str(self.hostfile), *left_out, "--launcher", "pdsh",
                "--force_multi", "--no_ssh_check", "--master_addr", first or hosts[0],
                "--module", self.module, *quoted]

    def environment(self, token: str, scratch: Path) -> dict[str, str]:
        """The launcher's environment, which marks all its processes with ``token``."""
        environment = {name: value for name, value in os.environ.items()
                       if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {TOKEN: token}
        if self.hostfile is not None:
            sent = {name: value for name, value in environment.items()
                    if name.startswith(EXPORTED)} | _own_variables()
            secret = {name for name, value in sent.items() if is_secret(name, value)}
            if secret:
                print(f"not sent to the hosts, as all their users could read it: "
                      f"{', '.join(sorted(secret))}; set it in each host's own environment",
                      flush=True)
            file = scratch / "deepspeed_env"
            # DeepSpeed puts them into a remote shell's line as they are
            file.write_text("".join(f"{name}={shlex.quote(value)}\n"
                                    for name, value in sent.items()
                                    if name not in secret and "\n" not in value))
            # MLFLOW_* it takes from its own environment, secrets included
            environment = {name: value for name, value in environment.items()
                           if not (name.startswith("MLFLOW_") and is_secret(name, value))}
            environment["DS_ENV_FILE"] = str(file)
            environment["PDSH_SSH_ARGS_APPEND"] = ssh_options()
        return environment


def is_secret(name: str, value: str) -> bool:
    """Whether a variable must not show on a command line."""
    return bool(SECRET.search(name) or PASSWORD_IN_URL.search(value))


def _own_variables() -> dict[str, str]:
    """What the user has written into DeepSpeed's own file for the hosts."""
    found = {}
    for folder in (Path.home(), Path.cwd()):
        own = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        for line in own.read_text().splitlines() if own.is_file() else []:
            name, equals, value = line.partition("=")
            if equals:
                # a shell's quotes in the file stay what they are
                found[name.strip()] = " ".join(shlex.split(value)) if "'" in value or '"' in value \
                    else value.strip()
    return found


def ssh_options() -> str:
    """The user's own ssh options for pdsh, then ours (ssh takes the first of two)."""
    return f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}".strip()


def launcher_tools(hostfile: bool) -> None:
    """Fail early where a tool of the launcher is missing."""
    for tool in ("pdsh", "ssh") if hostfile else ():
        if shutil.which(tool) is None:
            raise ClusterError(f"{tool} is not installed on this machine; it starts the ranks on "
                               "the hosts of --hostfile (Debian: apt-get install pdsh "
                               "openssh-client)")


WAITING = "waiting for store"


@dataclass
class Progress:
    """Where the slowest rank is and since when; ``before`` are heartbeats of earlier attempts.

    Only changes are compared, so the hosts' clocks need not agree.
    """

    before: list[Heartbeat]
    last_step: int | None = None  # the step after which the training has no more to do
    step: int | None = None
    beats: list[Heartbeat] = field(default_factory=list)
    changed_at: float = field(default_factory=time.monotonic)
    step_times_s: deque[float] = field(default_factory=lambda: deque(maxlen=101))
    _slowest: Heartbeat | None = None
    _signs: dict[int, tuple[Heartbeat, float]] = field(default_factory=dict)

    def update(self, beats: list[Heartbeat]) -> bool:
        """Take in the current heartbeats; True if the slowest rank advanced."""
        fresh = [beat for beat in beats if beat not in self.before]
        if not fresh:
            return False
        now = time.monotonic()
        for beat in fresh:
            if beat.rank not in self._signs or self._signs[beat.rank][0] != beat:
                self._signs[beat.rank] = beat, now
        slowest = min(fresh, key=lambda beat: beat.step)
        advanced = len(fresh) > len(self.beats) or slowest.step != self.step
        if any(beat.state == WAITING and beat not in self.beats for beat in fresh):
            # alive, and has told why it stands; it gives up by itself after data.retry_s
            self.changed_at = time.monotonic()
        previous = self._slowest
        if previous and previous.rank == slowest.rank and slowest.step > previous.step:
            self.step_times_s.append((slowest.time - previous.time)
                                     / (slowest.step - previous.step))
        if previous is None or slowest.step != previous.step:
            self._slowest = slowest
        self.beats, self.step = fresh, slowest.step
        if advanced:
            self.changed_at = time.monotonic()
        return advanced

    def limit_s(self, hang_s: float, start_s: float) -> float:
        """How long no step is normal: longer before the first step and after the last one."""
        if self.step is None or (self.last_step is not None and self.step >= self.last_step):
            return max(start_s, hang_s)
        median = statistics.median(self.step_times_s) if self.step_times_s else 0.0
        return max(hang_s, 10 * median)

    def ranks_silent_s(self) -> dict[int, float]:
        """Seconds since the last sign of life of each rank, by our clock."""
        now = time.monotonic()
        return {rank: now - seen for rank, (_, seen) in self._signs.items()}

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self.changed_at
