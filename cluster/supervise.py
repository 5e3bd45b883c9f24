"""Keep one run going: start the launcher, watch it, and start it again from the last checkpoint.

    supervise [--hostfile H] -- --config C ...
        -> deepspeed ... neurojepa.pretrain --config C ...      one attempt, in its own session
        -> events.jsonl: started, hang, exit, restart, give_up, stopped, finished
        -> logs/attempt-K.log: everything the launcher and its ranks printed

The training continues by itself when the same command runs again on the same run directory, so a
restart is just another attempt.  An attempt fails when it exits without having finished, or when
its slowest rank stands still.  Failures in a row without a new committed checkpoint end the
supervision, naming the step; so does a run that diverged or collapsed, which would do it again.
While the run directory's store fails, nobody is called silent and nothing is started.  Ranks are
ended by pid (see processes.py); SIGTERM or Ctrl-C here asks them to commit a checkpoint and stop.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from cluster.attempt import Progress, ssh_options
from cluster.processes import members, ranks, same_process, send, send_remote
from cluster.rundir import TRAIN_EVENTS, Heartbeat, RunDir
from neurojepa.errors import ClusterError, DataError
from neurojepa.storage import Patience, append_rows, is_outage, join, write_bytes

REQUEUE = 75  # exit status of a training that stopped on request, to be queued again
REFUSED = 2  # exit status of a command that cannot work as it was given
CLEANUP_S = 20.0  # DeepSpeed's launchers exit 1 to 3 s after their ranks
POLL_S = 0.2
LOG_LINES = 20
FATAL = ("diverged", "collapse")  # last events of trainings that cannot go on


class Launch(Protocol):
    """How an attempt is started; see attempt.DeepSpeedLaunch."""

    def hosts(self) -> list[str]: ...
    def command(self) -> list[str]: ...
    def environment(self, token: str, scratch: Path) -> dict[str, str]: ...


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: the launcher's status and the step its slowest rank had reached."""

    status: int
    step: int | None
    heartbeats: list[Heartbeat]
    log_lines: list[str]
    hung: bool
    fatal: str | None  # the event with which the training said that it cannot go on


