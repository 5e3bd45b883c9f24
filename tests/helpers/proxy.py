"""A network that fails in ways that a store's network does."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import deque
from urllib.parse import urlparse


class Proxy:
    """A TCP proxy on a port of its own; each new connection suffers the next of ``faults``."""

    def __init__(self, target: str | None, address: str = "127.0.0.1") -> None:
        self.target = target
        self.faults: deque[str] = deque()
        self._listener = socket.create_server((address, 0))
        self.url = f"http://{address}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                fault = self.faults.popleft() if self.faults else ""
                threading.Thread(target=self._serve, args=(client, fault), daemon=True).start()

    def _serve(self, client: socket.socket, fault: str) -> None:
        with client, contextlib.suppress(OSError):
            if fault == "reset" or self.target is None:
                client.recv(1)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            address = urlparse(self.target)
            with socket.create_connection((address.hostname or "", address.port or 0)) as server:
                threading.Thread(target=_copy, args=(client, server), daemon=True).start()
                _copy(server, client, fault)


def _copy(source: socket.socket, sink: socket.socket, fault: str = "") -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            if fault == "delay":
                time.sleep(0.3)
            if fault == "corrupt" and len(data) > 2000:
                data, fault = data[:-9] + b"!" + data[-8:], ""
            sink.sendall(data[:1000] if fault == "truncate" else data)
            if fault == "truncate":
                break
    with contextlib.suppress(OSError):  # also where the source was reset: a kill is not silence
        sink.shutdown(socket.SHUT_RDWR)
