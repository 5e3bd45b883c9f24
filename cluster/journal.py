"""What the supervisor writes into the run directory: its events, and files to be kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.incident import incident_of
from cluster.outcome import Outcome
from cluster.room import room
from cluster.rundir import RunDir
from neurojepa.errors import DataError
from neurojepa.storage import Patience, append_rows, join, no_space, write_bytes
from neurojepa.storage.lease import Lease

ROOM_S = 5.0  # between tries where a disk is full


@dataclass
class Journal:
    """Writes under the lease, once there is one.

    Parameters
    ----------
    given_up
        Whether nobody waits for a full disk any more.
    """

    run_dir: RunDir
    patience: Patience
    given_up: Callable[[], bool]
    lease: Lease | None = None

    def event(self, event: str, step: int | None, **fields: Any) -> None:
        """Add a row to events.jsonl."""
        row = {"time": time.time(), "event": event, "step": step, "by": "supervisor", **fields}
        uri = join(self.run_dir.uri, "events.jsonl")
        append = self.lease.append if self.lease else append_rows
        self._write(f"the event {event}", lambda: append(uri, [row]))
        shown = {key: value for key, value in fields.items() if key not in ("ranks", "log")}
        print(f"{event} at step {step} {shown}", flush=True)

    def file(self, name: str, data: bytes) -> None:
        """Write a file below the run directory."""
        self._write(name, lambda: write_bytes(join(self.run_dir.uri, name), data))

    def incident(self, outcome: Outcome, number: int, oom_kills: int,
                 away: list[str]) -> dict[str, str]:
        """Write the report of an attempt that failed; its name and the likely cause."""
        space = self.patience(lambda: room(self.run_dir))
        found = incident_of(self.patience(self.run_dir.events), outcome, number, oom_kills, away,
                            space is not None and not space.enough)
        name = f"logs/incident-{number}.md"
        self.file(name, found.report().encode())
        return {"cause": found.cause, "report": name}

    def _write(self, what: str, write: Callable[[], None]) -> None:
        while True:
            try:
                self.patience(write)
                return
            except DataError as error:
                if not no_space(error) or self.given_up():
                    raise
                print(f"cannot write {what}: {error}", flush=True)
                time.sleep(ROOM_S)