@dataclass
class Supervisor:
    """Supervises one run.

    Parameters
    ----------
    max_restarts
        Restarts in a row without a new committed checkpoint before giving up.
    hang_s, start_s
        Seconds without a step that count as a hang: at least ``hang_s`` (and ten median steps)
        while training; ``start_s`` before the first step and after the last one.
    grace_s
        Seconds the ranks get to commit and stop when the supervisor is asked to stop.
    last_step
        ``train.steps``, where known.
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
    _stop_signals: int = field(default=0, init=False)
    _patience: Patience = field(init=False)

    def __post_init__(self) -> None:
        self._patience = Patience(self.store_s, tell=lambda said: print(
            f"trying again: {said}", flush=True))

    def run(self) -> int:
        """Supervise until the run has finished; returns the status to exit with.

        Raises
        ------
        ClusterError
            It gave up, or the run is being trained by someone else already.
        """
        self._refuse_running()
        failures = restarts = 0
        with self._stop_on_signal(), tempfile.TemporaryDirectory(prefix="supervise-") as scratch:
            while True:
                committed = self._patience(self.run_dir.committed_step)
                outcome = self._attempt(self._next_attempt(), Path(scratch))
                if (status := self._ended(outcome)) is not None:
                    return status
                now_committed = self._patience(self.run_dir.committed_step)
                failures = failures + 1 if now_committed == committed else 1
                # the very first start refused its input: trying again cannot help
                refused = outcome.status == REFUSED and outcome.step is None and restarts == 0
                if failures > self.max_restarts or refused or outcome.fatal:
                    self._give_up(outcome, failures, now_committed)
                restarts += 1
                self._event("restart", now_committed, restarts=restarts, failures=failures)
                self._wait(min(60.0, 2.0 ** (failures - 1)))
                if self._stop_signals:
                    self._event("stopped", now_committed, status=REQUEUE)
                    return REQUEUE

    def _attempt(self, number: int, scratch: Path) -> Outcome:
        """Start the launcher, watch it to its end, and leave no process of it behind."""
        token = uuid.uuid4().hex
        log = self._log_path(number, scratch)
        progress = Progress(self._patience(self.run_dir.heartbeats), self.last_step)
        self._event("started", self._patience(self.run_dir.committed_step), attempt=number)
        with log.open("wb") as file:
            process = subprocess.Popen(
                self.launch.command(), env=self.launch.environment(token, scratch),
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True)
        try:
            hung = self._watch(process, token, progress)
        finally:
            self._end(process, token)
        if self.run_dir.local_path is None:
            self._patience(lambda: write_bytes(
                join(self.run_dir.uri, "logs", log.name), log.read_bytes()))
        progress.update(self._patience(self.run_dir.heartbeats))
        outcome = Outcome(_status(process.returncode), progress.step, progress.beats,
                          _last_lines(log), hung, self._fatal_event())
        self._event("exit", outcome.step, attempt=number, status=outcome.status, hung=hung,
                    ranks=[vars(beat) for beat in outcome.heartbeats], log=outcome.log_lines)
        return outcome

    def _watch(self, process: subprocess.Popen[bytes], token: str, progress: Progress) -> bool:
        """Wait for the launcher's end; True if it was ended here because it hung."""
        look_every_s = min(5.0, self.hang_s / 6)
        asked_at = looked_at = 0.0
        while process.poll() is None:
            now = time.monotonic()
            if self._stop_signals and not asked_at:
                self._signal(token, signal.SIGTERM)
                asked_at = now
            if asked_at and (self._stop_signals > 1 or now - asked_at > self.grace_s):
                return False
            if now - looked_at > look_every_s:
                looked_at = now
                self._look(progress)
                limit_s = progress.limit_s(self.hang_s, self.start_s)
                if not asked_at and progress.silent_s > limit_s:
                    self._report_hang(token, progress, limit_s)
                    return True
            time.sleep(POLL_S)
        return False

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

    def _fatal_event(self) -> str | None:
        """The training's last event of this attempt, if it says that it cannot go on."""
        for row in reversed(self._patience(self.run_dir.events)):
            if row["event"] == "started" or row.get("by") != "supervisor":
                return row["event"] if row["event"] in FATAL else None
        return None

    def _report_hang(self, token: str, progress: Progress, limit_s: float) -> None:
        """Say which ranks stand still; their states are read before they are ended."""
        states = {}
        for process in ranks(token):
            try:
                states[process.pid] = process.status()
            except psutil.NoSuchProcess:
                continue
        self._end_ranks(token)  # the event is written when no rank can write one at the same time
        self._event("hang", progress.step, silent_s=round(progress.silent_s, 1),
                    limit_s=round(limit_s, 1),
                    ranks=[{**vars(beat), "state": states.get(beat.pid)}
                           for beat in progress.beats])

    def _end(self, process: subprocess.Popen[bytes], token: str) -> None:
        """End what is left of an attempt: its ranks, then, if it lingers, its launcher."""
        self._end_ranks(token)
        try:
            process.wait(CLEANUP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        left = members(token)
        send(left, signal.SIGKILL)
        _, alive = psutil.wait_procs(left, timeout=CLEANUP_S)
        if alive:
            raise ClusterError(f"processes {[item.pid for item in alive]} of the attempt do not "
                               "end on SIGKILL; check the machine's devices and storage")

    def _end_ranks(self, token: str) -> None:
        self._signal(token, signal.SIGKILL)

    def _signal(self, token: str, signum: int) -> None:
        send(ranks(token), signum)
        hosts = self.launch.hosts()
        unreached = send_remote(hosts, token, signum, ssh_options()) if hosts else []
        if unreached:
            print(f"cannot reach by ssh: {', '.join(unreached)}", flush=True)

    def _ended(self, outcome: Outcome) -> int | None:
        """The status to exit with if the supervision is over without a failure."""
        trained = [row["event"] for row in self._patience(self.run_dir.events)
                   if row["event"] in TRAIN_EVENTS]
        if outcome.status == 0 and trained and trained[-1] == "finish":
            self._event("finished", outcome.step)
            return 0
        # asked to stop before they could listen, ranks just end: the last checkpoint is good
        if outcome.status == REQUEUE or self._stop_signals:
            self._event("stopped", outcome.step, status=outcome.status)
            return REQUEUE
        return None

    def _give_up(self, outcome: Outcome, failures: int, committed: int | None) -> None:
        step = "its start" if outcome.step is None else f"step {outcome.step}"
        last = "no checkpoint yet" if committed is None else f"last checkpoint: step {committed}"
        how = "hung" if outcome.hung else f"status {outcome.status}"
        self._event("give_up", outcome.step, failures=failures, status=outcome.status,
                    committed=committed, after=outcome.fatal)
        cause = next((line for line in reversed(outcome.log_lines) if "rror" in line), "")
        if outcome.fatal:
            raise ClusterError(f"{self.run_dir.uri}: gave up: the training ended with the event "
                               f"{outcome.fatal} at {step}, to which a restart would lead again "
                               f"({last}). {cause}".rstrip())
        raise ClusterError(f"{self.run_dir.uri}: gave up after {failures} failure(s) in a row "
                           f"at {step} ({how}; {last}); see logs/ there. {cause}".rstrip())

    def _refuse_running(self) -> None:
        """Two trainings in one run directory would overwrite each other's checkpoints."""
        host = os.uname().nodename
        for beat in self._patience(self.run_dir.heartbeats):
            if beat.host == host and same_process(beat.pid, beat.time):
                raise ClusterError(f"{self.run_dir.uri}: rank {beat.rank} is being trained by "
                                   f"process {beat.pid} already; stop that first")

    def _next_attempt(self) -> int:
        numbers = [name[len("attempt-"):-len(".log")]
                   for name in self._patience(lambda: self.run_dir.names("logs"))
                   if name.startswith("attempt-") and name.endswith(".log")]
        return 1 + max((int(number) for number in numbers if number.isdigit()), default=0)

    def _log_path(self, number: int, scratch: Path) -> Path:
        local = self.run_dir.local_path
        path = (Path(local) / "logs" if local else scratch) / f"attempt-{number}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _event(self, event: str, step: int | None, **fields: Any) -> None:
        """Add a row to events.jsonl; called only while no rank is alive to write there too."""
        row = {"time": time.time(), "event": event, "step": step, "by": "supervisor", **fields}
        self._patience(lambda: append_rows(join(self.run_dir.uri, "events.jsonl"), [row]))
        shown = {key: value for key, value in fields.items() if key not in ("ranks", "log")}
        print(f"{event} at step {step} {shown}", flush=True)

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


def _status(returncode: int) -> int:
    """An exit status as a shell shows it: 128 + N for a process ended by signal N."""
    return 128 - returncode if returncode < 0 else returncode


def _last_lines(log: Path) -> list[str]:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16_384))
        text = file.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-LOG_LINES:]
