"""Who is told what about a run: a real HTTP server and real commands, slow, wrong and dead ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster import __main__ as command
from cluster import notify
from cluster.notify import OLD_CHECKPOINT_S, QUIET_S, TOLD, Digest, Notifier, notifying
from cluster.rundir import RunDir
from neurojepa.errors import ClusterError, ConfigError
from neurojepa.storage import append_rows, drop_rows
from tests.helpers import ROOT
from tests.helpers.servers import serving
from tests.helpers.waiting import wait_until

SECRET = "/hooks/T0KEN-that-nobody-may-see"


class Hook(ThreadingHTTPServer):
    """A webhook's other side: keeps what it gets, answers with ``statuses`` in turn."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.statuses: list[int] = []
        self.answers = threading.Event()
        self.answers.set()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{SECRET}"


class _Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        self.server.answers.wait()
        data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Content-Type"] == "application/json"
        self.server.paths.append(self.path)
        status = self.server.statuses.pop(0) if self.server.statuses else 204
        if status < 300:
            self.server.got.append(data)
        self.send_response(status)
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hook() -> Iterator[Hook]:
    with serving(Hook()) as server:
        yield server


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "LOOK_S", 0.02)
    monkeypatch.setattr(notify, "CLOSE_S", 120.0)
    monkeypatch.setattr(notify, "TRIES_S", (0.02, 0.02, 0.02))


