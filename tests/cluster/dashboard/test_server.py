"""What the page's server answers, to whom, and what it keeps to itself."""

from __future__ import annotations

import http.client
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import __main__ as command
from cluster.dashboard.guard import Guard, is_loopback
from cluster.dashboard.server import Dashboard
from neurojepa.errors import ConfigError
from tests.helpers.feeds import tiny_config, write_feed
from tests.helpers.runs import write_run
from tests.helpers.servers import serving
from tests.helpers.waiting import wait_until

SECRETS = ("../outside.txt", "/etc/passwd", "logs/../../outside.txt", "%2e%2e%2foutside.txt",
           "....//outside.txt", "..%5coutside.txt", "attempt-1.log%00")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tree = tiny_config(write_feed(str(folder / "feed")), folder / "base").model_dump(mode="json")
    write_run(folder / "base", tree=tree)
    write_run(folder / "other", steps=60)
    (folder / "outside.txt").write_text("a secret")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Dashboard]:
    yield from served(Dashboard([str(folder / name) for name in ("base", "other", "none")],
                                "127.0.0.1", 0))


def served(server: Dashboard) -> Iterator[Dashboard]:
    with serving(server):
        for view in server.views:
            view.look()
        yield server


def ask(server: Dashboard, path: str, method: str = "GET",
        **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def found(server: Dashboard, path: str) -> Any:
    status, _, data = ask(server, path)
    assert status == 200, data
    return json.loads(data)


# ---- answers -------------------------------------------------------------------------------------

def test_runs_are_told_with_their_state_and_one_that_is_not_there_by_its_problem(
        server: Dashboard) -> None:
    base, other, none = found(server, "/api/runs")
    assert (base["state"], base["step"], base["rows"], base["lost_steps"]) == (
        "running", 600, 600, 10)
    assert [rank["host"] for rank in base["ranks"]] == ["node0", "node0"]
    assert base["slow"][0]["rank"] == 0
    assert other["name"] == "other" and other["step"] == 60
    assert none["state"] is None and "no run here" in none["problem"]


def test_series_have_few_points_of_the_steps_asked_for(server: Dashboard) -> None:
    series = found(server, "/api/series?run=0")
    assert set(series) == {"loss", "volumes_per_s", "effective_rank", "data_wait", "step_s",
                           "checkpoint_s"}
    assert len(series["loss"]) == 400 and series["loss"][-1][0] == 599
    assert [point[0] for point in series["checkpoint_s"]] == list(range(20, 600, 20))
    part = found(server, "/api/series?run=0&first=590&last=595")
    assert [point[0] for point in part["loss"]] == list(range(590, 596))


def test_events_say_how_bad_they_are(server: Dashboard) -> None:
    events = found(server, "/api/events?run=0")["events"]
    levels = {event["event"]: event["level"] for event in events}
    assert levels == {"started": "", "start": "", "host_lost": "problem", "exit": "warning",
                      "restart": "warning", "resume": "", "skip": "warning"}


def test_an_event_comes_with_its_log_samples_and_report(server: Dashboard,
                                                        folder: Path) -> None:
    events = found(server, "/api/events?run=0")["events"]
    first, second = [event for event in events if event["event"] == "skip"]
    around = found(server, f"/api/around?run=0&event={second['number']}")
    assert around["row"]["reason"] == "loss spike"
    assert around["log"]["name"] == "attempt-2.log"
    assert around["log"]["lines"][around["log"]["at"]].startswith("step 465/")
    rows = around["samples"]["rows"]
    assert around["samples"]["positions"] == [4 * 462, 4 * 462 + 4]
    assert len(rows) == 4 and {row["cohort"] for row in rows} == {"blobs"}
    # what both steps had comes first
    both = {row["scan_id"] for row in rows} & {row["scan_id"] for row in found(
        server, f"/api/around?run=0&event={first['number']}")["samples"]["rows"]}
    assert [row["dropped"] for row in rows] == [2] * len(both) + [1] * (4 - len(both))
    lost = next(event for event in events if event["event"] == "host_lost")
    around = found(server, f"/api/around?run=0&event={lost['number']}")
    assert around["samples"] is None and around["log"]["name"] == "attempt-1.log"
    assert around["log"]["at"] == len(around["log"]["lines"]) - 1
    assert around["report"] is None
    (folder / "base/logs/incident-1.md").write_text("the likely cause")
    assert found(server, f"/api/around?run=0&event={lost['number']}")[
        "report"] == "the likely cause"


def test_samples_are_those_that_the_loader_reads(folder: Path) -> None:
    from neurojepa.feed.samples import Samples
    from tests.helpers.feeds import read_batches

    config = tiny_config(str(folder / "feed"), folder / "unused", steps=3)
    samples = Samples(config.model_dump(mode="json"), "here")
    for step, batch in enumerate(read_batches(config)):
        begin = step * 2  # micro-batches of 2
        assert [sample.scan_id for sample in samples.at(begin, begin + 2)] == list(batch.scan_ids)


def test_samples_of_a_feed_that_has_changed_are_not_told(folder: Path, tmp_path: Path) -> None:
    from cluster.dashboard.around import samples_of
    from cluster.rundir import RunDir

    config = tiny_config(str(folder / "feed"), tmp_path).model_dump(mode="json")
    (tmp_path / "environment.json").write_text('{"order": "another"}')
    skip = {"event": "skip", "step": 3, "positions": [8, 12]}
    told = samples_of(RunDir(str(tmp_path)), [skip], skip, config)
    assert told is not None and "the feed has changed since" in told["why"]
    told = samples_of(RunDir(str(tmp_path)), [skip], {"event": "skip", "step": 3}, config)
    assert told is not None and "earlier version" in told["why"]


# ---- what is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("path", [
    *(f"/{name}" for name in SECRETS), *(f"/api/{name}" for name in SECRETS), "/page.py",
    "/server.py", "/page.js/../outside.txt", "/logs/attempt-1.log"])
