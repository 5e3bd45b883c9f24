"""What surrounds an event: the lines of the log, and the samples of steps that were dropped."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from typing import Any

import yaml

from cluster.rundir import RunDir
from neurojepa.errors import NeurojepaError
from neurojepa.feed.samples import Samples

LOG_BYTES = 8 << 20  # from the end of a log
REPORT_BYTES = 64 << 10
BEFORE, AFTER = 40, 15  # lines
MOST_SAMPLES = 512
MOST_SKIPS = 50  # in which a sample is looked for
AT_THE_END = ("exit", "give_up", "hang", "host_lost", "stopped", "finished")
STEP = re.compile(r"\bstep (\d+)/")


def around(run_dir: RunDir, rows: list[dict[str, Any]], number: int,
           config: dict[str, Any]) -> dict[str, Any]:
    """An event's row, the log around it, its samples and, of a failed attempt, the report on it;
    ``rows`` are all events."""
    row, attempt = rows[number], attempt_of(rows, number)
    report = run_dir.read(f"logs/incident-{attempt}.md", REPORT_BYTES) \
        if attempt is not None and row.get("event") in AT_THE_END else None
    return {"row": row, "log": log_around(run_dir, row, attempt),
            "samples": samples_of(run_dir, rows, row, config),
            "report": report and report.decode(errors="replace")}


# ---- log -----------------------------------------------------------------------------------------

def attempt_of(rows: list[dict[str, Any]], number: int) -> int | None:
    """The supervisor's attempt in which an event happened; None if there was none."""
    found = rows[number].get("attempt") or next(
        (before.get("attempt") for before in reversed(rows[:number])
         if before.get("event") == "started"), None)
    return found if isinstance(found, int) else None


def log_around(run_dir: RunDir, row: dict[str, Any], attempt: int | None) -> dict[str, Any]:
    """``name``, ``lines`` and ``at`` (which of them), or ``why`` there are none."""
    if attempt is None:
        return {"why": "no supervisor has started this run, so nobody has kept what it printed"}
    names = [name for name in run_dir.names("logs")
             if re.fullmatch(rf"attempt-{attempt}(\.[\w.-]+)?\.log", name)]
    if not names:
        return {"why": f"logs/ has nothing of attempt {attempt}"}
    data = run_dir.read(f"logs/{names[0]}", LOG_BYTES) or b""
    lines = data.decode(errors="replace").splitlines()
    at = _line_of(lines, row)
    first = max(0, at - BEFORE)
    return {"name": names[0], "lines": [line[:2000] for line in lines[first:at + AFTER]],
            "at": at - first}


def _line_of(lines: list[str], row: dict[str, Any]) -> int:
    """Where the event happened: at the first line of a later step, or at the end."""
    step = row.get("step")
    if row.get("event") not in AT_THE_END and isinstance(step, int):
        for number, line in enumerate(lines):
            if (found := STEP.search(line)) and int(found[1]) >= step:
                return number
    return max(0, len(lines) - 1)


# ---- samples -------------------------------------------------------------------------------------

def samples_of(run_dir: RunDir, rows: list[dict[str, Any]], row: dict[str, Any],
               config: dict[str, Any]) -> dict[str, Any] | None:
    """The samples of a dropped step or of a window that was stepped over; None of other events.

    ``rows`` (at most MOST_SAMPLES) have ``dropped``: in how many dropped steps the scan was.
    Those that were in several come first.
    """
    if row.get("event") not in ("skip", "rollback"):
        return None
    if (span := _span(row)) is None:
        return {"why": "written by an earlier version, which did not say which positions"}
    try:
        samples = _samples(run_dir.uri, yaml.safe_dump(config), _order_of(run_dir))
        counts = Counter(sample.scan_id for skip in
                         [other for other in rows if other.get("event") == "skip"][-MOST_SKIPS:]
                         if (where := _span(skip)) for sample in set(samples.at(*where)))
        found = samples.at(*span)
    except NeurojepaError as error:
        return {"why": str(error)}
    ranked = sorted(({**vars(sample), "dropped": counts[sample.scan_id]} for sample in found),
                    key=lambda item: -item["dropped"])
    return {"positions": list(span), "rows": ranked[:MOST_SAMPLES], "count": len(ranked)}


def _span(row: dict[str, Any]) -> tuple[int, int] | None:
    match row.get("positions"):
        case [int(begin), int(end)] if 0 <= begin < end:
            return begin, end
    return None


def _order_of(run_dir: RunDir) -> str | None:
    return (yaml.safe_load(run_dir.read("environment.json") or b"") or {}).get("order")


@lru_cache(maxsize=4)
def _samples(uri: str, config: str, order: str | None) -> Samples:
    return Samples(yaml.safe_load(config), f"{uri}/config.yaml", order)
