"""gpu: everything that is to be known of a GPU, in one command of at most eight minutes on an H100.

Every stage is a process with a time limit of its own and a log in build/bench-gpu; one that fails
or takes too long leaves the others as they are.

    versions    packages, device, rate of a large matrix product
    speed       base and large at two micro-batches, as it is and compiled: MFU by data sheet and
                by the measured matrix rate, memory, data wait, reads that wait for the device
    official    the official step, ours at equal work and with the token budget (--official)
    profile     the 40 costliest kernels beside what the count predicts (neurojepa/planning)
    agreement   views, masks, loss and gradients of the same positions on the CPU and here
    killed      a run killed and continued, deterministic and not
    zero        ZeRO 1 to 3, offloading and float32: do they train, and alike?
    checkpoint  how long training waits for a checkpoint

With --rehearse all of it runs at a tiny size, with or without a GPU, so that it works on the day.
Without one, processes are forked from this one, which has imported everything: that is most of what
a tiny stage takes.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from neurojepa.errors import ConfigError
from tools.bench.common import machine, print_table

TOTAL_S = 480.0
LOGS = Path("build/bench-gpu")
# What stages import, if only at their first step.
PRELOADED = ("deepspeed", "torch._dynamo", "torch.utils.tensorboard", "tools.bench._gpu_stages")
TRAINING_SHAPE, TINY_SHAPE = (108, 132, 108), (24, 36, 24)


@dataclass(frozen=True)
class Stage:
    """A process to start: a function of _gpu_stages, its arguments and its seconds."""

    name: str
    function: str
    limit_s: float
    arguments: dict[str, Any] = field(default_factory=dict)


def run(quick: bool, official: str | None, rehearse: bool = False) -> dict[str, Any]:
    """All stages; returns what each answered, or why it did not."""
    if not (torch.cuda.is_available() or rehearse):
        raise ConfigError("bench gpu: no CUDA GPU is visible here; --rehearse runs every stage at "
                          "a tiny size without one")
    print(machine() + ("; a rehearsal: its figures mean nothing" if rehearse else ""))
    LOGS.mkdir(parents=True, exist_ok=True)
    if start_method() == "fork":
        for name in PRELOADED:
            importlib.import_module(name)
    began, found = time.monotonic(), {}
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as work:
        for stage in stages(quick, official, rehearse):
            arguments = {"work": work, "tiny": rehearse,
                         "rate": found.get("versions", {}).get("flops"), **stage.arguments}
            left_s = TOTAL_S - (time.monotonic() - began)
            found[stage.name] = answer(stage, arguments, min(stage.limit_s, left_s))
    print_table(("stage", "s", "found"), [(name, round(result.pop("seconds"), 1), _short(result))
                                          for name, result in found.items()])
    print(f"logs: {LOGS}")
    return {"rehearsal": rehearse, "seconds": time.monotonic() - began,
            "failed": [name for name, result in found.items() if "failed" in result],
            "stages": found}


def start_method() -> str:
    """How processes begin: forked where no CUDA is that a copy could not use."""
    return "spawn" if torch.cuda.is_available() else "fork"


def stages(quick: bool, official: str | None, rehearse: bool) -> list[Stage]:
    """What is run: what others need first, then the most wanted."""
    if rehearse:
        speeds = [("tiny", 2, "off"), ("tiny", 2, "auto")]
    else:
        speeds = [(size, micro, compiled)
                  for size, micros in (("base", (64, 128)), ("large", (32, 64)))
                  for micro in (micros[:1] if quick else micros) for compiled in ("auto", "off")]
    listed = [Stage("versions", "versions", 60), Stage("feed", "make_feed", 60)]
    listed += [Stage(f"speed {size} {micro} {'compiled' if compiled == 'auto' else 'eager'}",
                     "speed", 120 if compiled == "auto" else 60,
                     {"size": size, "micro": micro, "compile": compiled})
               for size, micro, compiled in speeds]
    if official is not None:
        listed += [Stage(f"official {side}", "of_step", 70, {"side": side, "official": official})
                   for side in ("official", "parity", "budget")]
    return [*listed, Stage("agreement", "agreement", 60), Stage("profile", "profile", 60),
            Stage("killed", "killed", 150), Stage("zero", "zero", 90),
            Stage("checkpoint", "checkpoint", 60)]


def answer(stage: Stage, arguments: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """What a stage's process found, with its seconds; or ``failed`` and why."""
    if limit_s <= 0:
        return {"failed": f"the {TOTAL_S:.0f} s of the whole command are over", "seconds": 0.0}
    log, began = LOGS / f"{stage.name.replace(' ', '-')}.log", time.monotonic()
    # not the log's last line: NCCL and others write there until the process is gone
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)
    log.write_text("")  # a stage may be stopped before it has opened it
    process = multiprocessing.get_context(start_method()).Process(
        target=_enter, args=(stage.function, arguments, str(log), str(result)))
    process.start()
    try:
        process.join(limit_s)
        problem = (f"status {process.exitcode}" if process.exitcode else
                   f"stopped after its {limit_s:.0f} s" if process.exitcode is None else "")
    finally:
        if process.is_alive():
            _end(process)
    if problem:
        lines = log.read_text(errors="replace").splitlines()
        found = {"failed": f"{problem}: {lines[-1] if lines else 'it said nothing'}"[:300]}
    else:
        found = json.loads(result.read_text())
    return {**found, "seconds": time.monotonic() - began}


def _enter(function: str, arguments: dict[str, Any], log: str, result: str) -> None:
    """What a stage's process does."""
    os.setsid()  # so that it can be ended with all that it starts
    from tools.bench import _gpu_stages

    with open(log, "w", buffering=1) as output:
        sys.stdout = sys.stderr = output
        for descriptor in (1, 2):
            os.dup2(output.fileno(), descriptor)
        try:
            _gpu_stages.answer(function, arguments, Path(result))
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def _end(process: Any) -> None:
    """End a stage with all that it started, which would slow the others."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no session of its own yet
        process.kill()
    process.join()


def _short(result: dict[str, Any]) -> str:
    """The scalars of an answer in a line."""
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in result.items() if not isinstance(value, list | dict))
