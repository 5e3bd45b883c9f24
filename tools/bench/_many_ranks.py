"""What ``ranks`` measures: gloo among real processes, and many ranks of threads in one."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from cluster.rundir import RunDir
from neurojepa.feed.format import open_feed
from neurojepa.feed.loader import Loader
from neurojepa.ports import free_port
from neurojepa.storage import Patience
from neurojepa.train import checkpoint
from neurojepa.train.control import Control, allow_connections
from neurojepa.train.heartbeat import Heartbeat
from neurojepa.train.layout import Part, layout_of
from neurojepa.train.metrics import Metrics
from neurojepa.train.ownership import Ownership
from neurojepa.train.saver import Saver
from neurojepa.train.world import World
from tests.helpers.feeds import tiny_config, write_feed
from tests.helpers.ranks import FakeEngine, fake_worlds, on_all

ROUNDS, TIMEOUT = 20, timedelta(minutes=4)


def timed(work: Callable[[], Any]) -> float:
    """Wall seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# ---- real processes ------------------------------------------------------------------------------

def gloo(ranks: int) -> dict[str, Any]:
    """What agreeing costs ``ranks`` processes of this machine, in ms, and how many sockets.

    Forked, so that they share the memory of torch; call it before any thread is started.
    """
    context = multiprocessing.get_context("fork")
    answers, port = context.SimpleQueue(), free_port()
    processes = [context.Process(target=_rank, args=(rank, ranks, port, answers))
                 for rank in range(ranks)]
    for process in processes:
        process.start()
    found = dict(answers.get() for _ in processes)
    for process in processes:
        process.join()
    return {"ranks": ranks, **{name: max(each[name] for each in found.values())
                               for name in found[0] if name.endswith("_ms")},
            "sockets_group": found[ranks - 1]["sockets_group"],
            "sockets_store": found[ranks - 1]["sockets_store"]}


def _rank(rank: int, size: int, port: int, answers: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=TIMEOUT)
    torch.zeros(1)
    before = _sockets()
    group = dist.new_group(backend="gloo")
    dist.barrier(group=group)
    with_group = _sockets()
    store: Any = dist.distributed_c10d._get_default_store()
    control = Control(PrefixStore("bench", store.clone()), rank, size, TIMEOUT)
    world = World(rank=rank, size=size, device=torch.device("cpu"), control=control)
    world.gather(None)
    sockets = {"sockets_group": with_group - before, "sockets_store": _sockets() - with_group}
    loss, carried = torch.zeros(1).double(), torch.zeros(2).double()
    flags, item = torch.zeros(4, dtype=torch.int64), (None, ["a file", "x" * 64])
    objects: list[Any] = [None] * size

    def median_ms(work: Callable[[], Any], times: int) -> float:
        return 1000 * statistics.median(timed(work) for _ in range(times))

    ways: dict[str, Callable[[], Any]] = {
        "message": lambda: dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group),
        "loss": lambda: world.sum_(loss), "loss_and_flags": lambda: world.sum_(carried)}
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):  # in turns: other load on the machine meets all ways
        for name, work in ways.items():
            rounds[name].append(median_ms(work, 5))
    found = {f"{name}_ms": min(each) for name, each in rounds.items()}
    found["gather_ms"] = median_ms(lambda: dist.all_gather_object(objects, item, group=group), 5)
    found["settle_ms"] = median_ms(lambda: world.settle(item, lambda _: None), 5)
    answers.put((rank, {**found, **sockets}))
    world.leave()
    os._exit(0)


def _sockets() -> int:
    folder = "/proc/self/fd"
    return sum(os.path.exists(f"{folder}/{fd}") and os.readlink(f"{folder}/{fd}")[:7] == "socket:"
               for fd in os.listdir(folder))


# ---- many ranks as threads -----------------------------------------------------------------------

