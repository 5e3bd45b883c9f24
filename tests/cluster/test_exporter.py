"""What Prometheus reads of runs, and that the alert rules speak of nothing else."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from cluster import __main__ as command
from cluster.exporter import RunCollector
from neurojepa.errors import ConfigError
from neurojepa.ports import free_port
from tests.helpers import ROOT
from tests.helpers.waiting import wait_until

RULES = yaml.safe_load((ROOT / "cluster/alerts.yaml").read_text())["groups"][0]["rules"]


@pytest.fixture
def run(tmp_path: Path) -> str:
    folder, now = tmp_path / "run", time.time()
    (folder / "heartbeat").mkdir(parents=True)
    rows = [(now - 100, "start", 0), (now - 50, "skip", 3), (now - 40, "checkpoint", 4)]
    (folder / "events.jsonl").write_text("".join(
        json.dumps({"time": t, "event": name, "step": step}) + "\n" for t, name, step in rows))
    (folder / "metrics.jsonl").write_text(json.dumps(
        {"step": 5, "loss": 0.25, "volumes_per_s": 8.0, "step_s": 0.5}) + "\n")
    (folder / "latest").write_text("step-4")
    for rank, own_s in enumerate((0.3, 0.9)):
        (folder / "heartbeat" / f"rank-{rank}.json").write_text(json.dumps(
            {"rank": rank, "host": "a", "pid": 1, "step": 5, "time": now - 2, "seen": now,
             "own_s": own_s}))
    return str(folder)


def scrape(*runs: str) -> str:
    registry = CollectorRegistry()
    registry.register(RunCollector(list(runs)))
    return generate_latest(registry).decode()


def value(text: str, name: str, **labels: str) -> float:
    for line in text.splitlines():
        if line.startswith(name + "{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
            return float(line.split()[-1])
    raise AssertionError(f"{name} {labels} not in\n{text}")


def test_a_scrape_says_what_the_status_says(run: str, tmp_path: Path) -> None:
    text = scrape(run, str(tmp_path / "none"))
    assert value(text, "neurojepa_up", run=run) == 1
    assert value(text, "neurojepa_up", run=str(tmp_path / "none")) == 0
    for name, expected in (("step", 5), ("loss", 0.25), ("last_checkpoint_step", 4),
                           ("slow_ranks", 1), ("restarts", 0), ("volumes_per_second", 8)):
        assert value(text, f"neurojepa_{name}", run=run) == expected
    assert value(text, "neurojepa_state", state="running") == 1
    assert value(text, "neurojepa_state", state="failed") == 0
    assert value(text, "neurojepa_events", event="skip") == 1
    assert value(text, "neurojepa_events", event="host_excluded") == 0
    assert 40 <= value(text, "neurojepa_checkpoint_age_seconds") < 60
    assert 2 <= value(text, "neurojepa_rank_silent_seconds") < 20
    assert value(text, "neurojepa_goodput_ratio") == 1


def test_a_run_that_cannot_be_read_is_named_once(tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    collector = RunCollector([str(tmp_path / "none")])
    for _ in range(3):
        list(collector.collect())
    assert capsys.readouterr().out.count("no run here") == 1


def test_a_clock_that_is_off_alerts_nobody(run: str) -> None:
    collector = RunCollector([run])

    def stalled() -> bool:
        (state,) = [metric for metric in collector.collect() if metric.name == "neurojepa_state"]
        return any(sample.value and sample.labels["state"] == "stalled"
                   for sample in state.samples)

    path = Path(run) / "heartbeat/rank-1.json"
    told = []
    for seconds in (0, 2):  # behind by 300 s, but alive
        row = json.loads(path.read_text())
        path.write_text(json.dumps({**row, "time": time.time() - 300 + seconds,
                                    "seen": time.time() - 298 + seconds}))
        told.append(stalled())
    assert told == [True, False]  # the alert has more patience than for one look


def test_rules_speak_of_metrics_that_there_are(run: str) -> None:
    text = scrape(run)
    known = set(re.findall(r"^# TYPE (\w+)", text, re.M))
    states = set(re.findall(r'state="(\w+)"', text))
    explained = (ROOT / "docs/operations.md").read_text()
    for rule in RULES:
        used = set(re.findall(r"neurojepa_\w+", rule["expr"]))
        assert used and used <= known, rule["alert"]
        assert set(re.findall(r'state="(\w+)"', rule["expr"])) <= states
        for event in re.findall(r'event=~?"([\w|]+)"', rule["expr"]):
            assert all(f"**`{name}`**" in explained for name in event.split("|")), event
        for event in re.findall(r'increase\(neurojepa_events{event="(\w+)"}', rule["expr"]):
            value(text, "neurojepa_events", event=event)  # before its first row, too
    assert len({rule["alert"] for rule in RULES}) == len(RULES)


def test_it_listens_on_loopback(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    threading.Thread(target=command.main, args=(["export", run, "--port", str(port)],),
                     daemon=True).start()
    said: list[str] = []
    wait_until(lambda: said.append(capsys.readouterr().out) or "\n" in "".join(said))
    url = "".join(said).strip()
    assert url == f"http://127.0.0.1:{port}/metrics"
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert value(answer.read().decode(), "neurojepa_step", run=run) == 5
    with pytest.raises(ConfigError, match=f"--port {port}: cannot listen there"):
        command.main(["export", run, "--port", str(port)])
