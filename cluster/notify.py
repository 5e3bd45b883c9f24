"""Tells somebody when a supervised run needs them: a webhook, a command, or both.

A thread follows events.jsonl, where training and supervisor write, and another one delivers.  So
nothing here holds up the run, however slow or dead the other side is.  What is told is in ``TOLD``
and, of a run that commits nothing, ``old_checkpoint``.  Of each kind one message comes at once, and
what follows within ten minutes comes together.

The URL of a webhook is a secret: it is read from a file, appears in no command line, environment,
log or message.  The command gets its message on standard input and is started without a shell.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.follow import Follower, Rows
from cluster.rundir import RunDir
from neurojepa.errors import ConfigError, NeurojepaError
from neurojepa.storage import join

TOLD = {
    "stopped": "has stopped", "give_up": "has been given up", "hang": "stands still",
    "host_excluded": "goes on without a host", "host_lost": "has lost a host",
    "skip": "has dropped a step", "rollback": "went back to a checkpoint",
    "collapse": "has collapsed", "diverged": "has diverged",
    "disk_full": "waits for room on a disk", "no_room": "waits for room on the cluster"}
HIDDEN = ("ranks", "log", "event", "step", "time", "by")  # long, or told otherwise
LOOK_S = 5.0
QUIET_S = 600.0  # between two messages of a kind
OLD_CHECKPOINT_S = 7200.0  # as in alerts.yaml
TRIES_S = (2.0, 10.0, 60.0)  # pauses before a message is sent again
TIMEOUT_S = 10.0  # of a request
COMMAND_S = 30.0  # that a command may take
CLOSE_S = 15.0  # at the end, for what is still to be told

Message = dict[str, Any]
Target = Callable[[Message], str]  # delivers; returns what went wrong, or nothing


# ---- targets -------------------------------------------------------------------------------------

def webhook(file: str) -> Target:
    """POSTs messages as JSON to the URL in a file.

    Raises
    ------
    ConfigError
        The file cannot be read, or what it holds is no http(s) URL.
    """
    try:
        url = Path(file).read_text().strip()
        parts = urllib.parse.urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) \
            and parts.port != 0 and url.isascii()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--notify-url-file {file}: cannot be read ({error}); write the "
                          "webhook's URL into it") from error
    except ValueError:
        is_url = False
    if not is_url or any(character.isspace() for character in url):
        raise ConfigError(f"--notify-url-file {file}: holds no http:// or https:// URL; write the "
                          "webhook's URL into it, and nothing else")
    opener = urllib.request.build_opener(_NoRedirect)

    def post(message: Message) -> str:
        request = urllib.request.Request(url, json.dumps(message).encode(), method="POST",
                                         headers={"Content-Type": "application/json"})
        try:
            with opener.open(request, timeout=TIMEOUT_S):
                return ""
        except urllib.error.HTTPError as error:
            return f"the webhook answers {error.code}"
        # what is no HTTP is no OSError; of the reason alone: other texts may have the URL in them
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            return f"the webhook cannot be reached ({type(reason).__name__})"

    return post


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A message goes where it was meant to go, or nowhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


def command(line: str) -> Target:
    """Runs a command for each message, which it gets on standard input as JSON.

    Its output is not kept: it may hold what is secret.

    Raises
    ------
    ConfigError
        There is no such command.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise ConfigError(f"--notify-command {line}: {error}; quote it as in a shell") from error
    if not words or shutil.which(words[0]) is None:
        raise ConfigError(f"--notify-command {line}: there is no such command; give the path of "
                          "one that may be executed, and its arguments")

    def start(message: Message) -> str:
        try:
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            return f"{words[0]} cannot be started ({error.strerror})"
        with process:
            try:
                process.communicate(json.dumps(message).encode(), timeout=COMMAND_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
                return f"{words[0]} took longer than {COMMAND_S:.0f} s"
        return f"{words[0]} ended with status {process.returncode}" if process.returncode else ""

    return start


# ---- what is told --------------------------------------------------------------------------------

@dataclass
class Digest:
    """Turns rows of events into messages, few of each kind."""

    run: str
    clock: Callable[[], float] = time.time
    _checkpoint: float = field(init=False)
    _sent: dict[str, float] = field(default_factory=dict)
    _held: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._checkpoint = self.clock()

    def messages(self, rows: Sequence[dict[str, Any]], last: bool = False) -> list[Message]:
        """What is to be told now, of new rows and of what was held back; ``last``: all of it."""
        now = self.clock()
        for row in rows:
            if row.get("event") == "checkpoint":
                self._checkpoint = now
            elif (kind := str(row.get("event"))) in TOLD:
                self._hold(kind, row)
        if not last and now - self._checkpoint > OLD_CHECKPOINT_S:
            age_s, self._checkpoint = now - self._checkpoint, now
            self._hold("old_checkpoint", {"time": now, "step": None, "age_s": round(age_s)})
        due = [kind for kind in self._held
               if last or now - self._sent.get(kind, -QUIET_S) >= QUIET_S]
        return [self._message(kind, now) for kind in due]

    def _hold(self, kind: str, row: dict[str, Any]) -> None:
        self._held[kind] = (self._held.get(kind, (0, {}))[0] + 1, row)

    def _message(self, kind: str, now: float) -> Message:
        count, row = self._held.pop(kind)
        self._sent[kind] = now
        facts = {key: value for key, value in row.items() if key not in HIDDEN}
        what = TOLD.get(kind, "has committed no checkpoint for two hours")
        step = "" if row.get("step") is None else f" at step {row['step']}"
        often = f" ({count} times)" if count > 1 else ""
        told = ", ".join(f"{key} {value}" for key, value in facts.items()
                         if value not in (None, ""))
        return {"text": f"{self.run} {what}{step}{often}" + (f": {told}" if told else ""),
                "run": self.run, "kind": kind, "time": row.get("time"), "step": row.get("step"),
                "count": count, "facts": facts}


# ---- telling -------------------------------------------------------------------------------------

@contextmanager
def notifying(run_dir: RunDir, targets: Sequence[Target]) -> Iterator[None]:
    """Tell ``targets`` about a run while it is supervised, and what happened last at its end."""
    if not targets:
        yield
        return
    notifier = Notifier(run_dir, targets)
    try:
        yield
    finally:
        notifier.close()


class Notifier:
    """Follows a run's events, from those that come now on, and has messages delivered."""

    def __init__(self, run_dir: RunDir, targets: Sequence[Target]) -> None:
        self._digest = Digest(run_dir.uri)
        self._rows, self._problem = Rows(), ""
        self._follower = Follower(join(run_dir.uri, "events.jsonl"), self._rows, threading.Lock())
        self._known: list[dict[str, Any]] | None = None  # of those there at first, none is told
        self._read()
        self._ended = threading.Event()
        self._queues = [queue.SimpleQueue[Message | None]() for _ in targets]
        self._senders = [threading.Thread(target=self._send, args=pair, daemon=True)
                         for pair in zip(targets, self._queues, strict=True)]
        self._thread = threading.Thread(target=self._work, name="notify", daemon=True)
        for thread in (*self._senders, self._thread):
            thread.start()

    def close(self) -> None:
        """Tell what is left, for a few seconds."""
        self._ended.set()
        end = time.monotonic() + CLOSE_S
        for thread in (self._thread, *self._senders):
            thread.join(max(0.0, end - time.monotonic()))

    def _work(self) -> None:
        while True:
            ended = self._ended.wait(LOOK_S)
            if self._read() or ended:
                for message in self._digest.messages(self._new_rows(), last=ended):
                    for waiting in self._queues:
                        waiting.put(message)
            if ended:
                for waiting in self._queues:
                    waiting.put(None)
                return

    def _read(self) -> bool:
        """Whether the events could be read; if not, this is said once."""
        try:
            self._follower.refresh()
        except NeurojepaError as error:
            self._say(str(error))
            return False
        if self._known is None:
            self._known = list(self._rows.rows)
        return True

    def _new_rows(self) -> list[dict[str, Any]]:
        """What has come since; a file that was cut or written anew may begin as it did before."""
        rows, known = self._rows.rows, self._known or []
        same = next((at for at, (row, before) in enumerate(zip(rows, known, strict=False))
                     if row is not before and row != before), min(len(rows), len(known)))
        if len(rows) > same:  # else it may be away for a moment
            self._known = list(rows)
        return rows[same:]

    def _send(self, target: Target, waiting: queue.SimpleQueue[Message | None]) -> None:
        while (message := waiting.get()) is not None:
            for pause_s in (*TRIES_S, None):
                if not (problem := target(message)):
                    break
                if pause_s is None:
                    print(f"could not tell {message['kind']}: {problem}", file=sys.stderr,
                          flush=True)
                else:
                    self._ended.wait(pause_s)

    def _say(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            print(f"notification: {problem}", file=sys.stderr, flush=True)
