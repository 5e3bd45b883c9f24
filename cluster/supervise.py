"""Keep one run going: start its ranks, watch them, and start them again from the last checkpoint.

    supervise [--hostfile H] -- --config C ...
        -> an agent per host -> python -m neurojepa.pretrain --config C ...   one attempt
        -> events.jsonl: started, exit, hang and more (docs/operations.md says what each means)
        -> logs/attempt-K.log: everything the ranks printed;  heartbeat/ranks.json: what they do

All decisions are here; what starts and reaches the ranks is a launcher (launcher.py).  The same
command on the same run directory continues a training, so a restart is just another attempt.  An
attempt fails when a rank exits without having finished, when its slowest rank stands still, or when
a host is gone.  Failures in a row without a new committed checkpoint end the supervision, naming
the step; so does a run that diverged or collapsed, which would do it again.  While the run
directory's store fails, nothing is started.  SIGTERM or Ctrl-C here, or ``cluster stop`` from
anywhere, asks the ranks to commit a checkpoint and stop.

A run has one supervisor: it holds the run directory's lease (neurojepa/storage/lease.py).  One that
is started when the last one died goes on with that one's ranks, if it would have started the same,
and ends them otherwise.  A supervisor that lost the lease leaves everything as it is.
"""

from __future__ import annotations

import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from cluster.board import Board
from cluster.checkup import Checkups, oom_kills
from cluster.diagnosis import culprits, report
from cluster.journal import Journal
from cluster.launcher import Attempt, Launcher, World
from cluster.membership import Membership
from cluster.outcome import (
    Budget,
    GaveUp,
    Outcome,
    fatal_event,
    last_lines,
    status_of,
    told,
    unended,
)
from cluster.processes import refuse_running, signals_to
from cluster.progress import Progress
from cluster.room import room
from cluster.rundir import TRAIN_EVENTS, RunDir
from cluster.stragglers import Stragglers
from neurojepa.errors import ClusterError, ConfigError, LeaseLost
from neurojepa.storage import Patience
from neurojepa.storage.lease import Keeper, Lease, take
from neurojepa.storage.owners import Owner

