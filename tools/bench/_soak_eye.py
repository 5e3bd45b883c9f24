"""Looks at a run while it is harmed: what is committed stays, can be read, and has one writer."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field

from cluster.rundir import RunDir
from neurojepa.errors import NeurojepaError
from neurojepa.storage import is_outage

LOOK_S = 0.3


@dataclass
class Eye:
    """``wrong`` says what it has seen go wrong; ``states`` has a hash of each state it has read."""

    run_dir: RunDir
    same_world: bool  # so a step that is done again has to end the same
    states: dict[int, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    read: int = 0  # checkpoints read against their hashes
    _latest: tuple[int, int] = (0, 0)  # step and fencing token

    def __post_init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="eye", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join(30)

    def _work(self) -> None:
        while not self._ended.wait(LOOK_S):
            try:
                self.look()
            except Exception as error:  # an eye that has closed would see nothing go wrong
                if not is_outage(error) and repr(error) not in self.wrong:
                    self.wrong.append(repr(error))

    def look(self) -> None:
        """Take in ``latest``; read the checkpoint that it names, if it is a new one."""
        words = (self.run_dir.read("latest") or b"").split()
        if not words or words[0] == b"none":
            if self._latest[0]:
                self.wrong.append(f"latest names nothing after step {self._latest[0]}")
            return
        now = int(words[0].rpartition(b"-")[2]), int(words[-1]) if len(words) > 1 else 0
        if now == self._latest:
            return
        if now[0] < self._latest[0] or now[1] < self._latest[1]:
            self.wrong.append(f"latest goes back: from step, token {self._latest} to {now}")
        self._read(now[0])
        self._latest = now

    def _read(self, step: int) -> None:
        from neurojepa.train.checkpoint import open_checkpoint

        try:
            checkpoint = open_checkpoint(self.run_dir.uri, step)
            problems, state = checkpoint.problems(), checkpoint.state_sha256()
        except (NeurojepaError, OSError, json.JSONDecodeError) as error:
            if is_outage(error):
                raise  # and looked at again
            # newer ones may have replaced it while it was being read
            if self.run_dir.committed_step() == step:
                self.wrong.append(f"the committed step {step} cannot be read: {error}")
            return
        if problems and self.run_dir.committed_step() == step:
            self.wrong += problems
        if self.same_world and step in self.states and self.states[step] != state:
            self.wrong.append(f"step {step} was committed twice, with other weights")
        self.states[step] = state
        self.read += 1
