"""``python -m cluster.ray_job --config C ...``: a job whose supervisor lives on the Ray cluster.

    job (this; may be killed) --> Keeper, a detached actor --> supervise --ray --> ranks
                                  Ray starts it again            it starts again
                                  if its node is lost            if it is killed

The job only watches: it prints what the supervisor prints, hands SIGTERM on, and ends as it does.
When the job is killed, the run goes on; the same job again finds the keeper and watches on.  What
dies with the head continues from the last checkpoint when it is submitted to a new one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from cluster.outcome import Budget
from cluster.ranks import die_with
from cluster.ray_launcher import check_paths, connect, exported, run_key
from cluster.rundir import run_of_arguments
from neurojepa.errors import ClusterError, run_command

KEPT_LINES = 10_000
MAX_DEATHS, DEATHS_S = 5, 600.0  # of the supervisor; see outcome.Budget
ENDED_S = 60.0  # so long a keeper waits for a job that asks how it ended
LOOK_S, ANSWER_S = 0.5, 5.0
CANNOT_START = 126  # as a shell ends then
AWAY_S = 180.0  # Ray brings a keeper back on another node within a minute


class Keeper:
    """Runs a command and runs it again when it is killed.

    Parameters
    ----------
    leave
        Called a while after the command has ended: nobody asks any more.
    """

    def __init__(self, command: list[str], environment: dict[str, str],
                 leave: Callable[[], None]) -> None:
        self._command, self._environment, self._leave = command, environment, leave
        self._id = uuid.uuid4().hex
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._printed = 0
        self._turn = threading.Lock()
        self._asked = 0
        self._status: int | None = None
        self._process: subprocess.Popen[str] | None = None
        threading.Thread(target=self._work, name="keeper", daemon=True).start()

    def command(self) -> list[str]:
        """What it runs."""
        return self._command

    def look(self, seen: int) -> dict[str, Any]:
        """The lines printed since the first ``seen`` ones, and the status once it has ended."""
        status = self._status  # before the lines: behind it comes none
        with self._turn:
            new = min(len(self._lines), max(0, self._printed - seen))
            return {"id": self._id, "printed": self._printed, "status": status,
                    "lines": list(self._lines)[len(self._lines) - new:]}

    def signal(self, signum: int) -> None:
        """Hand a signal on; from then on its death is its end."""
        with self._turn:
            self._asked = signum
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signum)

    def _work(self) -> None:
        budget = Budget(MAX_DEATHS, DEATHS_S)
        while self._status is None:
            try:
                code = self._run()
            except OSError as error:
                self._say(f"the supervisor cannot be started: {error}")
                code = CANNOT_START
            if code < 0 and not self._asked:
                budget.failed(progressed=False)
                if not budget.spent:
                    self._say(f"the supervisor was ended by signal {-code}; starting it again")
                    time.sleep(budget.pause_s)
                    continue
            self._status = code if code >= 0 else 128 - code
        time.sleep(ENDED_S)
        self._leave()

    def _run(self) -> int:
        with self._turn:
            process = self._process = subprocess.Popen(
                self._command, env={**os.environ, **self._environment}, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                start_new_session=True, preexec_fn=partial(_begin, os.getpid(), self._asked))
            if self._asked:  # while it was down
                process.send_signal(self._asked)
        assert process.stdout
        for line in process.stdout:
            self._say(line.rstrip("\n"))
        return process.wait()

    def _say(self, line: str) -> None:
        with self._turn:
            self._lines.append(line)
            self._printed += 1


def _begin(keeper: int, asked: int) -> None:
    """In the child: a signal that is due waits until there is a handler (processes.signals_to)."""
    die_with(keeper)
    if asked:
        signal.pthread_sigmask(signal.SIG_BLOCK, [asked])


def _end_this_actor() -> None:
    import ray

    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def hear(asked: list[int]) -> None:
    """From now on put SIGTERM and SIGINT, as they come, where ``watch`` hands them on."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _signum, _frame: asked.append(signal.SIGTERM))


def watch(keeper: Any, asked: list[int]) -> int:
    """Print what the supervisor prints and return its status; signals in ``asked`` are handed on.

    Raises
    ------
    ClusterError
        The keeper is gone for good.
    """
    import ray

    of, seen, heard_at = "", 0, time.monotonic()
    while True:
        while asked:
            keeper.signal.remote(asked.pop())
        try:
            row = ray.get(keeper.look.remote(seen), timeout=ANSWER_S)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError) as error:
            if time.monotonic() - heard_at > AWAY_S:
                raise ClusterError(
                    f"the supervisor on the cluster does not answer ({type(error).__name__}); "
                    "submit the same job again") from error
            time.sleep(LOOK_S)
            continue
        heard_at = time.monotonic()
        if row["id"] != of and of:  # it began anew, on another node
            seen = 0
        else:
            seen = row["printed"]
            for line in row["lines"]:
                print(line, flush=True)
        of = row["id"]
        if row["status"] is not None:
            return int(row["status"])
        time.sleep(LOOK_S)


def find_or_start(run: str, arguments: list[str]) -> Any:
    """The keeper of a run: the one that is there, or a new one.

    Raises
    ------
    ClusterError
        One is there that supervises something else.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    name = f"keeper-{run_key(run)}"
    command = [sys.executable, "-u", "-m", "cluster", "supervise", "--ray", "--", *arguments]
    there = keeper = _there(name)
    if keeper is None:
        context = ray.get_runtime_context()
        environment = exported() | {"RAY_ADDRESS": context.gcs_address}
        # here and not on a worker, which may be lost or scaled away; elsewhere if here is no more
        place = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=True)
        kind: Any = ray.remote(num_cpus=0, max_restarts=-1)(Keeper)
        keeper = kind.options(
            name=name, lifetime="detached", get_if_exists=True,
            scheduling_strategy=place).remote(command, environment, _end_this_actor)
    # asked in any case: another job may have started it just now
    theirs: list[str] = ray.get(keeper.command.remote(), timeout=AWAY_S)
    if theirs != command:
        raise ClusterError(
            f"{run}: is supervised on this cluster with other arguments "
            f"({' '.join(theirs[theirs.index('--') + 1:])}); give the same, or stop it first: "
            f"python -m cluster stop {run}")
    if there is not None:
        print(f"{run}: watching the supervisor that is on the cluster already", flush=True)
    return keeper


def _there(name: str) -> Any:
    """A keeper whose supervisor has not ended; one that has is put away."""
    import ray

    try:
        keeper = ray.get_actor(name)
        row: Any = ray.get(keeper.look.remote(0), timeout=AWAY_S)
    except (ValueError, ray.exceptions.ActorDiedError):
        return None
    if row["status"] is not None:
        ray.kill(keeper, no_restart=True)
        time.sleep(LOOK_S)  # until its name is free
        return None
    return keeper


def main(argv: list[str] | None = None) -> int:
    """Start or find the supervisor of a run, and watch it to its end."""
    import ray

    arguments = sys.argv[1:] if argv is None else argv
    run_dir, settings = run_of_arguments(arguments)
    check_paths(settings)
    asked: list[int] = []
    hear(asked)  # a job that is stopped while it starts stops the run all the same
    connect()
    hear(asked)  # Ray has taken SIGTERM for itself
    try:
        keeper = find_or_start(run_dir.uri, arguments)
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError) as error:
        raise ClusterError(f"{run_dir.uri}: its supervisor on the cluster does not answer "
                           f"({type(error).__name__}); submit the same job again") from error
    status = watch(keeper, asked)
    ray.kill(keeper, no_restart=True)
    return status


if __name__ == "__main__":
    run_command(main)