def store_of(ranks: int) -> dict[str, float]:
    """Exchanges of so many ranks by a real TCPStore, each with its own connection; seconds."""
    allow_connections(ranks)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)

    def connected(_: int) -> Any:
        return TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False,
                             timeout=TIMEOUT)

    with ThreadPoolExecutor(128) as pool:  # some wait for a name server
        stores = list(pool.map(connected, range(ranks)))
    worlds = fake_worlds(ranks, stores.pop, timeout_s=TIMEOUT.total_seconds())
    root = {"parameters": "x" * 200_000}

    def talk(world: World) -> dict[str, float]:
        world.settle(None, lambda _: None)  # threads have started
        return {"barrier_s": timed(lambda: world.settle(None, lambda _: None)),
                "checkpoint_s": timed(lambda: world.settle(
                    (None, ["rank-00000-abcdefgh.json", "x" * 64, 1000]), lambda _: None)),
                "root_s": timed(lambda: world.settle(None, lambda _: root))}

    answers = on_all(worlds, talk)
    return {name: max(each[name] for each in answers) for name in answers[0]}


def shapes_of(parameters: int, ranks: int) -> dict[str, tuple[int, ...]]:
    """As many parameters, of which each rank holds 3 elements or fewer."""
    return {f"encoder.layers.{n}.weight": (ranks, 3) if n % 3 else (3 * ranks - 1,)
            for n in range(parameters)}


def manifests(ranks: int, parameters: int) -> dict[str, float]:
    """Manifests of ZeRO 3: the one of format 3, all in one, and the root with a rank's part."""
    shapes = shapes_of(parameters, ranks)
    rows: list[Any] = []
    parts: dict[str, list[Part]] = {}
    for world in (World(rank=rank, size=ranks, device=torch.device("cpu"), control=None)
                  for rank in range(ranks)):
        owner = f"rank-{world.rank:05d}-abcdefgh"
        for fragment in FakeEngine(shapes, world, zero=3).fragments:
            rows.append([fragment.name, list(fragment.shape), fragment.start, fragment.length,
                         owner])
            parts.setdefault(fragment.name, []).append(
                (fragment.start, fragment.length, world.rank))
    began = time.perf_counter()
    layout = layout_of(shapes, parts)
    layout_s = time.perf_counter() - began
    entry = {"size": 123456, "sha256": "0" * 64}
    old = json.dumps({"format": 3, "fragments": rows, "files": {
        f"rank-{rank:05d}-abcdefgh.{key}.safetensors": entry
        for rank in range(ranks) for key in ("master", "exp_avg", "exp_avg_sq", "ema")}})
    new = json.dumps({"format": 4, "parameters": layout, "files": {
        f"rank-{rank:05d}-abcdefgh.json": entry for rank in range(ranks)}})
    return {"rows": len(rows), "old_mib": len(old) / 2**20, "new_mib": len(new) / 2**20,
            **{f"{name}_{what}": value for name, text in (("old", old), ("new", new))
               for what, value in _held(text).items()}, "layout_s": layout_s}


def _held(text: str) -> dict[str, float]:
    """Seconds to parse a manifest, and what it then takes in memory."""
    tracemalloc.start()
    kept = json.loads(text)
    held = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    del kept
    return {"parse_s": timed(lambda: json.loads(text)), "held_mib": held}


