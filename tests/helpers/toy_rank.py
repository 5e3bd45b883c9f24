"""A stand-in for a rank of the training: keeps the contract with agent and run directory.

Steps take ``step_s`` seconds and no rank is a step ahead of another; every second step is
"committed".  ``crash=N`` exits with status 3 at step N of every attempt, ``diverge=N`` with 2 after
that event, ``refuse=1`` with 2 at once; ``wait=N`` says at step N for ``wait_s`` seconds that it
waits for a store, ``hold=N`` waits before step N for the file ``go``
in the run directory.  Started like the training: ``--config C [toy.crash=N ...]``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import yaml

from neurojepa.messages import AGENT, Messages


def main(argv: list[str]) -> int:
    config = yaml.safe_load(Path(argv[argv.index("--config") + 1]).read_text())
    options = dict(item.split("=", 1) for item in argv if item.startswith("toy."))
    run, rank = Path(config["run"]["dir"]), int(os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    if "toy.refuse" in options:
        print("error: no such feed", file=sys.stderr)
        return 2
    crash, diverge, wait, hold = (int(options.get(f"toy.{name}", 0))
                                  for name in ("crash", "diverge", "wait", "hold"))
    step_s = float(options.get("toy.step_s", 0.1))
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    (run / "steps").mkdir(parents=True, exist_ok=True)
    agent = Messages(os.environ[AGENT])

    def tell(step: int, state: str) -> None:
        agent.send({"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "step": step,
                    "time": time.time(), "seen": time.time(), "state": state})

    def event(name: str, step: int) -> None:
        if rank == 0:
            with (run / "events.jsonl").open("a") as file:
                file.write(json.dumps({"time": time.time(), "event": name, "step": step}) + "\n")

    def all_at(step: int) -> bool:
        paths = [run / "steps" / str(other) for other in range(world)]
        return all(path.exists() and int(path.read_text()) >= step for path in paths)

    first = int((run / "latest").read_text()[5:]) if (run / "latest").exists() else 0
    tell(first, "starting")
    event("resume" if first else "start", first)
    for step in range(first + 1, config["train"]["steps"] + 1):
        time.sleep(step_s)
        while step == hold and not stopping and not (run / "go").exists():
            time.sleep(0.01)
        if step == crash:
            print(f"ToyError: rank {rank} breaks at step {step}", file=sys.stderr)
            return 3
        if step == diverge:
            event("diverged", step)
            while '"diverged"' not in (run / "events.jsonl").read_text():
                time.sleep(0.01)
            return 2
        if step % 2 == 0 and rank == 0:
            _replace(run / "latest", f"step-{step}")
        end = time.monotonic() + float(options.get("toy.wait_s", 0))
        while step == wait and time.monotonic() < end:
            tell(step - 1, "waiting for store")
            time.sleep(0.1)
        tell(step, "step")
        _replace(run / "steps" / str(rank), str(step))
        while not stopping and not all_at(step):
            time.sleep(0.01)
        if stopping:
            event("stop", step)
            return 75
    event("finish", config["train"]["steps"])
    return 0


def _replace(path: Path, text: str) -> None:
    """Nobody reads half of it."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
