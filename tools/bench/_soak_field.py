"""Where the soak's runs take place: a run, its disk or store, and an eye on every rank.

All that is started there loads ``tools/bench/_soak_rank.py`` by a sitecustomize: a rank notes the
samples it trains on, and takes a nap before each micro-batch, so that a soak on a small machine
leaves room for its own restarts.  Processes are found by what they carry in their environment,
whoever started them.  What differs is in _soak_hosts.py and _soak_ray.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import psutil

from cluster.processes import TOKEN
from cluster.rundir import RunDir
from neurojepa.errors import DataError
from neurojepa.storage import is_outage
from tests.helpers import ROOT
from tests.helpers.hosts import run as command
from tests.helpers.proxy import Proxy
from tools.bench._harm import serve
from tools.bench.victim import noted

MARK = "NEUROJEPA_SOAK"  # a folder, in the environment of all that the soak starts
SITE = "from tools.bench import _soak_rank\n_soak_rank.begin()\n"


class Failed(Exception):
    """Something did not come about in time, or should not have."""


@dataclass
class Field(ABC):
    """A round's run and the processes of it.

    Parameters
    ----------
    mode
        ``fixed``: attempts wait for all hosts, on a disk; ``elastic``: they go on with those that
        are there; ``store``: fixed, and the run and its feed are in S3.
    recipe_of
        Writes a recipe, given the round's folder, the feed's URI and the run's.
    """

    folder: Path
    mode: str
    recipe_of: Callable[[Path, str, str], Path]
    run_dir: RunDir = field(init=False)
    recipe: Path = field(init=False)
    variables: dict[str, str] = field(init=False)  # of all that is started here
    open_store: Callable[[], None] = field(default=lambda: None, init=False)
    close_store: Callable[[], None] = field(default=lambda: None, init=False)
    notes: Notes = field(init=False)
    hang_s: ClassVar[int]  # without a step, until it is a hang

    def __post_init__(self) -> None:
        self.variables = {MARK: str(self.folder), "PYTHONPATH": f"{self.folder}:{ROOT}"}
        self.notes = Notes(self.folder)

    def prepare(self, stack: ExitStack, address: str) -> None:
        """A disk or a store at an address of this machine, with a feed; the stack takes it down."""
        disk = self.folder / "disk"
        self.run_dir, feed = RunDir(str(disk / "run")), str(self.folder.parent / "feed")
        if self.mode == "store":
            self.run_dir, feed = RunDir("s3://soak/run"), "s3://soak/feed"
            self._serve_store(stack, address, feed)
        self.recipe = self.recipe_of(self.folder, feed, self.run_dir.uri)

    def _serve_store(self, stack: ExitStack, address: str, feed: str) -> None:
        from tests.helpers.feeds import write_feed

        proxy = stack.enter_context(closing(Proxy(None, address)))
        servers = stack.enter_context(ExitStack())
        self.open_store = lambda: serve(servers, self.folder, proxy)
        self.close_store = servers.close
        self.open_store()
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()  # those know the last round's store
        s3fs.S3FileSystem().mkdir("soak")
        write_feed(feed)
        own = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        # a host's own credentials, as a file or an instance role would give them
        (self.folder / "environment.json").write_text(json.dumps(own))

    # ---- doing -----------------------------------------------------------------------------------

    @abstractmethod
    def start(self, at: int = 0) -> Any:
        """Start the run as an operator would, on a host where there are several to start it on."""

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """Of an operator's commands."""

    def command(self, *words: str, before: tuple[str, ...] = ()
                ) -> subprocess.CompletedProcess[str]:
        """One of the operator's commands."""
        return subprocess.run([*before, sys.executable, *words], cwd=ROOT, text=True, timeout=200,
                              capture_output=True, env=self.environment())

    # ---- looking ---------------------------------------------------------------------------------

    @abstractmethod
    def size(self) -> int:
        """Ranks of the last attempt; 0 before the first."""

    @abstractmethod
    def screen(self) -> str:
        """What the run's supervisors have said."""

    def belongs(self, process: psutil.Process, own: dict[str, str]) -> bool:
        """Whether a marked process is the run's, and has to be gone at its end."""
        return True

    def processes(self) -> list[psutil.Process]:
        """All that belongs to the run."""
        found = []
        for process, own in marked(self.folder):
            with suppress(psutil.NoSuchProcess):
                if self.belongs(process, own):
                    found.append(process)
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """The rank processes, without what they started."""
        found = {process.pid: (process, own) for process, own in marked(self.folder)
                 if "RANK" in own and TOKEN in own}
        whole = {}
        for process, own in found.values():
            with suppress(psutil.NoSuchProcess):
                if process.ppid() not in found:
                    whole[int(own["RANK"])] = process
        return whole

    def tokens(self) -> set[str]:
        """The attempts whose ranks are alive."""
        return {own[TOKEN] for _, own in marked(self.folder) if "RANK" in own and TOKEN in own}

    def events(self, *names: str) -> list[dict[str, Any]]:
        """The run's events of these names; all without names."""
        return [row for row in self.run_dir.events() if not names or row["event"] in names]

    def committed(self) -> int:
        return self.run_dir.committed_step() or 0

    def until(self, what: str, happened: Callable[[], Any], limit_s: float = 150.0) -> float:
        """Wait for it; returns how long that took."""
        began = time.monotonic()
        while True:
            try:
                if happened():
                    return time.monotonic() - began
            except DataError as error:
                if not is_outage(error):
                    raise
            if time.monotonic() - began > limit_s:
                raise Failed(f"{what}: not within {limit_s:.0f} s")
            time.sleep(0.1)

    def trained_since(self, begin: dict[int, int]) -> bool:
        """Whether all ranks of the last attempt have begun and made a step since."""
        ranks = self.size()
        return ranks > 0 and all(self.notes.stepped(rank, begin.get(rank, 0))
                                 for rank in range(ranks))


