"""A store that fails: which errors mean that it did not answer, and asking it again for a while."""

from __future__ import annotations

import errno
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
FIRST_DELAY_S, LONGEST_DELAY_S = 0.25, 8.0  # between tries; each is twice the one before
_POLL_S = 0.1
# what a store says when it is well
_ANSWERS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError,
            PermissionError)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_ANSWER_CODES = (*_NO_SPACE, errno.EROFS, errno.ENAMETOOLONG)
# of S3's own codes and of its client's errors those that say: asked so, never
_REFUSALS = ("InvalidBucketName", "NoSuchBucket", "AuthorizationHeaderMalformed",
             "MethodNotAllowed", "NotImplemented", "InvalidRequest", "PreconditionFailed")
_OF_THE_CLIENT = ("ParamValidationError", "NoCredentialsError", "PartialCredentialsError",
                  "InvalidRegionError", "ProfileNotFound", "UnsupportedSignatureVersionError")


def store_errors() -> tuple[type[Exception], ...]:
    """What a store raises when it cannot be reached (for ``except``); a driver's once loaded."""
    botocore, aiohttp = map(sys.modules.get, ("botocore.exceptions", "aiohttp"))
    return (OSError, *([botocore.BotoCoreError] if botocore else []),
            *([aiohttp.ClientError] if aiohttp else []))  # s3fs lets it pass: a cut answer


def is_outage(error: BaseException | None) -> bool:
    """Whether the store behind an error did not answer; "no such file" or "no space" is an answer.
    """
    while error is not None and not isinstance(error, store_errors()):
        error = error.__cause__
    return error is not None and not isinstance(error, _ANSWERS) and \
        getattr(error, "errno", None) not in _ANSWER_CODES and not _is_refusal(error)


def no_space(error: BaseException | None) -> bool:
    """Whether a disk or a quota behind an error is full."""
    while error is not None and getattr(error, "errno", None) not in _NO_SPACE:
        error = error.__cause__
    return error is not None


def _is_refusal(error: BaseException) -> bool:
    said = getattr(error.__cause__, "response", None)  # s3fs: an OSError from botocore's answer
    code = said.get("Error", {}).get("Code") if isinstance(said, dict) else None
    return code in _REFUSALS or type(error).__name__ in _OF_THE_CLIENT


class Patience:
    """Does work again while the store fails; threads may share one.

    An outage costs time; only one that lasts longer than ``seconds`` is an error.  What is asked
    again must bear being done twice: the answer to a write that was done may be lost.

    Parameters
    ----------
    seconds : float
        For how long, from the first try of a piece of work.  What takes longer to fail is tried
        once more; with 0 nothing is.
    tell : callable, optional
        Told what the store said, before each new try; by default ``retries`` keeps it.
    """

    def __init__(self, seconds: float, tell: Callable[[str], None] | None = None) -> None:
        self.seconds = seconds
        self.retries: deque[str] = deque()
        self._waiting: dict[int, float] = {}  # thread -> when it gives up
        self._tell = tell or self.retries.append
        self._closed = False

    def __call__(self, work: Callable[[], T]) -> T:
        """The result of ``work``, or its last error."""
        began, delay = time.monotonic(), FIRST_DELAY_S
        try:
            return self._until_done(work, began, delay)
        finally:
            self._waiting.pop(threading.get_ident(), None)

    @property
    def left_s(self) -> float | None:
        """For how long the store is still asked again; None where nobody waits for it."""
        ends = list(self._waiting.values())  # threads may come and go
        return max(0.0, max(ends) - time.monotonic()) if ends else None

    def _until_done(self, work: Callable[[], T], began: float, delay: float) -> T:
        while True:
            try:
                return work()
            except Exception as error:
                left = began + self.seconds - time.monotonic()
                if delay == FIRST_DELAY_S and self.seconds:  # a slow failure is no refusal
                    left = max(left, delay)
                if not is_outage(error) or left <= 0:
                    raise
                self._waiting[threading.get_ident()] = time.monotonic() + left
                if not self._pause(min(delay, left)):
                    raise
                self._tell(f"{error or type(error).__name__}")
                delay = min(2 * delay, LONGEST_DELAY_S)

    def take(self) -> list[str]:
        """What the store said since the last call, when it was asked again."""
        return [self.retries.popleft() for _ in range(len(self.retries))]  # threads may append

    def close(self) -> None:
        """Ask no more: what waits to try again fails at once.  A signal handler may call it."""
        self._closed = True  # an Event's lock could be held by the code that a signal interrupts

    def _pause(self, seconds: float) -> bool:
        """Wait; False as soon as it is closed."""
        end = time.monotonic() + seconds
        while not self._closed and (left := end - time.monotonic()) > 0:
            time.sleep(min(_POLL_S, left))
        return not self._closed
