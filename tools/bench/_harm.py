"""What benches that do harm to real runs share: supervisors on hosts, links, stores, full disks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.rundir import RunDir
from tests.helpers import ROOT
from tests.helpers.hosts import Hosts
from tests.helpers.hosts import run as command
from tests.helpers.proxy import Proxy
from tools.store import serve_s3

LONGEST_S = 200.0
# so calm that the tiny model never diverges
ENDLESS = ("train.steps=1000000", "train.log_every=5", "train.global_batch=6", "optim.lr=1.0e-5",
           "train.health.spike_deviations=0")


@dataclass
class Story:
    """What was done to a run, and after how many seconds something happened."""

    rows: list[tuple[str, str, float]] = field(default_factory=list)
    _done: str = ""
    _at: float = 0.0

    def do(self, what: str, deed: Callable[[], Any]) -> None:
        deed()
        self._done, self._at = what, time.monotonic()

    def until(self, what: str, happened: Callable[[], Any]) -> None:
        """Wait for it and keep the time since the last deed."""
        while not happened():
            if time.monotonic() - self._at > LONGEST_S:
                raise AssertionError(f"{self._done}: {what}: not within {LONGEST_S:.0f} s")
            time.sleep(0.1)
        self.rows.append((self._done, what, round(time.monotonic() - self._at, 1)))
        print(*self.rows[-1], sep="; ", flush=True)


def start_supervisor(run_dir: RunDir, recipe: Path, hosts: Hosts | None, at: int, *options: str,
                     arguments: tuple[str, ...] = (),
                     variables: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A supervisor of an endless training on one of the hosts, or here."""
    words = [sys.executable, "-m", "cluster", "supervise", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if hosts is not None:
        words = ["ip", "netns", "exec", hosts.namespaces[at], *words, "--hostfile",
                 str(hosts.hostfile)]
        environment = {name: value for name, value in hosts.environment().items()
                       if name != "GLOO_SOCKET_IFNAME"}
    with screen_of(recipe).open("ab") as screen:
        return subprocess.Popen(
            [*words, "--", "--config", str(recipe), *ENDLESS, "train.checkpoint_every=10",
             f"run.dir={run_dir.uri}", *arguments], cwd=ROOT,
            env={**environment, **(variables or {})}, stdout=screen, stderr=subprocess.STDOUT)


@contextmanager
def supervised(run_dir: RunDir, recipe: Path, hosts: Hosts | None, at: int, *options: str,
               arguments: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """The same, asked to stop at the end."""
    process = start_supervisor(run_dir, recipe, hosts, at, *options, arguments=arguments)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(LONGEST_S)


def screen_of(recipe: Path) -> Path:
    """What supervisors say, beside the recipe: the run's own disk may be full."""
    return recipe.with_suffix(".screen")


def events(run_dir: RunDir, name: str) -> list[dict[str, Any]]:
    return [row for row in run_dir.events() if row["event"] == name]


def stop(run_dir: RunDir, *options: str) -> None:
    subprocess.Popen([sys.executable, "-m", "cluster", "stop", run_dir.uri, *options], cwd=ROOT,
                     stdout=subprocess.DEVNULL)


def link(hosts: Hosts, number: int, state: str) -> None:
    command("ip", "-n", hosts.namespaces[number], "link", "set", "eth0", state)


def serve(servers: ExitStack, folder: Path, proxy: Proxy) -> None:
    environment = servers.enter_context(serve_s3(folder / "s3"))
    proxy.target = environment["AWS_ENDPOINT_URL"]
    os.environ.update({**environment, "AWS_ENDPOINT_URL": proxy.url})


def fill(filler: Path) -> None:
    try:
        with filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
    except OSError:
        return
