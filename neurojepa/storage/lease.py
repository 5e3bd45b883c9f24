"""One owner for a run directory: a lease with a fencing token, on disks and object stores alike.

The claim with the highest number owns the directory (owners.py), and its number is the fencing
token.  An owner knows that it lost the directory as soon as the next claim exists; it looks before
each write (``writing``, ``replace``, ``append``) and writes no more.  On a local disk nobody can
claim between look and write, because both hold the folder's lock.  In an object store a new owner
rewrites what it takes over, and writes are made only on the version that was read, so one that
comes too late has no effect.

A claim may be made when the last owner gave its own back, when its process has ended on this
machine, or when it has not renewed for ``TTL_S`` by the clock of the one who waits.  Processes that
the last owner had started go on under a claim that ``adopts`` them.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

from neurojepa.errors import DataError, LeaseHeld, LeaseLost
from neurojepa.storage.conditional import create, locked, read_version, write_if
from neurojepa.storage.files import join, local_path, read_if_there, write_bytes
from neurojepa.storage.outage import Patience
from neurojepa.storage.owners import (
    Owner,
    claim,
    facts,
    lease_uri,
    newest,
    pid_space,
    process_start,
)
from neurojepa.storage.rows import append_rows, rows_bytes

RENEW_S = 5.0
TTL_S = 45.0
ATTEMPT = "NEUROJEPA_ATTEMPT"  # in the environment of all processes that a supervisor starts


class Lease:
    """A claim that was made; see ``take`` and ``follow``.  Threads may share one.

    Parameters
    ----------
    follows
        A rank, which goes on under whoever adopts its supervisor's processes.
    """

    def __init__(self, run_dir: str, owner: Owner, follows: bool = False) -> None:
        self.run_dir, self.owner = run_dir, owner
        self.token, self.id = owner.token, owner.id
        self._follows = follows
        self._beat, self._released = 0, False
        self._turn = threading.RLock()
        self._next: Owner | None = None  # our own next claim, on its way
        self._local = local_path(run_dir) is not None

    # ---- keeping it ------------------------------------------------------------------------------

    def check(self) -> None:
        """Look whether the directory is still ours.

        Raises
        ------
        LeaseLost
            Someone else has claimed it.
        DataError
            The store does not answer.
        """
        with self._turn:
            while (later := claim(self.run_dir, self.token + 1)) is not None:
                if later == self._next:
                    self.owner = later
                elif not (self._follows and later.adopts == self.id):
                    raise LeaseLost(f"{self.run_dir}: was taken over by the {later}; this process "
                                    "(and whatever it trained since) writes there no more")
                self.token, self.id = later.token, later.id

    def advance(self) -> None:
        """Make the next claim ourselves: what an earlier attempt left anywhere writes no more.

        Raises
        ------
        LeaseLost
            Someone else was faster.
        """
        with self._turn:
            self.check()
            if self._next is None or self._next.token <= self.token:
                self._next = replace(self.owner, token=self.token + 1, id=uuid.uuid4().hex,
                                     time=time.time(), adopts=None)
            with locked(join(self.run_dir, "lease")):
                create(lease_uri(self.run_dir, self._next.token),
                       json.dumps(asdict(self._next)).encode())
            self.check()

    def renew(self, **said: Any) -> None:
        """Show that the owner lives; ``said`` is for whoever looks at ``facts``."""
        self.renew_by(lambda: said)

    def renew_by(self, said: Callable[[], dict[str, Any]]) -> None:
        """As ``renew``; of two threads the one that writes last asks last."""
        with self._turn:
            if not self._released:
                self._beat += 1
                self._say("held", said())

    def release(self) -> None:
        """Give it back, for good: the next owner need not wait.

        Where that cannot be written, it is only said: how the run has ended counts more.
        """
        with self._turn:
            self._released = True
            try:
                self._say("released", {})
            except DataError as error:
                print(f"the run directory was not given back ({error}); a start on another machine "
                      f"waits {TTL_S:.0f} s for it", file=sys.stderr, flush=True)

    def stop_asked(self) -> str:
        """"" or, where an operator asked for it, "stop" or "now"."""
        data = read_if_there(lease_uri(self.run_dir, self.token, "stop"))
        if data is None:
            return ""
        with suppress(ValueError):
            if json.loads(data).get("now"):
                return "now"
        return "stop"

    def _say(self, state: str, said: dict[str, Any]) -> None:
        row = {"beat": self._beat, "state": state, "time": time.time(), **said}
        write_bytes(lease_uri(self.run_dir, self.token, "alive"), json.dumps(row).encode())

    # ---- writing under it ------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around a write; on a local disk nobody can take the directory over meanwhile."""
        with locked(join(self.run_dir, "lease")):
            self.check()
            yield

    def replace(self, uri: str, data: bytes, token_of: Callable[[bytes], int]) -> None:
        """Replace an object that only owners write, unless a later owner has.

        Parameters
        ----------
        token_of
            The token with which what is there now was written; 0 where it says none.
        """
        if self._local:
            with self.writing():
                write_bytes(uri, data)
            return
        while True:
            there, version = read_version(uri)
            self.check()  # after it: what a later owner writes first changes the version
            if there == data:  # also: the answer to a write before was lost
                return
            if there is not None and token_of(there) > self.token:
                raise LeaseLost(f"{uri}: was written by a later owner; this process writes there "
                                "no more")
            if write_if(uri, data, version):
                return

    def append(self, uri: str, rows: list[dict[str, Any]]) -> None:
        """Append rows to a file that owner and ranks write, all or none of them, once."""
        if self._local:
            with self.writing():
                append_rows(uri, rows)
            return
        lines = rows_bytes(rows)
        while True:
            there, version = read_version(uri)
            self.check()
            there = (there or b"")[:(there or b"").rfind(b"\n") + 1]
            if there.endswith(lines) or write_if(uri, there + lines, version):
                return


