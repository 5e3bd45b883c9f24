"""Every alert is fired by a real Prometheus that reads the real exporter; a healthy run fires none.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from cluster.exporter import RunCollector, serve
from neurojepa.ports import free_port
from neurojepa.storage import append_rows
from tests.helpers import ROOT
from tests.helpers.runs import write_run
from tests.helpers.waiting import wait_until

RULES = ROOT / "cluster/alerts.yaml"
GRAFANA = json.loads((ROOT / "cluster/grafana.json").read_text())
PANELS: list[dict[str, Any]] = GRAFANA["panels"]
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="no prometheus; tools/test.sh installs it when run as root")


def told(run: Path, *names: str) -> None:
    append_rows(str(run / "events.jsonl"),
                [{"time": time.time(), "event": name, "step": 60} for name in names])


def earlier(run: Path, seconds: float) -> None:
    """Its events happened so long before."""
    path = run / "events.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    append_rows(str(path), [{**row, "time": row["time"] - seconds} for row in rows])


def silent(run: Path) -> None:
    earlier(run, 4000)
    for path in (run / "heartbeat").iterdir():
        row = json.loads(path.read_text())
        path.write_text(json.dumps({**row, "time": row["time"] - 4000, "seen": row["seen"] - 4000}))


def slow(run: Path) -> None:
    path = run / "heartbeat/rank-0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "own_s": 0.9}))


# alert -> what is wrong with the run of that name from the start, and what comes to it later
CASES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "RunUnreadable": (shutil.rmtree, ()),
    "RunFailed": (lambda run: told(run, "give_up"), ()),
    "RunStalled": (silent, ()),
    "RunWaiting": (lambda run: told(run, "disk_full"), ()),
    "RunStopped": (lambda run: told(run, "stopped"), ()),
    "HostExcluded": (lambda run: None, ("host_excluded",)),
    "SlowRank": (slow, ()),
    "OldCheckpoint": (lambda run: earlier(run, 9000), ()),
    "DiskNearlyFull": (lambda run: None, ()),
    "StepsSkipped": (lambda run: None, ("skip",) * 8),
    "Collapsed": (lambda run: told(run, "collapse", "exit", "give_up"), ()),
}
ALSO = {"Collapsed": {"RunFailed"}}  # fires as well, and should


def test_every_alert_has_a_case() -> None:
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    assert [rule["alert"] for rule in rules] == list(CASES)


@needs_prometheus
def test_the_rules_are_well_formed() -> None:
    done = subprocess.run(["promtool", "check", "rules", RULES], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0 and f"{len(CASES)} rules found" in done.stdout, done.stderr


@dataclass
class Watched:
    """A Prometheus that reads the runs of all cases."""

    runs: dict[str, Path]
    ask: Callable[[str], Any]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    runs = {name: write_run(folder / name, steps=60) for name in ("Healthy", *CASES)}
    for path in runs.values():  # no rank is slow
        rank = json.loads((path / "heartbeat/rank-0.json").read_text())
        (path / "heartbeat/rank-0.json").write_text(json.dumps({**rank, "own_s": 0.31}))
    for name, (spoil, _) in CASES.items():
        spoil(runs[name])
    port = free_port()
    threading.Thread(target=serve, args=([str(path) for path in runs.values()], "127.0.0.1", port),
                     daemon=True).start()
    with pytest.MonkeyPatch.context() as patch, prometheus(folder / "prometheus", port) as ask:
        patch.setattr("cluster.status.free_bytes", lambda path: int(
            1e9 if Path(path).name == "DiskNearlyFull" else 1e12))
        wait_until(lambda: len(ask("query?query=neurojepa_events")["result"]) > 20)
        yield Watched(runs, ask)


@needs_prometheus
@pytest.mark.slow(7)
def test_each_alert_is_fired_by_its_run_alone(watched: Watched) -> None:
    expected = {(name, str(watched.runs[run])) for run in CASES
                for name in {run} | ALSO.get(run, set())}
    for name, (_, later) in CASES.items():
        if later:
            told(watched.runs[name], *later)
    seen: list[set[tuple[str, str]]] = []
    wait_until(lambda: seen.append(firing(watched.ask)) or seen[-1] >= expected,
               why=lambda: expected - seen[-1])
    assert all(each <= expected for each in seen)
    texts = [alert["annotations"]["summary"] for alert in watched.ask("alerts")["alerts"]]
    assert all(str(watched.runs["Healthy"].parent) in text for text in texts)


@needs_prometheus
@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_grafana_gets_an_answer_for_every_panel(watched: Watched, panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        query = target["expr"].replace("$run", ".*").replace("$__rate_interval", "1m")
        found: list[dict[str, Any]] = []
        wait_until(lambda query=query, found=found: found.extend(
            watched.ask(where(query))["result"]) or found)
        names = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert all(names <= set(item["metric"]) for item in found), query
        if panel["title"] == "State":  # by number, as the panel names them
            names_of = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
            shown = {Path(item["metric"]["run"]).name: names_of[item["value"][1]]["text"]
                     for item in found}
            assert shown["Healthy"] == "running" and shown["RunStalled"] == "stalled"
            assert shown["RunWaiting"] == "waiting" and shown["Collapsed"] == "failed"


def where(query: str) -> str:
    return "query?query=" + urllib.parse.quote(query)


def test_grafana_asks_for_metrics_that_the_exporter_has(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    registry.register(RunCollector([str(write_run(tmp_path / "run", steps=60))]))
    known = set(re.findall(r"^# TYPE (\w+)", generate_latest(registry).decode(), re.M))
    assert set(re.findall(r"neurojepa_\w+", json.dumps(GRAFANA))) == known  # and shows them all


def test_panels_of_grafana_are_whole_and_side_by_side() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    cells = [(x, y) for panel in PANELS for at in [panel["gridPos"]]
             for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert all(target["datasource"]["uid"] == "${source}" for panel in PANELS
               for target in [panel, *panel["targets"]])
    assert {item["name"] for item in GRAFANA["templating"]["list"]} == {"source", "run"}


@contextmanager
def prometheus(folder: Path, exporter: int) -> Iterator[Callable[[str], Any]]:
    """A server with our rules that looks every second; yields what asks its API.

    Of the rules only the patience is shortened, to one second.
    """
    folder.mkdir()
    rules = yaml.safe_load(RULES.read_text())
    for rule in rules["groups"][0]["rules"]:
        if "for" in rule:
            rule["for"] = "1s"
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    (folder / "prometheus.yaml").write_text(yaml.safe_dump({
        "global": {"scrape_interval": "1s", "evaluation_interval": "500ms", "scrape_timeout": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "runs", "static_configs": [
            {"targets": [f"127.0.0.1:{exporter}"]}]}]}))
    port = free_port()
    process = subprocess.Popen(
        ["prometheus", f"--config.file={folder / 'prometheus.yaml'}", "--log.level=error",
         f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"])

    def ask(path: str) -> Any:
        try:
            url = f"http://127.0.0.1:{port}/api/v1/{path}"
            with urllib.request.urlopen(url, timeout=60) as got:
                return json.load(got)["data"]
        except OSError:  # not up yet
            assert process.poll() is None
            return {"result": [], "alerts": []}

    try:
        yield ask
    finally:
        process.kill()
        process.wait()


def firing(ask: Callable[[str], Any]) -> set[tuple[str, str]]:
    return {(alert["labels"]["alertname"], alert["labels"]["run"])
            for alert in ask("alerts")["alerts"] if alert["state"] == "firing"}


