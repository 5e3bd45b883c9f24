"""How tests wait for what other threads and processes do: until it has happened, however slowly."""

from __future__ import annotations

import time
from collections.abc import Callable

LONG_S = 120.0  # more than a machine that runs other tests meanwhile needs


def wait_until(happened: Callable[[], object], seconds: float = LONG_S,
               why: Callable[[], object] = lambda: "it did not happen") -> None:
    """Until an event has been seen; AssertionError with ``why()`` where it does not come."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, why()
        time.sleep(0.02)