@dataclass(frozen=True)
class Notes:
    """What ranks have noted: samples by position, and the first step of each process."""

    folder: Path

    def sizes(self) -> dict[int, int]:
        """Bytes by rank: what comes later has happened later."""
        return {int(path.stem[6:]): path.stat().st_size
                for path in self.folder.glob("notes-*.jsonl")}

    def stepped(self, rank: int, begin: int) -> bool:
        """Whether a process that came after ``begin`` bytes has made a step."""
        path = self.folder / f"notes-{rank}.jsonl"
        if not path.exists():
            return False
        with path.open("rb") as file:
            file.seek(begin)
            return b'{"mark": "step"' in file.read()

    def samples(self) -> dict[int, set[str]]:
        """Scans by position."""
        found: dict[int, set[str]] = {}
        for path in self.folder.glob("notes-*.jsonl"):
            for row in noted(path):
                for position, scan in zip(row.get("positions", []), row.get("scans", []),
                                          strict=True):
                    found.setdefault(position, set()).add(scan)
        return found


def marked(folder: Path) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """Live processes that carry the mark of a folder or of one below it, and their environment."""
    for process in psutil.process_iter():
        try:
            own = process.environ()
            if own.get(MARK, "").startswith(str(folder)) \
                    and process.status() != psutil.STATUS_ZOMBIE:
                yield process, own
        except (psutil.Error, OSError):
            continue


def lay_out(stack: ExitStack, folder: Path) -> None:
    """The folder of a round, with a small disk of its own."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(SITE)
    command("mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(disk))
    stack.callback(command, "umount", "-l", str(disk))


def end_all(folder: Path) -> None:
    """End what a round has started, by pid."""
    end = time.monotonic() + 30
    while (left := [process for process, _ in marked(folder)]) and time.monotonic() < end:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(left, timeout=2)


def clear(folder: Path) -> None:
    """Take down what a soak that was killed has left of a round."""
    end_all(folder)
    if (folder / "disk").is_mount():
        command("umount", "-l", str(folder / "disk"))
