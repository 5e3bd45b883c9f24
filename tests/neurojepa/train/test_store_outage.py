"""A run directory in an S3 server that is killed: the run waits, or ends with a good checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from neurojepa.config import RootConfig, validate
from neurojepa.errors import DataError
from neurojepa.storage import (
    Patience,
    append_rows,
    is_outage,
    outage,
    read_rows,
    write_bytes,
)
from neurojepa.train.checkpoint import committed_steps, open_checkpoint, remove, step_uri
from tests.helpers.feeds import tiny_config, write_feed
from tests.helpers.launches import start_pretrain, write_config
from tests.helpers.proxy import Proxy
from tests.helpers.waiting import wait_until
from tools.store import serve_s3

STEPS, EVERY = 60, 10


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """AWS_* point to it; a server has to be put behind it."""
    import s3fs

    made = Proxy(None)
    with serve_s3(tmp_path / "s3") as environment:  # only for its names and a bucket
        made.target = environment["AWS_ENDPOINT_URL"]
        for name, value in {**environment, "AWS_ENDPOINT_URL": made.url}.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("runs")
    yield made
    made.close()
    s3fs.S3FileSystem.clear_instance_cache()


def config_of(tmp_path: Path, run_dir: str, retry_s: float) -> RootConfig:
    feed = tmp_path / "feed"
    if not feed.exists():
        write_feed(str(feed))
    tree = tiny_config(str(feed), run_dir, steps=STEPS, checkpoint_every=EVERY).model_dump()
    return validate({**tree, "data": {**tree["data"], "retry_s": retry_s}}, "test")


@pytest.mark.slow(50)
def test_an_outage_costs_time_and_one_without_end_costs_no_checkpoint(
        tmp_path: Path, proxy: Proxy) -> None:
    uri, patient = "s3://runs/a", Patience(60)  # the server needs a while after its start
    path = write_config(config_of(tmp_path, uri, retry_s=120), tmp_path)
    with contextlib.ExitStack() as servers:
        proxy.target = servers.enter_context(serve_s3(tmp_path / "s3"))["AWS_ENDPOINT_URL"]
        process = start_pretrain("--config", path)
        wait_for_step(uri, EVERY)
        servers.close()  # SIGKILL
        time.sleep(8)
        assert process.poll() is None
        proxy.target = servers.enter_context(serve_s3(tmp_path / "s3"))["AWS_ENDPOINT_URL"]
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
        rows = patient(lambda: read_rows(f"{uri}/metrics.jsonl"))
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        events = patient(lambda: read_rows(f"{uri}/events.jsonl"))
        assert sum(row["tries"] for row in events if row["event"] == "store_retry") >= 1
        assert [row["step"] for row in events if row["event"] == "checkpoint"] == list(
            range(EVERY, STEPS + 1, EVERY))

        process = start_pretrain("--config", path, "train.steps=9999", "data.retry_s=1")
        wait_for_step(uri, STEPS + EVERY)
        servers.close()
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 2
        (line,) = (line for line in errors.splitlines() if line.startswith("error:"))
        assert "check the store" in line
        proxy.target = servers.enter_context(serve_s3(tmp_path / "s3"))["AWS_ENDPOINT_URL"]
        steps = patient(lambda: committed_steps(uri))
        assert len(steps) >= 2 and steps[-1] >= STEPS + EVERY
        for step in steps:
            found = patient(lambda step=step: open_checkpoint(uri, step))
            assert patient(found.problems) == []


def wait_for_step(uri: str, step: int) -> None:
    wait_until(lambda: max(committed_steps(uri), default=0) >= step)


def test_rows_whose_answer_was_lost_are_not_written_twice(s3: Any) -> None:
    uri, rows = f"{s3.uri}/lost/rows.jsonl", [{"step": 1}, {"step": 2, "loss": 0.5}]
    append_rows(uri, rows)
    append_rows(uri, rows)
    assert read_rows(uri) == rows
    append_rows(uri, rows[:1])
    append_rows(uri, rows[:1])
    assert read_rows(uri) == [*rows, rows[0]]


def test_a_listing_bears_checkpoints_that_come_and_go(s3: Any) -> None:
    uri, stop = f"{s3.uri}/lively", threading.Event()

    replaced_steps: list[int] = []

    def commit(step: int) -> None:
        write_bytes(f"{step_uri(uri, step)}/manifest.json", b"{}")

    def replace() -> None:
        for step in itertools.count(2):
            if stop.is_set():
                return
            commit(step)
            remove(uri, step)
            replaced_steps.append(step)

    commit(1)
    with ThreadPoolExecutor(1) as pool:
        replaced = pool.submit(replace)
        try:
            for number in itertools.count(1):
                assert committed_steps(uri)[0] == 1
                if number >= 100 and (len(replaced_steps) > 10 or replaced.done()):
                    break
        finally:
            stop.set()
    replaced.result()
    assert len(replaced_steps) > 10


def test_only_what_may_pass_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[float] = []
    now = [0.0]
    monkeypatch.setattr(outage, "time", SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds)))

    def failing(error: Exception) -> None:
        tries.append(now[0])
        raise DataError("not written") from error

    for answer in (FileNotFoundError(), PermissionError(), OSError(28, "No space left on device"),
                   ValueError("a bug")):
        assert not is_outage(answer)
        with pytest.raises(DataError):
            Patience(60)(lambda error=answer: failing(error))
    assert len(tries) == 4
    tries.clear()
    patience = Patience(2)
    with pytest.raises(DataError):
        patience(lambda: failing(ConnectionResetError("gone")))
    assert tries[:5] == pytest.approx([0, 0.25, 0.75, 1.75, 2]) and len(tries) <= 6
    assert patience.take() == ["not written"] * (len(tries) - 1) and patience.take() == []


def test_what_fails_slowly_is_asked_once_more() -> None:
    tries: list[float] = []

    def slow() -> None:
        tries.append(time.monotonic())
        time.sleep(0.3)
        raise ConnectionResetError("gone")

    for seconds, asked in ((0.2, 2), (0, 1)):
        tries.clear()
        with pytest.raises(ConnectionResetError):
            Patience(seconds)(slow)
        assert len(tries) == asked