REQUEUE = 75  # exit status of a training that stopped on request, to be queued again
REFUSED = 2  # exit status of a command that cannot work as it was given
ROOM_S = 5.0  # between looks for room on a full disk, or for hosts
PEERS_S = 5.0  # the peers of a rank that failed notice by themselves in well under a second
POLL_S = 0.2


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
        For so long the run directory's store is asked again when it fails.
    """

    launcher: Launcher
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
    _journal: Journal = field(init=False)
    _lease: Lease | None = field(default=None, init=False)
    _lost: LeaseLost | None = field(default=None, init=False)
    _attempt: Attempt | None = field(default=None, init=False)  # that runs, or is to be adopted
    _left: Attempt | None = field(default=None, init=False)  # of the last owner, to be ended
    _members: Membership | None = field(default=None, init=False)
    _checkups: Checkups = field(default_factory=Checkups, init=False)
    _slots: dict[str, int] = field(default_factory=dict, init=False)  # of the next attempt

    def __post_init__(self) -> None:
        self._patience = Patience(
            self.store_s, lambda said: print(f"trying again: {said}", flush=True))
        self._journal = Journal(self.run_dir, self._patience, lambda: self._stop_signals > 1)

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
        self._journal.lease = self._lease
        keeper = Keeper(self._lease, self._said, self._on_lost, self._on_stop)
        try:
            with signals_to(self._on_signal), tempfile.TemporaryDirectory(
                    prefix="supervise-") as scratch:
                if self._left is not None:
                    with self._telling(), Path(scratch, "left.log").open("ab", 0) as log:
                        self.launcher.adopt(self._left, log).end()
                if self._attempt is None:
                    refuse_running(self.run_dir.uri, self._patience(self.run_dir.heartbeats))
                with self._telling():
                    return self._to_end(Path(scratch))
        finally:
            keeper.close()
            self.launcher.close()
            if self._lost is None:
                self._lease.release()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Whatever ends the supervision is an event, too."""
        try:
            yield
        except LeaseLost:
            raise
        except (ClusterError, ConfigError) as error:
            told = error if isinstance(error, GaveUp) else GaveUp("", why=str(error))
            self._journal.event("give_up", told.step, **told.facts)
            raise

    def _to_end(self, scratch: Path) -> int:
        budget, restarts = Budget(self.max_restarts, self.retry_s), 0
        while True:
            self._wait_for_room()
            if self._attempt is None:
                self._choose_hosts(self.retry_s if restarts else 0.0)
                self._wait_for_launcher()
            committed = self._patience(self.run_dir.committed_step)
            if self._stop_signals:
                self._journal.event("stopped", committed, status=REQUEUE)
                return REQUEUE
            outcome = self._run_attempt(scratch)
            if (status := self._ended(outcome)) is not None:
                return status
            now_committed = self._patience(self.run_dir.committed_step)
            budget.failed(progressed=now_committed != committed)
            # the very first start refused its input: trying again cannot help
            refused = outcome.status == REFUSED and outcome.step is None and restarts == 0
            if budget.spent or refused or outcome.fatal:
                raise GaveUp(
                    outcome.give_up_message(self.run_dir.uri, budget.failures, now_committed),
                    outcome.step, failures=budget.failures, status=outcome.status,
                    committed=now_committed, after=outcome.fatal)
            restarts += 1
            self._journal.event("restart", now_committed, restarts=restarts,
                                failures=budget.failures)
            self._wait(budget.pause_s)

    def _wait_for_room(self) -> None:
        """Where the run's disk is full, say so and wait until it has room, or we shall stop."""
        said = False
        while not self._stop_signals and (found := self._patience(lambda: room(self.run_dir))) \
                and not found.enough:
            if not said:
                print(f"{found}; waiting for it", flush=True)
                self._journal.event("disk_full", None, path=found.path, free_mib=found.free >> 20,
                            need_mib=found.need >> 20)
            said = True
            self._wait(ROOM_S)

    def _choose_hosts(self, wait_s: float) -> None:
        """Look at the hosts and decide where the next attempt runs, if that is ours to decide.

        Raises
        ------
        TooFewHosts
            After ``wait_s`` there still are.
        """
        if not (slots := self.launcher.slots()):
            return
        if self._members is None:
            self._members = Membership(
                slots, self.min_hosts, self.max_hosts,
                lambda slots: self.launcher.problems(slots, self.run_dir.local_path,
                                                     self._tell_odd),
                lambda event, host, why: self._journal.event(event, None, host=host, why=why))
        self._members.slots = slots  # the file may be another one by now
        chosen = self._members.wait(wait_s, lambda: self._wait(ROOM_S))
        self._slots = {host: slots[host] for host in chosen}

    def _tell_odd(self, measured: dict[str, dict[str, Any]]) -> None:
        for host, why in self._checkups.new(measured):
            self._journal.event("host_odd", None, host=host, why=why)

    def _wait_for_launcher(self) -> None:
        """Where the launcher has no room for the ranks yet, say so and wait for it.

        Raises
        ------
        ClusterError
            There still is none after ``retry_s``.
        """
        end, said = time.monotonic() + self.retry_s, False
        while not self._stop_signals and (lacks := self.launcher.lacks()):
            if not said:
                self._journal.event("no_room", None, lacks=lacks, patience_s=self.retry_s)
            said = True
            if time.monotonic() >= end:
                raise GaveUp(f"{self.run_dir.uri}: gave up after {self.retry_s:.0f} s: {lacks}",
                             lacks=lacks)
            self._wait(ROOM_S)

    # ---- owning the run --------------------------------------------------------------------------

    def _adopt(self, last: Owner, said: dict[str, Any]) -> bool:
        """Go on with the ranks that the last owner left; others are ended once we own the run."""
        token, slots = str(said.get("attempt", "")), self.launcher.slots()
        hosts = [str(host) for host in said.get("hosts", [])]
        attempt = Attempt(token, int(said.get("number", 0)), last.token + 1,
                          [host for host in hosts if host in slots])
        if not token.isalnum() or not self.launcher.is_there(attempt):
            return False
        if last.kind == "supervisor" and attempt.hosts == hosts \
                and said.get("launch") == self.launcher.fingerprint():
            print(f"going on with attempt {attempt.number} of the {last}", flush=True)
            self._attempt = attempt
            return True
        print(f"ending attempt {attempt.number} of the {last}, which was started otherwise "
              "or on hosts that are not in the hostfile any more",
              flush=True)
        self._left = attempt
        return False

    def _said(self) -> dict[str, Any]:
        """What other machines need to know about the current attempt."""
        attempt = self._attempt
        return {"attempt": attempt.token, "number": attempt.number, "hosts": attempt.hosts,
                "launch": self.launcher.fingerprint()} if attempt else {}

    def _on_lost(self, error: LeaseLost) -> None:
        self._lost = error
        self._patience.close()

    def _on_stop(self, how: str) -> None:
        self._stop_signals = max(self._stop_signals, 2 if how == "now" else 1)
        self._patience.close()

    # ---- one attempt -----------------------------------------------------------------------------

    def _run_attempt(self, scratch: Path) -> Outcome:
        """Start the ranks, or go on with adopted ones, and watch them to their end."""
        adopted = self._attempt
        number = adopted.number if adopted else self._patience(self.run_dir.next_attempt)
        local = self.run_dir.local_path
        path = (Path(local) / "logs" if local else scratch) / f"attempt-{number}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        progress, board, killed = Progress(self.last_step), Board(self.run_dir), oom_kills() or 0
        away: list[str] = []
        with path.open("ab", buffering=0) as log:
            world = self.launcher.adopt(adopted, log) if adopted else self._start(number, log)
            self._attempts += 1
            try:
                hung = self._watch(world, progress, board)
            except LeaseLost as error:  # a write has met it before the keeper looked
                self._lost = error
                raise
            finally:
                board.close()
                if self._lost is None:
                    away = world.end()
                else:
                    world.leave()
        if local is None:
            self._journal.file(f"logs/{path.name}", path.read_bytes())
        seen = world.look()
        progress.update(seen.beats)
        status, first = status_of(seen)
        outcome = Outcome(status, progress.step, progress.beats, last_lines(path), hung,
                          fatal_event(self._patience(self.run_dir.events)))
        self._attempt = None
        cause = {} if status in (0, REQUEUE) or self._stop_signals else \
            self._journal.incident(outcome, number, (oom_kills() or 0) - killed, away)
        self._journal.event("exit", outcome.step, attempt=number, token=world.attempt.token,
                            status=status, first=first, hung=hung, away=away, **cause,
                            ranks=[vars(beat) for beat in outcome.heartbeats],
                            log=outcome.log_lines)
        return outcome

    def _start(self, number: int, log: IO[bytes]) -> World:
        assert self._lease is not None
        lease = self._lease
        if self._attempts:  # what hosts that could not be reached still run writes no more
            self._patience(lease.advance)
        attempt = Attempt(uuid.uuid4().hex, number, lease.token, list(self._slots),
                          unended(self._patience(self.run_dir.events)), self._slots)
        self._journal.event("started", self._patience(self.run_dir.committed_step), attempt=number,
                            token=attempt.token,
                            **({"hosts": attempt.hosts} if attempt.hosts else {}))
        self._attempt = attempt
        self._patience(lambda: lease.renew_by(self._said))  # its ranks look for it
        return self.launcher.start(attempt, log)

    def _watch(self, world: World, progress: Progress, board: Board) -> bool:
        """Wait for the attempt's end; True if it is to be ended because it hung."""
        look_every_s = min(5.0, self.hang_s / 6)
        asked_at = looked_at = failed_at = 0.0
        said, stragglers = progress.step, Stragglers()
        while True:
            now, seen = time.monotonic(), world.look()
            if self._lost is not None:
                raise self._lost
            progress.update(seen.beats)
            board.show(seen.beats, world.attempt.token)
            failed = [status for status in seen.statuses.values() if status]
            failed_at = failed_at or (now if failed else 0.0)
            peers_s = self.grace_s if REQUEUE in failed[:1] else PEERS_S
            if 0 < seen.size <= len(seen.statuses) or (failed and now - failed_at > peers_s):
                return False
            if seen.lost:
                self._journal.event("host_lost", progress.step, hosts=seen.lost)
                return False
            if self._stop_signals > 1 or (asked_at and now - asked_at > self.grace_s):
                return False
            if self._stop_signals and not asked_at:
                world.signal(signal.SIGTERM)
                asked_at = now
            if now - looked_at > look_every_s:
                looked_at = now
                if progress.step != said:
                    said = progress.step
                    print(f"step {said}", flush=True)
                for slow in stragglers.new(progress.beats):
                    self._journal.event("straggler", progress.step, **vars(slow))
                limit_s = progress.limit_s(self.hang_s, self.start_s)
                if not asked_at and not failed and progress.silent_s > limit_s:
                    self._report_hang(world, progress, limit_s)
                    return True
            time.sleep(POLL_S)

    def _report_hang(self, world: World, progress: Progress, limit_s: float) -> None:
        """Say which ranks stand still, and where, before they are ended."""
        states = world.states()
        guilty, why = culprits(states, progress.beats, progress.ranks_silent_s())
        text = report(states, guilty, why)
        print(text, flush=True)
        name = f"logs/attempt-{world.attempt.number}.stacks.txt"
        self._journal.file(name, text.encode())
        by_rank = {item.rank: item.state for item in states}
        self._journal.event("hang", progress.step, silent_s=round(progress.silent_s, 1),
                            limit_s=round(limit_s, 1), culprits=guilty, why=why, stacks=name,
                            ranks=[{**vars(beat), "state": by_rank.get(beat.rank)}
                                   for beat in progress.beats])

    def _ended(self, outcome: Outcome) -> int | None:
        """The status to exit with if the supervision is over without a failure."""
        events = self._patience(self.run_dir.events)
        trained, last = [row for row in events if row["event"] in TRAIN_EVENTS], told(events)
        if last == "finish" or (outcome.status == 0 and trained
                                and trained[-1]["event"] == "finish"):
            self._journal.event("finished", outcome.step)
            return 0
        # asked to stop before they could listen, ranks just end: the last checkpoint is good
        if outcome.status == REQUEUE or self._stop_signals:
            self._journal.event("stopped", outcome.step, status=outcome.status)
            return REQUEUE
        return None

    def _wait(self, seconds: float) -> bool:
        """Wait; False as soon as we are to stop."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._stop_signals:
            time.sleep(POLL_S)
        return not self._stop_signals

    def _on_signal(self, _signum: int, _frame: object) -> None:
        self._stop_signals += 1
        self._patience.close()
