"""The run directory as seen from outside: what training wrote, and the supervisor's own events.

    config.yaml  metrics.jsonl  events.jsonl  latest          written by rank 0 of the training
    heartbeat/ranks.json                                      of all ranks, by the supervisor
    heartbeat/rank-R.json  heartbeat/host-R.json              by ranks without a supervisor
    logs/attempt-K.log  logs/attempt-K.stacks.txt             written by the supervisor
    lease/                                                    who owns the run

It is a local directory or a URI that fsspec knows.  Reading never changes it and never needs the
training to be alive.  A line that a kill cut short is left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import yaml

from neurojepa.errors import ClusterError, ConfigError
from neurojepa.recipes import read_override, read_recipe
from neurojepa.storage import join, list_names, local_path, read_if_there

BOARD = "ranks.json"
TRAIN_EVENTS = ("start", "resume", "checkpoint", "skip", "stop", "finish")


@dataclass(frozen=True)
class Heartbeat:
    """The last message of one rank.

    ``time`` (of its last step) and ``seen`` (of this sign) are its host's clock in seconds; only
    their difference means anything elsewhere.
    """

    rank: int
    host: str
    pid: int
    step: int
    time: float
    seen: float = 0.0
    state: str = "step"  # or starting, compiling, checkpoint, evaluation, "waiting for store"
    attempt: str = ""  # of which world it is
    own_s: float | None = None  # of a micro-step, until it waits for the other ranks
    data_s: float | None = None  # of that, waiting for data
    step_s: float | None = None  # the last step
    device: str = ""

    @classmethod
    def of(cls, row: dict[str, Any]) -> Heartbeat:
        """From a row of JSON, which may be an older version's."""
        return cls(int(row["rank"]), str(row["host"]), int(row["pid"]), int(row["step"]),
                   float(row["time"]), float(row.get("seen", row["time"])),
                   str(row.get("state", "step")), str(row.get("attempt", "")), row.get("own_s"),
                   row.get("data_s"), row.get("step_s"), str(row.get("device", "")))

    @property
    def quiet_s(self) -> float:
        """Seconds without a step when it gave this sign."""
        return max(0.0, self.seen - self.time)


@dataclass(frozen=True)
class RunDir:
    """A run directory by its path or URI."""

    uri: str

    @property
    def local_path(self) -> str | None:
        """The directory on this machine, or None where the run lives in an object store."""
        return local_path(self.uri)

    def read(self, name: str, tail_bytes: int | None = None) -> bytes | None:
        """The content (or its last ``tail_bytes``) of a file below the run; None if absent."""
        return read_if_there(join(self.uri, name), tail_bytes)

    def names(self, folder: str) -> list[str]:
        """File names in a folder of the run; empty if it does not exist."""
        return list_names(join(self.uri, folder))

    def rows(self, name: str, tail_bytes: int | None = None) -> list[dict[str, Any]]:
        """The rows of a .jsonl file, oldest first (only those in the tail, if that is given)."""
        rows = []
        for line in (self.read(name, tail_bytes) or b"").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # cut by a kill, by the tail's start, or being written just now
                continue
            if isinstance(row, dict):
                rows.append(row)
        return rows

    def events(self) -> list[dict[str, Any]]:
        return self.rows("events.jsonl")

    def heartbeats(self) -> list[Heartbeat]:
        """The last message of every rank, by rank.

        Those of an earlier attempt with more ranks are left out; rank 0 is of every attempt.
        """
        beats, told = [], []
        for name in self.names("heartbeat"):
            if not name.endswith(".json"):
                continue
            try:
                row = json.loads(self.read(f"heartbeat/{name}") or b"")
            except ValueError:  # being rewritten just now; the next look finds it whole
                continue
            if name == BOARD:
                told = [Heartbeat.of(one) for one in row["ranks"]]
            elif name.startswith(("rank-", "host-")):
                beats += [Heartbeat.of(one) for one in row.get("ranks", [row])]
        beats.sort(key=lambda beat: (beat.rank, -beat.seen))
        beats = [beat for beat in beats if beat.attempt == beats[0].attempt]
        return told if told and (not beats or told[0].seen >= beats[0].seen) else beats

    def committed_step(self) -> int | None:
        """The step of the last committed checkpoint, or None before the first."""
        text = (self.read("latest") or b"").decode().strip()
        if not text:
            return None
        text = text.split()[0]  # a second line names the token of the owner that wrote it
        if text == "none":
            return None
        name, _, number = text.rpartition("-")
        if name != "step" or not number.isdigit():
            raise ClusterError(f"{self.uri}/latest: holds {text!r}, expected step-N; "
                               "put the name of the last good checkpoint there")
        return int(number)

    def next_attempt(self) -> int:
        """The number of the attempt after those that have a log."""
        numbers = [name[len("attempt-"):-len(".log")] for name in self.names("logs")
                   if name.startswith("attempt-") and name.endswith(".log")]
        return 1 + max((int(number) for number in numbers if number.isdigit()), default=0)

    def config(self) -> dict[str, Any]:
        """The resolved configuration the training stored; empty before its first start.

        Raises
        ------
        ClusterError
            Somebody has changed it into something else.
        """
        try:
            tree = yaml.safe_load(self.read("config.yaml") or b"") or {}
        except yaml.YAMLError as error:
            tree = " ".join(str(error).split())
        if not isinstance(tree, dict):
            raise ClusterError(f"{self.uri}/config.yaml: no YAML mapping ({str(tree)[:200]}); put "
                               "back what the training wrote, or start it again with its recipe")
        return tree


def run_of_arguments(arguments: list[str]) -> tuple[RunDir, dict[str, Any]]:
    """The run directory and plain config tree that ``--config C [a.b=v ...]`` will use.

    Only what a supervisor needs is read; the training validates the whole tree.

    Raises
    ------
    ConfigError
        No --config, no such recipe, a value that is not YAML, or no run.dir.
    """
    path = None
    overrides = []
    remaining = iter(arguments)
    for item in remaining:
        if item == "--config":
            path = next(remaining, None)
        elif item.startswith("--config="):
            path = item.partition("=")[2]
        elif "=" in item and not item.startswith("-"):
            overrides.append(item)
    if not path:
        raise ConfigError("no --config after --; for example: supervise -- --config C.yaml")
    flat = {f"{section}.{key}": value for section, branch in read_recipe(path).items()
            if isinstance(branch, dict) for key, value in branch.items()}
    for item in overrides:
        key, value = read_override(item)
        flat[key] = value
    if not flat.get("run.dir"):
        raise ConfigError(f"{path}: run.dir is required; set it in the file or as run.dir=PATH")
    return RunDir(str(flat["run.dir"])), flat
