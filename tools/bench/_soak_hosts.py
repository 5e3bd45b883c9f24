"""The soak's three hosts: network namespaces with sshd, and a supervisor on one of them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.helpers.hosts import Hosts, two_hosts
from tools.bench._harm import screen_of, start_supervisor
from tools.bench._soak_eye import Eye
from tools.bench._soak_field import Field, clear, end_all, lay_out


@dataclass
class HostField(Field):
    """A run on three hosts."""

    hosts: Hosts = field(init=False)
    at: int = field(default=0, init=False)  # where the supervisor is
    supervisors: list[subprocess.Popen[bytes]] = field(default_factory=list, init=False)
    hang_s = 20

    @property
    def supervisor(self) -> subprocess.Popen[bytes]:
        return self.supervisors[-1]

    def start(self, at: int = 0) -> subprocess.Popen[bytes]:
        """A supervisor on a host."""
        least = "1" if self.mode == "elastic" else str(len(self.hosts.addresses))
        self.at = at
        self.supervisors.append(start_supervisor(
            self.run_dir, self.recipe, self.hosts, at, "--hang-seconds", str(self.hang_s),
            "--min-hosts", least, arguments=("data.retry_s=300",),
            variables={**self.variables, "HOST_ADDRESS": self.hosts.addresses[at]}))
        return self.supervisors[-1]

    def environment(self) -> dict[str, str]:
        return {**self.hosts.environment(), **self.variables}

    def command_on(self, at: int, *words: str) -> subprocess.CompletedProcess[str]:
        """One of the operator's commands, on a host."""
        return self.command(*words, before=("ip", "netns", "exec", self.hosts.namespaces[at]))

    def size(self) -> int:
        started = self.events("started")
        return len(started[-1]["hosts"]) if started else 0

    def screen(self) -> str:
        path = screen_of(self.recipe)
        return path.read_text(errors="replace") if path.exists() else ""


@contextmanager
def on_hosts(folder: Path, mode: str, recipe_of: Callable[[Path, str, str], Path]
             ) -> Iterator[tuple[HostField, Eye]]:
    """Three hosts with nothing started on them; all is gone at the end."""
    with ExitStack() as stack:
        lay_out(stack, folder)
        found = HostField(folder, mode, recipe_of)
        found.hosts = stack.enter_context(two_hosts(folder, 3, found.variables))
        (folder / "links.json").write_text(json.dumps(found.hosts.namespaces))
        stack.callback(end_all, folder)
        found.prepare(stack, found.hosts.gateway)
        yield found, stack.enter_context(closing(Eye(found.run_dir, mode != "elastic")))


def clear_hosts(folder: Path) -> None:
    """``clear``, and the namespaces."""
    links = folder / "links.json"
    for namespace in json.loads(links.read_text()) if links.exists() else []:
        pids = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
        for pid in pids.stdout.split():
            with suppress(psutil.NoSuchProcess):
                psutil.Process(int(pid)).kill()
        subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
    if links.exists() and (suffix := json.loads(links.read_text())[0][2:-1]):
        subprocess.run(["ip", "link", "del", f"njbr{suffix}"], capture_output=True)
    clear(folder)
