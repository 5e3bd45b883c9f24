"""Two "hosts" on one machine: network namespaces on a bridge, each with its own sshd.

They have addresses, links and ssh of their own and share files and process numbers.  All names end
in a random suffix, and everything is taken down by those names and by the pids started here.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

TOOLS = {"ip": "iproute2", "pdsh": "pdsh", "sshd": "openssh-server", "ssh-keygen": "openssh-client"}


@dataclass(frozen=True)
class Hosts:
    """Running hosts: their addresses, a hostfile, and how to run something on the first."""

    addresses: list[str]
    hostfile: Path
    ssh_arguments: str
    namespaces: list[str]
    gateway: str  # this machine's address as the hosts see it

    def environment(self) -> dict[str, str]:
        """For a launcher: its ssh options, and gloo on the hosts' own link."""
        return {**os.environ, "PDSH_SSH_ARGS_APPEND": self.ssh_arguments, "DS_ACCELERATOR": "cpu",
                "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}

    def on_first(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespaces[0], *command]


def skip_without_tools() -> None:
    """Skip, saying what is missing, where namespaces cannot be made."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("network namespaces need Linux and root")
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool, path=path) is None]
    if missing:
        pytest.skip(f"not installed: apt-get install {' '.join(missing)}")
    probe = f"njprobe{random.randrange(10**6)}"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"network namespaces are not allowed here: {done.stderr.strip()}")
    run("ip", "netns", "del", probe)


@contextmanager
def two_hosts(folder: Path, count: int = 2,
              variables: dict[str, str] | None = None) -> Iterator[Hosts]:
    """Bring the hosts up, and take them down again whatever happens.

    ``variables`` are in the environment of all that ssh starts there, and so is HOST_ADDRESS.
    """
    suffix = f"{random.randrange(16**5):05x}"
    subnet = f"10.{random.randrange(64, 128)}.{random.randrange(256)}"
    bridge = f"njbr{suffix}"
    namespaces = [f"nj{suffix}{letter}" for letter in "abcdef"[:count]]
    addresses = [f"{subnet}.{number}" for number in range(1, count + 1)]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "link", "set", bridge, "up")
        run("ip", "addr", "add", f"{subnet}.254/24", "dev", bridge)
        for namespace, address in zip(namespaces, addresses, strict=True):
            _connect(namespace, address, bridge)
        ssh_arguments = _keys(folder)
        daemons += [_sshd(folder, namespace, address, variables or {})
                    for namespace, address in zip(namespaces, addresses, strict=True)]
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{address} slots=1\n" for address in addresses))
        hosts = Hosts(addresses, hostfile, ssh_arguments, namespaces, f"{subnet}.254")
        _wait_for_ssh(hosts)
        yield hosts
    finally:
        for daemon in daemons:
            daemon.kill()
            daemon.wait()
        for namespace in namespaces:  # its end of the veth pair, and so the pair, goes with it
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def run(*command: str) -> None:
    """Run to success; a failure shows what the command said."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _connect(namespace: str, address: str, bridge: str) -> None:
    outside = f"v{namespace}"
    run("ip", "netns", "add", namespace)
    run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    run("ip", "link", "set", outside, "master", bridge, "up")
    run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
    run("ip", "-n", namespace, "link", "set", "eth0", "up")
    run("ip", "-n", namespace, "link", "set", "lo", "up")


def _keys(folder: Path) -> str:
    """Make host and user keys; returns the ssh options that use them."""
    for name in ("host_key", "user_key"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    config = folder / "ssh_config"
    config.write_text(f"IdentityFile {folder}/user_key\nIdentitiesOnly yes\nUser root\n"
                      "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n")
    return f"-F {config}"


def _sshd(folder: Path, namespace: str, address: str,
          variables: dict[str, str]) -> subprocess.Popen[bytes]:
    os.makedirs("/run/sshd", exist_ok=True)  # sshd insists on it
    config = folder / f"sshd_{namespace}"
    given = " ".join(f"{name}={value}" for name, value in
                     {**variables, "HOST_ADDRESS": address}.items())
    config.write_text(f"ListenAddress {address}\nHostKey {folder}/host_key\nStrictModes no\n"
                      f"AuthorizedKeysFile {folder}/authorized_keys\nUsePAM no\nPidFile none\n"
                      "PermitRootLogin yes\nPasswordAuthentication no\nMaxStartups 50\n"
                      f"SetEnv {given}\n")
    sshd = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin") or "sshd"
    with (folder / f"sshd_{namespace}.log").open("wb") as log:
        # -D: stays our child, so its pid is known
        return subprocess.Popen(["ip", "netns", "exec", namespace, sshd, "-D", "-e", "-f",
                                 str(config)], stdout=log, stderr=log)


def _wait_for_ssh(hosts: Hosts) -> None:
    for address in hosts.addresses:
        command = hosts.on_first("ssh", *hosts.ssh_arguments.split(), "-o", "ConnectTimeout=2",
                                 address, "true")
        for _ in range(50):
            if subprocess.run(command, capture_output=True).returncode == 0:
                break
            time.sleep(0.2)
        else:
            raise AssertionError(f"no ssh to {address}")
