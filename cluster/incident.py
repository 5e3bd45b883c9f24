"""One readable report per incident: logs/incident-K.md says how the K-th attempt ended and why.

The cause is told from what is known anyway: exit statuses, the last lines of the log, the kernel's
count of processes that it ended for want of memory, room on the disk, ranks that waited.
"""

from __future__ import annotations

import re
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from cluster.outcome import Outcome
from cluster.rundir import Heartbeat

# what logs say, and what it comes from; the first that is found counts
SIGNS = (
    (r"CUDA out of memory|torch\.OutOfMemoryError", "a GPU has run out of memory: lower "
     "train.micro_batch or raise model.activation_checkpointing"),
    (r"No space left|ENOSPC|Errno 28", "a disk is full"),
    (r"NoCredentials|AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken",
     "the store refuses the credentials"),
    (r"EndpointConnectionError|does not answer|ConnectTimeout|ReadTimeout|ServiceUnavailable|"
     r"SlowDown", "the store has not answered for data.retry_s"),
    (r"uncorrectable ECC|Xid|CUDA error: (an illegal|unspecified|device-side)|NVLink",
     "a GPU has failed: look at nvidia-smi and the kernel's log of its host"),
    (r"LeaseLost|has taken over", "the run has another owner"),
)
PEERS = re.compile(r"Connection (closed by peer|reset)|Broken pipe|Timed out waiting|NCCL.*timeout")


@dataclass(frozen=True)
class Incident:
    """An attempt that did not end as it should.

    Parameters
    ----------
    status
        As a shell shows it: of the launcher, or of the rank that ended first.
    step
        That the slowest rank had reached.
    hung, culprits, why
        Whether it was ended because nothing moved, and what was found then.
    lost
        Hosts that were gone.
    full
        Whether the run directory's disk has no room: then the log may be cut, too.
    oom_kills
        Processes that this machine's kernel has ended for want of memory during the attempt.
    stacks
        The file that has them.
    """

    number: int
    status: int
    step: int | None
    hung: bool = False
    culprits: list[int] = field(default_factory=list)
    why: str = ""
    lost: list[str] = field(default_factory=list)
    oom_kills: int = 0
    beats: list[Heartbeat] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    stacks: str = ""
    full: bool = False

    @property
    def cause(self) -> str:
        """The likely cause in a sentence."""
        if self.lost:
            return f"{', '.join(self.lost)} could not be reached any more"
        if self.oom_kills and not self.hung:
            return (f"out of memory: the kernel has ended {self.oom_kills} process(es); lower "
                    "data.prefetch_batches or data.read_threads, or end what else runs there")
        text = "\n".join(self.log)
        for pattern, meaning in SIGNS:
            if re.search(pattern, text):
                return meaning
        if self.full:
            return "the disk of the run directory is full"
        if self.hung:
            ranks = ", ".join(map(str, self.culprits))
            return f"rank {ranks}: {self.why}" if ranks else f"nothing moved; {self.why}"
        if ending := _signal(self.status):
            return (f"a process was ended by {ending}"
                    + (", not for want of memory on this machine" if ending == "SIGKILL" else ""))
        error = next((line for line in reversed(self.log)
                      if "rror" in line and not PEERS.search(line)), "")
        return error.strip() or f"it ended with status {self.status}; the log does not tell why"

    def report(self, now: float | None = None) -> str:
        """All of it as Markdown."""
        at = time.strftime("%F %T UTC", time.gmtime(now))
        step = "before its first step" if self.step is None else f"at step {self.step}"
        parts = [f"# Attempt {self.number} {'hung' if self.hung else 'ended'} {step}", "",
                 f"{at}, status {self.status}", "", f"**Likely cause:** {self.cause}", ""]
        if self.beats:
            parts += ["| rank | host | process | step | seconds without a step | state |",
                      "|---|---|---|---|---|---|"]
            parts += [f"| {beat.rank}{' (!)' if beat.rank in self.culprits else ''} | {beat.host} "
                      f"| {beat.pid} | {beat.step} | {beat.quiet_s:.0f} | {beat.state} |"
                      for beat in self.beats] + [""]
        if self.stacks:
            parts += [f"Where each rank stood: `{self.stacks}`", ""]
        parts += ["The last lines of its log:", "", "```", *self.log, "```"]
        return "\n".join(parts) + "\n"


def incident_of(events: list[dict[str, Any]], outcome: Outcome, number: int, oom_kills: int,
                away: list[str], full: bool) -> Incident:
    """What the events since an attempt's start say about its end, with how it ended."""
    starts = [index for index, row in enumerate(events) if row["event"] == "started"]
    own = events[starts[-1] if starts else 0:]
    hang: dict[str, Any] = next((row for row in own if row["event"] == "hang"), {})
    # a short limit of hangs is over before a host counts as lost
    lost: list[str] = next((row["hosts"] for row in own if row["event"] == "host_lost"), away)
    return Incident(number, outcome.status, outcome.step, outcome.hung, hang.get("culprits", []),
                    hang.get("why", ""), lost, oom_kills, outcome.heartbeats, outcome.log_lines,
                    hang.get("stacks", ""), full)


def _signal(status: int) -> str:
    """The name of the signal that a status tells of, if it does."""
    try:
        return signal.Signals(status - 128).name if status > 128 else ""
    except ValueError:
        return ""
