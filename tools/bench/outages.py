"""outages: what an operator may meet, done to real runs; when it is noticed, when training goes on.

Three hosts are network namespaces with sshd on this machine (needs root, iproute2, pdsh and
openssh), the store is a real S3 server, the full disk a tmpfs.  Training is the tests' tiny recipe.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.rundir import RunDir
from neurojepa.config import dump_config
from tests.helpers import ROOT
from tests.helpers.feeds import tiny_config, write_feed
from tests.helpers.hosts import Hosts, two_hosts
from tests.helpers.hosts import run as command
from tests.helpers.launches import write_recipe
from tests.helpers.proxy import Proxy
from tools.bench.common import machine, print_table
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


def run(quick: bool, official: str | None) -> dict[str, Any]:
    """All stories, or that of the hosts; returns the seconds of each row."""
    print(machine(), flush=True)
    rows: list[tuple[str, str, float]] = []
    for story in [_hosts] if quick else [_hosts, _one_rank, _store, _disk]:
        with tempfile.TemporaryDirectory(prefix="outages-") as folder:
            rows += story(Path(folder))
    print_table(("done", "then", "seconds"), rows)
    return {"seconds": {f"{done}: {then}": seconds for done, then, seconds in rows}}


def _hosts(folder: Path) -> list[tuple[str, str, float]]:
    story, run_dir, recipe = Story(), RunDir(str(folder / "run")), write_recipe(folder)
    with two_hosts(folder, 3) as hosts:
        _link(hosts, 2, "down")
        story.do("start with a dead host, names lead to loopback", lambda: None)
        with _supervised(run_dir, recipe, hosts, 0) as first:
            story.until("named", lambda: _events(run_dir, "host_excluded"))
            story.until("first checkpoint on the other two", run_dir.committed_step)
            story.do("cluster stop from elsewhere", lambda: _stop(run_dir))
            story.until("stopped with a checkpoint", lambda: first.poll() == 75)
        _link(hosts, 2, "up")
        with _supervised(run_dir, recipe, hosts, 0) as second:
            story.do("start with three hosts", lambda: None)
            story.until("three ranks train", lambda: len(run_dir.heartbeats()) == 3)
            story.do("one host's link is cut", lambda: _link(hosts, 2, "down"))
            story.until("named as lost", lambda: _events(run_dir, "host_lost"))
            story.until("going on with two", lambda: len(run_dir.heartbeats()) == 2)
            pids = [beat.pid for beat in run_dir.heartbeats()]
            story.do("supervisor killed, started on another host", second.kill)
            with _supervised(run_dir, recipe, hosts, 1) as third:
                story.until("owner again", lambda: _events(run_dir, "takeover"))
                committed = run_dir.committed_step()
                story.until("the same ranks commit", lambda: run_dir.committed_step() != committed
                            and [beat.pid for beat in run_dir.heartbeats()] == pids)
                _link(hosts, 2, "up")
                story.do("host back, a rank killed", lambda: os.kill(pids[1], signal.SIGKILL))
                story.until("noticed", lambda: len(_events(run_dir, "exit")) == 3)
                story.until("three ranks train", lambda: len(run_dir.heartbeats()) == 3)
                story.do("cluster stop --now", lambda: _stop(run_dir, "--now"))
                story.until("ended", lambda: third.poll() == 75)
    return story.rows


def _one_rank(folder: Path) -> list[tuple[str, str, float]]:
    story, run_dir, recipe = Story(), RunDir(str(folder / "run")), write_recipe(folder)
    with two_hosts(folder) as hosts, _supervised(
            run_dir, recipe, hosts, 0, "--hang-seconds", "30",
            arguments=("train.global_batch=32", "train.micro_batch=16")):
        story.do("start", lambda: None)
        story.until("two ranks train", run_dir.committed_step)
        pid, ended = run_dir.heartbeats()[1].pid, threading.Event()

        def throttle() -> None:
            with suppress(ProcessLookupError):  # it has ended: the story will tell
                while not ended.is_set():
                    os.kill(pid, signal.SIGSTOP)
                    time.sleep(0.06)
                    os.kill(pid, signal.SIGCONT)
                    time.sleep(0.04)

        slow = threading.Thread(target=throttle, daemon=True)
        story.do("a rank gets less than half of its time", slow.start)
        story.until("named", lambda: [row["rank"] for row in _events(run_dir, "straggler")] == [1])
        ended.set()
        slow.join()
        story.do("a rank stopped (SIGSTOP)", lambda: os.kill(pid, signal.SIGSTOP))
        story.until("named, with stacks", lambda: [row["culprits"] for row in _events(
            run_dir, "hang")] == [[1]])
        story.until("going on", lambda: len(_events(run_dir, "resume")) == 1)
    return story.rows


def _store(folder: Path) -> list[tuple[str, str, float]]:
    story, run_dir = Story(), RunDir(str(folder / "run"))
    proxy = Proxy(None)  # so that the store keeps its address
    with ExitStack() as servers, closing(proxy):
        _serve(servers, folder, proxy)
        import s3fs

        s3fs.S3FileSystem().mkdir("feeds")
        feed = write_feed("s3://feeds/feed")
        recipe = folder / "recipe.yaml"
        recipe.write_text(dump_config(tiny_config(feed, run_dir.uri, steps=10**6,
                                                  checkpoint_every=20, log_every=5)))
        with _supervised(run_dir, recipe, None, 0, arguments=("data.retry_s=300",)):
            story.do("start", lambda: None)
            story.until("training", run_dir.committed_step)
            story.do("the feed's store killed, data.retry_s=300", servers.close)
            story.until("the rank says that it waits", lambda: any(
                beat.state != "step" for beat in run_dir.heartbeats()))
            time.sleep(90)
            committed = run_dir.committed_step()
            story.do("store back after 90 s", lambda: _serve(servers, folder, proxy))
            story.until("next checkpoint", lambda: run_dir.committed_step() != committed)
            assert not _events(run_dir, "restart") and not _events(run_dir, "hang")
    return story.rows


def _disk(folder: Path) -> list[tuple[str, str, float]]:
    disk = folder / "disk"
    disk.mkdir()
    command("mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk))
    try:
        story, run_dir, recipe = Story(), RunDir(str(disk / "run")), write_recipe(folder)
        with _supervised(run_dir, recipe, None, 0):
            story.do("start", lambda: None)
            story.until("training", run_dir.committed_step)
            filler = disk / "filler"
            story.do("the run's disk is full", lambda: _fill(filler))
            # of the log too, so only the supervisor's own screen can say it
            story.until("said, waiting", lambda: "waiting for it" in _screen(recipe).read_text(
                errors="replace"))
            committed = run_dir.committed_step()
            story.do("room made", filler.unlink)
            story.until("next checkpoint", lambda: run_dir.committed_step() != committed)
    finally:
        command("umount", "-l", str(disk))
    return story.rows


# ---- pieces --------------------------------------------------------------------------------------

@contextmanager
def _supervised(run_dir: RunDir, recipe: Path, hosts: Hosts | None, at: int, *options: str,
                arguments: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """A supervisor on one of the hosts (or here), asked to stop at the end."""
    words = [sys.executable, "-m", "cluster", "supervise", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if hosts is not None:
        words = ["ip", "netns", "exec", hosts.namespaces[at], *words, "--hostfile",
                 str(hosts.hostfile)]
        environment = {name: value for name, value in hosts.environment().items()
                       if name != "GLOO_SOCKET_IFNAME"}
    with _screen(recipe).open("ab") as screen:
        process = subprocess.Popen(
            [*words, "--", "--config", str(recipe), *ENDLESS, "train.checkpoint_every=10",
             f"run.dir={run_dir.uri}", *arguments], cwd=ROOT, env=environment, stdout=screen,
            stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(LONGEST_S)


def _screen(recipe: Path) -> Path:
    """What supervisors say, beside the recipe: the run's own disk may be full."""
    return recipe.with_suffix(".screen")


def _events(run_dir: RunDir, name: str) -> list[dict[str, Any]]:
    return [row for row in run_dir.events() if row["event"] == name]


def _stop(run_dir: RunDir, *options: str) -> None:
    subprocess.Popen([sys.executable, "-m", "cluster", "stop", run_dir.uri, *options], cwd=ROOT,
                     stdout=subprocess.DEVNULL)


def _link(hosts: Hosts, number: int, state: str) -> None:
    command("ip", "-n", hosts.namespaces[number], "link", "set", "eth0", state)


def _serve(servers: ExitStack, folder: Path, proxy: Proxy) -> None:
    environment = servers.enter_context(serve_s3(folder / "s3"))
    proxy.target = environment["AWS_ENDPOINT_URL"]
    os.environ.update({**environment, "AWS_ENDPOINT_URL": proxy.url})


def _fill(filler: Path) -> None:
    try:
        with filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
    except OSError:
        return
