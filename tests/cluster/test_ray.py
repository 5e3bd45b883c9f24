"""What lives on a Ray cluster, without one: the actors are plain objects around processes."""

from __future__ import annotations

import importlib
import io
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.managers import BaseManager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cluster import ray_job, ray_launcher
from cluster.launcher import Attempt
from cluster.outcome import status_of
from cluster.ray_job import Keeper
from cluster.ray_launcher import RayLauncher, check_paths, connect
from cluster.ray_rank import RankActor, _clear
from cluster.ray_world import RayWorld
from neurojepa.errors import ClusterError, ConfigError
from neurojepa.messages import AGENT, ALONE, Messages, private_folder
from tests.helpers import ROOT
from tests.helpers.waiting import wait_until

# prints its rank, then waits for SIGTERM and ends as a training does
RANK = ("import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        "print('rank', os.environ['RANK'], flush=True); time.sleep(60)")


class Actors(BaseManager):
    """A process that an actor lives in."""


Actors.register("RankActor", RankActor)


@pytest.fixture
def rank():
    manager = Actors(ctx=get_context("spawn"))  # it ends all that its process has started
    manager.start()
    actor = manager.RankActor()
    actor.start(3, [sys.executable, "-c", RANK], {"RANK": "1", "WORLD_SIZE": "4"})
    yield actor
    actor.end(100)
    manager.shutdown()


def printed(actor: RankActor, fence: int) -> list[str]:
    lines: list[str] = []
    wait_until(lambda: lines.extend(actor.look(fence)["printed"]) or lines)
    return lines


def test_a_rank_says_what_it_prints_and_how_it_ends(rank: RankActor) -> None:
    assert printed(rank, 3) == ["rank 1"]
    row = rank.look(3)
    assert (row["rank"], row["size"], row["status"], row["printed"]) == (1, 4, None, [])
    assert rank.state()["pid"] == row["pid"]
    rank.signal(3, signal.SIGTERM)
    wait_until(lambda: rank.look(3)["status"] == 75)
    assert rank.state() is None


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGKILL, 137), (signal.SIGABRT, 134)])
def test_the_death_of_a_rank_is_its_status(rank: RankActor, signum: int, status: int) -> None:
    printed(rank, 3)
    os.kill(rank.look(3)["pid"], signum)
    wait_until(lambda: rank.look(3)["status"] == status)
    time.sleep(0.2)
    assert 0.2 <= rank.look(3)["ended_s"] < 60  # an age, not a time of day


def test_a_rank_obeys_no_earlier_supervisor(rank: RankActor) -> None:
    printed(rank, 5)
    assert "fencing token 5" in rank.look(4)["refused"]
    rank.signal(4, signal.SIGKILL)
    assert rank.end(4) == []
    assert rank.look(5)["status"] is None
    socket = Path(psutil.Process(rank.look(5)["pid"]).environ()[AGENT])
    assert socket.parent == private_folder() and socket.exists()
    assert rank.end(6) == []
    assert not socket.exists()
    assert not psutil.pid_exists(rank.look(6)["pid"])
    assert rank.end(7) == []  # nothing is left to end


