"""Which hosts take part: what is said of each, who is left out, who comes back."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import __main__ as command
from cluster import hosts
from cluster.agents import AgentLauncher
from cluster.hosts import about_this_host, problems
from cluster.launcher import Attempt
from cluster.membership import Membership, TooFewHosts
from cluster.rundir import RunDir
from cluster.supervise import Supervisor
from neurojepa.errors import ConfigError
from neurojepa.train import world

# by the host's name: what a host may do to whoever calls it
SSH = """#!/bin/bash
while [ "${1:0:1}" = "-" ]; do shift; [ "${1:0:1}" = "-" ] || shift; done
host=$1; shift
case $host in
  dead*) echo "ssh: connect to host $host port 22: No route to host" >&2; exit 255;;
  deaf*) exec sleep 900;;
  latin*) printf 'Gr\\374\\337e\\n'; printf 'gesch\\374tzt\\n' >&2; exit 255;;
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
    monkeypatch.setattr(hosts, "ANSWER_S", 120.0)
    return folder


def test_each_host_with_a_problem_is_named_and_the_good_one_is_not(
        ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([0.0] * 6 + [hosts.ANSWER_S])  # when the last one is asked for, time is up
    monkeypatch.setattr(hosts, "time", SimpleNamespace(monotonic=lambda: next(looks)))
    found = problems(dict.fromkeys(("good", "dead", "bare", "other", "latin", "deaf"), 1), None)
    assert found == {
        "dead": "cannot be reached by ssh (ssh: connect to host dead port 22: No route to host)",
        "bare": found["bare"], "other": found["other"],
        "latin": r"cannot be reached by ssh (gesch\xfctzt)",
        "deaf": "has not answered by ssh within 120 s"}
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


def membership(told: list[tuple[str, str, str]], looks: list[dict[str, str]], least: int = 1,
               most: int = 99) -> Membership:
    return Membership({"a": 2, "b": 2, "c": 2}, least, most, lambda _: looks.pop(0),
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


def attempt(token: str, **slots: int) -> Attempt:
    return Attempt(token, 1, 1, list(slots), slots=slots)


def test_each_host_is_told_its_own_ranks_and_the_same_world(tmp_path: Path) -> None:
    launcher = AgentLauncher(["--config", "c"], 1, hostfile(tmp_path), "10.0.0.1")
    orders = launcher.orders(attempt("t", a=2, b=2, c=2))
    assert list(orders) == ["a", "b", "c"]
    ranks = [rank for order in orders.values() for rank in order["ranks"]]
    assert [(one["RANK"], one["LOCAL_RANK"]) for one in ranks] == [
        (str(rank), str(rank % 2)) for rank in range(6)]
    assert {(one["WORLD_SIZE"], one["MASTER_ADDR"], one["LOCAL_WORLD_SIZE"]) for one in ranks} == {
        ("6", "10.0.0.1", "2")}
    assert len({one["MASTER_PORT"] for one in ranks}) == 1
    assert all(order["command"] == [sys.executable, "-u", "-m", "neurojepa.pretrain", "--config",
                                    "c"] for order in orders.values())
    # the address that was given is that of a host that is left out
    (one, *_) = launcher.orders(attempt("t", b=2))["b"]["ranks"]
    assert (one["WORLD_SIZE"], one["MASTER_ADDR"]) == ("2", "b")
    (order,) = AgentLauncher([], 3).orders(Attempt("t", 1)).values()
    assert len(order["ranks"]) == 3 and order["ranks"][0]["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(("text", "says"), [
    ("a slots=1\na slots=1\n", "hosts:2: a stands there twice"),
    ("10.0.0.1\n", "hosts:1: '10.0.0.1' is not 'HOST slots=N'"),
    ("a slots=1\nb slots=0\n", "hosts:2: 'b slots=0' is not 'HOST slots=N' with N of 1 or more"),
    ("-oProxyCommand=x slots=1\n", "hosts:1: '-oProxyCommand=x slots=1' is not"),
    ("# größe\na slots=1\n", "hosts: the hostfile is no text in UTF-8"),
    ("# none\n", "names no host")])
def test_a_hostfile_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "hosts").write_text(text, "latin-1")
    with pytest.raises(ConfigError, match=says):
        AgentLauncher([], 1, str(tmp_path / "hosts")).slots()


