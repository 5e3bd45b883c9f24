"""Rows, rates, trackers and the record of the environment."""

from __future__ import annotations

import getpass
import json
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from neurojepa.config import RootConfig
from neurojepa.errors import ConfigError, DataError
from neurojepa.model.flops import step_flops
from neurojepa.storage import Patience, append_rows, drop_rows, read_rows
from neurojepa.train import metrics, telemetry
from neurojepa.train.metrics import Metrics
from neurojepa.train.telemetry import write_environment
from neurojepa.train.world import World
from tests.helpers.feeds import GRID, tiny_config

ALONE = World(rank=0, size=1, device=torch.device("cpu"), control=None)


def with_run(config: RootConfig, **run: Any) -> RootConfig:
    return config.model_copy(update={"run": config.run.model_copy(update=run)})


def fill(found: Metrics, steps: range) -> None:
    """Rows of one micro-batch of four scans each, with loss = step / 4."""
    for step in steps:
        found.add(torch.tensor(float(step)), {"weight": torch.tensor(4.0),
                                              "l0": torch.tensor(8.0 * step)})
        found.end_step(step, {"lr": 0.5, "grad_norm": torch.tensor(1.5)})


def test_rows_hold_means_rates_and_nothing_of_the_device(tmp_path: Path) -> None:
    found = Metrics(tiny_config("feed", tmp_path), GRID, ALONE, 0, Patience(0))
    fill(found, range(1, 4))
    found.flush(0.0)
    found.close()
    rows = read_rows(str(tmp_path / "metrics.jsonl"))
    assert [(row["step"], row["loss"], row["l0"], row["lr"], row["grad_norm"]) for row in rows] == [
        (1, 0.25, 2.0, 0.5, 1.5), (2, 0.5, 4.0, 0.5, 1.5), (3, 0.75, 6.0, 0.5, 1.5)]
    row = rows[0]
    assert row["tokens_per_s"] == pytest.approx(32 * row["volumes_per_s"])  # the token budget
    assert row["volumes_per_s"] == pytest.approx(4 / row["step_s"])
    assert row["mfu"] is None and row["memory_mib"] > 10
    assert list((tmp_path / "tensorboard").glob("events.out*"))


def test_mfu_is_the_share_of_all_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 20)
    config = tiny_config("feed", tmp_path)
    work = metrics._Work(config, GRID, World(
        rank=1, size=4, device=torch.device("cuda"), control=None))
    rates = work.rates(1e6)
    assert rates["mfu"] == pytest.approx(1e6 * step_flops(config, GRID) / (4 * 989e12))
    assert rates["memory_mib"] == 3
    filled = config.model_copy(update={
        "objective": config.objective.model_copy(update={"method": "mae"})})
    alone = metrics._Work(filled, GRID, World(
        rank=0, size=1, device=torch.device("cuda"), control=None))
    assert alone.rates(1e6)["mfu"] == pytest.approx(1e6 * step_flops(filled, GRID) / 989e12)
    assert 0 < step_flops(filled, GRID) < step_flops(config, GRID)


def test_a_resumed_run_drops_what_it_will_do_again(tmp_path: Path) -> None:
    config = tiny_config("feed", tmp_path)
    first = Metrics(config, GRID, ALONE, 0, Patience(0))
    fill(first, range(1, 7))
    first.flush(0.0)
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # cut by a kill
    again = Metrics(config, GRID, ALONE, 4, Patience(0))
    assert [row["step"] for row in read_rows(str(tmp_path / "metrics.jsonl"))] == [1, 2, 3, 4]
    fill(again, range(5, 7))
    again.flush(0.0)
    again.rewind(3)
    fill(again, range(4, 6))
    again.flush(0.0)
    again.close()
    assert [row["step"] for row in read_rows(str(tmp_path / "metrics.jsonl"))] == [1, 2, 3, 4, 5]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"events\.jsonl: b'\{\"st' is no row .*Delete that line"):
        read_rows(str(file))


