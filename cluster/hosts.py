"""Hosts before a start: what is wrong with them.

``problems`` asks all hosts at once by ssh what ``python -m cluster.hosts`` says of each: one that
is dead, runs another version of the code, has no room or too few GPUs, or that the others cannot
reach is named within seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.checkup import Listener, measure
from cluster.meeting import Visit, meet, strangers, visits
from cluster.room import LEAST_ROOM, free_bytes
from cluster.ssh import module_on

ANSWER_S = 10.0  # ssh gives up on a dead host after 5 s
RANK_MEMORY = 512 << 20  # bytes: Python with torch and a tiny model
NO_CONNECTION = 255  # ssh's own status


def problems(slots: dict[str, int], folder: str | None,
             odd: Callable[[dict[str, dict[str, Any]]], None] | None = None,
             master_addr: str | None = None) -> dict[str, str]:
    """What keeps hosts from taking part, in words; the hosts without a problem are not in it.

    Parameters
    ----------
    slots
        Ranks by host.
    folder
        A local run directory, where there must be room.
    odd
        Told what the hosts that can take part have measured (see checkup.py).
    master_addr
        The first host's address as the others see it, where that is not its name here.
    """
    here = about_this_host(folder)
    with closing(Listener()) as listener:
        said = {host: json.dumps({"key": listener.key.hex(), "visit": visit})
                for host, visit in visits(list(slots), master_addr).items()}
        answers = {host: _read(answer) for host, answer in ask(
            said, "cluster.hosts", [folder or "", str(listener.port)], ANSWER_S).items()}
    found = {}
    devices = max((answer["devices"] for answer in answers.values() if isinstance(answer, dict)),
                  default=0)
    for host, answer in answers.items():
        problem = answer if isinstance(answer, str) else _judge(answer, here, slots[host], devices)
        if problem:
            found[host] = problem
    found |= strangers({host: answer["missed"] for host, answer in answers.items()
                        if isinstance(answer, dict) and host not in found})
    if odd is not None:
        odd({host: answer["measured"] for host, answer in answers.items()
             if isinstance(answer, dict) and host not in found})
    return found


def about_this_host(folder: str | None) -> dict[str, Any]:
    """What others want to know of the host that this runs on."""
    return {"code": code_version(), "devices": num_devices(),
            "free": free_bytes(folder) if folder else None}


def code_version() -> str:
    """A hash of the packages' code, the same on hosts that run the same."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for package in ("cluster", "neurojepa"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def num_devices() -> int:
    """GPUs that the driver shows, without loading CUDA."""
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return 0


def _judge(answer: dict[str, Any], here: dict[str, Any], slots: int, devices: int) -> str:
    if answer["code"] != here["code"]:
        return (f"runs other code ({answer['code']}, here {here['code']}); bring it to the same "
                "version")
    if answer["free"] is not None and answer["free"] < LEAST_ROOM:
        return (f"has {answer['free'] >> 20} MiB free for the run directory, "
                f"{LEAST_ROOM >> 20} MiB are needed; free some space")
    if devices and answer["devices"] < slots:
        return (f"has {answer['devices']} GPU(s) for slots={slots}; correct the hostfile or look "
                "at nvidia-smi there")
    if (free := answer["measured"]["memory_free"]) < slots * RANK_MEMORY:
        return (f"has {free >> 20} MiB of memory free for slots={slots}, a rank needs at least "
                f"{RANK_MEMORY >> 20} MiB; end what else runs there")
    return ""


def _read(answer: Answer) -> dict[str, Any] | str:
    if answer.status is None:
        return f"has not answered by ssh within {ANSWER_S:.0f} s"
    if answer.status == NO_CONNECTION:
        return f"cannot be reached by ssh ({answer.error or 'no answer'})"
    try:
        row: dict[str, Any] = json.loads(answer.lines[-1])
        return row
    except (ValueError, IndexError):
        return (f"cannot run {sys.executable} in {os.getcwd()} ({answer.error or answer.status}); "
                "it needs the same checkout and environment at the same path")


@dataclass(frozen=True)
class Answer:
    """What a command on a host came to; ``status`` is None if it did not end in time."""

    status: int | None
    lines: list[str]
    error: str  # its last line


def ask(said: dict[str, str], module: str, words: list[str],
        timeout_s: float) -> dict[str, Answer]:
    """Run a module of ours on hosts, all at once, in the same folder as here.

    Parameters
    ----------
    said
        By host (empty for this machine), a line for the standard input there.
    """
    calls = {host: subprocess.Popen(module_on(host, module, words), stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                    # a banner there may be in any encoding
                                    encoding="utf-8", errors="backslashreplace")
             for host in said}
    for host, call in calls.items():
        assert call.stdin
        with suppress(BrokenPipeError):  # it has ended: its answer tells why
            call.stdin.write(f"{said[host]}\n")
            call.stdin.close()
        call.stdin = None
    answers, end = {}, time.monotonic() + timeout_s
    for host, call in calls.items():
        try:
            out, errors = call.communicate(timeout=max(0.1, end - time.monotonic()))
            told = [line.strip() for line in errors.splitlines() if line.strip()]
            answers[host] = Answer(call.returncode, out.splitlines(), told[-1] if told else "")
        except subprocess.TimeoutExpired:
            call.kill()
            call.wait()
            for pipe in (call.stdout, call.stderr):  # a proxy of ssh's may still hold them open
                assert pipe
                pipe.close()
            answers[host] = Answer(None, [], "")
    return answers


def main(folder: str, port: int) -> None:
    """Print what whoever asks by ssh wants to know; a key and whom to visit come on standard input.
    """
    said = json.loads(sys.stdin.readline())
    key = bytes.fromhex(said["key"])
    asker = os.environ.get("SSH_CONNECTION", "").partition(" ")[0] or None
    with ThreadPoolExecutor(1) as pool:
        missed = pool.submit(meet, Visit(**said["visit"]), key)
        measured = measure(num_devices(), asker, port, key)
        print(json.dumps({**about_this_host(folder or None), "measured": measured,
                          "missed": missed.result()}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
