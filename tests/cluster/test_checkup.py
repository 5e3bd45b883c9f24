"""What hosts measure of themselves before a start, and what is told of it."""

from __future__ import annotations

import time
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import checkup
from cluster.checkup import Checkups, Listener, measure, oddities, read_gpus, read_xids


def host(**own: Any) -> dict[str, Any]:
    return {"gflops": [100.0], "memory_free": 1 << 34, "trip_ms": 0.2, "mib_per_s": 900.0,
            "clock_ahead_s": 0.01, "gpus": [], "xids": [], "oom_kills": 0, **own}


def gpu(**own: Any) -> dict[str, Any]:
    return {"index": "0", "celsius": 40, "errors": 0, "throttled": False, **own}


@pytest.mark.parametrize(("own", "says"), [
    ({}, ""), ({"gflops": [51.0]}, ""), ({"clock_ahead_s": -1.5}, ""), ({"gflops": []}, ""),
    ({"gflops": [49.0]}, "matrix rate 49 GFLOP/s, the others have 100 (median)"),
    ({"gflops": [100.0, 100.0, 30.0]}, "matrix rate 30 GFLOP/s"),  # its slowest device
    ({"mib_per_s": 100.0}, "link 100 MiB/s, the others have 900"),
    ({"mib_per_s": None, "trip_ms": None, "clock_ahead_s": None}, "cannot reach a free port"),
    ({"trip_ms": 20.0}, "a round trip takes 20.0 ms, to the others 0.2 ms"),
    ({"trip_ms": 4.0}, ""),  # ten times the others', and no matter
    ({"clock_ahead_s": 300.2}, "its clock is 300 s ahead"),
    ({"clock_ahead_s": -5.0}, "its clock is 5 s behind"),
    ({"gpus": [gpu(), gpu(index="3", errors=2)]}, "GPU 3 has 2 uncorrected memory errors"),
    ({"gpus": [gpu(throttled=True, celsius=91)]}, "GPU 0 is throttled by its hardware at 91"),
    ({"gpus": [gpu(celsius=93)]}, "GPU 0 has 93 degrees before the start"),
    ({"gpus": [gpu(celsius=None, errors=None)]}, ""),
    ({"xids": [79, 79]}, "Xid 79 of the last hour")])
def test_a_host_that_differs_is_named_with_what_to_do(own: dict[str, Any], says: str) -> None:
    found = oddities({"a": host(), "b": host(), "odd": host(**own), "c": host()})
    assert list(found) == (["odd"] if says else [])
    assert not says or (len(found["odd"]) == 1 and says in found["odd"][0])


def test_one_host_alone_is_compared_with_nobody() -> None:
    assert oddities({"a": host(gflops=[0.1], mib_per_s=1.0, trip_ms=90.0)}) == {}


def test_it_is_told_once_and_again_when_it_comes_back() -> None:
    told, odd = Checkups(), {"clock_ahead_s": 300.0}
    looks = [told.new({"a": host(**own)}) for own in (odd, {"clock_ahead_s": 301.0}, {}, odd)]
    assert [len(found) for found in looks] == [1, 0, 0, 1]


def test_processes_that_the_kernel_ended_between_two_starts_are_counted() -> None:
    told = Checkups()
    counts = [7, 7, 9, 9, None, 10]
    said = [told.new({"a": host(oom_kills=count)}) for count in counts]
    assert [[why[:35] for _, why in found] for found in said] == [
        [], [], ["its kernel has ended 2 process(es) "], [], [],
        ["its kernel has ended 1 process(es) "]]


def test_figures_of_nvidia_smi_and_of_the_kernel_are_read() -> None:
    assert read_gpus("0, 34, 0, Not Active, Not Active\n1, 91, 3, Active, Active\n"
                     "2, [N/A], [N/A], Not Active, Not Active\nUnable to determine\n") == [
        gpu(celsius=34), gpu(index="1", celsius=91, errors=3, throttled=True),
        gpu(index="2", celsius=None, errors=None)]
    log = ("[   10.000000] NVRM: Xid (PCI:0000:01:00): 13, pid=1\n"
           "[ 9000.250000] NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.\n"
           "[ 9000.300000] usb 1-1: Xid no\n")
    assert read_xids(log, now_s=9100.0) == [79]


def test_a_host_measures_its_way_to_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "RATE_S", 0.01)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # measuring sets them for its own process
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    with closing(Listener()) as listener:
        found = measure(0, "127.0.0.1", listener.port, listener.key)
        assert found["gflops"][0] > 0 and found["memory_free"] > 0
        assert 0 < found["trip_ms"] < 1000 and found["mib_per_s"] > 1
        assert abs(found["clock_ahead_s"]) < 0.5
        ahead = iter([300.0, 0.0] * 6)  # this host's clock, then the asker's
        # a module of its own: threads of other tests look at the clock, too
        monkeypatch.setattr(checkup, "time", SimpleNamespace(**{
            **vars(time), "time": lambda: time.time() + next(ahead)}))
        assert measure(0, "127.0.0.1", listener.port, listener.key)["clock_ahead_s"] == \
            pytest.approx(300.0, abs=0.5)
        monkeypatch.undo()
        wrong = measure(0, "127.0.0.1", listener.port, bytes(16))
    gone = measure(0, "127.0.0.1", listener.port, listener.key)
    assert wrong["mib_per_s"] is gone["mib_per_s"] is gone["clock_ahead_s"] is None