@pytest.fixture
def url_file(tmp_path: Path, hook: Hook) -> str:
    (tmp_path / "url").write_text(hook.url + "\n")
    return str(tmp_path / "url")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that had given up before."""
    found = RunDir(str(tmp_path / "run"))
    event(found, "start", 0)
    event(found, "give_up", 7)
    return found


def event(run: RunDir, name: str, step: int | None, **facts: Any) -> None:
    append_rows(f"{run.uri}/events.jsonl",
                [{"time": time.time(), "event": name, "step": step, **facts}])


# ---- delivery ------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", sorted(TOLD))
def test_each_kind_reaches_the_webhook(run: RunDir, hook: Hook, url_file: str, kind: str) -> None:
    with notifying(run, [notify.webhook(url_file)]):
        event(run, "checkpoint", 8)
        event(run, kind, 9, host="node3", why="no route", log=["a line"], ranks=[{}])
        wait_until(lambda: hook.got)
    (message,) = hook.got  # nothing of what was before, no checkpoint
    assert message["kind"] == kind and message["run"] == run.uri and message["step"] == 9
    assert message["text"] == f"{run.uri} {TOLD[kind]} at step 9: host node3, why no route"
    assert message["facts"] == {"host": "node3", "why": "no route"} and message["count"] == 1
    assert hook.paths == [SECRET]


def test_a_webhook_that_fails_is_asked_again(run: RunDir, hook: Hook, url_file: str) -> None:
    hook.statuses = [500, 503]
    with notifying(run, [notify.webhook(url_file)]):
        event(run, "hang", 9)
        wait_until(lambda: hook.got)
    assert len(hook.paths) == 3 and len(hook.got) == 1


@pytest.mark.parametrize("status", [302, 403, 500])
def test_one_that_goes_on_failing_is_named_without_its_url(
        run: RunDir, hook: Hook, url_file: str, capfd: pytest.CaptureFixture[str],
        status: int) -> None:
    hook.statuses = [status] * 99
    with notifying(run, [notify.webhook(url_file)]):
        event(run, "hang", 9)
        wait_until(lambda: len(hook.paths) == 4)
    said = "".join(capfd.readouterr())
    assert said == f"could not tell hang: the webhook answers {status}\n"
    assert set(hook.paths) == {SECRET}  # not to where it was sent on


def test_one_that_is_dead_is_named_without_its_url(run: RunDir, tmp_path: Path,
                                                   capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dead").write_text(f"http://127.0.0.1:9{SECRET}")
    with notifying(run, [notify.webhook(str(tmp_path / "dead"))]):
        event(run, "hang", 9)
    said = "".join(capfd.readouterr())
    assert said == ("could not tell hang: the webhook cannot be reached "
                    "(ConnectionRefusedError)\n")


def test_one_that_answers_no_http_is_asked_again(run: RunDir, hook: Hook, url_file: str,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    speaks = _Handler.do_POST
    answers = iter([lambda self: self.wfile.write(b"no HTTP\r\n\r\n"), speaks])
    monkeypatch.setattr(_Handler, "do_POST", lambda self: next(answers)(self))
    with notifying(run, [notify.webhook(url_file)]):
        event(run, "hang", 9)
        wait_until(lambda: hook.got)
    assert len(hook.got) == 1


def test_a_slow_webhook_holds_up_neither_the_run_nor_the_command(
        run: RunDir, hook: Hook, url_file: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    hook.answers.clear()
    monkeypatch.setattr(notify, "CLOSE_S", 0.3)
    with notifying(run, [notify.webhook(url_file), notify.command(f"tee {tmp_path}/told")]):
        event(run, "hang", 9)
        wait_until((tmp_path / "told").exists)
    assert not hook.got  # it is over, and the webhook has not answered yet
    hook.answers.set()


def test_what_happens_last_is_told_though_supervision_fails(run: RunDir, hook: Hook,
                                                            url_file: str) -> None:
    with pytest.raises(ClusterError), notifying(run, [notify.webhook(url_file)]):
        event(run, "give_up", 12, failures=4)
        raise ClusterError("gave up")
    assert [message["kind"] for message in hook.got] == ["give_up"]


def test_events_that_cannot_be_read_are_told_of_once(
        run: RunDir, hook: Hook, url_file: str, tmp_path: Path,
        capfd: pytest.CaptureFixture[str]) -> None:
    path = Path(run.uri) / "events.jsonl"
    kept = path.rename(path.with_name("kept"))
    path.symlink_to(tmp_path)  # a folder, and taken away in one step
    notifier = Notifier(run, [notify.webhook(url_file)])
    time.sleep(0.1)
    kept.replace(path)
    wait_until(lambda: notifier._known is not None)  # what comes from now on is told
    event(run, "hang", 9)
    wait_until(lambda: hook.got)
    notifier.close()
    assert "".join(capfd.readouterr()).count("notification:") == 1
    assert [message["kind"] for message in hook.got] == ["hang"]


def test_rows_that_are_cut_off_are_not_missed_and_others_not_told_twice(
        run: RunDir, hook: Hook, url_file: str) -> None:
    path = Path(run.uri) / "events.jsonl"
    with notifying(run, [notify.webhook(url_file)]):
        event(run, "hang", 9)
        wait_until(lambda: len(hook.got) == 1)
        path.rename(path.with_suffix(".away"))  # for a moment
        time.sleep(0.1)
        path.with_suffix(".away").rename(path)
        time.sleep(0.1)
        drop_rows(str(path), lambda row: row["event"] == "start")  # by hand
        time.sleep(0.1)
        event(run, "host_lost", 10)
        wait_until(lambda: len(hook.got) == 2)
    assert [message["kind"] for message in hook.got] == ["hang", "host_lost"]


# ---- a command -----------------------------------------------------------------------------------

def test_a_command_gets_the_event_as_json_and_no_shell_sees_it(run: RunDir, tmp_path: Path) -> None:
    script = tmp_path / "tell me"
    script.write_text(f"#!{sys.executable}\nimport sys\n"
                      f"open({str(tmp_path / 'told')!r}, 'a').write(repr(sys.argv[1:]) + "
                      "sys.stdin.read() + '\\n')\n")
    script.chmod(0o700)
    with notifying(run, [notify.command(f"'{script}' '$(id)' ; echo > {tmp_path}/made")]):
        event(run, "hang", 9, why="`touch x`; $(id)")
        wait_until(lambda: (tmp_path / "told").exists() and (tmp_path / "told").read_text())
    said = (tmp_path / "told").read_text()
    assert said.startswith(str(["$(id)", ";", "echo", ">", f"{tmp_path}/made"]))
    assert json.loads(said[said.index("{"):])["facts"]["why"] == "`touch x`; $(id)"
    assert not (tmp_path / "made").exists()


def test_a_command_that_fails_or_hangs_is_named(run: RunDir, monkeypatch: pytest.MonkeyPatch,
                                                tmp_path: Path) -> None:
    assert notify.command("false")({"kind": "x"}) == "false ended with status 1"
    pids = tmp_path / "pids"
    line = f"sh -c 'sleep 500 & echo $! > {pids}; wait'"
    for limit_s in (0.3, 3.0, 30.0):
        monkeypatch.setattr(notify, "COMMAND_S", limit_s)
        assert notify.command(line)({"kind": "x"}) == f"sh took longer than {limit_s:.0f} s"
        if pids.exists() and pids.read_text():  # a busy machine may have begun too late
            break
    wait_until(lambda: not os.path.exists(f"/proc/{pids.read_text().strip()}"))


# ---- how often -----------------------------------------------------------------------------------

def test_many_of_a_kind_become_few_messages() -> None:
    now = [0.0]
    digest = Digest("run", lambda: now[0])
    skip = {"event": "skip", "time": 1.0, "step": 5, "reason": "loss spike"}
    assert [m["count"] for m in digest.messages([skip] * 3)] == [3]
    assert digest.messages([skip] * 40) == []
    (other,) = digest.messages([{"event": "hang", "time": 1.0, "step": 6}])  # not held up by it
    assert other["kind"] == "hang"
    now[0] += QUIET_S
    (later,) = digest.messages([])
    assert later["count"] == 40 and "at step 5 (40 times): reason loss spike" in later["text"]
    digest.messages([skip])
    assert [m["count"] for m in digest.messages([], last=True)] == [1]


def test_a_run_that_commits_nothing_is_told_of_once_in_two_hours() -> None:
    now = [0.0]
    digest = Digest("run", lambda: now[0])
    told = []
    for minute in range(60 * 7):
        now[0] = 60.0 * minute
        rows = [{"event": "checkpoint", "time": 0.0, "step": 1}] if minute == 100 else []
        told += [(minute, message["kind"]) for message in digest.messages(rows)]
    assert told == [(minute, "old_checkpoint") for minute in (221, 342)]
    assert OLD_CHECKPOINT_S == 7200  # the text and cluster/alerts.yaml say so


# ---- what is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["", "ftp://host/x", "file:///etc/passwd", "not a url", "http://",
                                  "http://host/a b", "http://[::1", "http://a\nhttp://b", "http://host:x/y",
                                  "http://host/\u00e4"])
def test_what_is_no_url_is_refused_without_showing_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "url").write_text(text)
    with pytest.raises(ConfigError, match="holds no http:// or https:// URL") as error:
        notify.webhook(str(tmp_path / "url"))
    assert text in ("", "http://") or text not in str(error.value)


@pytest.mark.parametrize(("line", "why"), [("no-such-command x", "no such command"),
                                           ("", "no such command"), ("'open", "No closing quot")])
def test_a_command_that_is_not_there_is_refused(line: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        notify.command(line)


def test_a_file_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--notify-url-file .*none: cannot be read"):
        command.main(["supervise", "--notify-url-file", str(tmp_path / "none"), "--", "--config",
                      "configs/demo.yaml", "data.feed=x", f"run.dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.cluster
@pytest.mark.slow(8)
def test_a_supervisor_tells_that_it_gave_up(tmp_path: Path, hook: Hook, url_file: str) -> None:
    """The command itself: a recipe whose feed is not there."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "supervise", "--notify-url-file", url_file,
         "--notify-command", f"tee -a {tmp_path / 'told'}", "--", "--config",
         "configs/demo.yaml", f"data.feed={tmp_path / 'none'}", "run.ranks=1",
         f"run.dir={tmp_path / 'run'}"], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 2 and [message["kind"] for message in hook.got] == ["give_up"]
    assert json.loads((tmp_path / "told").read_text()) == hook.got[0]
    kept = [done.stdout, done.stderr, *(path.read_text(errors="replace") for path in
                                        (tmp_path / "run").rglob("*") if path.is_file())]
    assert not [text for text in kept if "T0KEN" in text]
