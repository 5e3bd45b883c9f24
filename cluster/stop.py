"""``cluster stop RUN``: ask whoever owns a run to stop it, from any machine, and wait until it has.

The request is a file beside the owner's claim.  The owner (a supervisor, or rank 0 of a training
without one) looks for it every few seconds; so does rank 0 under a supervisor that has died.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from cluster.rundir import RunDir
from neurojepa.errors import ClusterError
from neurojepa.storage.lease import RENEW_S, TTL_S
from neurojepa.storage.owners import ask_to_stop, facts, newest


def stop(run_dir: RunDir, now: bool, wait_s: float, clock: Callable[[], float] = time.monotonic,
         sleep: Callable[[float], None] = time.sleep) -> int:
    """Stop a run; returns 0 when nobody owns it any more.

    Parameters
    ----------
    now
        Without a checkpoint.
    wait_s
        How long to wait for it.

    Raises
    ------
    ClusterError
        There is no run, or its owner still holds it after ``wait_s``.
    """
    owner = newest(run_dir.uri)
    if owner is None:
        raise ClusterError(f"{run_dir.uri}: nobody has owned a run here; give the run.dir of a "
                           "training")
    said = facts(run_dir.uri, owner)
    if said.get("state") == "released":
        print(f"{run_dir.uri}: nothing to stop; the last owner, the {owner}, has ended")
        return 0
    ask_to_stop(run_dir.uri, owner, now)
    print(f"asked the {owner} to stop" + (" now, without a checkpoint" if now else ""), flush=True)
    end, beat, seen = clock() + wait_s, said.get("beat"), clock()
    while clock() < end:
        sleep(1.0)
        current = newest(run_dir.uri)
        if current is not None and current != owner:
            if current.same_process(owner):  # a supervisor claims anew for each attempt
                ask_to_stop(run_dir.uri, current, now)
                owner = current
            else:
                print(f"{run_dir.uri}: the {owner} has ended; the {current} owns the run since")
                return 0
        said = facts(run_dir.uri, owner)
        if said.get("state") == "released":
            print(f"{run_dir.uri}: stopped; last checkpoint: step {run_dir.committed_step()}")
            return 0
        if said.get("beat") != beat:
            beat, seen = said.get("beat"), clock()
        if clock() - seen > TTL_S and (ended := _ended(run_dir)):
            print(f"{run_dir.uri}: the {owner} had died; {ended}")
            return 0
    raise ClusterError(f"{run_dir.uri}: the {owner} has not stopped within {wait_s:.0f} s; see "
                       f"python -m cluster status {run_dir.uri}, or use --now")


def _ended(run_dir: RunDir) -> str:
    """What became of the ranks of an owner that died; empty while they still beat."""
    before = run_dir.heartbeats()
    time.sleep(RENEW_S)
    if run_dir.heartbeats() != before:
        print("its ranks are still at work", file=sys.stderr)
        return ""
    return "no rank gives a sign of life"
