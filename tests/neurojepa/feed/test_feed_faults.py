"""Reading when things go wrong: a store that fails or is gone, damaged samples; time that is up."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neurojepa.config import RootConfig, validate
from neurojepa.errors import DataError
from neurojepa.feed.format import open_feed
from neurojepa.feed.loader import Batch, Loader
from neurojepa.feed.order import Order, first_position
from neurojepa.storage import read_rows, write_bytes
from neurojepa.train.checkpoint import latest_step
from neurojepa.train.stopping import StopRequest
from tests.helpers.feeds import damage, feed_config, read_batches, write_feed
from tests.helpers.proxy import Proxy
from tests.helpers.worker import job, run_ranks

FILES = ("shards/00000.tar", "shards/00001.tar", "index.parquet", "labels.parquet", "feed.json")


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Proxy(None)
    yield made
    made.close()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "feed"
    write_feed(str(folder))
    return folder


def upload(local: Path, uri: str) -> str:
    for name in FILES:
        write_bytes(f"{uri}/{name}", (local / name).read_bytes())
    return uri


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        a.scan_ids == b.scan_ids and a.voxels.equal(b.voxels) and a.position.equal(b.position)
        and a.modality.equal(b.modality) for a, b in zip(ours, theirs, strict=True))


# ---- the store -----------------------------------------------------------------------------------

@pytest.mark.slow(8)
def test_a_store_that_dies_and_comes_back_costs_only_time(
        local: Path, tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    from tools.store import serve_s3

    with contextlib.ExitStack() as servers:
        environment = servers.enter_context(serve_s3(tmp_path / "s3"))
        proxy.target = environment["AWS_ENDPOINT_URL"]
        for name, value in {**environment, "AWS_ENDPOINT_URL": proxy.url}.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("faults")
        config = feed_config(upload(local, "s3://faults/feed"), retry_s=300)
        loader = Loader(open_feed(config.data.feed), config, rank=0, world=1, first_step=0)
        stream = iter(loader)
        seen = [next(stream)]
        servers.close()  # SIGKILL
        reading = threading.Thread(target=lambda: seen.extend(stream))
        reading.start()
        while not loader.has_reports:
            assert reading.is_alive()
            time.sleep(0.05)
        proxy.target = servers.enter_context(serve_s3(tmp_path / "s3"))["AWS_ENDPOINT_URL"]
        reading.join(timeout=300)
        loader.close()
        s3fs.S3FileSystem.clear_instance_cache()
    assert same(seen, read_batches(feed_config(str(local))))
    damaged, retries = loader.take_reports()
    assert retries and not damaged and not loader.has_reports


def test_what_a_proxy_spoils_is_read_again(local: Path, s3: Any, proxy: Proxy,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    config = feed_config(upload(local, f"{s3.uri}/faulty"), read_threads=1)
    feed = open_feed(config.data.feed)
    proxy.target = s3.endpoint
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    proxy.faults.extend(["reset", "truncate", "corrupt", "delay"])
    loader = Loader(feed, config, rank=0, world=1, first_step=0)
    assert same(list(loader), read_batches(feed_config(str(local))))
    loader.close()
    assert len(proxy.faults) <= 1  # a connection that was only corrupt or slow is used again
    damaged, retries = loader.take_reports()
    assert retries and not damaged


def test_a_store_that_stays_away_ends_in_one_clear_error(
        local: Path, s3: Any, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    config = feed_config(upload(local, f"{s3.uri}/away"), retry_s=1)
    feed = open_feed(config.data.feed)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)  # it resets every connection
    loader = Loader(feed, config, rank=0, world=1, first_step=0)
    with pytest.raises(DataError, match=r"shards/0000.*cannot be read.*check the store"):
        next(iter(loader))
    assert loader.has_reports
    loader.close()


def test_closing_ends_reads_that_wait(local: Path, s3: Any, proxy: Proxy,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    config = feed_config(upload(local, f"{s3.uri}/closing"), retry_s=480)
    feed = open_feed(config.data.feed)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)  # it resets every connection
    loader = Loader(feed, config, rank=0, world=1, first_step=0)
    read = loader._pool.submit(loader.reader.image, 0)
    while not loader.has_reports:
        time.sleep(0.01)
    loader.close()
    with pytest.raises(DataError, match="cannot be read"):
        read.result(timeout=60)


# ---- damaged samples -----------------------------------------------------------------------------

def test_a_damaged_sample_has_one_successor_on_every_rank_and_at_every_resume(
        local: Path, tmp_path: Path) -> None:
    order = Order(open_feed(str(local)).index, feed_config(str(local), balance=1).data, 0)
    first, second = order.row(3), order.row(4)
    uri = damage(local, tmp_path / "feed", [first, second])
    config = feed_config(uri, replace_damaged=True, balance=1)
    columns = open_feed(uri).index.to_pydict()

    def by_position(world: int, start: int = 0) -> dict[int, str]:
        return {int(position): scan_id for rank in range(world)
                for batch in read_batches(config, rank, world, start)
                for position, scan_id, weight in zip(batch.position, batch.scan_ids, batch.weight,
                                                     strict=True) if weight}

    alone, whole = by_position(1), {p: columns["scan_id"][order.row(p)] for p in range(32)}
    assert alone[3] == alone[4] == columns["scan_id"][order.row(5)]
    replaced = {p for p in whole if alone[p] != whole[p]}
    assert replaced == {p for p in range(32) if order.row(p) in (first, second)}
    assert by_position(2) == by_position(3) == alone
    assert by_position(2, start=3) == {p: alone[p] for p in range(12, 32)}
    batch = next(b for b in read_batches(config) if 3 in b.position)
    stored = columns["modality"][order.row(5)]
    assert batch.modality[list(batch.position).index(3)] == ("T1w", "T2w").index(stored)
    with pytest.raises(DataError, match=r"content differs.*or set data\.replace_damaged=true"):
        read_batches(feed_config(uri))


def test_where_everything_is_damaged_nothing_is_replaced(local: Path, tmp_path: Path) -> None:
    uri = damage(local, tmp_path / "feed", list(range(24)))
    with pytest.raises(DataError, match="its sample and the 10 after it are damaged"):
        read_batches(feed_config(uri, replace_damaged=True))


def test_windows_move_the_positions_of_later_steps() -> None:
    windows = [(4, 6), (12, 2)]
    assert [first_position(step, 10, windows) for step in (0, 3, 4, 11, 12)] == [
        0, 30, 100, 170, 200]
    assert first_position(4, 10, [(4, 6), (4, 3)]) == 130


@pytest.mark.slow(19)
def test_damage_in_runs_is_logged_once_and_bounded(local: Path, tmp_path: Path) -> None:
    uri = damage(local, tmp_path / "two", [3, 8])
    many = damage(local, tmp_path / "many", [1, 4, 7, 10, 13])
    for process in run_ranks([job(feed_config(uri, tmp_path / "both", replace_damaged=True),
                                  tmp_path)], tmp_path, ranks=2):
        assert process.returncode == 0, process.stdout
    jobs = [job(feed_config(uri, tmp_path / "one", replace_damaged=True), tmp_path),
            job(feed_config(uri, tmp_path / "strict", steps=20), tmp_path,
                expect="or set data.replace_damaged=true"),
            job(feed_config(many, tmp_path / "many-run", replace_damaged=True), tmp_path,
                expect="were damaged, more than data.max_damaged_share"),
            job(late(feed_config(str(local), tmp_path / "late")), tmp_path)]
    (process,) = run_ranks(jobs, tmp_path)
    assert process.returncode == 0, process.stdout

    rows = [read_rows(str(tmp_path / run / "metrics.jsonl")) for run in ("both", "one")]
    assert [row["loss"] for row in rows[0]] == pytest.approx(
        [row["loss"] for row in rows[1]], abs=1e-5)
    ids = {open_feed(uri).index["scan_id"][row].as_py() for row in (3, 8)}
    for run in ("both", "one"):
        found = events(tmp_path / run, "damaged")
        assert len(found) == 2 and {event["scan_id"] for event in found} == ids
        assert all(event["shard"] == "shards/00000.tar" for event in found)
    assert len(events(tmp_path / "many-run", "damaged")) in (4, 5)

    (stop,) = events(tmp_path / "late", "stop")
    assert stop["reason"] == "time limit" and stop["step"] == 1
    assert latest_step(str(tmp_path / "late")) == 1


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(str(run / "events.jsonl")) if row["event"] == name]


# ---- time that is up -----------------------------------------------------------------------------

def late(config: RootConfig) -> RootConfig:
    """So little time that only the margin for a checkpoint is left."""
    tree = config.model_dump()
    return validate({**tree, "run": {**tree["run"], "time_limit_min": 0.9}}, "test")


def test_a_run_leaves_time_for_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(limit_min: float, checkpoint_s: float = 0.0) -> str:
        stop = StopRequest(limit_min)
        stop.checkpoint_s = checkpoint_s
        stop.close()
        return stop.reason

    assert reason(0) == "" and reason(2) == "" and reason(0.99) == "time limit"
    assert reason(10, checkpoint_s=210) == "time limit" and reason(10, checkpoint_s=100) == ""
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 50))
    assert reason(0) == reason(100) == "time limit"
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 500))
    assert reason(0) == ""
