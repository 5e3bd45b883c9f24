"""Measures of a host before a start: what is slow, hot or damaged there, and what is odd about it.

Every host measures itself (``measure``), all at the same time; ``oddities`` compares them.  What is
found is told and keeps no host from taking part: one at half the speed of the others still trains.

    matrix rate     the best of some products of float32 matrices; on GPUs of bfloat16 ones
    link            a round trip and 4 MiB to the machine that asks, over a port of its own
    clock           against that machine's clock, by the middle of a round trip
    GPUs            nvidia-smi: memory errors, throttling, temperature; Xid in the kernel's log
"""

from __future__ import annotations

import csv
import hmac
import os
import re
import secrets
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

SIZE, RATE_S = 512, 0.5  # products on a CPU, some 10 ms each
GPU_SIZE, GPU_LIMIT_S = 8192, 7.0
SENT_BYTES, TRIPS, LINK_S = 4 << 20, 5, 3.0
SLOW, CLOCK_S, HOT_C = 0.5, 2.0, 88
SLOW_TRIP_MS, XID_S = 5.0, 3600.0
_KEY_BYTES, _CLOCK = 16, struct.Struct("!d")
_GPU_FIELDS = ("index", "temperature.gpu", "ecc.errors.uncorrected.volatile.total",
               "clocks_throttle_reasons.hw_slowdown",
               "clocks_throttle_reasons.hw_thermal_slowdown")
_GPU_RATE = """
import sys, time, torch
for device in range(torch.cuda.device_count()):
    a = torch.randn(int(sys.argv[1]), int(sys.argv[1]), device=device, dtype=torch.bfloat16)
    best = 1e9
    for _ in range(5):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        a @ a
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    print(2 * a.shape[0] ** 3 / best / 1e9)
"""


def measure(num_devices: int, asker: str | None, port: int, key: bytes) -> dict[str, Any]:
    """What a host finds out about itself, in some seconds.

    Parameters
    ----------
    asker, port, key
        Where a ``Listener`` waits, for the link; no asker, no link.

    Returns
    -------
    dict
        gflops (one per device, or one of the CPU), memory_free (bytes), gpus, xids, oom_kills;
        trip_ms, mib_per_s and clock_ahead_s, None where the port cannot be reached.
    """
    link = _link(asker, port, key) if asker else None
    return {"gflops": _gpu_rates() if num_devices else [_cpu_rate()],
            "memory_free": psutil.virtual_memory().available,
            "trip_ms": link and link[0], "mib_per_s": link and link[1],
            "clock_ahead_s": link and link[2],
            "gpus": _gpus() if num_devices else [], "xids": _xids() if num_devices else [],
            "oom_kills": oom_kills()}


def oddities(answers: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """What is odd about hosts, in words, from what each measured; the others are left out."""
    found: dict[str, list[str]] = {host: [] for host in answers}
    for host, answer in answers.items():
        if abs(off_s := answer["clock_ahead_s"] or 0.0) > CLOCK_S:
            found[host].append(f"its clock is {abs(off_s):.0f} s "
                               f"{'ahead' if off_s > 0 else 'behind'}; look at its time service")
    rates = {host: min(answer["gflops"]) for host, answer in answers.items() if answer["gflops"]}
    _compare(found, rates, "matrix rate", "GFLOP/s",
             "look at its clock rates, temperature and other jobs")
    links = {host: answer["mib_per_s"] for host, answer in answers.items() if answer["mib_per_s"]}
    _compare(found, links, "link", "MiB/s", "look at its network card and cable")
    trips = {host: answer["trip_ms"] for host, answer in answers.items() if answer["trip_ms"]}
    for host, trip_ms in trips.items():
        others = [value for other, value in trips.items() if other != host]
        if others and trip_ms > max(SLOW_TRIP_MS, 10 * statistics.median(others)):
            found[host].append(f"a round trip takes {trip_ms:.1f} ms, to the others "
                               f"{statistics.median(others):.1f} ms (median)")
    for host, answer in answers.items():
        if links and answer["mib_per_s"] is None:
            found[host].append("cannot reach a free port of the supervisor's machine, the others "
                               "can; look at its firewall")
        found[host] += _of_gpus(answer)
    return {host: said for host, said in found.items() if said}


def _compare(found: dict[str, list[str]], values: dict[str, float], what: str, unit: str,
             advice: str) -> None:
    """Name those below half of the others' median."""
    for host, value in values.items():
        others = [number for other, number in values.items() if other != host]
        if others and value < SLOW * (median := statistics.median(others)):
            found[host].append(f"{what} {value:.0f} {unit}, the others have {median:.0f} (median); "
                               f"{advice}")


def _of_gpus(answer: dict[str, Any]) -> list[str]:
    said = []
    for gpu in answer["gpus"]:
        name = f"GPU {gpu['index']}"
        if gpu["errors"]:
            said.append(f"{name} has {gpu['errors']} uncorrected memory errors since the driver "
                        "was loaded; reset it or have it replaced")
        if gpu["throttled"]:
            said.append(f"{name} is throttled by its hardware at {gpu['celsius']} degrees; look at "
                        "its cooling and power")
        elif gpu["celsius"] is not None and gpu["celsius"] > HOT_C:
            said.append(f"{name} has {gpu['celsius']} degrees before the start; look at its "
                        "cooling")
    said += [f"the kernel's log has Xid {xid} of the last hour; look it up in NVIDIA's list"
             for xid in sorted(set(answer["xids"]))]
    return said


@dataclass
class Checkups:
    """Successive checkups of the hosts of a run: what is new about them."""

    _said: set[tuple[str, str]] = field(default_factory=set)
    _oom_kills: dict[str, int] = field(default_factory=dict)

    def new(self, answers: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
        """Hosts and what is odd about each, but for what was said the last time already."""
        found = [(host, why) for host, said in oddities(answers).items() for why in said]
        for host, answer in answers.items():
            count = answer["oom_kills"]
            if count is not None:
                if count > self._oom_kills.get(host, count):
                    found.append((host, f"its kernel has ended {count - self._oom_kills[host]} "
                                        "process(es) for want of memory since the last start; look "
                                        "at what else runs there"))
                self._oom_kills[host] = count
        before, self._said = self._said, {(host, _gist(why)) for host, why in found}
        return [(host, why) for host, why in found if (host, _gist(why)) not in before]


def _gist(why: str) -> str:
    """Without its figures, which differ every time."""
    return re.sub(r"[\d.]+", "", why)


# ---- measures ------------------------------------------------------------------------------------

def _cpu_rate() -> float:
    """GFLOP/s of products of float32 matrices on one core."""
    # of one core: threads that wait for each other would measure other jobs
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    import numpy as np

    matrix = np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32)
    best_s, end = float("inf"), time.perf_counter() + RATE_S
    while time.perf_counter() < end:
        began = time.thread_time()  # without the turns of other jobs
        matrix @ matrix
        best_s = min(best_s, time.thread_time() - began)
    return round(2 * SIZE**3 / best_s / 1e9, 1)


def _gpu_rates() -> list[float]:
    """GFLOP/s by GPU; empty where torch takes too long to load."""
    with suppress(subprocess.TimeoutExpired, OSError, ValueError):
        done = subprocess.run([sys.executable, "-c", _GPU_RATE, str(GPU_SIZE)], text=True,
                              capture_output=True, timeout=GPU_LIMIT_S)
        return [round(float(line), 1) for line in done.stdout.split()]
    return []


def _gpus() -> list[dict[str, Any]]:
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}",
                               "--format=csv,noheader,nounits"], text=True, capture_output=True,
                              timeout=GPU_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return read_gpus(done.stdout) if done.returncode == 0 else []