def test_nothing_but_the_page_is_served(server: Dashboard, path: str) -> None:
    status, _, data = ask(server, path)
    assert status == 404 and b"secret" not in data and b"root:" not in data


@pytest.mark.parametrize("query", [
    "", "run=3", "run=-1", "run=0x1", "run=1e9", "run=\u0663", "run=" + "9" * 40, "run=..%2f",
    "run=0&event=99999", "run=0&event=-1", *(f"run=0&event={name}" for name in SECRETS),
    *(f"run={name}&event=1" for name in SECRETS), "run=0;id&event=1", "run=$(id)&event=`id`"])
def test_numbers_are_numbers(server: Dashboard, query: str) -> None:
    status, _, data = ask(server, "/api/around?" + urllib.parse.quote(query, safe="=&%$();`."))
    assert status == 400 and b"secret" not in data


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "",
                                  "localhost.evil.example"])
def test_names_that_are_not_ours_are_not_answered(server: Dashboard, host: str) -> None:
    """Else a page elsewhere could have its name resolve to loopback and read all (DNS rebinding).
    """
    assert ask(server, "/api/runs", Host=host)[0] == 421


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1234", "[::1]:80", "LOCALHOST:9"])
def test_names_of_loopback_are_answered(server: Dashboard, host: str) -> None:
    assert ask(server, "/api/runs", Host=host)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD"])
def test_nothing_can_be_sent(server: Dashboard, method: str) -> None:
    assert ask(server, "/api/runs", method)[0] == 501


@pytest.mark.parametrize("path", ["/", "/page.js", "/api/runs", "/nothing"])
def test_every_answer_has_a_policy_that_lets_nothing_in(server: Dashboard, path: str) -> None:
    _, headers, data = ask(server, path)
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Access-Control-Allow-Origin"] is None
    assert not re.search(rb"(src|href)=\"(https?:)?//", data)


# ---- beyond loopback -----------------------------------------------------------------------------

@pytest.fixture
def open_to_all(folder: Path) -> Iterator[Dashboard]:
    yield from served(Dashboard([str(folder / "other")], "0.0.0.0", 0))


def test_elsewhere_a_token_is_needed(open_to_all: Dashboard) -> None:
    token = open_to_all.guard.token
    assert token is not None and len(token) > 40 and open_to_all.url.endswith(f"/?token={token}")
    wrong = ("", token[:-1], token + "x", "\u00fc", "x" * len(token))
    for path in ("/", "/page.js", "/api/runs", *(f"/?token={urllib.parse.quote(t)}"
                                                for t in wrong)):
        status, headers, data = ask(open_to_all, path)
        assert (status, headers["Set-Cookie"]) == (403, None) and token.encode() not in data
    for value in (*wrong, "", "=;"):
        cookie = f"{open_to_all.guard.cookie}={value}".encode().decode("latin-1")
        assert ask(open_to_all, "/api/runs", Cookie=cookie)[0] == 403
    assert ask(open_to_all, f"/api/runs?token={token}")[0] == 403  # only where it becomes a cookie
    status, headers, _ = ask(open_to_all, f"/?token={token}")
    assert (status, headers["Location"]) == (303, "/")
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    status, _, data = ask(open_to_all, "/api/runs", Cookie=cookie.partition(";")[0])
    assert status == 200 and token.encode() not in data


def test_on_loopback_none_is() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "node0", "localhost.evil")))
    assert Guard("127.0.0.1", 1).token is None
    assert Guard("0.0.0.0", 1).token != Guard("0.0.0.0", 1).token


def test_two_of_one_machine_do_not_take_each_others_cookies(open_to_all: Dashboard,
                                                            folder: Path) -> None:
    jar = {}
    other = Dashboard([str(folder / "other")], "0.0.0.0", 0)
    with serving(other):
        for server in (open_to_all, other):  # as a browser keeps them: by name, for all ports
            _, headers, _ = ask(server, f"/?token={server.guard.token}")
            name, _, value = headers["Set-Cookie"].partition(";")[0].partition("=")
            jar[name] = value
        cookies = "; ".join(f"{name}={value}" for name, value in jar.items())
        for server in (open_to_all, other):
            assert ask(server, "/api/runs", Cookie=cookies)[0] == 200


def test_the_command_says_where_to_look(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threading.Thread(target=command.main, daemon=True, args=(
        ["dashboard", str(folder / "other"), "--port", "0"],)).start()
    out: list[str] = []
    url = re.compile(r"http://127\.0\.0\.1:(\d+)/ ")
    wait_until(lambda: out.append(capsys.readouterr().out) or url.search("".join(out)))
    port = int(url.search("".join(out))[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/")
    assert b"neurojepa runs" in connection.getresponse().read()


def test_a_port_that_is_taken_is_named(server: Dashboard, folder: Path) -> None:
    port = server.server_address[1]
    with pytest.raises(ConfigError, match=f"--port {port}: cannot listen there"):
        command.main(["dashboard", str(folder / "base"), "--port", str(port)])