def test_a_rank_that_nobody_asks_for_trains_on_where_tmp_was_cleared(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actor, path = RankActor(), tmp_path / "messages"
    actor._ranks = SimpleNamespace(messages=SimpleNamespace(path=str(path)))
    actor._rank = SimpleNamespace(status=None)
    actor._go_on_alone()
    monkeypatch.setattr("cluster.ray_rank.ALONE_S", 0.0)
    actor._go_on_alone()
    assert Path(f"{path}{ALONE}").exists()
    shutil.rmtree(tmp_path)
    actor._go_on_alone()  # its thread goes on


def test_what_killed_actors_have_left_is_removed(tmp_path: Path) -> None:
    heard = Messages(str(tmp_path / "heard.ray"))
    heard.listen()
    for name in ("left", "new"):
        Messages(str(tmp_path / f"{name}.ray")).listen()
        (tmp_path / f"{name}.ray{ALONE}").touch()
    for name in ("heard", "left"):
        os.utime(tmp_path / f"{name}.ray", (time.time() - 100,) * 2)
    _clear(tmp_path)  # a new one may be in the making
    assert {path.name for path in tmp_path.iterdir()} == {"heard.ray", "new.ray", f"new.ray{ALONE}"}


def test_ranks_that_could_not_be_started_are_an_attempt_that_failed() -> None:
    log = io.BytesIO()
    world = RayWorld(Attempt("token", 2), {}, {}, 3, log)
    assert status_of(world.look()) == (137, 0)
    world.end()
    assert status_of(world.look()) == (137, 0)


def test_the_rank_that_ended_first_is_named_in_whatever_order_it_is_learnt() -> None:
    world = RayWorld(Attempt("token", 2), {}, {}, 0, io.BytesIO())
    for rank, status, ended_s in ((0, 1, 0.1), (2, 1, 0.2), (1, 137, 0.4)):  # the peers of rank 1
        world._take(rank, {"rank": rank, "size": 3, "status": status, "ended_s": ended_s})
    assert status_of(world.look()) == (137, 1)
    world.leave()


class Group:
    """A placement group on a cluster that has room for ``Group.room`` ranks."""

    room = 3

    def __init__(self, bundles: list[dict[str, float]], **_: object) -> None:
        self.bundle_count = len(bundles)

    def wait(self, _seconds: float) -> bool:
        return self.bundle_count <= Group.room


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes that are asked for."""
    groups = importlib.import_module("ray.util.placement_group")
    sizes: list[int] = []

    def ask(bundles: list[dict[str, float]], **named: object) -> Group:
        sizes.append(len(bundles))
        return Group(bundles, **named)

    monkeypatch.setattr(groups, "placement_group", ask)
    monkeypatch.setattr(groups, "get_placement_group", lambda _: Group([]))
    monkeypatch.setattr("ray.util.remove_placement_group", lambda _: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    # a node that was lost is counted for a while
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": Group.room + 1.0})
    monkeypatch.setattr(ray_launcher, "needs", lambda: {"CPU": 1.0})
    monkeypatch.setattr(Group, "room", 3)
    yield sizes


@pytest.mark.parametrize(("room", "least", "fewer", "sizes"), [
    (4, 2, 4, [4]), (3, 2, 3, [4, 3]), (2, 2, 2, [4, 3, 2]), (1, 2, None, [4, 2, 4]),
    (3, 0, None, [4])])
def test_a_cluster_without_room_for_all_gets_fewer_where_that_is_enough(
        asked: list[int], monkeypatch: pytest.MonkeyPatch, room: int, least: int,
        fewer: int | None, sizes: list[int]) -> None:
    now = [100.0]
    monkeypatch.setattr(ray_launcher.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Group, "room", room)
    launcher = RayLauncher([], 4, "/run", least)
    assert bool(launcher.lacks()) is (room < 4)
    now[0] += ray_launcher.FEWER_S - 1
    assert bool(launcher.lacks()) is (room < 4) and asked == [4]  # an autoscaler has its time
    now[0] += 2
    said = launcher.lacks()
    assert asked == sizes
    if fewer is None:
        assert "Ray has no room for run.ranks=4" in said
    else:
        assert said == "" and launcher._group.bundle_count == fewer
    monkeypatch.setattr(Group, "room", 4)  # from the next attempt on there are all again
    launcher.close()
    assert launcher.lacks() == "" and launcher._group.bundle_count == 4


# ---- the keeper of the supervisor ----------------------------------------------------------------

def keep(command: list[str], environment: dict[str, str] | None = None) -> Keeper:
    """A keeper that is no actor, and stays."""
    return Keeper(command, environment or {}, lambda: None)


def test_a_supervisor_that_is_killed_is_started_again(tmp_path: Path) -> None:
    count = (f"import os, sys; path = {str(tmp_path / 'starts')!r}; open(path, 'a').write('x'); "
             "print(open(path).read(), flush=True); "
             "len(open(path).read()) < 2 and os.kill(os.getpid(), 9); sys.exit(75)")
    keeper = keep([sys.executable, "-c", count])
    wait_until(lambda: keeper.look(0)["status"] is not None)
    row = keeper.look(1)
    assert row["status"] == 75 and row["printed"] == 3
    assert row["lines"] == ["the supervisor was ended by signal 9; starting it again", "xx"]


def test_one_that_is_killed_all_the_time_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_job, "MAX_DEATHS", 1)
    monkeypatch.setattr(ray_job, "DEATHS_S", 0.0)
    keeper = keep([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    wait_until(lambda: keeper.look(0)["status"] == 137)


def test_one_that_cannot_be_started_is_told_and_the_keeper_leaves(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_job, "ENDED_S", 0.2)
    left: list[float] = []
    began = time.monotonic()
    keeper = Keeper(["/no/such/python"], {}, lambda: left.append(time.monotonic()))
    wait_until(lambda: keeper.look(0)["status"] == 126)
    assert "cannot be started: [Errno 2]" in keeper.look(0)["lines"][0]
    wait_until(lambda: left)
    assert left[0] - began > 0.2  # somebody may ask how it ended


def test_a_signal_reaches_the_supervisor() -> None:
    keeper = keep([sys.executable, "-c", RANK], {"RANK": "0"})
    wait_until(lambda: keeper.look(0)["lines"] == ["rank 0"])
    keeper.signal(signal.SIGTERM)
    wait_until(lambda: keeper.look(0)["status"] == 75)


def test_a_signal_while_it_is_down_stops_the_next_one_when_it_can_hear(tmp_path: Path) -> None:
    """Sent at its start, the signal would end it, and its ranks would go on without it."""
    supervise = (f"import os, time; path = {str(tmp_path / 'killed')!r}\n"
                 "if not os.path.exists(path): open(path, 'x'); os.kill(os.getpid(), 9)\n"
                 "time.sleep(0.5); heard = []\n"
                 "from cluster.processes import signals_to\n"
                 "with signals_to(lambda *_: heard.append(1)):\n"
                 "    end = time.monotonic() + 60\n"
                 "    while not heard and time.monotonic() < end: time.sleep(0.01)\n"
                 "print(heard, flush=True); raise SystemExit(75)")
    keeper = keep([sys.executable, "-c", supervise], {"PYTHONPATH": str(ROOT)})
    wait_until(lambda: any("starting it again" in line for line in keeper.look(0)["lines"]))
    keeper.signal(signal.SIGTERM)
    wait_until(lambda: keeper.look(0)["status"] is not None)
    assert (keeper.look(0)["status"], keeper.look(0)["lines"][-1]) == (75, "[1]")


# ---- what is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("key", ["run.dir", "data.feed"])
def test_relative_paths_are_refused(key: str) -> None:
    good = {"run.dir": "/a/run", "data.feed": "s3://bucket/feed"}
    check_paths(good)
    with pytest.raises(ConfigError, match=f"{key} = 'runs/a': .* absolute path or a URI"):
        check_paths({**good, key: "runs/a"})


def test_without_a_cluster_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match="RAY_ADDRESS is not set; submit this command"):
        connect()
