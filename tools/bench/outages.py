"""outages: what an operator may meet, done to real runs; when it is noticed, when training goes on.

Three hosts are network namespaces with sshd on this machine (needs root, iproute2 and
openssh), the store is a real S3 server, the full disk a tmpfs.  Training is the tests' tiny recipe.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from cluster.rundir import RunDir
from neurojepa.config import dump_config
from tests.helpers.feeds import tiny_config, write_feed
from tests.helpers.hosts import run as command
from tests.helpers.hosts import two_hosts
from tests.helpers.launches import write_recipe
from tests.helpers.proxy import Proxy
from tools.bench._harm import Story, events, fill, link, screen_of, serve, stop, supervised
from tools.bench.common import machine, print_table


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
        link(hosts, 2, "down")
        story.do("start with a dead host, names lead to loopback", lambda: None)
        with supervised(run_dir, recipe, hosts, 0) as first:
            story.until("named", lambda: events(run_dir, "host_excluded"))
            story.until("first checkpoint on the other two", run_dir.committed_step)
            story.do("cluster stop from elsewhere", lambda: stop(run_dir))
            story.until("stopped with a checkpoint", lambda: first.poll() == 75)
        link(hosts, 2, "up")
        with supervised(run_dir, recipe, hosts, 0) as second:
            story.do("start with three hosts", lambda: None)
            story.until("three ranks train", lambda: _training(run_dir) == 3)
            story.do("one host's link is cut", lambda: link(hosts, 2, "down"))
            story.until("named as lost", lambda: events(run_dir, "host_lost"))
            story.until("going on with two", lambda: _training(run_dir) == 2)
            pids = [beat.pid for beat in run_dir.heartbeats()]
            story.do("supervisor killed, started on another host", second.kill)
            with supervised(run_dir, recipe, hosts, 1) as third:
                story.until("owner again", lambda: events(run_dir, "takeover"))
                committed = run_dir.committed_step()
                story.until("the same ranks commit", lambda: run_dir.committed_step() != committed
                            and [beat.pid for beat in run_dir.heartbeats()] == pids)
                link(hosts, 2, "up")
                story.do("host back, a rank killed", lambda: os.kill(pids[1], signal.SIGKILL))
                story.until("noticed", lambda: len(events(run_dir, "exit")) == 3)
                story.until("three ranks train", lambda: _training(run_dir) == 3)
                story.do("cluster stop --now", lambda: stop(run_dir, "--now"))
                story.until("ended", lambda: third.poll() == 75)
    return story.rows


def _training(run_dir: RunDir) -> int:
    """How many ranks the run has, if they all make steps; otherwise 0."""
    beats = run_dir.heartbeats()
    return len(beats) if all(beat.state == "step" for beat in beats) else 0


def _one_rank(folder: Path) -> list[tuple[str, str, float]]:
    story, run_dir, recipe = Story(), RunDir(str(folder / "run")), write_recipe(folder)
    with two_hosts(folder) as hosts, supervised(
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
        story.until("named", lambda: [row["rank"] for row in events(run_dir, "straggler")] == [1])
        ended.set()
        slow.join()
        story.do("a rank stopped (SIGSTOP)", lambda: os.kill(pid, signal.SIGSTOP))
        story.until("named, with stacks", lambda: [row["culprits"] for row in events(
            run_dir, "hang")] == [[1]])
        story.until("going on", lambda: len(events(run_dir, "resume")) == 1)
    return story.rows


def _store(folder: Path) -> list[tuple[str, str, float]]:
    story, run_dir = Story(), RunDir(str(folder / "run"))
    proxy = Proxy(None)  # so that the store keeps its address
    with ExitStack() as servers, closing(proxy):
        serve(servers, folder, proxy)
        import s3fs

        s3fs.S3FileSystem().mkdir("feeds")
        feed = write_feed("s3://feeds/feed")
        recipe = folder / "recipe.yaml"
        recipe.write_text(dump_config(tiny_config(feed, run_dir.uri, steps=10**6,
                                                  checkpoint_every=20, log_every=5)))
        with supervised(run_dir, recipe, None, 0, arguments=("data.retry_s=300",)):
            story.do("start", lambda: None)
            story.until("training", run_dir.committed_step)
            story.do("the feed's store killed, data.retry_s=300", servers.close)
            story.until("the rank says that it waits", lambda: any(
                beat.state == "waiting for store" for beat in run_dir.heartbeats()))
            time.sleep(90)
            committed = run_dir.committed_step()
            story.do("store back after 90 s", lambda: serve(servers, folder, proxy))
            story.until("next checkpoint", lambda: run_dir.committed_step() != committed)
            assert not events(run_dir, "restart") and not events(run_dir, "hang")
    return story.rows


def _disk(folder: Path) -> list[tuple[str, str, float]]:
    disk = folder / "disk"
    disk.mkdir()
    command("mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk))
    try:
        story, run_dir, recipe = Story(), RunDir(str(disk / "run")), write_recipe(folder)
        with supervised(run_dir, recipe, None, 0):
            story.do("start", lambda: None)
            story.until("training", run_dir.committed_step)
            filler = disk / "filler"
            story.do("the run's disk is full", lambda: fill(filler))
            # of the log too, so only the supervisor's own screen can say it
            story.until("said, waiting", lambda: any(
                words in screen_of(recipe).read_text(errors="replace")
                for words in ("waiting for it", "cannot write")))
            committed = run_dir.committed_step()
            story.do("room made", filler.unlink)
            story.until("next checkpoint", lambda: run_dir.committed_step() != committed)
    finally:
        command("umount", "-l", str(disk))
    return story.rows
