"""What ranks settle through their store."""

from __future__ import annotations

import resource
import threading
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from neurojepa.errors import (
    CheckpointError,
    ClusterError,
    DataError,
    LeaseLost,
    NeurojepaError,
)
from neurojepa.feed.loader import DamagedSample
from neurojepa.train import control
from neurojepa.train.control import Control, allow_connections
from neurojepa.train.health import DIGIT, MAX_FLAGS, Guard
from neurojepa.train.world import World
from tests.helpers.ranks import fake_worlds, on_all
from tests.helpers.waiting import wait_until


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_everyone_learns_what_rank_0_makes_of_all_items(size: int) -> None:
    def talk(world: World) -> Any:
        total = world.settle(world.rank, sum)
        said = [world.settle(("from", world.rank, n), lambda items, n=n: [len(items), n])
                for n in range(20)]
        return total, said, world.gather(world.rank * 2)

    expected = (sum(range(size)), [[size, n] for n in range(20)], [2 * n for n in range(size)])
    assert on_all(fake_worlds(size), talk) == [expected] * size


def test_the_verdict_is_rank_0s_alone() -> None:
    called = []
    on_all(fake_worlds(8), lambda world: world.settle(
        None, lambda _: called.append(threading.current_thread().name)))
    assert len(called) == 1


@pytest.mark.parametrize(("error", "shown"), [
    (CheckpointError("disk of rank 3"), CheckpointError), (LeaseLost("token 9 has it"), LeaseLost),
    (DamagedSample("position 7"), DataError)])  # of a module that another rank may not have loaded
def test_an_error_of_the_verdict_is_raised_on_all(error: NeurojepaError, shown: type) -> None:
    def fail(_: Any) -> None:
        raise error

    def talk(world: World) -> tuple[type, str]:
        with pytest.raises(NeurojepaError) as caught:
            world.settle(None, fail)
        assert world.gather(1) == [1] * 6  # and they can go on together
        return type(caught.value), str(caught.value)

    first, *others = on_all(fake_worlds(6), talk)
    assert first == (type(error), str(error)) and others == [(shown, str(error))] * 5


def test_the_store_does_not_fill_up() -> None:
    store = dist.HashStore()
    worlds = fake_worlds(4, lambda: store)
    counts = []
    for rounds in (3, 30):
        on_all(worlds, lambda world, rounds=rounds: [world.gather("x" * 100)
                                                     for _ in range(rounds)])
        counts.append(store.num_keys())
    assert counts[0] == counts[1] <= 3 + 2


def test_ranks_that_say_nothing_are_named() -> None:
    store = dist.HashStore()
    worlds = fake_worlds(5, lambda: store, timeout_s=0.3)

    def gather(world: World) -> Any:
        if world.rank == 0:  # its patience begins when the others have spoken
            wait_until(lambda: store.check(["1/1", "1/3"]))
        return None if world.rank in (2, 4) else world.gather(0)

    answers = on_all(worlds, gather)
    assert isinstance(answers[0], ClusterError) and "ranks 2, 4 said nothing" in str(answers[0])
    assert isinstance(answers[1], ClusterError) and "rank 0 said nothing" in str(answers[1])


def test_rank_0_leaves_last() -> None:
    store, order = dist.HashStore(), []
    first, second = (Control(store, rank, 2, timedelta(seconds=30)) for rank in range(2))
    leaving = threading.Thread(target=lambda: (first.leave(), order.append(0)))
    leaving.start()
    leaving.join(0.1)
    order.append(1)
    second.leave()
    leaving.join()
    assert order == [1, 0]


def test_too_few_open_files_are_said_before_anyone_connects(
        monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"now": (1024, 4096)}
    monkeypatch.setattr(control.resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(control.resource, "setrlimit",
                        lambda _, new: limits.__setitem__("now", new))
    allow_connections(16)
    assert limits["now"] == (1024, 4096)
    allow_connections(1024)
    assert limits["now"] == (2 * 1024 + control.OWN_FILES, 4096)
    with pytest.raises(ClusterError, match=r"4096 ranks need 8704 open files .* limit is 4096"):
        allow_connections(4096)
    limits["now"] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    allow_connections(10**6)


@pytest.mark.parametrize(("mine", "others", "expected"), [
    ((False, False), 0, [False, False]), ((True, False), 0, [True, False]),
    ((False, True), 1, [True, True]), ((False, False), 1023, [True, False])])
def test_flags_travel_with_the_loss(mine: tuple[bool, ...], others: int,
                                    expected: list[bool]) -> None:
    """``others``: ranks that set the first flag; each rank's loss is 3."""
    def summed(tensor: torch.Tensor) -> torch.Tensor:
        tensor += torch.tensor([3.0, others], dtype=torch.float64)
        return tensor

    world: Any = SimpleNamespace(size=2, device=torch.device("cpu"), sum_=summed)
    guard, limits = Guard(5.0, world), []
    for flags in (mine, (), mine):
        guard.add(torch.tensor(1.0))
        guard.end_step(1, flags)
        assert guard.why()["loss"] == (1 + 3) / 2  # whatever the flags are
        limits.append(guard.agreed()[:2])
    assert limits[0] == limits[2] == expected
    assert guard.agreed()[2:] == [False] * (MAX_FLAGS - 2)


def test_flags_of_8191_ranks_are_counted_exactly() -> None:
    ranks = DIGIT - 1

    def summed(tensor: torch.Tensor) -> torch.Tensor:
        tensor *= ranks
        return tensor

    world: Any = SimpleNamespace(size=ranks, device=torch.device("cpu"), sum_=summed)
    guard = Guard(5.0, world)
    for number in range(2 ** MAX_FLAGS):
        flags = [bool(number >> i & 1) for i in range(MAX_FLAGS)]
        guard.end_step(1, flags)
        assert guard.agreed() == flags
