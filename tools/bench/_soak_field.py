"""Where the soak's runs take place: three hosts, a supervisor, and an eye on every rank.

All that ssh or a supervisor starts loads ``tools/bench/_soak_rank.py`` by a sitecustomize: a rank
notes the samples it trains on, and takes a nap before each micro-batch, so that a soak on a
small machine leaves room for its own restarts.  Ranks are found by what they carry in their
environment, whoever started them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cluster.processes import TOKEN
from cluster.rundir import RunDir
from neurojepa.errors import DataError
from neurojepa.storage import is_outage
from tests.helpers import ROOT
from tests.helpers.hosts import Hosts, two_hosts
from tests.helpers.hosts import run as command
from tests.helpers.proxy import Proxy
from tools.bench._harm import screen_of, serve, start_supervisor
from tools.bench._soak_eye import Eye
from tools.bench.victim import noted

MARK = "NEUROJEPA_SOAK"  # a folder, in the environment of all that the soak starts
HANG_S = 20
SITE = "from tools.bench import _soak_rank\n_soak_rank.begin()\n"


class Failed(Exception):
    """Something did not come about in time, or should not have."""


@dataclass
class Field:
    """A round's hosts and run.

    Parameters
    ----------
    mode
        ``fixed``: attempts wait for all hosts, on a disk; ``elastic``: they go on with those that
        are there; ``store``: fixed, and the run and its feed are in S3.
    """

    folder: Path
    mode: str
    hosts: Hosts
    run_dir: RunDir
    recipe: Path
    variables: dict[str, str]
    open_store: Callable[[], None] = lambda: None
    close_store: Callable[[], None] = lambda: None
    at: int = 0  # where the supervisor is
    supervisors: list[subprocess.Popen[bytes]] = field(default_factory=list)
    notes: Notes = field(init=False)

    def __post_init__(self) -> None:
        self.notes = Notes(self.folder)

    # ---- doing -----------------------------------------------------------------------------------

    def start(self, at: int) -> subprocess.Popen[bytes]:
        """A supervisor on a host, as an operator would start it."""
        least = "1" if self.mode == "elastic" else str(len(self.hosts.addresses))
        self.at = at
        self.supervisors.append(start_supervisor(
            self.run_dir, self.recipe, self.hosts, at, "--hang-seconds", str(HANG_S),
            "--min-hosts", least, arguments=("data.retry_s=300",),
            variables={**self.variables, "HOST_ADDRESS": self.hosts.addresses[at]}))
        return self.supervisors[-1]

    @property
    def supervisor(self) -> subprocess.Popen[bytes]:
        return self.supervisors[-1]

    def command(self, *words: str, at: int | None = None) -> subprocess.CompletedProcess[str]:
        """One of the operator's commands, on this machine or on a host."""
        where = [] if at is None else ["ip", "netns", "exec", self.hosts.namespaces[at]]
        return subprocess.run([*where, sys.executable, *words], cwd=ROOT, text=True, timeout=200,
                              capture_output=True, env={**self.hosts.environment(),
                                                        **self.variables})

    # ---- looking ---------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """All that this round has started, but for what runs commands in namespaces."""
        return [process for process, _ in marked(self.folder)]

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

    def screen(self) -> str:
        """What the supervisors have said."""
        path = screen_of(self.recipe)
        return path.read_text(errors="replace") if path.exists() else ""

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
        started = self.events("started")
        ranks = len(started[-1].get("hosts", [])) if started else 0
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


@contextmanager
def playing_field(folder: Path, mode: str, recipe_of: Callable[[Path, str, str], Path]) \
        -> Iterator[tuple[Field, Eye]]:
    """A round's hosts, disk or store, with nothing started on them; all is gone at the end.

    ``recipe_of`` writes a recipe, given the round's folder, the feed's URI and the run's.
    """
    disk = folder / "disk"
    disk.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(SITE)
    variables = {MARK: str(folder), "PYTHONPATH": f"{folder}:{ROOT}"}
    with ExitStack() as stack:
        command("mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(disk))
        stack.callback(command, "umount", "-l", str(disk))
        hosts = stack.enter_context(two_hosts(folder, 3, variables))
        (folder / "links.json").write_text(json.dumps(hosts.namespaces))
        stack.callback(_end_all, folder)
        field_ = Field(folder, mode, hosts, RunDir(str(disk / "run")), folder, variables)
        feed = str(folder.parent / "feed")
        if mode == "store":
            field_.run_dir, feed = RunDir("s3://soak/run"), "s3://soak/feed"
            _open_store(stack, field_, feed)
        field_.recipe = recipe_of(folder, feed, field_.run_dir.uri)
        eye = stack.enter_context(closing(Eye(field_.run_dir, mode != "elastic")))
        yield field_, eye


def _open_store(stack: ExitStack, field_: Field, feed: str) -> None:
    from tests.helpers.feeds import write_feed

    proxy = stack.enter_context(closing(Proxy(None, field_.hosts.gateway)))
    servers = stack.enter_context(ExitStack())
    field_.open_store = lambda: serve(servers, field_.folder, proxy)
    field_.close_store = servers.close
    field_.open_store()
    import s3fs

    s3fs.S3FileSystem().mkdir("soak")
    write_feed(feed)
    own = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    # a host's own credentials, as a file or an instance role would give them
    (field_.folder / "environment.json").write_text(json.dumps(own))


def _end_all(folder: Path) -> None:
    """End what a round has started, by pid."""
    end = time.monotonic() + 30
    while (left := [process for process, _ in marked(folder)]) and time.monotonic() < end:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(left, timeout=2)


def clear(folder: Path) -> None:
    """Take down what a soak that was killed has left of a round."""
    _end_all(folder)
    links = folder / "links.json"
    for namespace in json.loads(links.read_text()) if links.exists() else []:
        pids = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
        for pid in pids.stdout.split():
            with suppress(psutil.NoSuchProcess):
                psutil.Process(int(pid)).kill()
        subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
    if links.exists() and (suffix := json.loads(links.read_text())[0][2:-1]):
        subprocess.run(["ip", "link", "del", f"njbr{suffix}"], capture_output=True)
    if (folder / "disk").is_mount():
        command("umount", "-l", str(folder / "disk"))
