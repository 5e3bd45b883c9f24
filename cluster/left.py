"""Whether a run that stands still has been left: killed with all who could have told."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from neurojepa.storage.lease import TTL_S
from neurojepa.storage.owners import facts, newest


class Left:
    """Looks at the owner of a run directory, again and again."""

    def __init__(self, uri: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._uri, self._clock = uri, clock
        self._said: Any = None
        self._since = clock()

    def look(self) -> str:
        """Why nobody can go on with the run; empty while somebody may.

        Clocks of hosts are not compared: an owner elsewhere is dead when it has said nothing new
        while we looked for as long as its claim lasts.
        """
        owner = newest(self._uri)
        if owner is None:
            return "it has no owner"
        said = facts(self._uri, owner)
        if (now := (owner.token, said.get("state"), said.get("beat"))) != self._said:
            self._said, self._since = now, self._clock()
        if said.get("state") == "released":
            return f"the {owner} has ended"
        if owner.process_ended:
            return f"the {owner} was killed"
        if self._clock() - self._since > TTL_S:
            return f"the {owner} gives no sign of life"
        return ""
