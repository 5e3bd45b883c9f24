"""Signs of life by our own clock: hosts' clocks may differ from it, and from each other."""

from __future__ import annotations

from dataclasses import replace

from cluster.rundir import Heartbeat, RunDir


def by_our_clock(beat: Heartbeat, now: float) -> Heartbeat:
    """A sign that was given just now; its host's clock may say something else."""
    return replace(beat, time=now - beat.quiet_s, seen=now)


class Signs:
    """The heartbeats of a run that is looked at again and again.

    At the first look there is nothing but what the hosts' clocks say.  Whoever has given a sign
    since the last look did so just now.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._last: dict[int, tuple[Heartbeat, Heartbeat]] = {}  # rank -> as told, by our clock

    def look(self, now: float) -> list[Heartbeat]:
        """All heartbeats, by rank, as of ``now``."""
        found = {}
        for beat in self._run_dir.heartbeats():
            told, ours = self._last.get(beat.rank, (beat, beat))
            found[beat.rank] = (beat, ours if told == beat else by_our_clock(beat, now))
        self._last = found
        return [ours for _, ours in found.values()]
