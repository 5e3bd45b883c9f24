"""A real Ray cluster on loopback, whose nodes and processes can be killed one by one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from neurojepa.ports import free_port
from tests.helpers import ROOT
from tests.helpers.waiting import wait_until

RAY = str(Path(sys.executable).parent / "ray")
# Ray binds the machine's own address unless told that loopback is enough.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu", "RAY_USAGE_STATS_ENABLED": "0"}
# On loopback Ray refuses to start a second node by command, though its nodes work there.
START = """
import sys, types
from ray.scripts import scripts
scripts.ray_constants = types.SimpleNamespace(**{**vars(scripts.ray_constants),
                                                 "ENABLE_RAY_CLUSTER": True})
sys.exit(scripts.main())
"""
# a node that refuses connections is taken for dead after a second, one that is only slow is not
IMPATIENT = {"RAY_health_check_initial_delay_ms": "0", "RAY_health_check_period_ms": "300",
             "RAY_health_check_timeout_ms": "10000", "RAY_health_check_failure_threshold": "3"}


@dataclass
class Cluster:
    """Addresses and the environment of clients, and the processes of its nodes, the head first.

    ``logs`` has what each node that was ever started prints, in that order.
    """

    environment: dict[str, str]
    address: str
    folder: str
    dashboard: int  # its port
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)

    def start(self, *arguments: str, num_cpus: int = 1) -> subprocess.Popen[bytes]:
        """Start a node; --block keeps its processes below the one that is returned."""
        self.logs.append(Path(self.folder) / f"node-{len(self.logs)}.log")
        with self.logs[-1].open("wb") as log:
            node = subprocess.Popen(
                [sys.executable, "-c", START, "start", "--block", "--num-cpus", str(num_cpus),
                 "--object-store-memory", "100000000", *arguments], cwd=ROOT,
                env=self.environment, stdout=log, stderr=log)
        self.nodes.append(node)
        return node

    def start_head(self, num_cpus: int) -> None:
        """The first node; after the loss of a head, a new cluster in the old one's place."""
        head = self.start("--head", "--port", self.address.rpartition(":")[2], "--dashboard-host",
                          "127.0.0.1", "--dashboard-port", str(self.dashboard),
                          "--dashboard-agent-listen-port", str(free_port()),  # 52365 may be taken
                          "--temp-dir", self.folder, num_cpus=num_cpus)
        wait_until(lambda: _answers(self.dashboard, head), why=lambda: "Ray did not start")

    def add_node(self) -> subprocess.Popen[bytes]:
        """Another node; one after the other, as two of one address get in each other's way."""
        node = self.start("--address", self.address, "--dashboard-agent-listen-port",
                          str(free_port()))
        log = self.logs[-1]
        wait_until(lambda: "Ray runtime started" in log.read_text(), why=log.read_text)
        return node

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """SIGKILL to everything of a node, the raylet first, as when a machine goes dark."""
        family = psutil.Process(node.pid).children(recursive=True)
        for raylet in (True, False):
            for process in family:
                with suppress(psutil.NoSuchProcess):  # its parent's end is the end of many
                    if (process.name() == "raylet") is raylet:
                        process.kill()
        node.kill()
        node.wait()
        self.nodes.remove(node)


@contextmanager
def cluster(num_cpus: int = 1, variables: dict[str, str] | None = None) -> Iterator[Cluster]:
    """A head node with so many CPUs; more nodes are added by the test.

    ``variables`` are in the environment of all that runs there.
    """
    folder = tempfile.mkdtemp(prefix="ry")  # short: Ray puts unix sockets below it
    dashboard = free_port()
    # a token of its own: Ray would otherwise enforce or ignore the user's, head and client apart
    environment = {**os.environ, **LOOPBACK, **IMPATIENT, "RAY_AUTH_MODE": "token",
                   "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2,
                   "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", **(variables or {})}
    environment.pop("RAY_ADDRESS", None)
    made = Cluster(environment, f"127.0.0.1:{free_port()}", folder, dashboard)
    try:
        made.start_head(num_cpus)
        yield made
    finally:
        for node in list(made.nodes):
            made.kill(node)
        shutil.rmtree(folder, ignore_errors=True)


def _answers(port: int, head: subprocess.Popen[bytes]) -> bool:
    assert head.poll() is None, "Ray did not start"
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
