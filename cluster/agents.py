"""Start attempts by agents (agent.py): on this machine, or on the hosts of a hostfile by ssh."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cluster import hosts
from cluster.launcher import Attempt
from cluster.link import ask
from cluster.processes import TOKEN
from cluster.world import AgentWorld
from neurojepa.errors import ClusterError, ConfigError
from neurojepa.ports import free_port

# Variables of this process that ranks on other hosts get, besides what is in .deepspeed_env.  They
# travel over standard input, so credentials may be among them.
EXPORTED = ("PYTHON", "OMP_", "DS_", "GLOO_", "NCCL_", "UCX_", "FI_", "TORCH_", "NEUROJEPA_",
            "SLURM_JOB", "LD_LIBRARY_PATH", "WANDB_", "MLFLOW_", "CUDA_HOME", "AWS_ENDPOINT_URL",
            "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN")


@dataclass
class AgentLauncher:
    """See launcher.Launcher.

    Parameters
    ----------
    arguments
        What follows ``python -m <module>``: ``--config C [a.b=v ...]``.
    ranks
        On this machine, where there is no hostfile.
    hostfile
        Lines ``HOST slots=N``.
    master_addr
        Address of the hostfile's first host as the others see it; its name there by default.  It
        stays that host's, whoever is the first one after a change of the file.
    """

    arguments: list[str]
    ranks: int = 1
    hostfile: str | None = None
    master_addr: str | None = None
    module: str = "neurojepa.pretrain"

    def __post_init__(self) -> None:
        self._addressed = next(iter(self.slots()), None)

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def slots(self) -> dict[str, int]:
        if self.hostfile is None:
            return {}
        try:
            lines = Path(self.hostfile).read_text("utf-8").splitlines()
        except OSError as error:
            raise ConfigError(f"{self.hostfile}: cannot read the hostfile "
                              f"({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.hostfile}: the hostfile is no text in UTF-8; save it as "
                              "such") from error
        slots: dict[str, int] = {}
        for number, line in enumerate(lines, start=1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            # what begins with a dash would be an option of ssh
            match = re.fullmatch(r"([^\s-]\S*)\s+slots=(\d+)", text)
            if not match or not int(match[2]):
                raise ConfigError(f"{self.hostfile}:{number}: {line!r} is not 'HOST slots=N' with "
                                  "N of 1 or more")
            if match[1] in slots:
                raise ConfigError(f"{self.hostfile}:{number}: {match[1]} stands there twice; "
                                  "give it one line with all its slots")
            slots[match[1]] = int(match[2])
        if not slots:
            raise ConfigError(f"{self.hostfile}: names no host; add lines 'HOST slots=N'")
        return slots

    def problems(self, slots: dict[str, int], folder: str | None,
                 odd: Callable[[dict[str, dict[str, Any]]], None]) -> dict[str, str]:
        return hosts.problems(slots, folder, odd, self._address_of(next(iter(slots))))

    def _address_of(self, host: str) -> str | None:
        """The address that was given for a host."""
        return self.master_addr if host == self._addressed else None

    def lacks(self) -> str:
        return ""

    def close(self) -> None:
        pass  # it has asked for nothing

    def start(self, attempt: Attempt, log: IO[bytes]) -> AgentWorld:
        orders = self.orders(attempt)
        size = sum(len(order["ranks"]) for order in orders.values())
        return AgentWorld(attempt, size, orders, log)

    def orders(self, attempt: Attempt) -> dict[str, dict[str, Any]]:
        """What the agent of each host is to start; every start takes another free port."""
        # not as the hostfile says by now: whoever edits it does so at any moment
        chosen = attempt.slots or {"": self.ranks}
        first = next(iter(chosen))
        world = {"MASTER_ADDR": self._address_of(first) or first or "127.0.0.1",
                 "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(sum(chosen.values()))}
        environment = (_exported() if attempt.slots else {}) | {TOKEN: attempt.token}
        orders, rank = {}, 0
        for host, count in chosen.items():
            orders[host] = {
                "command": [sys.executable, "-u", "-m", self.module, *self.arguments],
                "environment": environment, "before": attempt.before,
                "ranks": [{**world, "RANK": str(rank + local), "LOCAL_RANK": str(local),
                           "LOCAL_WORLD_SIZE": str(count)} for local in range(count)]}
            rank += count
        return orders

    def is_there(self, attempt: Attempt) -> bool:
        return ask(attempt.hosts or [""], attempt)

    def adopt(self, attempt: Attempt, log: IO[bytes]) -> AgentWorld:
        return AgentWorld(attempt, 0, None, log)


def _exported() -> dict[str, str]:
    return {name: value for name, value in os.environ.items()
            if name.startswith(EXPORTED)} | _own_variables()


def _own_variables() -> dict[str, str]:
    """What the user has written into DeepSpeed's own file for the hosts."""
    found = {}
    for folder in (Path.home(), Path.cwd()):
        own = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        for line in own.read_text().splitlines() if own.is_file() else []:
            name, equals, value = line.partition("=")
            if equals:
                found[name.strip()] = _unquoted(value, f"{own}: {name.strip()}")
    return found


def _unquoted(value: str, where: str) -> str:
    """Without the quotes that a shell would take away."""
    try:
        return " ".join(shlex.split(value)) if "'" in value or '"' in value else value.strip()
    except ValueError as error:
        # the value is not shown: it may be a secret
        raise ConfigError(f"{where}: has a quote that is not closed; close or remove it") from error


def require_ssh() -> None:
    """Fail early where ssh is missing."""
    if shutil.which("ssh") is None:
        raise ClusterError("ssh is not installed on this machine; it reaches the hosts of "
                           "--hostfile (Debian: apt-get install openssh-client)")
