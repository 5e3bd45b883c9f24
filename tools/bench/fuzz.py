"""fuzz: random damage to good scans, tables and sidecars; what becomes of each variant.

A variant is a good file with one thing wrong: a header field, a byte, its length; a cell, a row, a
key.  It has to end in one of four ways: equal (the content in the world is the good file's), told
(a table now says so itself: another word, or nothing), flagged (it differs, and a flag or a note
says so), rejected (an error that names the file).  Never in a traceback, a hang or another content
without a word.  Seeded: a variant is known by its number.
"""

from __future__ import annotations

import logging
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from neurojepa.errors import DataError
from tools.bench import _fuzz_scans as scans
from tools.bench import _fuzz_tables as tables
from tools.bench.common import clock, machine, print_table

OUTCOMES = ("equal", "told", "flagged", "rejected", "silent", "traceback", "hang")
WRONG = OUTCOMES[4:]
MAX_SECONDS = 5  # a variant takes milliseconds
SUBJECTS = (*scans.GOOD, *tables.GOOD)


@dataclass(frozen=True)
class Ended:
    """How one variant ended."""

    number: int
    subject: str
    damage: str
    outcome: str
    detail: str


def run(quick: bool, official: str | None) -> dict[str, Any]:
    """Try variants; returns how many ended how, which must be 0 for silent, traceback, hang."""
    print(machine())
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # what it thinks of headers
    with clock() as spent:
        ended = list(fuzz(400 if quick else 4000))
    counts = Counter((one.subject, one.outcome) for one in ended)
    print_table(("subject", "variants", *OUTCOMES), [
        (subject, sum(counts[subject, outcome] for outcome in OUTCOMES),
         *(counts[subject, outcome] for outcome in OUTCOMES)) for subject in SUBJECTS])
    for one in ended:
        if one.outcome in WRONG:
            print(f"{one.number} {one.subject}, {one.damage}: {one.outcome}: {one.detail}")
    totals = Counter(one.outcome for one in ended)
    return {"variants": len(ended), "ms_per_variant": 1000 * spent.cpu_s / len(ended),
            **{outcome: totals[outcome] for outcome in OUTCOMES}}


def fuzz(count: int, first: int = 0) -> Iterator[Ended]:
    """Try the variants ``first`` to ``first + count - 1``, subject after subject."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        tree = Path(name) / "tree"
        tables.plant(tree)
        good = tables.read(tree)
        for number in range(first, first + count):
            rng = np.random.default_rng([20, number])
            subject = SUBJECTS[number % len(SUBJECTS)]
            if subject in scans.GOOD:
                damage, content = scans.damaged(rng, subject)
                path = Path(name) / f"{number}_{subject}"
                scans.write(path, content)
                ended = _ended(lambda path=path, subject=subject: scans.judge(path, subject),
                               path.name)
                path.unlink()
            else:
                damage, content = tables.damaged(rng, subject)
                path = tree / subject
                whole = path.read_bytes()
                path.write_bytes(content)
                ended = _ended(lambda damage=damage, content=content: tables.judge(
                    tree, good, damage, content), path.name)
                path.write_bytes(whole)
            yield Ended(number, subject, damage, *ended)


def _ended(judge: Callable[[], tuple[str, str]], name: str) -> tuple[str, str]:
    """Outcome and detail; an error that does not name the file counts as a traceback."""
    before = signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        return judge()
    except _Hang:
        return "hang", f"over {MAX_SECONDS} s"
    except DataError as error:
        return ("rejected" if name in str(error) else "traceback"), str(error)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "traceback", f"{type(error).__name__}: {error} ({where.name}:{where.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Hang(BaseException):
    """A variant took too long."""


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise _Hang
