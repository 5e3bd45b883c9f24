"""One process a host, ``python -m cluster.agent``: starts that host's ranks and stays with them.

    supervisor  --ssh, JSON lines-->  relay  --Unix socket-->  agent  --starts-->  ranks
                <-------------------         <--------------          <--messages--

What the supervisor calls, by ssh or as its child, is a relay: the first line on its standard input
says what to do.  With ``start`` it forks an agent, which goes on in a session of its own, unless
there is one already; then it carries lines between the supervisor and that agent until either ends.
So an agent outlives the supervisor and its connection, and another supervisor reaches it with
``attach``.

Nothing listens on the network.  The sockets lie in a folder that only this user can enter, and what
is to be run comes over standard input, never on a command line.  Every order names the fencing
token of its supervisor's lease; an agent that has heard a higher one refuses it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.processes import end_members
from cluster.ranks import END_S, Ranks
from cluster.serving import CHUNK, Agent
from neurojepa.errors import run_command
from neurojepa.messages import ALONE, private_folder


@dataclass(frozen=True)
class Places:
    """Files of one attempt's agent on one host (several "hosts" may share a file system)."""

    control: Path
    messages: Path
    problem: Path  # what an agent that failed had to say

    @classmethod
    def of(cls, token: str, host: str) -> Places:
        name = hashlib.sha256(f"{token}\n{host}".encode()).hexdigest()[:24]
        folder = private_folder()
        return cls(*(folder / f"{name}.{kind}" for kind in ("control", "messages", "problem")))

    def remove(self) -> None:
        for path in (self.control, self.messages, self.problem, Path(f"{self.messages}{ALONE}")):
            path.unlink(missing_ok=True)


def main() -> int:
    """A relay, as the supervisor calls it."""
    line = b""
    while not line.endswith(b"\n"):  # byte by byte: what follows is the agent's
        if not (byte := os.read(0, 1)):
            return 0
        line += byte
    order = json.loads(line)
    places = Places.of(order["token"], order["host"])
    if order["do"] == "start":
        for token in order.get("before", []):
            _end_earlier(token, order["host"], order["fence"])
        _fork_agent(order, places)
        line = json.dumps({"do": "attach", "fence": order["fence"]}).encode() + b"\n"
    try:
        agent = socket.socket(socket.AF_UNIX)
        agent.connect(str(places.control))
    except (FileNotFoundError, ConnectionRefusedError):
        _answer_for_none(order, places)
        return 0
    with suppress(ConnectionError):  # the agent has ended, or the supervisor is gone
        _relay(agent, line)
    return 0


def _fork_agent(order: dict[str, Any], places: Places) -> None:
    """Start the agent as a process that does not end with this one."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(places.control))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return  # the order came before, over a connection that broke
    listener.listen()
    if os.fork():
        listener.close()
        return
    status = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):  # ssh waits for whoever holds them
            os.dup2(nothing, number)
        ranks = Ranks(order["command"], order["environment"], order["ranks"],
                      str(places.messages))
        agent = Agent(ranks, listener, order["fence"])
        # a batch system's end of a job; ranks do not inherit the handler
        signal.signal(signal.SIGTERM, lambda *_: agent.stop())
        agent.run()
        places.remove()
        status = 0
    except BaseException:  # whatever it was: standard error leads nowhere
        places.problem.write_text(traceback.format_exc())
    finally:
        os._exit(status)  # not back into the relay's code


def _end_earlier(token: str, host: str, fence: int) -> None:
    """End what an earlier attempt has left here while the host could not be reached."""
    places = Places.of(token, host)
    with socket.socket(socket.AF_UNIX) as agent:
        agent.settimeout(END_S + 5)
        try:
            agent.connect(str(places.control))
            agent.sendall(json.dumps({"do": "end", "fence": fence}).encode() + b"\n")
            while agent.recv(CHUNK):
                pass
        except OSError:  # it is gone, ends just now, or is stopped
            end_members(token, END_S)
            places.remove()


def _answer_for_none(order: dict[str, Any], places: Places) -> None:
    """There is no agent; what it may have left is ended by pid."""
    answer: dict[str, Any] = {"none": ""}
    if places.problem.exists():
        answer["none"] = places.problem.read_text()
    if order["do"] == "end":
        answer = {"ended": end_members(order["token"], END_S)}
        places.remove()
    print(json.dumps(answer), flush=True)


def _relay(agent: socket.socket, line: bytes) -> None:
    """Carry bytes between standard input and output and the agent."""
    agent.sendall(line)
    sources = [0, agent.fileno()]
    while agent.fileno() in sources:
        for source in select.select(sources, [], [])[0]:
            if source == 0:
                if data := os.read(0, CHUNK):
                    agent.sendall(data)
                else:  # the supervisor is gone, or asks nothing more
                    agent.shutdown(socket.SHUT_WR)
                    sources.remove(0)
            elif data := agent.recv(CHUNK):
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            else:
                sources.remove(agent.fileno())


if __name__ == "__main__":
    run_command(main)
