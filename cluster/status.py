"""What a run is doing, on one screen, from its run directory alone.

``read_status`` makes plain data of the heartbeats, events and metrics; ``screen.render`` shows it.
States: running; waiting (for a store, or for room on a disk); stalled (no step for longer than is
normal, or gone without a word); stopped (on request); failed (exited, or the supervisor gave up);
finished.

Clocks of hosts may differ.  What looks silent by our clock is looked at twice: whoever has given a
sign in between is alive, and how long it has made no step it says by its own clock.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from cluster.goodput import goodput
from cluster.progress import SLOW, WAITING
from cluster.room import free_bytes
from cluster.rundir import TRAIN_EVENTS, Heartbeat, RunDir
from cluster.signs import Signs
from cluster.stragglers import stragglers
from cluster.trend import trend
from neurojepa.errors import ClusterError

TAIL_BYTES = 262_144
AGAIN_S = 6.0  # between two looks; signs of life come every 2 s, from object stores every 5 s
WAITS = ("disk_full", "no_room")  # events after which the supervisor waits
START_S = 600.0  # a start (imports, compilation, reading a checkpoint) may take this long
SILENT_S = 60.0
ENDED = {"finish": "finished", "finished": "finished", "stop": "stopped", "stopped": "stopped",
         "exit": "failed", "give_up": "failed"}


def read_status(run_dir: RunDir, now: float | None = None,
                sleep: Callable[[float], None] | None = None,
                signs: Signs | None = None) -> dict[str, Any]:
    """The state of a run as plain data (see the keys below); nothing is changed.

    Parameters
    ----------
    now
        By default, this machine's clock.
    sleep
        Waits for a second look where the run looks stalled; None looks once.
    signs
        Of whoever looks again and again: what it has seen before.

    Raises
    ------
    ClusterError
        There is no run there.
    """
    began = time.time()
    now = began if now is None else now
    signs = signs or Signs(run_dir)
    status = _read(run_dir, signs.look(now), now)
    if sleep is None or status["state"] != "stalled":
        return status
    sleep(AGAIN_S)
    now += max(AGAIN_S, time.time() - began)
    return _read(run_dir, signs.look(now), now)


def _read(run_dir: RunDir, beats: list[Heartbeat], now: float) -> dict[str, Any]:
    return summarise(run_dir, run_dir.events(), beats, run_dir.rows("metrics.jsonl", TAIL_BYTES),
                     run_dir.config(), now)


def summarise(run_dir: RunDir, events: list[dict[str, Any]], beats: list[Heartbeat],
              metrics: list[dict[str, Any]], config: dict[str, Any], now: float) -> dict[str, Any]:
    """The status of a run from what was read of it.

    Parameters
    ----------
    metrics
        The last rows; the trends are theirs.

    Raises
    ------
    ClusterError
        Nothing was found: there is no run.
    """
    if not (events or beats or metrics or config):
        raise ClusterError(f"{run_dir.uri}: no run here (no events.jsonl, heartbeat/ or "
                           "config.yaml); give the run.dir of a training")
    last = metrics[-1] if metrics else {}
    step = max([beat.step for beat in beats] + [int(last.get("step", 0))])
    steps = config.get("train", {}).get("steps")
    step_s = last.get("step_s")
    state = _state(events, beats, step_s, now)
    spent = goodput([row for row in events if isinstance(row.get("time"), int | float)
                     and "event" in row and "step" in row], step, now,
                    running=state in ("running", "waiting", "stalled"))
    return {
        "run": run_dir.uri,
        "state": state,
        "step": step,
        "steps": steps,
        "loss": last.get("loss"),
        "loss_step": last.get("step"),
        "volumes_per_s": last.get("volumes_per_s"),
        "trend": {name: trend([row.get(name) for row in metrics])
                  for name in ("loss", "volumes_per_s")},
        "step_s": step_s,
        "eta_s": (steps - step) * step_s if state == "running" and steps and step_s else None,
        "last_checkpoint": run_dir.committed_step(),
        "checkpoint_age_s": _checkpoint_age_s(events, now),
        "disk_free": free_bytes(path) if (path := run_dir.local_path) else None,
        "event_counts": dict(Counter(str(row.get("event")) for row in events)),
        "restarts": sum(row.get("event") == "restart" for row in events),
        "goodput": spent.share,
        "seconds": {"productive": spent.productive_s, "starting": spent.starting_s,
                    "lost": spent.lost_s, "down": spent.down_s},
        "lost_steps": spent.lost_steps,
        "slow": [vars(slow) for slow in stragglers(beats)],
        "ranks": [{**vars(beat), "age_s": round(now - beat.time, 1)} for beat in beats],
        "events": events[-8:],
    }


def _state(events: list[dict[str, Any]], beats: list[Heartbeat], step_s: float | None,
           now: float) -> str:
    """The last event that says what the run is doing, against the age of the last sign of life."""
    telling = [row for row in events if row.get("event") in
               {*TRAIN_EVENTS, *ENDED, "started", "restart", "hang", *WAITS}]
    event = telling[-1]["event"] if telling else None
    if event == "hang":
        return "stalled"
    if event in ENDED:
        return ENDED[event]
    if event in WAITS:
        return "waiting"
    signs = [beat.time for beat in beats]
    newest_start = max((row["time"] for row in telling
                        if row["event"] in ("started", "restart", "start", "resume")), default=0.0)
    if newest_start > max(signs, default=0.0):
        return "running" if now - newest_start < START_S else "stalled"
    if any(beat.state == WAITING for beat in beats) and now - max(b.seen for b in beats) < SILENT_S:
        return "waiting"
    # the slowest rank counts: the others may be waiting for it
    limit_s = START_S if any(beat.state in SLOW for beat in beats) else SILENT_S
    return "running" if now - min(signs) < max(limit_s, 10 * (step_s or 0.0)) else "stalled"


def _checkpoint_age_s(events: list[dict[str, Any]], now: float) -> float | None:
    """Since the last checkpoint was committed; before the first, since the run began."""
    rows = [row for row in events if row.get("event") == "checkpoint"] or events[:1]
    return now - rows[-1]["time"] if rows else None
