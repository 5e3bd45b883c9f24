"""Which hosts take part: what is said of each, who is left out, who comes back."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import __main__ as command
from cluster import hosts, supervise
from cluster.attempt import DeepSpeedLaunch
from cluster.hosts import HostWatch, about_this_host, problems
from cluster.membership import Membership, TooFewHosts
from cluster.rundir import RunDir
from cluster.supervise import Supervisor
from cluster.world import World
from neurojepa.errors import ConfigError
from neurojepa.train import world

# by the host's name: what a host may do to whoever calls it
SSH = """#!/bin/bash
while [ "${1:0:1}" = "-" ]; do shift; [ "${1:0:1}" = "-" ] || shift; done
host=$1; shift
case $host in
  dead*) echo "ssh: connect to host $host port 22: No route to host" >&2; exit 255;;
  deaf*) exec sleep 60;;
  bare*) cd / && exec /bin/sh -c "cd /no/such/checkout && $*";;
  other*) echo '{"code": "old", "devices": 0, "time": 0, "free": null}';;
  *) exec /bin/sh -c "$*";;
esac
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An ssh that reaches only this machine; returns its folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_each_host_with_a_problem_is_named_and_the_good_one_is_not(
        ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "ANSWER_S", 3.0)
    began = time.monotonic()
    found = problems(dict.fromkeys(("good", "dead", "bare", "other", "deaf"), 1), None, "-o A=b")
    assert time.monotonic() - began < 30
    assert found == {
        "dead": "cannot be reached by ssh (ssh: connect to host dead port 22: No route to host)",
        "bare": found["bare"], "other": found["other"],
        "deaf": "has not answered by ssh within 3 s"}
    assert f"cannot run {sys.executable} in {os.getcwd()}" in found["bare"]
    assert "no/such/checkout" in found["bare"]
    assert found["other"].startswith("runs other code (old, here ")


@pytest.mark.parametrize(("answer", "slots", "devices", "says"), [
    ({}, 1, 0, ""), ({"free": None}, 1, 0, ""), ({"devices": 8}, 8, 8, ""),
    ({"measured": {"memory_free": 100 << 20}}, 2, 0, "has 100 MiB of memory free for slots=2"),
    ({"code": "b"}, 1, 0, r"runs other code (b, here a)"),
    ({"free": 3 << 20}, 1, 0, "has 3 MiB free for the run directory, 16 MiB are needed"),
    ({"devices": 7}, 8, 8, "has 7 GPU(s) for slots=8"), ({}, 1, 8, "has 0 GPU(s) for slots=1")])
def test_what_a_host_says_of_itself_is_judged(answer: dict[str, object], slots: int, devices: int,
                                              says: str) -> None:
    row = {"code": "a", "free": 1 << 40, "devices": 0, "measured": {"memory_free": 1 << 40},
           **answer}
    judged = hosts._judge(row, {"code": "a"}, slots, devices)
    assert judged.startswith(says) and bool(judged) is bool(says)


