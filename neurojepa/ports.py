"""TCP ports for servers that other processes start."""

from __future__ import annotations

import random
import socket

# Below the ports that Linux lends to clients (32768 and up): one of those, free now, may be some
# connection's a second later, when the server comes to bind it.
_FIRST, _END = 20000, 32768


def free_port(twin: int = 0) -> int:
    """A port that is free now, and so is the one ``twin`` above it.

    Raises
    ------
    OSError
        A thousand tries found none.
    """
    draw = random.SystemRandom()  # runs seed the common generator alike
    for _ in range(1000):
        port = draw.randrange(_FIRST, _END - twin)
        if _is_free(port) and (not twin or _is_free(port + twin)):
            return port
    raise OSError(f"no free TCP port between {_FIRST} and {_END}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
