"""The page over HTTP: GET of a few fixed addresses, and nothing else.

    /  /page.css  /page.js ...            the page
    /api/runs                             what the runs are doing
    /api/series?run=0&first=1&last=900    figures by step
    /api/events?run=0                     what happened
    /api/around?run=0&event=17            one event, its log and samples
"""

from __future__ import annotations

import ipaddress
import json
import math
import socket
import urllib.parse
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from cluster.dashboard.guard import Guard
from cluster.dashboard.view import RunView
from neurojepa.errors import NeurojepaError

PAGE = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css"),
        **{f"/{name}.js": (f"{name}.js", "text/javascript")
           for name in ("page", "charts", "events", "hosts", "parts")}}
POINTS = 400  # of a line, at most
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin", "Cache-Control": "no-store"}


class Dashboard(ThreadingHTTPServer):
    """Serves runs on an address until ``shutdown``.

    Raises
    ------
    OSError
        It cannot listen there.
    """

    daemon_threads = True

    def __init__(self, runs: list[str], address: str, port: int) -> None:
        if ":" in address:
            self.address_family = socket.AF_INET6
        self.views = [RunView(run) for run in runs]
        super().__init__((address, port), _Handler)
        self.guard = Guard(address, self.server_port)

    @property
    def url(self) -> str:
        """Where to look; the token is in it, where there is one."""
        address, port = str(self.server_address[0]), self.server_address[1]
        if ipaddress.ip_address(address).is_unspecified:
            address = socket.gethostname()
        elif ":" in address:
            address = f"[{address}]"
        token = f"?token={self.guard.token}" if self.guard.token else ""
        return f"http://{address}:{port}/{token}"


class _Handler(BaseHTTPRequestHandler):
    server: Dashboard
    server_version, sys_version = "neurojepa", ""
    timeout = 30  # seconds for a request to arrive

    def do_GET(self) -> None:
        guard = self.server.guard
        if not guard.knows_host(self.headers.get("Host")):
            self._refuse(421, "this server is not called that; use its address")
            return
        path, _, query = self.path.partition("?")
        asked = dict(urllib.parse.parse_qsl(query))
        if path == "/" and guard.is_token(asked.get("token", "")):
            self._keep_token(asked["token"])
        elif not guard.admits(self.headers.get("Cookie")):
            self._refuse(403, "open the address with its token, which the command has printed")
        elif page := PAGE.get(path):
            self._send(200, page[1], files("cluster.dashboard").joinpath(page[0]).read_bytes())
        elif answer := ANSWERS.get(path):
            self._answer(answer, asked)
        else:
            self._refuse(404, "there is no such address")

    def _answer(self, answer: Callable[[list[RunView], dict[str, str]], Any],
                asked: dict[str, str]) -> None:
        try:
            found = answer(self.server.views, asked)
        except _NotThere as error:
            self._refuse(400, str(error))
        except NeurojepaError as error:
            self._refuse(502, str(error))
        else:
            self._send(200, "application/json", json.dumps(_finite(found)).encode())

    def _keep_token(self, token: str) -> None:
        """Into a cookie, so that it is in no history and in nobody's address bar."""
        self.send_response(303)
        self.send_header("Location", "/")
        self.send_header("Set-Cookie", f"{self.server.guard.cookie}={token}; HttpOnly; "
                         "SameSite=Strict; Path=/")
        self.send_header("Content-Length", "0")
        self._end_headers()

    def _refuse(self, status: int, why: str) -> None:
        self._send(status, "text/plain", why.encode())

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self._end_headers()
        with suppress(ConnectionError):  # whoever asked has left
            self.wfile.write(data)

    def _end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: one of them has the token in it."""


# ---- answers -------------------------------------------------------------------------------------

class _NotThere(Exception):
    """A number that names nothing."""


def _number(asked: dict[str, str], name: str, default: int | None = None) -> int:
    text = asked.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise _NotThere(f"{name}: a whole number is needed")
    return int(text)


def _view(views: list[RunView], asked: dict[str, str]) -> RunView:
    number = _number(asked, "run")
    if number >= len(views):
        raise _NotThere(f"run: there are {len(views)}, counted from 0")
    views[number].ask()
    return views[number]


def _runs(views: list[RunView], asked: dict[str, str]) -> Any:
    for view in views:
        view.ask()
    return [view.overview() for view in views]


def _series(views: list[RunView], asked: dict[str, str]) -> Any:
    first, last = _number(asked, "first", 0), _number(asked, "last", 10**15 - 1)
    return _view(views, asked).series(first, last, POINTS)


def _events(views: list[RunView], asked: dict[str, str]) -> Any:
    return _view(views, asked).events()


def _around(views: list[RunView], asked: dict[str, str]) -> Any:
    found = _view(views, asked).around(_number(asked, "event"))
    if found is None:
        raise _NotThere("event: there is none of that number")
    return found


ANSWERS: dict[str, Callable[[list[RunView], dict[str, str]], Any]] = {
    "/api/runs": _runs, "/api/series": _series, "/api/events": _events, "/api/around": _around}


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