def read_gpus(text: str) -> list[dict[str, Any]]:
    """What nvidia-smi's table says; figures that a device does not have are None."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines())]
    return [{"index": row[0], "celsius": _number(row[1]), "errors": _number(row[2]),
             "throttled": "Active" in row[3:]} for row in rows if len(row) == len(_GPU_FIELDS)]


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _xids() -> list[int]:
    try:
        done = subprocess.run(["dmesg"], text=True, capture_output=True, timeout=LINK_S,
                              errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return []
    return read_xids(done.stdout, time.clock_gettime(time.CLOCK_BOOTTIME))


def read_xids(log: str, now_s: float) -> list[int]:
    """Error numbers of the NVIDIA driver in a kernel's log of the last hour.

    Parameters
    ----------
    now_s
        Seconds since the boot, as the log counts them.
    """
    lines = re.findall(r"^\[\s*(\d+\.\d+)\] NVRM: Xid \([^)]*\): (\d+)", log, re.MULTILINE)
    return [int(xid) for at, xid in lines if now_s - float(at) < XID_S]


def oom_kills() -> int | None:
    """Processes that the kernel has ended for want of memory since the boot, None if not known."""
    with suppress(OSError, ValueError):
        for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
            with suppress(FileNotFoundError), open(path) as file:
                for line in file:
                    name, _, count = line.partition(" ")
                    if name == "oom_kill":
                        return int(count)
    return None


# ---- the link ------------------------------------------------------------------------------------

class Listener(threading.Thread):
    """Answers hosts that measure their way to this machine and have its key."""

    def __init__(self) -> None:
        super().__init__(name="link", daemon=True)
        self.key = secrets.token_bytes(_KEY_BYTES)
        self._socket = socket.create_server(("", 0), backlog=1024)
        self.port = int(self._socket.getsockname()[1])
        self.start()

    def close(self) -> None:
        """No more hosts are answered."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()

    def run(self) -> None:
        with suppress(OSError):
            while True:
                host, _ = self._socket.accept()
                threading.Thread(target=self._answer, args=(host,), daemon=True).start()

    def _answer(self, host: socket.socket) -> None:
        with host, suppress(OSError):
            host.settimeout(LINK_S)
            host.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not hmac.compare_digest(_receive(host, _KEY_BYTES), self.key):
                return
            for size in (SENT_BYTES, *[1] * TRIPS):
                if len(_receive(host, size)) < size:
                    return
                host.sendall(_CLOCK.pack(time.time()))


def _link(asker: str, port: int, key: bytes) -> tuple[float, float, float] | None:
    """To a ``Listener``: best round trip (ms), rate of a transfer (MiB/s), by how many seconds our
    clock is ahead."""
    with suppress(OSError), socket.create_connection((asker, port), LINK_S) as there:
        there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        there.sendall(key)
        times, ahead_s = [], 0.0
        for size in (SENT_BYTES, *[1] * TRIPS):
            clock, began = time.time(), time.perf_counter()
            there.sendall(bytes(size))
            said = _receive(there, _CLOCK.size)
            if len(said) < _CLOCK.size:
                return None
            times.append(time.perf_counter() - began)
            ahead_s = clock + times[-1] / 2 - _CLOCK.unpack(said)[0]
        return (round(1000 * min(times[1:]), 3), round(SENT_BYTES / 2**20 / times[0], 1),
                round(ahead_s, 3))
    return None


def _receive(peer: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (part := peer.recv(min(1 << 16, size - len(data)))):
        data += part
    return bytes(data)