def test_what_ranks_on_hosts_are_given_of_this_environment(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials, too: they travel over ssh's input."""
    sent = {"WANDB_PROJECT": "scans", "LD_LIBRARY_PATH": "/opt/lib:/a b", "SLURM_JOB_END_TIME": "9",
            "WANDB_API_KEY": "hidden", "AWS_SECRET_ACCESS_KEY": "hidden", "GLOO_SOCKET_IFNAME": "e"}
    for name, value in (sent | {"HOME_MADE": "1", "NEUROJEPA_ATTEMPT": "old"}).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "own").write_text("MY_TOKEN=hidden\nTORCH_HOME='/a b'\nPLAIN=1\n")
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / "own"))
    launcher = AgentLauncher([], 1, hostfile(tmp_path))
    given = launcher.orders(attempt("t0ken", a=2))["a"]["environment"]
    assert given.items() >= (sent | {"MY_TOKEN": "hidden", "TORCH_HOME": "/a b", "PLAIN": "1",
                                     "NEUROJEPA_ATTEMPT": "t0ken"}).items()
    assert "HOME_MADE" not in given
    (tmp_path / "own").write_text("MESSAGE=it's\n")
    with pytest.raises(ConfigError, match=r"own: MESSAGE: has a quote that is not closed"):
        launcher.orders(attempt("t0ken", a=2))
    (order,) = AgentLauncher([], 1).orders(Attempt("t0ken", 1)).values()
    assert order["environment"] == {"NEUROJEPA_ATTEMPT": "t0ken"}  # here it is inherited


def test_the_supervisor_waits_for_hosts_only_when_it_has_started_once(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [dict.fromkeys("abc", "is dead")] * 3 + [{"b": "is dead"}]
    monkeypatch.setattr(hosts, "problems", lambda *_: looks.pop(0))
    supervisor = Supervisor(AgentLauncher([], 1, hostfile(tmp_path)), RunDir(str(tmp_path)),
                            min_hosts=2)
    waited: list[float] = []
    monkeypatch.setattr(supervisor, "_wait", lambda seconds: waited.append(seconds) or True)
    with pytest.raises(TooFewHosts, match="a is dead; b is dead; c is dead"):
        supervisor._choose_hosts(0)
    supervisor._choose_hosts(60)
    assert list(supervisor._slots) == ["a", "c"] and len(waited) == 2
    rows = [(row["event"], row["host"]) for row in supervisor.run_dir.events()]
    assert rows == [("host_excluded", host) for host in "abc"] + [("host_back", "a"),
                                                                  ("host_back", "c")]


@pytest.mark.parametrize("words", [
    ["--min-hosts", "2"], ["--max-hosts", "1"], ["--master-addr", "10.0.0.1"],
    ["--hostfile", "H", "--min-hosts", "4"],
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


def test_a_hostfile_that_changes_counts_from_the_next_attempt_on(ssh: Path, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("one slots=1\ntwo slots=1\n")
    supervisor = Supervisor(AgentLauncher([], hostfile=str(hostfile)), RunDir(str(tmp_path)))
    supervisor._choose_hosts(0.0)
    assert list(supervisor._slots) == ["one", "two"]
    hostfile.write_text("two slots=1\nthree slots=2\n")
    supervisor._choose_hosts(0.0)
    assert supervisor._slots == {"two": 1, "three": 2}


def test_an_address_stays_that_of_the_host_that_it_was_given_for(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = AgentLauncher([], 1, hostfile(tmp_path), "10.0.0.1")
    told: list[str | None] = []
    monkeypatch.setattr(hosts, "problems", lambda *given: told.append(given[-1]) or {})
    for text, slots in (("a slots=2\nb slots=2\n", {"a": 2, "b": 2}),
                        ("b slots=2\n", {"b": 2}),  # a is broken
                        ("", {"a": 2})):  # an editor is writing it just now
        (tmp_path / "hosts").write_text(text)
        launcher.problems(slots, None, lambda _: None)
        (one, *_) = launcher.orders(attempt("t", **slots))[next(iter(slots))]["ranks"]
        told.append(one["MASTER_ADDR"])
    assert told == ["10.0.0.1", "10.0.0.1", None, "b", "10.0.0.1", "10.0.0.1"]


def test_a_hostfile_that_is_edited_during_a_start_does_not_change_that_start(
        ssh: Path, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("one slots=2\ntwo slots=1\n")
    launcher = AgentLauncher([], hostfile=str(hostfile))
    supervisor = Supervisor(launcher, RunDir(str(tmp_path)))
    look = hosts.problems
    with pytest.MonkeyPatch.context() as patch:  # while the hosts are asked
        patch.setattr(hosts, "problems", lambda *given: [
            hostfile.write_text("three slots=1\n"), look(*given)][1])
        supervisor._choose_hosts(0.0)
    orders = launcher.orders(attempt("t", **supervisor._slots))
    assert {host: len(order["ranks"]) for host, order in orders.items()} == {"one": 2, "two": 1}
