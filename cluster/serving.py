"""What an agent does once it has started its ranks: gathers what they say, and obeys a supervisor.

    ranks  --datagrams: state, step, times-->  agent  --"ranks", every half second-->  supervisor
           --what they print-->                       --"printed"-->
                                                      <--"signal", "end"--
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.ranks import Rank, Ranks
from neurojepa.messages import ALONE

ORPHAN_S = 3600.0  # for so long ranks train on without a supervisor
GRACE_S = 120.0  # then they get so long for a checkpoint
ENDED_S = 60.0  # so long an agent whose ranks have ended waits for somebody to see how
FAILED_S = 5.0  # peers of a rank that failed end so much later, where no supervisor decides it
ALONE_S = 10.0  # without a supervisor, until ranks are told
TURN_S, TELL_S = 0.05, 0.5
LAST_WORDS_S = 5.0  # for a supervisor to take what is left to tell
KEPT_BYTES = 1 << 20  # of what ranks print while nobody listens
LINE_BYTES = 100  # what Python needs for a line besides its characters
CHUNK = 65_536


class Peer:
    """A connection to a supervisor's relay."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.setblocking(False)
        self.unsent = bytearray()
        self.closing = False
        self._cut = b""

    def orders(self) -> list[dict[str, Any]] | None:
        """The orders that have come; None at the end of the connection."""
        try:
            data = self.connection.recv(CHUNK)
        except BlockingIOError:
            return []
        except ConnectionError:
            return None
        *lines, self._cut = (self._cut + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None

    def tell(self, **row: Any) -> None:
        self.unsent += json.dumps(row).encode() + b"\n"

    def flush(self) -> bool:
        """Send what the connection takes; False if it is broken."""
        try:
            while self.unsent:
                del self.unsent[:self.connection.send(self.unsent[:CHUNK])]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True


class Agent:
    """Serves one attempt on this host until it is ended.

    Parameters
    ----------
    listener
        A listening Unix socket for relays.
    orphan_s
        For how long the ranks go on without a supervisor.
    """

    def __init__(self, ranks: Ranks, listener: socket.socket, fence: int,
                 orphan_s: float = ORPHAN_S) -> None:
        self.ranks, self.fence, self.orphan_s = ranks, fence, orphan_s
        self._listener = listener
        self._alone = Path(ranks.messages.path + ALONE)
        self._peers: list[Peer] = []
        self._owner: Peer | None = None
        self._alone_since = time.monotonic()
        self._asked_at = 0.0  # when orphaned ranks were asked to stop
        self._printed: deque[tuple[int, str]] = deque()
        self._printed_bytes, self._dropped = 0, 0
        self._changed, self._told_at, self._over = True, 0.0, False
        self._stop_asked = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(ranks.messages, selectors.EVENT_READ, None)
        for item in ranks.ranks.values():
            self._selector.register(item.output, selectors.EVENT_READ, item)

    def run(self) -> None:
        """Until an order ends it, or it has been alone for too long."""
        while not self._over:
            self._turn(TURN_S)
        end = time.monotonic() + LAST_WORDS_S
        while any(peer.unsent for peer in self._peers) and time.monotonic() < end:
            self._send()
            time.sleep(0.01)

    def stop(self) -> None:
        """Ask the ranks to stop; without a supervisor it is over when they have.

        May be called by a signal's handler: the next turn does it, when no rank that has just been
        reaped still counts as running.
        """
        self._stop_asked = True

    def _turn(self, wait_s: float) -> None:
        for key, _ in self._selector.select(wait_s):
            if self._over:  # an order a moment ago: it has read and closed the pipes
                return
            if isinstance(key.data, Rank):
                self._read(key.data)
            elif isinstance(key.data, Peer):
                if key.data in self._peers:  # not dropped a moment ago
                    self._listen(key.data)
            elif key.data is not None:
                key.data()
        self._changed |= self.ranks.hear()
        if self.ranks.reap():
            self._changed, self._told_at = True, 0.0
        if self._stop_asked:
            self._stop_asked, self.orphan_s = False, 0.0
            self.ranks.signal(signal.SIGTERM)
        if self._owner is None:
            self._go_on_alone()
        else:
            self._report(self._owner)
        self._send()

    # ---- what ranks print and say ----------------------------------------------------------------

    def _read(self, item: Rank) -> None:
        lines = item.lines()
        if lines is None:
            self._selector.unregister(item.output)
            os.close(item.output)
            return
        for line in lines:
            self._printed.append((item.rank, line))
            self._printed_bytes += LINE_BYTES + len(line)
        while self._printed_bytes > KEPT_BYTES:
            self._next_line()
            self._dropped += 1

    def _next_line(self) -> tuple[int, str]:
        rank, line = self._printed.popleft()
        self._printed_bytes -= LINE_BYTES + len(line)
        return rank, line

    def _report(self, owner: Peer, room: int = CHUNK) -> None:
        if self._dropped:
            owner.tell(printed=[-1, f"({self._dropped} lines were dropped here)"])
            self._dropped = 0
        while self._printed and len(owner.unsent) < room:
            owner.tell(printed=self._next_line())
        now = time.monotonic()
        if self._changed and now - self._told_at > TELL_S and len(owner.unsent) < CHUNK:
            owner.tell(size=self.ranks.size, ranks=self.ranks.rows())
            self._changed, self._told_at = False, now

    # ---- orders ----------------------------------------------------------------------------------

    def _accept(self) -> None:
        peer = Peer(self._listener.accept()[0])
        self._peers.append(peer)
        self._selector.register(peer.connection, selectors.EVENT_READ, peer)

    def _listen(self, peer: Peer) -> None:
        orders = peer.orders()
        if orders is None:
            self._drop(peer)
        for order in orders or []:
            self._obey(peer, order)

    def _obey(self, peer: Peer, order: dict[str, Any]) -> None:
        if order["do"] == "ask":
            peer.tell(size=self.ranks.size, ranks=self.ranks.rows())
            peer.closing = True
            return
        if order["fence"] < self.fence:
            peer.tell(refused=f"a later supervisor (fencing token {self.fence}) has taken over")
            peer.closing = True
            return
        self.fence = order["fence"]
        if order["do"] == "attach":
            if self._owner is not None and self._owner is not peer:
                self._drop(self._owner)
            self._alone.unlink(missing_ok=True)
            self._owner, self._changed, self._told_at, self._asked_at = peer, True, 0.0, 0.0
        elif order["do"] == "signal":
            self.ranks.signal(order["signum"])
        elif order["do"] == "end":
            left = self.ranks.end()
            self._read_out()
            self._report(peer, room=sys.maxsize)  # all of it; ``run`` sends it before it ends
            peer.tell(size=self.ranks.size, ranks=self.ranks.rows())
            peer.tell(ended=left)
            self._over = True

    def _read_out(self) -> None:
        """Take in what ranks that have ended still left in their pipes."""
        # a pipe that a process which does not end still holds is not ready
        while ready := [key.data for key, _ in self._selector.select(0)
                        if isinstance(key.data, Rank)]:
            for item in ready:
                self._read(item)

    def _drop(self, peer: Peer) -> None:
        self._peers.remove(peer)
        self._selector.unregister(peer.connection)
        peer.connection.close()
        if peer is self._owner:
            self._owner, self._alone_since = None, time.monotonic()

    def _send(self) -> None:
        for peer in list(self._peers):
            if not peer.flush() or (peer.closing and not peer.unsent):
                self._drop(peer)

    # ---- without a supervisor --------------------------------------------------------------------

    def _go_on_alone(self) -> None:
        now = time.monotonic()
        if self.ranks.failed_at is not None and now - self.ranks.failed_at > FAILED_S:
            self.ranks.signal(signal.SIGKILL)
        if now - self._alone_since > ALONE_S:
            with suppress(OSError):  # a full or cleared /tmp: ranks train on, only unseen
                self._alone.touch()  # ranks write into the run directory themselves
        since, limit_s = self._alone_since, self.orphan_s
        if not self.ranks.running:
            since = max(since, *(item.ended_at for item in self.ranks.ranks.values()))
            limit_s = min(limit_s, ENDED_S)
        if now - since < limit_s:
            return
        if not self._asked_at:
            self.ranks.signal(signal.SIGTERM)
            self._asked_at = now
        if not self.ranks.running or now - self._asked_at > GRACE_S:
            self.ranks.end()
            self._over = True
