"""A training that dies at a chosen instant, and notes what it did and when.

    python -m tools.bench.victim launch JOB      the local launcher, whose ranks are victims
    python -m tools.bench.victim rank JOB        one rank, started by it

JOB is a JSON file: arguments (of neurojepa.pretrain), folder (for notes), poison: steps whose
samples are NaN on rank 0, so that the run has to go back, and event: null or {"name", "rank",
"count"}: that rank sends itself SIGKILL the count-th time it comes to

    views      between reading a micro-batch and its forward
    step       inside the optimizer step, after one parameter group of several
    ema        after the weights, before the target encoder follows
    snapshot   while the state is copied to the host
    write      in the middle of a file of the checkpoint
    manifest   when all files are written, before the commit
    latest     after the commit, before ``latest``
    remove     while an old checkpoint is half deleted
    row        in the middle of a row of metrics.jsonl
    load       while a checkpoint is being loaded
    rollback   the next of five places in a rollback: its beginning, before and after the rows are
               cut, while the weights are loaded, before the samples are stepped over
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

STARTED = time.time()  # of this process, but for the interpreter
EVENTS = ("views", "step", "ema", "snapshot", "write", "manifest", "latest", "remove", "row",
          "load", "rollback")


def main(argv: list[str]) -> int:
    """Be the launcher or a rank."""
    role, path = argv
    job = json.loads(Path(path).read_text())
    if role == "launch":
        return _launch(job["arguments"], path)
    notes = Notes(Path(job["folder"]), int(os.environ["RANK"]))
    watch(notes, job["poison"])
    if job["event"] and job["event"]["rank"] == notes.rank:
        _arm(notes, job["event"]["name"], job["event"]["count"])
    notes.mark("imports")
    from neurojepa.pretrain import main as pretrain

    return pretrain(job["arguments"])


def _launch(arguments: list[str], path: str) -> int:
    from neurojepa.pretrain import main as pretrain
    from neurojepa.train import launch

    local = launch._local
    launch._local = lambda ranks, _: local(
        ranks, [sys.executable, "-u", "-m", "tools.bench.victim", "rank", path])
    return pretrain(arguments)


class Notes:
    """Lines of a rank: the samples of each micro-batch, and when each part of the start ended."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.rank, self._marked = rank, {"process"}
        self._path = folder / f"notes-{rank}.jsonl"
        self.write(mark="process", time=STARTED)

    def write(self, **facts: Any) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(facts) + "\n")

    def mark(self, name: str) -> None:
        """Note the first time that a part of the start has ended."""
        if name not in self._marked:
            self._marked.add(name)
            self.write(mark=name, time=time.time())

    def die(self) -> None:
        self.write(mark="killed", time=time.time())
        os.kill(os.getpid(), signal.SIGKILL)


