"""The likely cause of a failed attempt, and the page about it."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.incident import Incident, incident_of
from cluster.outcome import Outcome
from cluster.rundir import Heartbeat

PEER = "RuntimeError: [gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:3"


@pytest.mark.parametrize(("facts", "cause"), [
    ({"status": 137}, "ended by SIGKILL, not for want of memory"),
    ({"status": 137, "oom_kills": 1}, "out of memory: the kernel has ended 1"),
    ({"status": 139}, "ended by SIGSEGV"),
    ({"log": ["x", "OSError: [Errno 28] No space left on device"]}, "a disk is full"),
    ({"log": ["torch.OutOfMemoryError: CUDA out of memory. Tried"]}, "a GPU has run out of memory"),
    ({"log": ["DataError: s3://b/f: does not answer (EndpointConnectionError)"]},
     "the store has not answered"),
    ({"log": ["ClientError: AccessDenied when calling GetObject"]}, "refuses the credentials"),
    ({"log": ["CUDA error: an illegal memory access was encountered"]}, "a GPU has failed"),
    ({"hung": True, "culprits": [2], "why": "gives no sign of life"},
     "rank 2: gives no sign of life"),
    ({"hung": True, "why": "all stand at the same place"}, "nothing moved; all stand"),
    ({"hung": True, "culprits": [0], "why": "is behind", "oom_kills": 1}, "rank 0: is behind"),
    ({"full": True, "status": 2}, "the disk of the run directory is full"),  # and so its log is cut
    ({"lost": ["h2", "h3"], "status": 137}, "h2, h3 could not be reached"),
    ({"log": ["ValueError: bad", PEER]}, "ValueError: bad"),  # the first fault, not its echo
    ({"log": [PEER]}, "status 1; the log does not tell why")])
def test_the_likely_cause_is_told_apart(facts: dict[str, Any], cause: str) -> None:
    assert cause in Incident(**{"number": 3, "status": 1, "step": 40, **facts}).cause


def test_a_page_has_what_is_known() -> None:
    beats = [Heartbeat(rank, f"h{rank}", 100 + rank, 40, 5.0, 65.0) for rank in range(2)]
    events = [{"event": "started"}, {"event": "host_lost", "hosts": ["old"]}, {"event": "started"},
              {"event": "hang", "culprits": [1], "why": "the process is stopped or dead",
               "stacks": "logs/attempt-3.stacks.txt"}]
    outcome = Outcome(137, 40, beats, ["step 40", "the end"], True, None)
    page = incident_of(events, outcome, 3, 0, [], False).report(now=0.0)
    assert page.startswith("# Attempt 3 hung at step 40\n\n1970-01-01 00:00:00 UTC, status 137")
    assert "**Likely cause:** rank 1: the process is stopped or dead" in page
    assert "| 1 (!) | h1 | 101 | 40 | 60 | step |" in page and "| 0 | h0 |" in page
    assert "`logs/attempt-3.stacks.txt`" in page and "step 40\nthe end\n```" in page


def test_a_host_that_was_away_at_the_end_is_the_cause_of_a_hang() -> None:
    events = [{"event": "started"}, {"event": "hang", "culprits": [], "why": "all stand"}]
    outcome = Outcome(137, 40, [], [], True, None)
    assert incident_of(events, outcome, 3, 0, ["h2"], False).cause.startswith("h2 could not be")
    assert incident_of(events, outcome, 3, 0, [], False).cause == "nothing moved; all stand"
