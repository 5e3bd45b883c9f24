"""The status of a run as one screen of text, in colours where a person looks at it."""

from __future__ import annotations

import os
import time
from typing import Any, TextIO

from cluster.levels import level
from cluster.trend import bars

MOST_ROWS = 16  # ranks that have a line of their own
BOLD, RED, GREEN, YELLOW, SOFT, PLAIN = ("\033[1m", "\033[31m", "\033[32m", "\033[33m", "\033[2m",
                                         "\033[0m")
STATES = {"running": GREEN, "finished": GREEN, "waiting": YELLOW, "stopped": YELLOW,
          "stalled": RED, "failed": RED}
LEVELS = {"problem": RED, "warning": YELLOW, "": ""}


def wants_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colours and whose user wants them."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def render(status: dict[str, Any], colour: bool = False) -> str:
    """One screen of text."""

    def paint(text: str, code: str) -> str:
        return f"{code}{text}{PLAIN}" if colour and code else text

    total = f"/{status['steps']}" if status["steps"] else ""
    of_step = "" if status["loss_step"] is None else f" ({_step(status['loss_step'])})"
    state = paint(f"{status['state'].upper():9}", BOLD + STATES[status["state"]])
    lines = [
        paint(status["run"], BOLD),
        f"  {state} step {status['step']}{total}"
        f"   loss {_number(status['loss'])}{of_step}"
        f"   {_number(status['volumes_per_s'])} volumes/s"
        f"   ETA {_duration(status['eta_s'])}",
        f"  last checkpoint: {_step(status['last_checkpoint']) or 'none yet'}"
        f"   restarts: {status['restarts']}   goodput: {_share(status['goodput'])}"
        f" (lost: {status['lost_steps']} steps)",
        *_trends(status["trend"]),
        "",
    ]
    ranks = status["ranks"]
    if not ranks:
        lines.append("  no rank has given a sign of life yet")
    else:
        lines += _by_rank(ranks) if len(ranks) <= MOST_ROWS else _by_host(ranks)
    lines += [paint(f"  slow: rank {slow['rank']} on {slow['host']} needs {slow['own_s']:.2g} s, "
                    f"the others {slow['others_s']:.2g} s", YELLOW) for slow in status["slow"]]
    lines += ["", "  last events"]
    lines += [paint(f"  {time.strftime('%F %T', time.localtime(row.get('time', 0)))}  "
                    f"{row.get('event'):11} {_step(row.get('step')):12} {_facts(row)}".rstrip(),
                    LEVELS[level(row)]) for row in status["events"]]
    return "\n".join(lines)


def _trends(trends: dict[str, dict[str, Any] | None]) -> list[str]:
    """How loss and rate went over the last rows."""
    lines = []
    for name, label in (("loss", "loss"), ("volumes_per_s", "volumes/s")):
        if found := trends[name]:
            change = "" if found["change"] is None else f"   {found['change']:+.1%}"
            lines.append(f"  {label:10} {bars(found['points'])}{change} over {found['rows']} steps")
    return lines


def _by_rank(ranks: list[dict[str, Any]]) -> list[str]:
    return ["  rank  host                 pid       step      last step", *(
        f"  {rank['rank']:<5} {rank['host'][:20]:20} {rank['pid']:<9} {rank['step']:<9} "
        f"{_duration(rank['age_s'])} ago" for rank in ranks)]


def _by_host(ranks: list[dict[str, Any]]) -> list[str]:
    """One line a host: the slowest of its ranks counts."""
    lines = ["  host                 ranks            step      last step"]
    for host in dict.fromkeys(rank["host"] for rank in ranks):
        own = [rank for rank in ranks if rank["host"] == host]
        span = f"{own[0]['rank']}-{own[-1]['rank']} ({len(own)})"
        lines.append(f"  {host[:20]:20} {span:16} {min(rank['step'] for rank in own):<9} "
                     f"{_duration(max(rank['age_s'] for rank in own))} ago")
    return lines


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _facts(row: dict[str, Any]) -> str:
    shown = {key: value for key, value in row.items()
             if key not in ("time", "event", "step", "by") and isinstance(value, int | float | str)}
    return " ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={str(value)[:16]}"
                    for key, value in shown.items())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _step(step: int | None) -> str:
    return "" if step is None else f"step {step}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    seconds = max(0.0, seconds)  # of a clock that is ahead
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
