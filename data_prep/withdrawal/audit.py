"""audit.jsonl of an archive or a feed: who was taken out, when, and on whose word.

One JSON object a line, each with the hash of the line before, so that a line that was changed,
removed or slipped in later shows.  Cutting off the end does not: whoever must exclude that keeps
the hash that ``withdraw`` prints.  People are named by pseudonym.

    {"event": "withdrawn", ...}     before anything is deleted: lists, people, what they had
    {"event": "purged", ...}        after everything of theirs is gone
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from neurojepa.errors import DataError
from neurojepa.storage import join, read_if_there, sha256, write_bytes

NAME = "audit.jsonl"
Event = dict[str, Any]


def read_events(uri: str) -> list[Event]:
    """All events, oldest first; none where nothing was ever withdrawn.

    Raises
    ------
    DataError
        The chain is broken: the log says less, or something else, than what happened.
    """
    lines = _lines(uri)
    for problem in _breaks(uri, lines):
        raise DataError(problem)
    return [json.loads(line) for line in lines]


def append_event(uri: str, event: Event) -> str:
    """Add an event at the end; returns the hash of its line."""
    lines = _lines(uri)
    line = json.dumps({"when": datetime.now(UTC).isoformat(timespec="seconds"), **event,
                       "previous": sha256(lines[-1]) if lines else None}, sort_keys=True).encode()
    write_bytes(join(uri, NAME), b"".join(each + b"\n" for each in [*lines, line]))
    return sha256(line)


def withdrawn_people(uri: str) -> set[str]:
    """Pseudonyms of everyone ever listed as withdrawn, whether they had scans here or not."""
    return {person for event in read_events(uri) if event["event"] == "withdrawn"
            for person in event["people"]}


def unfinished(events: list[Event]) -> list[Event]:
    """Withdrawals whose deletions did not come to their end."""
    purges = [number for number, event in enumerate(events) if event["event"] == "purged"]
    return [event for event in events[(purges or [-1])[-1] + 1:] if event["event"] == "withdrawn"]


def audit_problems(uri: str) -> Iterator[str]:
    """What is wrong with the log, one line each."""
    yield from _breaks(uri, _lines(uri))


def _lines(uri: str) -> list[bytes]:
    return (read_if_there(join(uri, NAME)) or b"").splitlines()


def _breaks(uri: str, lines: list[bytes]) -> Iterator[str]:
    before = None
    for number, line in enumerate(lines, 1):
        try:
            previous = json.loads(line)["previous"]
        except (ValueError, KeyError, TypeError):
            previous = "unreadable"
        if previous != before:
            yield (f"{join(uri, NAME)} line {number}: does not follow from the line before; the "
                   "log was changed; restore it from a backup")
            return
        before = sha256(line)

