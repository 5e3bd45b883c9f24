"""What a browser makes of a page that this project writes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

TOLD = "<title>@facts@"
PROBE = """<script>addEventListener('load', () => setTimeout(() => {
  const facts = {}, images = [...document.images];
  %s
  Object.assign(facts, {images: images.length, width: innerWidth,
    broken: images.filter(image => !image.naturalWidth).length,
    overflow: document.documentElement.scrollWidth - innerWidth,
    requests: performance.getEntriesByType('resource').filter(
      entry => !entry.name.startsWith('data:')).length});
  document.title = '@facts@' + JSON.stringify(facts) + '@end@'; }, 500));</script>"""


def look(page: Path, folder: Path, script: str = "", width: int = 800) -> dict[str, Any]:
    """Facts about a page in a window of ``width`` pixels; ``script`` may add to ``facts``.

    Always there: the number of images and of broken ones, the window's width, by how many pixels
    the page is wider, and the number of requests that left it.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium; tools/test.sh installs it when run as root")
    copy = folder / "page.html"
    copy.write_text(page.read_text().replace("</body>", PROBE % script + "</body>"))
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900",
        "--virtual-time-budget=8000", "--dump-dom", copy.as_uri()]
    for _ in range(3):  # on a busy machine chromium may print a page before its timers have run
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if TOLD in done.stdout:
            break
    assert TOLD in done.stdout, done.stderr[-2000:]
    facts: dict[str, Any] = json.loads(done.stdout.split(TOLD)[1].split("@end@")[0])
    return facts