def save_and_read(folder: Path, ranks: int, parameters: int, others: int) -> dict[str, Any]:
    """A checkpoint by the real saver of so many ranks, and how each of ``others`` reads it."""
    shapes, run_dir = shapes_of(parameters, ranks), str(folder / "run")

    def saved(world: World) -> dict[str, float]:
        engine: Any = FakeEngine(shapes, world, zero=3)
        found: dict[str, float] = {}
        savers: list[Saver] = []
        found["begin_s"] = timed(lambda: savers.append(Saver(
            Ownership(run_dir), engine, world, keep_last=1, milestone_every=0,
            patience=Patience(0))))
        found["start_s"] = timed(lambda: savers[0].start(5, {"config": {}}))
        savers[0]._pending.job.result()  # type: ignore[union-attr]
        world.settle(None, lambda _: None)  # here all have written
        found["agree_s"] = timed(savers[0].advance)
        found["commit_s"] = timed(savers[0].advance)
        savers[0].close()
        return found

    began = time.perf_counter()
    answers = on_all(fake_worlds(ranks, timeout_s=240), saved)
    if problem := next((each for each in answers if isinstance(each, Exception)), None):
        raise problem
    whole_s = time.perf_counter() - began
    step = Path(checkpoint.step_uri(run_dir, 5))
    found = checkpoint.open_checkpoint(run_dir, 5)
    reads: dict[int, list[int]] = {}
    for size in (ranks, others):
        for rank in (0, size // 3, size - 1):
            one = checkpoint.Checkpoint(run_dir, 5, found.manifest)
            world = World(rank=rank, size=size, device=torch.device("cpu"), control=None)
            engine = FakeEngine(shapes, world, zero=3)
            for fragment in engine.fragments:
                for key, values in engine.tensors(fragment).items():
                    if not one.read(fragment, key).equal(values):
                        raise RuntimeError(f"rank {rank} of {size} reads other values than written")
            reads.setdefault(size, []).append(len(one._known))
    return {"whole_s": whole_s, **{name: max(each[name] for each in answers)
                                   for name in answers[0]},
            "files": len(list(step.iterdir())),
            "root_kib": (step / "manifest.json").stat().st_size / 1024,
            "part_kib": max(p.stat().st_size for p in step.glob("rank-*.json")) / 1024,
            "same_size_parts": max(reads[ranks]), "other_size_parts": max(reads[others])}


def order_and_metrics(folder: Path, ranks: int) -> dict[str, Any]:
    """Positions of a step of all ranks by the real loader, and rows by the real metrics."""
    config = tiny_config(write_feed(str(folder / "feed")), folder / "metrics",
                         global_batch=2 * ranks, micro_batch=1, log_every=20)
    feed = open_feed(config.data.feed)
    seen: list[int] = []
    spent = []
    for rank in range(ranks):
        loader = Loader(feed, config, rank=rank, world=ranks, first_step=3)
        began = time.perf_counter()
        for positions, _ in itertools.islice(loader._plan(), loader.micro_steps):
            seen += positions.tolist()
        spent.append(time.perf_counter() - began)
        loader.close()
    begin = 3 * config.train.global_batch
    if sorted(seen) != list(range(begin, begin + config.train.global_batch)):
        raise RuntimeError("the ranks' positions are not each position of the step once")
    world = World(rank=0, size=1, device=torch.device("cpu"), control=None)
    metrics = Metrics(config, feed.grid, world, 0, Patience(0))
    for step in range(20):
        metrics.add(torch.ones(()), {"weight": torch.ones(())})
        metrics.end_step(step + 1, {"lr": 0.1})
    flush_s = timed(lambda: metrics.flush(0.0))
    metrics.close()
    return {"positions": len(seen), "plan_ms": 1000 * statistics.median(spent),
            "flush_20_rows_ms": 1000 * flush_s}


def watched(folder: Path, ranks: int) -> dict[str, float]:
    """Heartbeats of so many ranks in a local run directory, and a look at them by the supervisor's
    code."""
    run_dir = str(folder / "watched")
    for rank in range(ranks):
        heartbeat = Heartbeat(run_dir, rank, attempt="a", world=ranks)
        heartbeat.beat(5)
        heartbeat.close()
    looks = []
    for _ in range(3):
        began = time.perf_counter()
        if len(RunDir(run_dir).heartbeats()) != ranks:
            raise RuntimeError("not all heartbeats were read")
        looks.append(time.perf_counter() - began)
    return {"look_s": min(looks)}
