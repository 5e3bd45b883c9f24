"""A real Slurm on loopback: a controller and two nodes, with a munge of their own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from neurojepa.ports import free_port
from tests.helpers.waiting import wait_until

DAEMONS = ("slurmctld", "slurmd", "munged")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmctldPort={port}
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """A running Slurm: the environment of its commands."""

    environment: dict[str, str]

    def run(self, *command: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """The fields of a job."""
        words = self.run("scontrol", "show", "job", number, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)


def skip_without_slurm() -> None:
    """Skip, saying what is missing."""
    missing = [name for name in DAEMONS if not shutil.which(name, path=_path())]
    if missing or os.geteuid():
        pytest.skip(f"needs root and {', '.join(missing) or 'no more'}; "
                    "apt-get install slurmctld slurmd slurm-client munge")


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@contextmanager
def slurm(folder: Path, nodes: int = 2) -> Iterator[Slurm]:
    """Bring it up, and end its daemons whatever happens."""
    host = socket.gethostname()
    (folder / "munge").mkdir()
    (folder / "state").mkdir()
    key = folder / "munge/key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o600)
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, user="root", folder=folder, port=free_port())
                      + "".join(f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 "
                                f"Port={free_port()} CPUs=4\n" for number in range(nodes)))
    made = Slurm({**os.environ, "PATH": _path(), "SLURM_CONF": str(config)})
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with (folder / f"{command[0]}-{len(daemons)}.out").open("wb") as out:
            daemons.append(subprocess.Popen(command, env=made.environment, stdout=out, stderr=out))

    try:
        start("munged", "--foreground", "--force", f"--key-file={key}",
              f"--socket={folder}/munge/socket", f"--pid-file={folder}/munge/pid",
              f"--log-file={folder}/munge/log", f"--seed-file={folder}/munge/seed")
        _until(lambda: (folder / "munge/socket").exists(), "munged")
        start("slurmctld", "-D", "-i")
        for number in range(nodes):
            start("slurmd", "-D", "-N", f"n{number}")
        _until(lambda: subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%D"],
                                      env=made.environment, capture_output=True,
                                      text=True).stdout.strip() == str(nodes), "Slurm")
        yield made
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _until(happened, what: str) -> None:  # type: ignore[no-untyped-def]
    wait_until(happened, why=lambda: f"{what} did not start")