def noted(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a rank's notes, but for those that a kill has cut; none if there is no file."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        yield row


def watch(notes: Notes, poison: list[int]) -> None:
    """Note samples and the parts of the start; poison samples."""
    from neurojepa.train import loop
    from neurojepa.train.engine import Engine
    from neurojepa.train.heartbeat import Heartbeat

    start_world, make_views = loop.start_world, loop.make_views
    init, load, beat = Engine.__init__, Engine.load, Heartbeat.beat

    def started(*arguments: Any) -> Any:
        world = start_world(*arguments)
        notes.mark("world")
        return world

    def built(*arguments: Any, **named: Any) -> None:
        init(*arguments, **named)
        notes.mark("engine")

    def loaded(*arguments: Any, **named: Any) -> None:
        load(*arguments, **named)
        notes.mark("load")

    def beaten(self: Heartbeat, step: int) -> None:
        beat(self, step)
        notes.mark("step")

    def viewed(batch: Any, config: Any, *arguments: Any) -> Any:
        kept = (batch.weight > 0).tolist()
        notes.write(positions=[p for p, real in zip(batch.position.tolist(), kept, strict=True)
                               if real],
                    scans=[s for s, real in zip(batch.scan_ids, kept, strict=True) if real])
        views = make_views(batch, config, *arguments)
        if notes.rank == 0 and int(batch.position[0]) // config.train.global_batch in poison:
            views.tokens_BNP.fill_(float("nan"))
        return views

    loop.start_world, loop.make_views = started, viewed
    Engine.__init__, Engine.load = built, loaded  # type: ignore[method-assign]
    Heartbeat.beat = beaten  # type: ignore[method-assign]


def _arm(notes: Notes, name: str, count: int) -> None:
    """Let the rank die the ``count``-th time it comes to the event."""
    import torch

    from neurojepa.storage import lease
    from neurojepa.train import commit, loop, metrics, saver
    from neurojepa.train.engine import Engine

    left = [count]

    def due() -> None:
        left[0] -= 1
        if left[0] == 0:
            notes.die()

    def before(work: Callable[..., Any], when: Callable[..., bool] = lambda *_: True) -> Any:
        def doomed(*arguments: Any, **named: Any) -> Any:
            if when(*arguments):
                due()
            return work(*arguments, **named)
        return doomed

    def half_written(uri: str, parts: Iterable[memoryview]) -> None:
        def some() -> Iterable[memoryview]:
            for number, part in enumerate(parts):
                if number == 5:
                    due()
                yield part
        write_parts(uri, some())

    def half_removed(run_dir: str, step: int) -> None:
        files = list(Path(run_dir, "checkpoints", f"step-{step}").glob("*"))
        if left[0] == 1:
            for file in sorted(files, key=lambda file: file.name != "manifest.json")[:3]:
                file.unlink()
        due()
        remove(run_dir, step)

    def half_a_row(uri: str, rows: Any) -> None:
        if uri.endswith("metrics.jsonl"):
            if left[0] == 1:
                with open(uri, "a") as file:
                    file.write('{"step": 1, "lo')
            due()
        append_rows(uri, rows)

    def stepped(*arguments: Any, **named: Any) -> Any:
        answer = adam(*arguments, **named)
        due()
        return answer

    write_parts, remove, append_rows = saver.write_parts, commit.remove, metrics.append_rows
    adam = torch.optim.AdamW.step
    patches: dict[str, Callable[[], None]] = {
        "views": lambda: setattr(loop, "make_views", before(loop.make_views)),
        "step": lambda: setattr(torch.optim.AdamW, "step", stepped),
        "ema": lambda: setattr(Engine, "update_ema", before(Engine.update_ema)),
        "snapshot": lambda: setattr(saver.Saver, "_snapshot", _slow_snapshot(due)),
        "write": lambda: setattr(saver, "write_parts", half_written),
        "manifest": lambda: setattr(lease, "write_bytes", before(
            lease.write_bytes, lambda uri, _: uri.endswith("manifest.json"))),
        "latest": lambda: setattr(lease, "write_bytes", before(
            lease.write_bytes, lambda uri, _: uri.endswith("latest"))),
        "remove": lambda: setattr(commit, "remove", half_removed),
        "row": lambda: setattr(metrics, "append_rows", half_a_row),
        "load": lambda: setattr(Engine, "load", _half_load(due)),
        "rollback": lambda: _doom_rollback(due),
    }
    patches[name]()


def _slow_snapshot(due: Callable[[], None]) -> Any:
    """Saver._snapshot that comes to the event after some of the tensors are copied."""
    from neurojepa.train.engine import Engine
    from neurojepa.train.saver import Saver

    snapshot, tensors = Saver._snapshot, Engine.tensors

    def doomed(self: Saver) -> Any:
        asked = 0

        def counted(engine: Engine, fragment: Any) -> Any:
            nonlocal asked
            asked += 1
            if asked == 10:
                due()
            return tensors(engine, fragment)

        Engine.tensors = counted  # type: ignore[method-assign]
        try:
            return snapshot(self)
        finally:
            Engine.tensors = tensors  # type: ignore[method-assign]
    return doomed


def _half_load(due: Callable[[], None]) -> Any:
    """Engine.load that comes to the event after some of the fragments are set."""
    from neurojepa.train.engine import Engine

    load = Engine.load

    def doomed(self: Engine, read: Any, *arguments: Any) -> None:
        asked = 0

        def counted(fragment: Any, key: str) -> Any:
            nonlocal asked
            asked += 1
            if asked == 20:
                due()
            return read(fragment, key)

        load(self, counted, *arguments)
    return doomed


def _doom_rollback(due: Callable[[], None]) -> None:
    """Five events in each Run._go_back."""
    from neurojepa.feed.loader import Loader
    from neurojepa.train.engine import Engine
    from neurojepa.train.loop import Run
    from neurojepa.train.metrics import Metrics

    go_back, rewind, seek = Run._go_back, Metrics.rewind, Loader.seek

    def rewound(*arguments: Any) -> None:
        due()
        rewind(*arguments)
        due()

    def sought(*arguments: Any) -> None:
        due()
        seek(*arguments)

    def doomed(self: Run) -> None:
        due()
        Metrics.rewind = rewound  # type: ignore[method-assign]
        Engine.load = _half_load(due)  # type: ignore[method-assign]
        Loader.seek = sought  # type: ignore[method-assign]
        go_back(self)

    Run._go_back = doomed  # type: ignore[method-assign]


if __name__ == "__main__":
    import atexit
    import gc

    from neurojepa.errors import run_command

    gc.disable()  # as neurojepa.pretrain does
    atexit.register(gc.freeze)
    run_command(lambda: main(sys.argv[1:]), teardown=False)
