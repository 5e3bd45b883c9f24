"""Whether hosts reach each other, before a start: each opens a port and calls on its neighbours.

Ranks connect to the first host and among themselves.  A host that only the supervisor can reach
would make a start hang for minutes; here it is named within seconds.  Every host calls the first
one and those before and after it in the hostfile, by the names that stand there or, the first one,
by the address that was given for it.
"""

from __future__ import annotations

import hmac
import socket
import threading
import time
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from typing import Any

from neurojepa.ports import free_port

MEET_S = 2.0  # for hosts that start at different moments, and for packets that are lost
CONNECT_S = 1.5


@dataclass(frozen=True)
class Visit:
    """What one host does: opens ``port`` to so many ``callers``, and calls ``peers``.

    By name, ``peers`` has the address and port of each.
    """

    port: int
    callers: int
    peers: dict[str, tuple[str, int]]


def visits(hosts: list[str], first_address: str | None = None) -> dict[str, dict[str, Any]]:
    """By host, its ``Visit`` as JSON has it."""
    ports = {host: free_port() for host in hosts}  # free here, and most likely there
    addresses = {hosts[0]: first_address or hosts[0]}
    peers = {host: {hosts[0], hosts[at - 1], hosts[(at + 1) % len(hosts)]} - {host}
             for at, host in enumerate(hosts)}
    return {host: asdict(Visit(ports[host], sum(host in called for called in peers.values()),
                               {peer: (addresses.get(peer, peer), ports[peer])
                                for peer in sorted(peers[host])}))
            for host in hosts}


def meet(visit: Visit, key: bytes) -> dict[str, str]:
    """Call the neighbours, and answer until all have called or it is too late.

    Returns
    -------
    dict
        By neighbour that cannot be reached, why.  One that refuses the connection counts as
        reached, for it may have begun late or ended already, and so does one where another server
        has the port.  One whose name is not known here, or not within seconds, is no complaint: it
        may be an alias of the caller's ssh.
    """
    end, missed, came = time.monotonic() + MEET_S, dict[str, str](), threading.Semaphore(0)
    with suppress(OSError), closing(socket.create_server(("", visit.port))) as door:
        threading.Thread(target=_answer, args=(door, key, came), daemon=True).start()
        _call_all(visit, key, end, missed)
        for _ in range(visit.callers):
            came.acquire(timeout=max(0.0, end - time.monotonic()))
        return dict(missed)
    _call_all(visit, key, end, missed)  # the port is taken here: nobody is answered
    return dict(missed)


def _answer(door: socket.socket, key: bytes, came: threading.Semaphore) -> None:
    with suppress(OSError):  # closed
        while True:
            caller, _ = door.accept()
            with caller, suppress(OSError):
                caller.settimeout(CONNECT_S)
                if hmac.compare_digest(caller.recv(len(key), socket.MSG_WAITALL), key):
                    caller.sendall(b"1")
                    came.release()


def _call_all(visit: Visit, key: bytes, end: float, missed: dict[str, str]) -> None:
    calls = [threading.Thread(target=_call, args=(peer, tuple(place), key, end, missed),
                              daemon=True) for peer, place in visit.peers.items()]
    for call in calls:
        call.start()
    for call in calls:  # a name server that is away would take longer than the asker waits
        call.join(max(0.0, end + 2 * CONNECT_S - time.monotonic()))


def _call(peer: str, place: tuple[str, int], key: bytes, end: float,
          missed: dict[str, str]) -> None:
    why = ""
    while True:
        try:
            there = socket.create_connection(place, CONNECT_S)
        except (ConnectionError, socket.gaierror):
            why = ""
        except OSError as error:
            why = error.strerror or str(error)
        else:
            why = ""
            with there, suppress(OSError):  # another server does not answer
                there.sendall(key)
                if there.recv(1):
                    return
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    if why:
        missed[peer] = why


def strangers(missed: dict[str, dict[str, str]]) -> dict[str, str]:
    """The fewest hosts without which all others reach each other, roughly; and why, in words.

    Parameters
    ----------
    missed
        By host, in the hostfile's order, which others it could not reach and why.
    """
    order, found = list(missed), dict[str, str]()
    failed = {(host, peer): why for host, peers in missed.items() for peer, why in peers.items()
              if peer in missed}
    while failed:
        worst = max(order, key=lambda host: (sum(host in pair for pair in failed),
                                             order.index(host)))
        callers = [host for host, peer in failed if peer == worst]
        called = [peer for host, peer in failed if host == worst]
        why = next(why for pair, why in failed.items() if worst in pair)
        said = [f"cannot be reached by {', '.join(callers)}"] if callers else []
        said += [f"cannot reach {', '.join(called)}"] if called else []
        found[worst] = (f"{' and '.join(said)} on a free port ({why}); ranks connect to each "
                        "other: look at its firewall and routes")
        failed = {pair: why for pair, why in failed.items() if worst not in pair}
    return found
