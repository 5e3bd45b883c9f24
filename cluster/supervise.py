"""Keep one run going: start the launcher, watch it, and start it again from the last checkpoint.

    supervise [--hostfile H] -- --config C ...
        -> deepspeed ... neurojepa.pretrain --config C ...      one attempt, in its own session
        -> events.jsonl: started, exit, hang and more (docs/operations.md says what each means)
        -> logs/attempt-K.log: everything the launcher and its ranks printed

The training continues by itself when the same command runs again on the same run directory, so a
restart is just another attempt.  An attempt fails when it exits without having finished, or when
its slowest rank stands still.  Failures in a row without a new committed checkpoint end the
supervision, naming the step; so does a run that diverged or collapsed, which would do it again.
While the run directory's store fails, nobody is called silent and nothing is started.  Ranks are
ended by pid (see processes.py); SIGTERM or Ctrl-C here, or ``cluster stop`` from anywhere, asks
them to commit a checkpoint and stop.

A run has one supervisor: it holds the run directory's lease (neurojepa/storage/lease.py).  One that
is started when the last one died goes on with that one's processes, if it would have started the
same, and ends them otherwise.  A supervisor that lost the lease leaves everything as it is.
"""

from __future__ import annotations

import hashlib
import os
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from cluster.attempt import DeepSpeedLaunch, Progress, ssh_options
from cluster.checkup import Checkups, oom_kills
from cluster.diagnosis import culprits, diagnose, report
from cluster.hosts import NO_CONNECTION, problems
from cluster.incident import incident_of
from cluster.membership import Membership, TooFewHosts
from cluster.outcome import (
    LOG_BYTES,
    Budget,
    Outcome,
    fatal_event,
    last_lines,
    lines_of,
    told,
)
from cluster.processes import same_process
from cluster.room import room
from cluster.rundir import TRAIN_EVENTS, RunDir
from cluster.stragglers import Stragglers
from cluster.world import World
from neurojepa.errors import ClusterError, DataError, LeaseLost
from neurojepa.storage import Patience, append_rows, is_outage, join, no_space, write_bytes
from neurojepa.storage.lease import Keeper, Lease, take
from neurojepa.storage.owners import Owner

REQUEUE = 75  # exit status of a training that stopped on request, to be queued again
REFUSED = 2  # exit status of a command that cannot work as it was given
ROOM_S = 5.0  # between looks for room on a full disk
POLL_S = 0.2


class Launch(Protocol):
    """How an attempt is started; see attempt.DeepSpeedLaunch."""

    def hosts(self) -> list[str]: ...
    def command(self) -> list[str]: ...
    def environment(self, token: str, scratch: Path) -> dict[str, str]: ...


