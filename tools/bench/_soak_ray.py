"""The soak's Ray cluster: a head without room for ranks and three nodes, all on loopback."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cluster.processes import TOKEN
from tests.helpers import ROOT
from tests.helpers.ray_nodes import RAY, Cluster, cluster
from tools.bench._harm import ENDLESS
from tools.bench._soak_eye import Eye
from tools.bench._soak_field import Failed, Field, end_all, lay_out

RANKS = 3
ACTORS = ("ray::RankActor", "ray::Keeper")


@dataclass
class RayField(Field):
    """A run on three nodes, as submitted jobs."""

    cluster: Cluster = field(init=False)
    jobs: list[str] = field(default_factory=list, init=False)
    hang_s = 60  # the supervisor's default: a job has no options for it

    def start(self, at: int = 0) -> None:
        self.submit()

    def submit(self, *settings: str) -> None:
        """Submit the run as a job; a young cluster has no agent to take it, so that is retried."""
        self.jobs.append(f"soak-{len(self.jobs)}")
        words = [RAY, "job", "submit", "--no-wait", "--submission-id", self.jobs[-1], "--",
                 sys.executable, "-m", "neurojepa.pretrain", *self.arguments(), *settings]
        end = time.monotonic() + 60
        while True:
            done = subprocess.run(words, cwd=ROOT, env=self.environment(), text=True, timeout=120,
                                  capture_output=True)
            if done.returncode == 0:
                return
            if "No available agent" not in done.stderr or time.monotonic() > end:
                raise Failed(f"ray job submit: {done.stderr[-300:]}")
            time.sleep(1)

    def arguments(self) -> list[str]:
        """Of the training."""
        return ["--config", str(self.recipe), "run.launcher=ray", f"run.ranks={RANKS}",
                f"run.dir={self.run_dir.uri}", *ENDLESS, "train.checkpoint_every=10",
                "data.retry_s=300", *(["run.min_ranks=1"] if self.mode == "elastic" else [])]

    def environment(self) -> dict[str, str]:
        return {**self.cluster.environment, "RAY_ADDRESS": self.cluster.address}

    def size(self) -> int:
        return len(self.ranks()) if self.mode == "elastic" else RANKS

    def screen(self) -> str:
        """What the jobs have printed."""
        logs = Path(self.cluster.folder).glob("session_2*/logs/job-driver-*.log")
        return "".join(path.read_text(errors="replace")
                       for path in sorted(logs, key=lambda path: path.stat().st_ctime))

    def said_by(self, job: str) -> str:
        """What one job has printed."""
        logs = list(Path(self.cluster.folder).glob(f"session_2*/logs/job-driver-{job}.log"))
        return logs[0].read_text(errors="replace") if logs else ""

    def belongs(self, process: psutil.Process, own: dict[str, str]) -> bool:
        words = process.cmdline()
        return (TOKEN in own or "cluster.ray_job" in words or "supervise" in words
                or (bool(words) and words[0].startswith(ACTORS)))

    def one(self, word: str) -> psutil.Process:
        """The process of the run whose command line begins with a word or has it."""
        for process in self.processes():
            words = process.cmdline()
            if words and (word in words or words[0].startswith(word)):
                return process
        raise Failed(f"no process {word}")

    def node_of(self, rank: psutil.Process) -> subprocess.Popen[bytes]:
        above = {process.pid for process in rank.parents()}
        return next(node for node in self.cluster.nodes if node.pid in above)


@contextmanager
def on_ray(folder: Path, mode: str, recipe_of: Callable[[Path, str, str], Path]
           ) -> Iterator[tuple[RayField, Eye]]:
    """A Ray cluster with nothing submitted to it; all is gone at the end."""
    with ExitStack() as stack:
        lay_out(stack, folder)
        stack.callback(end_all, folder)
        found = RayField(folder, mode, recipe_of)
        found.cluster = stack.enter_context(cluster(0, found.variables))
        for _ in range(RANKS):
            found.cluster.add_node()
        found.prepare(stack, "127.0.0.1")
        yield found, stack.enter_context(closing(Eye(found.run_dir, mode != "elastic")))
