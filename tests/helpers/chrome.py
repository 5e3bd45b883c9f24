"""A chromium that a test drives: pages over HTTP, keys, window sizes, dark and light, pictures.

It is told what to do through pipes (``--remote-debugging-pipe``), so no port is open.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35,
        "Tab": 9, "Enter": 13, " ": 32}


class Chrome:
    """One page of a running chromium."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._number, self._session, self._read = 0, "", b""
        self.problems: list[str] = []  # errors of scripts, and what the policy of the page refused
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target,
                                  flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._ask(f"{domain}.enable")

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Open a page in a window of that size."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)
        self._ask("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self._ask("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """What an expression is on the page."""
        found = self._ask("Runtime.evaluate", expression=expression, returnByValue=True,
                          awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> Any:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < end, f"{expression}: {self.value('document.body.innerText')}"
            time.sleep(0.05)
        return found

    def press(self, key: str, shift: bool = False) -> None:
        facts = {"key": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 * shift,
                 **({"text": "\r"} if key == "Enter" else {})}
        self._ask("Input.dispatchKeyEvent", type="keyDown", **facts)
        self._ask("Input.dispatchKeyEvent", type="keyUp", **facts)

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        found = self._ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters,
                   **({"sessionId": self._session} if self._session else {})}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            found = json.loads(self._message())
            if found.get("id") == self._number:
                assert "error" not in found, found
                answer: dict[str, Any] = found["result"]
                return answer
            if found.get("method") == "Runtime.exceptionThrown":
                self.problems.append(str(found["params"]["exceptionDetails"]))
            if found.get("method") == "Log.entryAdded" \
                    and found["params"]["entry"]["level"] == "error":
                self.problems.append(found["params"]["entry"]["text"])

    def _message(self) -> bytes:
        while b"\0" not in self._read:
            data = os.read(self._answers, 1 << 16)
            assert data, "chromium has ended"
            self._read += data
        message, _, self._read = self._read.partition(b"\0")
        return message


@contextmanager
def chrome(folder: Path) -> Iterator[Chrome]:
    """A chromium with a profile of its own below ``folder``; skips where there is none."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium; tools/test.sh installs it when run as root")
    commands_out, commands_in = os.pipe()
    answers_out, answers_in = os.pipe()
    browser = subprocess.Popen(
        ["bash", "-c", f'exec "$0" "$@" 3<&{commands_out} 4>&{answers_in}', program, "--headless",
         "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
         f"--user-data-dir={folder / 'profile'}"],
        pass_fds=(commands_out, answers_in), stderr=subprocess.DEVNULL)
    os.close(commands_out)
    os.close(answers_in)
    try:
        yield Chrome(commands_in, answers_out)
    finally:
        browser.kill()
        browser.wait()
        for pipe in (commands_in, answers_out):
            os.close(pipe)
