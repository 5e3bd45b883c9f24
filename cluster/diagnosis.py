"""What the ranks of an attempt are doing, before they are ended: states, stacks, the odd one out.

``python -m cluster.diagnosis TOKEN CALLER`` prints what this host knows; ``diagnose`` asks all.
Stacks are read from outside by py-spy, so a rank that is stopped or stuck in C gives its own, too.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.hosts import ask
from cluster.processes import ranks
from cluster.rundir import Heartbeat
from neurojepa.storage.owners import pid_space

SPY_S = 10.0
SILENT_S = 15.0  # a rank's signs come every 2 s, or 5 s from an object store
OUR_CODE = ("/neurojepa/", "/cluster/", "/tests/helpers/")
AT_REST = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE,
           psutil.STATUS_DEAD)


@dataclass(frozen=True)
class RankState:
    """One rank as its host sees it; ``stack`` is innermost first, "function (file:line)"."""

    rank: int
    pid: int
    state: str
    stack: list[str]

    @property
    def where(self) -> str:
        """The innermost place in our own code, or the innermost of all."""
        own = next((frame for frame in self.stack if any(part in frame for part in OUR_CODE)), None)
        return own or next(iter(self.stack), "unknown")


def here(token: str) -> list[RankState]:
    """The ranks of an attempt on this machine."""
    found = []
    for process in ranks(token):
        try:
            rank, state = int(process.environ().get("RANK", -1)), process.status()
        except psutil.Error:  # ended meanwhile
            continue
        found.append(RankState(rank, process.pid, state, stack_of(process.pid)))
    return sorted(found, key=lambda item: item.rank)


def stack_of(pid: int) -> list[str]:
    """The main thread's frames; what kept py-spy from reading them, where something did."""
    spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if spy is None:
        return ["py-spy is not installed here"]
    try:
        done = subprocess.run([spy, "dump", "--json", "--nonblocking", "--pid", str(pid)],
                              capture_output=True, text=True, timeout=SPY_S)
        threads = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return ["py-spy did not answer"]
    except ValueError:
        why = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return [f"no stack: {why[-1] if why else done.returncode}"]
    main = next((item for item in threads if item.get("os_thread_id") == pid), threads[0])
    return [f"{frame['name']} ({frame['filename']}:{frame['line']})" for frame in main["frames"]]


def diagnose(token: str, hosts: list[str]) -> list[RankState]:
    """The ranks on this machine and, by ssh, on all hosts; those of hosts that answer."""
    found = here(token)
    for answer in ask(dict.fromkeys(hosts, ""), "cluster.diagnosis", [token, pid_space()],
                      timeout_s=2 * SPY_S).values():
        if answer.status == 0 and answer.lines:
            found += [RankState(**row) for row in json.loads(answer.lines[-1])]
    return sorted(found, key=lambda item: item.rank)


def groups(states: list[RankState]) -> list[tuple[str, list[int]]]:
    """Ranks by the place where they stand, the fewest first."""
    by_place: dict[str, list[int]] = defaultdict(list)
    for item in states:
        by_place[item.where].append(item.rank)
    return sorted(by_place.items(), key=lambda pair: (len(pair[1]), pair[1]))


def culprits(states: list[RankState], beats: list[Heartbeat],
             silent_s: dict[int, float]) -> tuple[list[int], str]:
    """The ranks that the others wait for, and how that is known; none where nothing tells.

    Parameters
    ----------
    silent_s
        By rank, seconds since its last sign of life, by the clock of whoever watches.
    """
    if stopped := [item.rank for item in states if item.state in AT_REST]:
        return stopped, "the process is stopped or dead"
    quiet = [rank for rank, seconds in silent_s.items() if seconds > SILENT_S]
    if quiet and len(quiet) < len(silent_s):
        return sorted(quiet), "gives no sign of life, the others do"
    if waiting := [beat.rank for beat in beats if beat.state == "waiting for store"]:
        return waiting, "waits for its store"
    steps = {beat.rank: beat.step for beat in beats}
    behind = [rank for rank, step in steps.items() if step < max(steps.values())]
    if behind and len(behind) < len(steps):
        return sorted(behind), "is a step behind"
    by_place = groups(states)
    if len(by_place) > 1 and len(by_place[0][1]) < len(by_place[1][1]):
        return by_place[0][1], f"stands elsewhere: {by_place[0][0]}"
    return [], "all stand at the same place"


def report(states: list[RankState], guilty: list[int], why: str) -> str:
    """The incident in words, with all stacks; ranks at the same place share one."""
    named = f"rank {', '.join(map(str, guilty))}: {why}" if guilty else why
    parts = [named]
    by_rank = {item.rank: item for item in states}
    for place, members in groups(states):
        first = by_rank[members[0]]
        parts.append(f"\nranks {', '.join(map(str, members))} ({first.state}), at {place}")
        parts += [f"    {frame}" for frame in first.stack]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    _token, _caller = sys.argv[1:]
    # the caller looks at its own machine itself
    print(json.dumps([asdict(item) for item in here(_token)] if _caller != pid_space() else []))
