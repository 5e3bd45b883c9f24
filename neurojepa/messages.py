"""What ranks tell the agent of their host, or each other: datagrams of JSON over a Unix socket.

Sending never waits: a message that finds no room is dropped, and the next one says all again.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from neurojepa.errors import ClusterError

AGENT = "NEUROJEPA_AGENT"  # where the agent listens; in the environment of the ranks it started
ALONE = ".alone"  # behind that path: a file that is there while the agent has no supervisor
LONGEST = 65_536  # bytes of a message


class Messages:
    """The way to whoever listens at ``path``."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def send(self, row: dict[str, Any]) -> None:
        """Send one message.

        Raises
        ------
        OSError
            Nobody listens.
        """
        with suppress(BlockingIOError):
            self._socket.sendto(json.dumps(row).encode(), self.path)

    def listen(self) -> bool:
        """Receive what is sent to ``path``; False where somebody else does."""
        try:
            self._socket.bind(self.path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
        return True

    def heard(self) -> Iterator[dict[str, Any]]:
        """The messages that have come."""
        with suppress(BlockingIOError):
            while True:
                yield json.loads(self._socket.recv(LONGEST))

    def fileno(self) -> int:
        """For ``select``."""
        return self._socket.fileno()


def private_folder() -> Path:
    """A folder that only this user can enter; not in TMPDIR, which may differ between two calls.

    Raises
    ------
    ClusterError
        Others can, too, it is somebody else's, or no folder.
    """
    folder = Path(f"/tmp/neurojepa-{os.getuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ClusterError(f"{folder}: others can enter it, it belongs to somebody else, or it is "
                           "no folder; remove it, and it is made anew for this user alone")
    return folder
