"""Run directories as trainings and supervisors leave them, without training."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any


def write_run(folder: Path, *, steps: int = 600, hosts: int = 1, slots: int = 2,
              tree: dict[str, Any] | None = None, now: float | None = None) -> Path:
    """A run of ``steps`` steps that is going on, with a restart, two dropped steps and a slow rank.

    Attempt 1 died at two thirds of the steps, attempt 2 continued; its log is there.
    """
    now = time.time() if now is None else now
    begun = now - steps - 60
    for name in ("heartbeat", "logs"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(tree or {"train": {"steps": 2 * steps}}))
    (folder / "latest").write_text(f"step-{steps - 20}")
    write_rows(folder / "metrics.jsonl", [metrics_row(step) for step in range(1, steps + 1)])
    died = 2 * steps // 3
    rows: list[tuple[float, str, int | None, dict[str, Any]]] = [
        (begun, "started", None, {"by": "supervisor", "attempt": 1}),
        (begun + 9, "start", 0, {"world": hosts * slots}),
        (begun + died, "host_lost", died, {"by": "supervisor", "hosts": ["node1"]}),
        (begun + died + 1, "exit", died, {"by": "supervisor", "attempt": 1, "status": 255,
                                          "hung": False, "ranks": [], "log": ["died"]}),
        (begun + died + 2, "restart", died - 10, {"by": "supervisor", "restarts": 1,
                                                  "failures": 1}),
        (begun + died + 3, "started", died - 10, {"by": "supervisor", "attempt": 2}),
        (begun + died + 20, "resume", died - 10, {"world": hosts * slots})]
    rows += [(begun + step + 40 * (step > died), "checkpoint", step,
              {"stalled_s": 0.02, "seconds": 4 + math.sin(step)}) for step in range(20, steps, 20)]
    rows += [(begun + 50 + step, "skip", step, {
        "reason": "loss spike", "loss": 9.5, "loss_limit": 2.0,
        "positions": [4 * step, 4 * step + 4]}) for step in (died + 60, died + 62)]
    write_rows(folder / "events.jsonl", [
        {"time": at, "event": name, "step": step, **facts}
        for at, name, step, facts in sorted(rows, key=lambda row: row[0])])
    for attempt, (first, last) in enumerate(((0, died), (died - 10, steps)), 1):
        (folder / "logs" / f"attempt-{attempt}.log").write_text("".join(
            f"step {step}/{2 * steps}  loss {metrics_row(step)['loss']:.5f}\n"
            for step in range(first + 5, last, 5)))
    for rank in range(hosts * slots):
        slow = rank == hosts * slots - 2
        (folder / "heartbeat" / f"rank-{rank}.json").write_text(json.dumps(
            {"rank": rank, "host": f"node{rank // slots}", "pid": 1000 + rank, "step": steps,
             "time": now - 1, "seen": now, "state": "step", "attempt": "a",
             "own_s": 0.3 + 0.01 * (rank % 7) + 0.4 * slow, "data_s": 0.02 + 0.002 * (rank % 5)}))
    return folder


def metrics_row(step: int) -> dict[str, Any]:
    """A row of metrics.jsonl whose figures follow from its step."""
    return {"step": step, "lr": 1e-4, "skipped": False, "grad_norm": 0.5,
            "loss": 0.6 + 0.9 * math.exp(-step / 150) + 0.03 * math.sin(1.7 * step),
            "effective_rank": 30 + 12 * math.log(step), "target_std": 0.8,
            "volumes_per_s": 50 + 3 * math.sin(step / 9), "step_s": 1.0,
            "data_wait": 0.02 + 0.01 * math.sin(step / 5) ** 2}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
