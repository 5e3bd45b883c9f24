"""Whether hosts reach each other before a start, and who is left out if not."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from cluster import hosts, meeting
from cluster.meeting import Visit, meet, strangers, visits
from neurojepa.ports import free_port

KEY = b"k" * 16
TO, AWAY = "Connection timed out", "No route to host"


def visit_all(there: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """Hosts of these addresses meet; returns whom each could not reach."""
    connect = socket.create_connection
    monkeypatch.setattr(meeting, "MEET_S", 0.5)
    monkeypatch.setattr(meeting, "CONNECT_S", 0.3)
    monkeypatch.setattr(socket, "create_connection",
                        lambda place, limit: connect((there[place[0]], place[1]), limit))
    with ThreadPoolExecutor(len(there)) as pool:
        calls = {host: pool.submit(meet, Visit(**own), KEY)
                 for host, own in visits(list(there)).items()}
        return {host: call.result() for host, call in calls.items()}


@contextmanager
def deaf() -> Iterator[tuple[str, int]]:
    """An address that lets callers wait, as behind a firewall that drops: its queue is full."""
    with socket.socket() as door, socket.socket() as first, socket.socket() as second:
        door.bind(("127.0.0.1", free_port()))
        door.listen(0)
        for caller in (first, second):
            caller.setblocking(False)
            caller.connect_ex(door.getsockname())
        yield door.getsockname()


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_everyone_is_called_and_calls(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"h{number}" for number in range(count)]
    drawn = {free_port() for _ in range(4 * count)}  # here all hosts are one: no port twice
    monkeypatch.setattr(meeting, "free_port", drawn.pop)
    planned = visits(names)
    assert {host: own["callers"] for host, own in planned.items()} == {
        host: sum(host in other["peers"] for other in planned.values()) for host in names}
    assert all(planned[names[0]]["port"] == own["peers"][names[0]][1]
               for host, own in planned.items() if host != names[0])
    assert len({own["port"] for own in planned.values()}) == count
    assert visit_all(dict.fromkeys(names, "127.0.0.1"), monkeypatch) == {
        name: {} for name in names}


def test_names_that_only_ssh_knows_are_no_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(visit_all({"a": "127.0.0.1", "b": "no.such.host.invalid"}, monkeypatch).values())


def test_the_first_host_is_called_by_the_address_that_was_given_for_it() -> None:
    planned = visits(["a", "b", "c"], "10.0.0.1")
    assert {planned[host]["peers"]["a"][0] for host in "bc"} == {"10.0.0.1"}
    assert planned["a"]["peers"]["b"][0] == planned["c"]["peers"]["b"][0] == "b"


def test_a_port_that_drops_is_told_and_one_that_refuses_may_be_late(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "MEET_S", 0.3)
    monkeypatch.setattr(meeting, "CONNECT_S", 0.2)
    with deaf() as (_, port):
        assert meet(Visit(free_port(), 0, {"b": ("127.0.0.1", port)}), KEY) == {"b": "timed out"}
    assert meet(Visit(free_port(), 0, {"b": ("127.0.0.1", free_port())}), KEY) == {}
    with socket.create_server(("127.0.0.1", 0)) as other:  # which says nothing
        assert meet(Visit(free_port(), 0, {"b": other.getsockname()}), KEY) == {}


def test_a_name_server_that_is_away_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "MEET_S", 0.1)
    monkeypatch.setattr(meeting, "CONNECT_S", 0.1)
    back, alone = threading.Event(), list[bool]()

    def ask(*_: object) -> None:
        alone.append(not back.wait(60))  # nobody may wait for this
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "create_connection", ask)
    try:
        assert meet(Visit(free_port(), 0, {"b": ("alias", free_port())}), KEY) == {}
        assert not alone
    finally:
        back.set()


def test_a_caller_without_the_key_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "MEET_S", 0.4)
    port, began = free_port(), time.monotonic()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(meet, Visit(port, 1, {}), KEY)
        late: dict[str, str] = {}
        thread = threading.Thread(target=meeting._call,
                                  args=("a", ("127.0.0.1", port), b"x" * 16, 0.0, late))
        thread.start()
        thread.join()
        assert waiting.result(60) == {} and time.monotonic() - began > 0.35


@pytest.mark.parametrize(("missed", "found"), [
    ({"a": {}, "b": {}}, {}),
    ({"a": {"b": TO}, "b": {}}, {"b": f"cannot be reached by a on a free port ({TO})"}),
    ({"a": {}, "b": {"a": AWAY}}, {"b": f"cannot reach a on a free port ({AWAY})"}),
    ({"a": {"b": TO}, "b": {"a": TO, "c": TO}, "c": {}, "d": {}},
     {"b": f"cannot be reached by a and cannot reach a, c on a free port ({TO})"}),
    ({"a": {}, "b": {"a": TO}, "c": {"a": TO}, "d": {"a": TO}},
     {"a": f"cannot be reached by b, c, d on a free port ({TO})"}),
    ({"a": {"b": TO, "dead": TO}, "b": {}, "c": {"d": TO}, "d": {}}, {"b": "", "d": ""}),
    ({"a": {"dead": AWAY}, "b": {"dead": AWAY}}, {})])  # it is left out for that already
def test_few_are_left_out_and_named_in_one_line(missed: dict[str, dict[str, str]],
                                                found: dict[str, str]) -> None:
    said = strangers(missed)
    assert said.keys() == found.keys()
    assert all(said[host].startswith(found[host]) and "look at its firewall" in said[host]
               for host in found)


def test_a_host_that_the_others_cannot_reach_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(said: dict[str, str], *_: Any) -> dict[str, hosts.Answer]:
        row = {**hosts.about_this_host(None), "measured": {"memory_free": 1 << 40}}
        missed = {"a": {"c": TO}, "b": {}, "c": {}}
        return {host: hosts.Answer(0, [hosts.json.dumps({**row, "missed": missed[host]})], "")
                for host in said}

    monkeypatch.setattr(hosts, "ask", answer)
    found = hosts.problems({"a": 1, "b": 1, "c": 1}, None)
    assert found == {"c": found["c"]} and found["c"].startswith("cannot be reached by a on")