def test_an_object_store_is_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").store.clear()
    found = Metrics(tiny_config("feed", "memory://run"), GRID, ALONE, 0, Patience(0))

    def written() -> list[int]:
        return [row["step"] for row in read_rows("memory://run/metrics.jsonl")]

    fill(found, range(1, 3))
    found.flush(0.0)
    assert written() == [1, 2]
    fill(found, range(3, 5))
    found.flush(0.0)
    assert written() == [1, 2]  # within a minute
    fill(found, range(5, 6))
    found.flush(0.0, durable=True)
    assert written() == [1, 2, 3, 4, 5]
    fill(found, range(6, 7))
    found.flush(0.0)
    found.event("skip", 6)
    assert written() == [1, 2, 3, 4, 5, 6]
    fill(found, range(7, 8))
    found.flush(0.0)
    found.rewind(4)
    assert written() == [1, 2, 3, 4]
    monkeypatch.setattr(metrics, "ROWS_PUT_S", -1.0)  # a minute later
    fill(found, range(5, 6))
    found.flush(0.0)
    assert written() == [1, 2, 3, 4, 5]
    found.close()


def test_rows_in_s3_are_appended_and_dropped(s3: Any) -> None:
    uri = f"{s3.uri}/rows/metrics.jsonl"
    many = [{"step": step, "text": "x" * 1000} for step in range(1, 6001)]  # above 5 MiB
    append_rows(uri, many[:10])
    append_rows(uri, many[10:])
    append_rows(uri, [{"step": 6001, "loss": 0.1}])
    rows = read_rows(uri)
    assert [row["step"] for row in rows] == list(range(1, 6002)) and rows[-1]["loss"] == 0.1
    drop_rows(uri, lambda row: row["step"] <= 6000)
    assert read_rows(uri) == many


class Recorder:
    """A tracker in memory; it may refuse to open, or wait."""

    def __init__(self, refuse: bool = False, gate: threading.Event | None = None) -> None:
        if refuse:
            raise ConnectionError("no route to host")
        self.steps: list[int] = []
        self.closed = False
        self.gate = gate

    def log(self, flush: list[tuple[int, dict[str, float]]]) -> None:
        if self.gate:
            self.gate.wait()
        assert all("loss" in values and "step" not in values for _, values in flush)
        self.steps += [step for step, _ in flush]

    def close(self) -> None:
        self.closed = True


def test_trackers_get_all_rows_and_one_that_fails_is_told_once(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, recorder = threading.Event(), Recorder()
    recorder.gate = gate
    monkeypatch.setitem(telemetry.OPEN, "mlflow", lambda config: recorder)
    monkeypatch.setitem(telemetry.OPEN, "wandb", lambda config: Recorder(refuse=True))
    monkeypatch.setattr(metrics, "check_trackers", lambda names: None)
    config = with_run(tiny_config("feed", tmp_path), trackers=["mlflow", "wandb"])
    found = Metrics(config, GRID, ALONE, 0, Patience(0))
    assert found._trackers
    while not found._trackers._services[1]._problem:
        time.sleep(0.001)
    for first in (1, 4, 7):
        fill(found, range(first, first + 3))
        found.flush(0.0)  # the service waits, training does not
    assert recorder.steps == []
    gate.set()
    found.close()
    assert recorder.steps == list(range(1, 10)) and recorder.closed
    problems = [row["problem"] for row in read_rows(str(tmp_path / "events.jsonl"))]
    assert problems == ["wandb: ConnectionError: no route to host"]
    assert len(read_rows(str(tmp_path / "metrics.jsonl"))) == 9


def test_a_tracker_that_is_not_installed_is_refused(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry.importlib.util, "find_spec", lambda name: None)
    config = with_run(tiny_config("feed", tmp_path), trackers=["wandb"])
    with pytest.raises(ConfigError, match="names wandb, which is not installed"):
        Metrics(config, GRID, ALONE, 0, Patience(0))


def test_environment(tmp_path: Path) -> None:
    write_environment(tiny_config("feed", tmp_path), ALONE,
                      {"feed": "feed-print", "order": "order-print"})
    text = (tmp_path / "environment.json").read_text()
    facts = json.loads(text)
    assert facts["software"]["torch"] == torch.__version__
    assert (facts["feed"], facts["order"], facts["world"]) == ("feed-print", "order-print", 1)
    assert len(facts["config_sha256"]) == 64 and len(facts["ranks"]) == 1
    assert str(tmp_path) not in text and str(Path.home()) not in text
    assert f'"{getpass.getuser()}"' not in text