def test_the_version_of_the_code_is_that_of_its_files(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert about_this_host(str(tmp_path))["code"] == hosts.code_version()
    for name in ("cluster", "neurojepa"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(hosts, "__file__", str(tmp_path / "cluster" / "hosts.py"))
    (tmp_path / "neurojepa" / "a.py").write_text("1")
    first = hosts.code_version()
    (tmp_path / "neurojepa" / "a.py").write_text("2")
    assert hosts.code_version() != first


def test_a_host_is_gone_when_it_stays_away_and_not_when_it_flaps(ssh: Path) -> None:
    good, dead = HostWatch("good", "", gone_s=0.6), HostWatch("dead", "", gone_s=0.6)
    end = time.monotonic() + 10
    while not dead.gone:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert not good.gone
    (ssh / "ssh").write_text(SSH.replace("dead*)", "none*)"))  # it is back
    while dead.gone:
        assert time.monotonic() < end
        time.sleep(0.05)
    for watch in (good, dead):
        watch.close()
        watch.join(5)
        assert not watch.is_alive()


def membership(told: list[tuple[str, str, str]], looks: list[dict[str, str]], least: int = 1,
               most: int = 99) -> Membership:
    return Membership({"a": 2, "b": 2, "c": 2}, least, most, lambda slots: looks.pop(0),
                      lambda *said: told.append(said))


def test_bad_hosts_are_left_out_told_once_and_come_back() -> None:
    told: list[tuple[str, str, str]] = []
    members = membership(told, [{}, {"b": "is dead"}, {"b": "is dead", "a": "is old"}, {"a": "x"}])
    assert [sorted(members.choose()) for _ in range(4)] == [[], ["b"], ["a", "b"], ["a"]]
    assert told == [("host_excluded", "b", "is dead"), ("host_excluded", "a", "is old"),
                    ("host_back", "b", "is dead")]


def test_a_spare_takes_the_place_of_a_host_that_is_gone() -> None:
    members = membership([], [{}, {"a": "is dead"}, {}], most=2)
    assert [sorted(members.choose()) for _ in range(3)] == [["c"], ["a"], ["c"]]


def test_too_few_hosts_are_all_named() -> None:
    members = membership([], [{"a": "is dead", "c": "is old"}], least=2)
    with pytest.raises(TooFewHosts, match=r"1 of 3 hosts can take part, 2 are needed: a is dead; "
                                          "c is old"):
        members.choose()


def hostfile(folder: Path) -> str:
    (folder / "hosts").write_text("a slots=2\nb slots=2\nc slots=2\n")
    return str(folder / "hosts")


def test_the_launch_leaves_them_out(tmp_path: Path) -> None:
    launch = DeepSpeedLaunch(["--config", "c"], 1, hostfile(tmp_path), "10.0.0.1")
    assert "--exclude" not in launch.command()
    without_b, without_a = (DeepSpeedLaunch(launch.arguments, 1, launch.hostfile, "10.0.0.1",
                                            without=frozenset(names)) for names in ("bc", "a"))
    command_b, command_a = without_b.command(), without_a.command()
    assert command_b[command_b.index("--exclude") + 1] == "b@c" and without_b.hosts() == ["a"]
    assert command_b[command_b.index("--master_addr") + 1] == "10.0.0.1"
    # the address that was given is that of a host that is left out
    assert command_a[command_a.index("--master_addr") + 1] == "b"
    (tmp_path / "hosts").write_text("a slots=1\na slots=1\n")
    with pytest.raises(ConfigError, match="hosts:2: a stands there twice"):
        launch.hosts()


def test_the_supervisor_waits_for_hosts_only_when_it_has_started_once(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [dict.fromkeys("abc", "is dead")] * 3 + [{"b": "is dead"}]
    monkeypatch.setattr(supervise, "problems", lambda *_: looks.pop(0))
    supervisor = Supervisor(DeepSpeedLaunch([], 1, hostfile(tmp_path)), RunDir(str(tmp_path)),
                            min_hosts=2)
    waited: list[float] = []
    monkeypatch.setattr(supervisor, "_wait", waited.append)
    with pytest.raises(TooFewHosts, match="a is dead; b is dead; c is dead"):
        supervisor._choose_hosts(0)
    supervisor._choose_hosts(60)
    assert supervisor._current.hosts() == ["a", "c"] and len(waited) == 2
    rows = [(row["event"], row["host"]) for row in supervisor.run_dir.events()]
    assert rows == [("host_excluded", host) for host in "abc"] + [("host_back", "a"),
                                                                  ("host_back", "c")]


def test_an_attempt_ends_when_a_host_is_gone(tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = World("0", 1, ["a", "b"])
    monkeypatch.setattr(attempt, "watch_hosts", lambda: None)
    monkeypatch.setattr(attempt, "alive", lambda: True)
    monkeypatch.setattr(attempt, "signal", lambda signum: None)
    monkeypatch.setattr(attempt, "gone_hosts", lambda: ["b"])
    supervisor = Supervisor(DeepSpeedLaunch([], 1), RunDir(str(tmp_path)))
    assert supervisor._watch(attempt, supervise.Progress([])) is False
    (row,) = supervisor.run_dir.events()
    assert (row["event"], row["hosts"]) == ("host_lost", ["b"])


@pytest.mark.parametrize("words", [
    ["--min-hosts", "2"], ["--max-hosts", "1"], ["--hostfile", "H", "--min-hosts", "4"],
    ["--hostfile", "H", "--min-hosts", "2", "--max-hosts", "1"]])
def test_hosts_that_cannot_be_chosen_are_refused(tmp_path: Path, words: list[str]) -> None:
    recipe = tmp_path / "c.yaml"
    recipe.write_text("run: {dir: a}\ntrain: {steps: 5}\n")
    words = [hostfile(tmp_path) if word == "H" else word for word in words]
    with pytest.raises(ConfigError, match="hosts"):
        command.main(["supervise", *words, "--", "--config", str(recipe)])


# ---- the interface between hosts -----------------------------------------------------------------

@pytest.mark.parametrize(("names", "environment", "expected"), [
    ({"me": "127.0.1.1", "m": "10.0.0.9"}, {"MASTER_ADDR": "m"}, "eth7"),
    ({"m": "10.0.0.9"}, {"MASTER_ADDR": "m"}, "eth7"),  # this host's name leads nowhere
    ({"me": "10.0.0.2", "m": "10.0.0.9"}, {"MASTER_ADDR": "m"}, None),
    ({"me": "127.0.1.1", "m": "127.0.0.1"}, {"MASTER_ADDR": "m"}, None),  # all ranks are here
    ({"me": "127.0.1.1", "m": "10.0.0.9"}, {"MASTER_ADDR": "m", "GLOO_SOCKET_IFNAME": "ib0"}, None),
    ({}, {}, None)])
def test_the_interface_is_that_of_the_way_to_the_master(
        monkeypatch: pytest.MonkeyPatch, names: dict[str, str], environment: dict[str, str],
        expected: str | None) -> None:
    def resolve(name: str) -> str:
        if name not in names:
            raise OSError("unknown")
        return names[name]

    class Probe:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Probe: return self
        def __exit__(self, *_: object) -> None: ...
        def connect(self, address: tuple[str, int]) -> None: assert address[0] == "10.0.0.9"
        def getsockname(self) -> tuple[str, int]: return "10.0.0.2", 5

    class Address:
        def __init__(self, address: str) -> None:
            self.address = address

    monkeypatch.setattr(socket, "gethostbyname", resolve)
    monkeypatch.setattr(socket, "gethostname", lambda: "me")
    monkeypatch.setattr(socket, "socket", Probe)
    monkeypatch.setattr(world.psutil, "net_if_addrs", lambda: {
        "lo": [Address("127.0.0.1")], "eth7": [Address("fe80::1"), Address("10.0.0.2")]})
    assert world.interface_to_use(environment) == expected
