"""A stand-in for a rank of the training: keeps the run directory's contract, learns nothing.

Steps take ``step_s`` seconds and no rank is a step ahead of another; ``crash=N`` exits with status
3 at step N of every attempt, ``diverge=N`` with 2 after that event; every second step is
"committed".  Started like the training: ``--config C [toy.crash=N ...]``.
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


def main(argv: list[str]) -> int:
    words = [item for item in argv if not item.startswith("--local_rank")]
    config = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text())
    options = dict(item.split("=", 1) for item in words if item.startswith("toy."))
    run, rank = Path(config["run"]["dir"]), int(os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    crash, diverge = (int(options.get(f"toy.{name}", 0)) for name in ("crash", "diverge"))
    step_s = float(options.get("toy.step_s", 0.1))
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    (run / "heartbeat").mkdir(parents=True, exist_ok=True)

    def event(name: str, step: int) -> None:
        if rank == 0:
            with (run / "events.jsonl").open("a") as file:
                file.write(json.dumps({"time": time.time(), "event": name, "step": step}) + "\n")

    def all_at(step: int) -> bool:
        beats = [json.loads(file.read_text()) for file in (run / "heartbeat").glob("*.json")]
        return len(beats) == world and min(beat["step"] for beat in beats) >= step

    first = int((run / "latest").read_text()[5:]) if (run / "latest").exists() else 0
    event("resume" if first else "start", first)
    for step in range(first + 1, config["train"]["steps"] + 1):
        time.sleep(step_s)
        if step == crash:
            print(f"ToyError: rank {rank} breaks at step {step}", file=sys.stderr)
            return 3
        if step == diverge:
            event("diverged", step)
            while '"diverged"' not in (run / "events.jsonl").read_text():
                time.sleep(0.01)
            return 2
        if step % 2 == 0 and rank == 0:
            (run / "latest").write_text(f"step-{step}")
        beat = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "step": step,
                "time": time.time()}
        path = run / "heartbeat" / f"rank-{rank}.json"
        path.with_suffix(".new").write_text(json.dumps(beat))
        path.with_suffix(".new").rename(path)
        while not stopping and not all_at(step):
            time.sleep(0.01)
        if stopping:
            event("stop", step)
            return 75
    event("finish", config["train"]["steps"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
