"""Files of rows that grow: each row is read once.

A resumed run drops the rows past its checkpoint and goes on from there.  So what was read is
remembered by marks; where the file no longer holds what stood before a mark, it is read again from
the mark before.
"""

from __future__ import annotations

import json
import threading
from typing import Any, Protocol

from neurojepa.storage import read_range

CHUNK_BYTES = 8 << 20  # read at once
MARK_BYTES = 1 << 20  # between marks
CHECK_BYTES = 256  # before a mark that have to be as they were


class Taker(Protocol):
    """What becomes of rows."""

    def add(self, row: dict[str, Any]) -> None: ...

    def cut(self, count: int) -> None:
        """Forget all but the first ``count`` rows."""


class Follower:
    """Hands the rows of a .jsonl file to ``taker``, each once, under a lock."""

    def __init__(self, uri: str, taker: Taker, lock: threading.Lock) -> None:
        self._uri, self._taker, self._lock = uri, taker, lock
        self._marks = [(0, b"", 0)]  # (bytes read, the last of them, rows taken)
        self._end, self._tail, self.count = self._marks[0]

    def refresh(self) -> None:
        """Read what has come since.

        Raises
        ------
        DataError
            The file cannot be read.
        """
        while True:
            start = self._end - len(self._tail)
            data = read_range(self._uri, start, self._end + CHUNK_BYTES) or b""
            if not data.startswith(self._tail):
                self._go_back()
                continue
            new = data[len(self._tail):]
            whole = new.rfind(b"\n") + 1  # what follows is being written
            self._take(new[:whole].split(b"\n"))
            self._end += whole
            self._tail = data[:len(self._tail) + whole][-CHECK_BYTES:]
            if self._end - self._marks[-1][0] >= MARK_BYTES:
                self._marks.append((self._end, self._tail, self.count))
            if len(new) < CHUNK_BYTES or not whole:
                return

    def _take(self, lines: list[bytes]) -> None:
        with self._lock:
            for line in lines:
                try:
                    row = json.loads(line) if line else None
                except ValueError:  # cut by a kill
                    continue
                if isinstance(row, dict):
                    self._taker.add(row)
                    self.count += 1

    def _go_back(self) -> None:
        if self._marks[-1][0] == self._end:  # this mark does not hold either
            self._marks.pop()
        self._end, self._tail, self.count = self._marks[-1]
        with self._lock:
            self._taker.cut(self.count)


class Rows:
    """Rows as they are."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def cut(self, count: int) -> None:
        del self.rows[count:]