def take(run_dir: str, kind: str, patience: Patience,
         adopt: Callable[[Owner, dict[str, Any]], bool] | None = None,
         clock: Callable[[], float] = time.monotonic,
         sleep: Callable[[float], None] = time.sleep) -> Lease:
    """Become the owner of a run directory; waits for a last owner that says nothing.

    Parameters
    ----------
    kind
        supervisor or training.
    patience
        With a store that fails.
    adopt
        Decides, from the last owner and what it said, whether its processes go on under us.

    Raises
    ------
    LeaseHeld
        It has a live owner.
    """
    last = patience(lambda: newest(run_dir))
    said: dict[str, Any] = {}
    if last is not None:
        said = _wait_for_end(last, lambda: patience(lambda: facts(run_dir, last)), run_dir, clock,
                             sleep)
    adopts = last.id if last and said.get("state") != "released" and adopt \
        and adopt(last, said) else None
    owner = Owner(token=last.token + 1 if last else 1, id=uuid.uuid4().hex, kind=kind,
                  host=socket.gethostname(), pid=os.getpid(), pid_space=pid_space(),
                  process=process_start(os.getpid()), time=time.time(), adopts=adopts)
    uri = lease_uri(run_dir, owner.token)
    with locked(join(run_dir, "lease")):
        patience(lambda: create(uri, json.dumps(asdict(owner)).encode()))
    # not by the answer: it may be lost and the claim be ours
    first = patience(lambda: claim(run_dir, owner.token))
    if first is None or first.id != owner.id:
        raise LeaseHeld(f"{run_dir}: the {first} was faster; see: "
                        f"python -m cluster status {run_dir}")
    lease = Lease(run_dir, owner)
    patience(lease.renew)
    if last is not None and said.get("state") != "released":
        # an append of the last owner that is on its way fails on this row
        row = _event("takeover", by=kind, token=owner.token, adopted=adopts is not None,
                     **{"from": str(last)})
        patience(lambda: lease.append(join(run_dir, "events.jsonl"), [row]))
    return lease


def follow(run_dir: str, attempt: str) -> Lease:
    """The lease of the supervisor that started this process, or of one that adopted it.

    Parameters
    ----------
    attempt
        The value of ``ATTEMPT``; an owner says which one it runs.

    Raises
    ------
    LeaseLost
        The run directory is not that supervisor's, or no more.
    """
    owner = newest(run_dir)
    if owner is None or facts(run_dir, owner).get("attempt") != attempt:
        whose = f"belongs to the {owner}" if owner else "has no owner"
        raise LeaseLost(f"{run_dir}: {whose}, not to the supervisor that started this process; "
                        "give both the same run.dir, as an absolute path or a URI")
    return Lease(run_dir, owner, follows=True)


class Keeper(threading.Thread):
    """Renews a lease in the background and tells when it is lost or a stop is asked for.

    While the store does not answer, nobody else can see that either; the next look decides.

    Parameters
    ----------
    said
        What to say when renewing; None: only look (a rank under a supervisor).
    on_lost, on_stop
        Called in this thread, once; ``on_stop`` with "stop", and again with "now".
    """

    def __init__(self, lease: Lease, said: Callable[[], dict[str, Any]] | None,
                 on_lost: Callable[[LeaseLost], None],
                 on_stop: Callable[[str], None]) -> None:
        super().__init__(name="lease", daemon=True)
        self._lease, self._said = lease, said
        self._on_lost, self._on_stop = on_lost, on_stop
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        told = ""
        while True:
            try:
                self._lease.check()
                if self._said is not None:
                    self._lease.renew_by(self._said)
                if (asked := self._lease.stop_asked()) and asked != told:
                    told = asked
                    self._on_stop(asked)
            except LeaseLost as error:
                self._on_lost(error)
                return
            except DataError:  # an outage: writers meet it, too, and have the patience
                pass
            if self._ended.wait(RENEW_S):
                return

    def close(self) -> None:
        """Renew no more; the last look may still be on its way."""
        self._ended.set()
        if threading.current_thread() is not self:
            self.join(2 * RENEW_S)


def _event(name: str, **said: Any) -> dict[str, Any]:
    return {"time": time.time(), "event": name, "step": None, **said}


def _wait_for_end(owner: Owner, look: Callable[[], dict[str, Any]], run_dir: str,
                  clock: Callable[[], float], sleep: Callable[[float], None]) -> dict[str, Any]:
    """Return what a last owner said once it may be followed; raises LeaseHeld while it lives."""
    first = said = look()
    end = clock() + TTL_S
    while said.get("state") != "released" and not owner.process_ended:
        if owner.is_here or said.get("beat") != first.get("beat"):
            raise LeaseHeld(
                f"{run_dir}: belongs to the {owner}, which is alive; watch it with python -m "
                f"cluster watch {run_dir}, end it with python -m cluster stop {run_dir}, or choose "
                "another run.dir")
        if clock() >= end:
            break
        sleep(1.0)
        said = look()
    return said
