"""Asking a store that fails again, for a while.

An outage costs time; only when it lasts longer than ``data.retry_s`` does it end the run.  What is
asked again must bear being done twice: the answer to a write that was done may be lost.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from neurojepa.errors import is_outage

FIRST_DELAY_S, LONGEST_DELAY_S = 0.25, 8.0  # between tries; each is twice the one before
T = TypeVar("T")


class Patience:
    """Does work again while the store fails; threads may share one.

    Parameters
    ----------
    seconds : float
        For how long, from the first try of a piece of work.  What takes longer to fail is tried
        once more; with 0 nothing is.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.retries: deque[str] = deque()
        self._closed = threading.Event()

    def __call__(self, work: Callable[[], T]) -> T:
        """The result of ``work``, or its last error."""
        began, delay = time.monotonic(), FIRST_DELAY_S
        while True:
            try:
                return work()
            except Exception as error:
                left = began + self.seconds - time.monotonic()
                if delay == FIRST_DELAY_S and self.seconds:  # a slow failure is no refusal
                    left = max(left, delay)
                if not is_outage(error) or left <= 0 or self._closed.wait(min(delay, left)):
                    raise
                self.retries.append(f"{error or type(error).__name__}")
                delay = min(2 * delay, LONGEST_DELAY_S)

    def take(self) -> list[str]:
        """What the store said since then, when it was asked again."""
        return [self.retries.popleft() for _ in range(len(self.retries))]  # threads may append

    def close(self) -> None:
        """Ask no more: what waits to try again fails at once."""
        self._closed.set()
