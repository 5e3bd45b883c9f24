"""``cluster export RUN...``: the status of runs for Prometheus, on loopback unless asked.

Each scrape reads the run directories anew; only the last signs of life are kept, since clocks of
hosts may differ.  The rules of ``cluster/alerts.yaml`` and the boards of ``cluster/grafana.json``
are made for these metrics.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.rundir import RunDir
from cluster.signs import Signs
from cluster.status import read_status
from neurojepa.errors import NeurojepaError

# counted from 0 on: to Prometheus the first row of a kind would else be no increase
AT_LEAST_0 = ("skip", "host_excluded")
STATES = ("running", "waiting", "stalled", "stopped", "failed", "finished")
# metric, what it says, key of the status
VALUES = (
    ("step", "step of the run", "step"),
    ("steps", "steps of the whole run", "steps"),
    ("loss", "loss of the last row", "loss"),
    ("step_seconds", "seconds a step takes", "step_s"),
    ("volumes_per_second", "volumes trained per second", "volumes_per_s"),
    ("last_checkpoint_step", "step of the last committed checkpoint", "last_checkpoint"),
    ("checkpoint_age_seconds", "seconds since the last checkpoint was committed, or since the run "
     "began", "checkpoint_age_s"),
    ("restarts", "restarts by the supervisor", "restarts"),
    ("goodput_ratio", "share of the run's time that was productive", "goodput"),
    ("lost_steps", "steps that were done in vain", "lost_steps"),
    ("disk_free_bytes", "room on the disk of a local run directory", "disk_free"),
)


class RunCollector(Collector):
    """Metrics of several runs, labelled by ``run``."""

    def __init__(self, runs: list[str]) -> None:
        self._runs = [(found := RunDir(run), Signs(found)) for run in runs]
        self._problems: dict[str, str] = {}  # said already

    def collect(self) -> Iterable[Metric]:
        """Read the runs; one that cannot be read is ``neurojepa_up`` 0 and has no others."""
        up = _gauge("up", "whether the run directory could be read")
        state = _gauge("state", "1 for the state that the run is in", "state")
        silent = _gauge("rank_silent_seconds", "longest time of a rank since its last step")
        slow = _gauge("slow_ranks", "ranks that slow down the others")
        events = _gauge("events", "rows of events.jsonl by kind", "event")
        values = [(_gauge(name, text), key) for name, text, key in VALUES]
        for run, signs in self._runs:
            try:
                status = read_status(run, signs=signs)
            except NeurojepaError as error:
                if self._problems.get(run.uri) != str(error):
                    self._problems[run.uri] = str(error)
                    print(error, flush=True)
                up.add_metric([run.uri], 0)
                continue
            up.add_metric([run.uri], 1)
            self._problems.pop(run.uri, None)
            for name in STATES:
                state.add_metric([run.uri, name], status["state"] == name)
            for gauge, key in values:
                if status[key] is not None:
                    gauge.add_metric([run.uri], status[key])
            slow.add_metric([run.uri], len(status["slow"]))
            if status["ranks"]:
                silent.add_metric([run.uri], max(rank["age_s"] for rank in status["ranks"]))
            for name, count in (dict.fromkeys(AT_LEAST_0, 0) | status["event_counts"]).items():
                events.add_metric([run.uri, name], count)
        return [up, state, silent, slow, events, *(gauge for gauge, _ in values)]


def serve(runs: list[str], address: str, port: int) -> None:
    """Answer scrapes until interrupted.

    Raises
    ------
    OSError
        The port is taken.
    """
    registry = CollectorRegistry()
    registry.register(RunCollector(runs))
    server, thread = start_http_server(port, address, registry)
    print(f"http://{address}:{port}/metrics", flush=True)
    try:
        while thread.is_alive():
            time.sleep(1)
    finally:
        server.shutdown()


def _gauge(name: str, text: str, *labels: str) -> Any:
    return GaugeMetricFamily(f"neurojepa_{name}", text, labels=["run", *labels])