@dataclass
class Supervisor:
    """Supervises one run.

    Parameters
    ----------
    max_restarts, retry_s
        Restarts in a row without a new committed checkpoint, and seconds for which it is tried,
        before giving up: both have to be used up.
    hang_s, start_s
        Seconds without a step that count as a hang: at least ``hang_s`` (and ten median steps)
        while training; ``start_s`` before the first step and after the last one.
    grace_s
        Seconds the ranks get to commit and stop when the supervisor is asked to stop.
    last_step
        ``train.steps``, where known.
    min_hosts, max_hosts
        Of a hostfile: how many have to, and at most may, take part in an attempt.
    store_s
        Seconds for which the run directory's store is asked again when it fails.
    """

    launch: Launch
    run_dir: RunDir
    max_restarts: int = 3
    hang_s: float = 60.0
    start_s: float = 600.0
    grace_s: float = 120.0
    last_step: int | None = None
    store_s: float = 600.0
    retry_s: float = 0.0
    min_hosts: int = 1
    max_hosts: int = 10_000
    _stop_signals: int = field(default=0, init=False)
    _attempts: int = field(default=0, init=False)
    _patience: Patience = field(init=False)
    _lease: Lease | None = field(default=None, init=False)
    _lost: LeaseLost | None = field(default=None, init=False)
    _world: World | None = field(default=None, init=False)
    _left: World | None = field(default=None, init=False)  # of the last owner, not taken over
    _members: Membership | None = field(default=None, init=False)
    _checkups: Checkups = field(default_factory=Checkups, init=False)
    _stragglers: Stragglers = field(default_factory=Stragglers, init=False)
    _current: Launch = field(init=False)  # the launch, without hosts that are left out

    def __post_init__(self) -> None:
        self._current = self.launch
        self._patience = Patience(self.store_s, tell=lambda said: print(
            f"trying again: {said}", flush=True))

    def run(self) -> int:
        """Supervise until the run has finished; returns the status to exit with.

        Raises
        ------
        LeaseHeld, LeaseLost
            The run has another owner.
        ClusterError
            It gave up, or the run is being trained by someone else already.
        """
        self._lease = take(self.run_dir.uri, "supervisor", self._patience, self._adopt)
        keeper = Keeper(self._lease, self._said, self._on_lost, self._on_stop)
        try:
            if self._left is not None:
                self._left.end()
            if self._world is None:
                self._refuse_running()
            with self._stop_on_signal(), tempfile.TemporaryDirectory(
                    prefix="supervise-") as scratch:
                return self._to_end(Path(scratch))
        finally:
            keeper.close()
            if self._lost is None:
                self._lease.release()

    def _to_end(self, scratch: Path) -> int:
        budget, restarts = Budget(self.max_restarts, self.retry_s), 0
        while True:
            self._wait_for_room()
            if self._world is None:
                self._choose_hosts(self.retry_s if restarts else 0.0)
            committed = self._patience(self.run_dir.committed_step)
            if self._stop_signals:
                self._event("stopped", committed, status=REQUEUE)
                return REQUEUE
            outcome = self._attempt(scratch)
            if (status := self._ended(outcome)) is not None:
                return status
            now_committed = self._patience(self.run_dir.committed_step)
            budget.failed(progressed=now_committed != committed)
            # the very first start refused its input: trying again cannot help
            refused = outcome.status == REFUSED and outcome.step is None and restarts == 0
            if budget.spent or refused or outcome.fatal:
                self._event("give_up", outcome.step, failures=budget.failures,
                            status=outcome.status, committed=now_committed, after=outcome.fatal)
                raise ClusterError(outcome.give_up_message(self.run_dir.uri, budget.failures,
                                                           now_committed))
            restarts += 1
            self._event("restart", now_committed, restarts=restarts, failures=budget.failures)
            self._wait(budget.pause_s)

    def _wait_for_room(self) -> None:
        """Where the run's disk is full, say so and wait until it has room, or we shall stop."""
        said = False
        while not self._stop_signals and (found := self._patience(lambda: room(self.run_dir))) \
                and not found.enough:
            if not said:
                print(f"{found}; waiting for it", flush=True)
                self._event("disk_full", None, path=found.path, free_mib=found.free >> 20,
                            need_mib=found.need >> 20)
            said = True
            self._wait(ROOM_S)

    def _choose_hosts(self, wait_s: float) -> None:
        """Look at the hosts and decide where the next attempt runs; none are chosen locally.

        Raises
        ------
        TooFewHosts
            After ``wait_s`` there still are.
        """
        if not isinstance(self.launch, DeepSpeedLaunch) or not self.launch.slots():
            return
        if self._members is None:
            self._members = Membership(
                self.launch.slots(), self.min_hosts, self.max_hosts,
                lambda slots: problems(slots, self.run_dir.local_path, ssh_options(),
                                       self._tell_odd),
                lambda event, host, why: self._event(event, None, host=host, why=why))
        end, said = time.monotonic() + wait_s, False
        while not self._stop_signals:
            try:
                self._current = replace(self.launch, without=self._members.choose())
                return
            except TooFewHosts as error:
                if time.monotonic() >= end:
                    raise
                if not said:
                    print(f"waiting for hosts: {error}", flush=True)
                said = True
                self._wait(ROOM_S)

    def _tell_odd(self, measured: dict[str, dict[str, Any]]) -> None:
        for host, why in self._checkups.new(measured):
            self._event("host_odd", None, host=host, why=why)

    # ---- owning the run --------------------------------------------------------------------------

    def _adopt(self, last: Owner, said: dict[str, Any]) -> bool:
        """Go on with the processes that the last owner left; others are ended once we own the run.
        """
        attempt = str(said.get("attempt", ""))
        if not attempt.isalnum():  # it is part of a remote command line
            return False
        world = World(attempt, int(said.get("number", 0)),
                      [str(host) for host in said.get("hosts", []) if host in self.launch.hosts()])
        if not world.somewhere():
            return False
        if last.kind == "supervisor" and said.get("launch") == self._fingerprint():
            print(f"going on with attempt {world.number} of the {last}", flush=True)
            self._world = world
            return True
        print(f"ending attempt {world.number} of the {last}, which was started otherwise",
              flush=True)
        self._left = world
        return False

    def _fingerprint(self) -> str:
        """What is started; not in words, which may be long or name what others need not read."""
        return hashlib.sha256(repr(self.launch).encode()).hexdigest()[:16]

    def _said(self) -> dict[str, Any]:
        """What other machines need to know about the current attempt."""
        world = self._world
        return {"attempt": world.token, "number": world.number, "hosts": world.hosts,
                "launch": self._fingerprint()} if world else {}

    def _on_lost(self, error: LeaseLost) -> None:
        self._lost = error
        self._patience.close()

    def _on_stop(self, how: str) -> None:
        self._stop_signals = max(self._stop_signals, 2 if how == "now" else 1)
        self._patience.close()

    # ---- one attempt -----------------------------------------------------------------------------

    def _attempt(self, scratch: Path) -> Outcome:
        """Start the launcher (or take up an adopted attempt), watch it to its end, and leave no
        process of it behind."""
        world = self._world
        before = self._patience(self.run_dir.heartbeats)
        log: Path | None = None
        if world is None:
            number = self._patience(self.run_dir.next_attempt)
            world = World(uuid.uuid4().hex, number, self._current.hosts())
            local = self.run_dir.local_path
            log = (Path(local) / "logs" if local else scratch) / f"attempt-{number}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            self._start(world, log, scratch)
        else:
            before = []
        self._attempts += 1
        progress, killed = Progress(before, self.last_step), oom_kills() or 0
        try:
            hung = self._watch(world, progress)
        except LeaseLost as error:  # a write has met it before the keeper looked
            self._lost = error
            raise
        finally:
            if self._lost is None:
                world.end()
        if self.run_dir.local_path is None and log is not None:
            data = log.read_bytes()
            self._patience(lambda: write_bytes(join(self.run_dir.uri, "logs", log.name), data))
        progress.update(self._patience(self.run_dir.heartbeats))
        status = self._status(world)
        outcome = Outcome(status, progress.step, progress.beats,
                          last_lines(log) if log else self._logged(world.number), hung,
                          fatal_event(self._patience(self.run_dir.events)))
        self._world = None
        self._event("exit", outcome.step, attempt=world.number, status=outcome.status, hung=hung,
                    **self._incident(outcome, world.number, (oom_kills() or 0) - killed),
                    ranks=[vars(beat) for beat in outcome.heartbeats], log=outcome.log_lines)
        return outcome

    def _incident(self, outcome: Outcome, number: int, killed: int) -> dict[str, str]:
        """Write the report of an attempt that failed; its name and the likely cause."""
        if outcome.status in (0, REQUEUE) or self._stop_signals:
            return {}
        found = incident_of(self._patience(self.run_dir.events), outcome, number, killed)
        name = f"logs/incident-{number}.md"
        self._write(name, lambda: write_bytes(join(self.run_dir.uri, name),
                                              found.report().encode()))
        return {"cause": found.cause, "report": name}

    def _start(self, world: World, log: Path, scratch: Path) -> None:
        assert self._lease is not None
        lease = self._lease
        if self._attempts:  # what hosts that could not be reached still run writes no more
            self._patience(lease.advance)
        self._event("started", self._patience(self.run_dir.committed_step), attempt=world.number,
                    **({"hosts": world.hosts} if world.hosts else {}))
        self._world = world
        self._patience(lambda: lease.renew_by(self._said))  # its ranks look for it
        with log.open("wb") as file:
            world.start(self._current.command(), self._current.environment(world.token, scratch),
                        file)

    def _watch(self, world: World, progress: Progress) -> bool:
        """Wait for the attempt's end; True if it was ended here because it hung."""
        look_every_s = min(5.0, self.hang_s / 6)
        asked_at = looked_at = 0.0
        self._stragglers = Stragglers()
        world.watch_hosts()
        while world.alive():
            now = time.monotonic()
            if self._lost is not None:
                raise self._lost
            if gone := world.gone_hosts():
                self._event("host_lost", progress.step, hosts=gone)
                return False
            if self._stop_signals and not asked_at:
                world.signal(signal.SIGTERM)
                asked_at = now
            if asked_at and (self._stop_signals > 1 or now - asked_at > self.grace_s):
                return False
            if now - looked_at > look_every_s:
                looked_at = now
                self._look(progress)
                self._name_stragglers(progress)
                limit_s = progress.limit_s(self.hang_s, self.start_s)
                if not asked_at and progress.silent_s > limit_s:
                    self._report_hang(world, progress, limit_s)
                    return True
            time.sleep(POLL_S)
        return False

    def _status(self, world: World) -> int:
        """How an attempt ended; of an adopted one only what its training said."""
        if world.status is not None:
            return world.status
        return {"finish": 0, "stop": REQUEUE}.get(told(self._patience(self.run_dir.events)), 1)

    def _logged(self, number: int) -> list[str]:
        data = self._patience(lambda: self.run_dir.read(f"logs/attempt-{number}.log", LOG_BYTES))
        return lines_of(data or b"")

    def _look(self, progress: Progress) -> None:
        """Read the heartbeats; where that fails, silence says nothing about the ranks."""
        try:
            if progress.update(self.run_dir.heartbeats()):
                print(f"step {progress.step}", flush=True)
        except DataError as error:
            if not is_outage(error):
                raise
            progress.changed_at = time.monotonic()
            print(f"the run directory does not answer: {error}", flush=True)

    def _report_hang(self, world: World, progress: Progress, limit_s: float) -> None:
        """Say which ranks stand still, and where, before they are ended."""
        states = diagnose(world.token, world.hosts)
        guilty, why = culprits(states, progress.beats, progress.ranks_silent_s())
        text = report(states, guilty, why)
        print(text, flush=True)
        name = f"logs/attempt-{world.number}.stacks.txt"
        self._write(name, lambda: write_bytes(join(self.run_dir.uri, name), text.encode()))
        by_rank = {item.rank: item.state for item in states}
        self._event("hang", progress.step, silent_s=round(progress.silent_s, 1),
                    limit_s=round(limit_s, 1), culprits=guilty, why=why, stacks=name,
                    ranks=[{**vars(beat), "state": by_rank.get(beat.rank)}
                           for beat in progress.beats])

    def _name_stragglers(self, progress: Progress) -> None:
        """Say once of each rank that it slows down all others."""
        for slow in self._stragglers.new(progress.beats):
            self._event("straggler", progress.step, **vars(slow))

    def _ended(self, outcome: Outcome) -> int | None:
        """The status to exit with if the supervision is over without a failure."""
        events = self._patience(self.run_dir.events)
        trained, last = [row for row in events if row["event"] in TRAIN_EVENTS], told(events)
        # after a flap of the network pdsh says 255 to whatever its ranks did
        stopped = outcome.status == REQUEUE or (outcome.status == NO_CONNECTION and last == "stop")
        if last == "finish" or (outcome.status == 0 and trained
                                and trained[-1]["event"] == "finish"):
            self._event("finished", outcome.step)
            return 0
        # asked to stop before they could listen, ranks just end: the last checkpoint is good
        if stopped or self._stop_signals:
            self._event("stopped", outcome.step, status=outcome.status)
            return REQUEUE
        return None

    def _refuse_running(self) -> None:
        """Two trainings in one run directory would overwrite each other's checkpoints."""
        host = os.uname().nodename
        for beat in self._patience(self.run_dir.heartbeats):
            if beat.host == host and same_process(beat.pid, beat.time):
                raise ClusterError(f"{self.run_dir.uri}: rank {beat.rank} is being trained by "
                                   f"process {beat.pid} already; stop that first")

    def _event(self, event: str, step: int | None, **fields: Any) -> None:
        """Add a row to events.jsonl."""
        row = {"time": time.time(), "event": event, "step": step, "by": "supervisor", **fields}
        uri = join(self.run_dir.uri, "events.jsonl")
        append = self._lease.append if self._lease else append_rows
        self._write(f"the event {event}", lambda: append(uri, [row]))
        shown = {key: value for key, value in fields.items() if key not in ("ranks", "log")}
        print(f"{event} at step {step} {shown}", flush=True)

    def _write(self, what: str, write: Callable[[], None]) -> None:
        """Write what must not be lost: where the disk is full, wait for room."""
        while True:
            try:
                self._patience(write)
                return
            except DataError as error:
                if not no_space(error) or self._stop_signals > 1:
                    raise
                print(f"cannot write {what}: {error}", flush=True)
                time.sleep(ROOM_S)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._stop_signals:
            time.sleep(POLL_S)

    @contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        def count(_signum: int, _frame: object) -> None:
            self._stop_signals += 1
            self._patience.close()

        before = {number: signal.signal(number, count)
                  for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
