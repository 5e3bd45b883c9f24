"""The page in a browser: charts that grow, keys, an event's details, sizes, light and dark."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.dashboard.server import Dashboard
from neurojepa.storage import append_rows
from tests.helpers.chrome import Chrome, chrome
from tests.helpers.feeds import tiny_config, write_feed
from tests.helpers.runs import metrics_row, write_run
from tests.helpers.servers import serving

pytestmark = [pytest.mark.browser, pytest.mark.slow(6)]
# the ratio by which luminances of text and of what is behind it differ (WCAG 2)
CONTRAST = """(() => {
  const light = text => { const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(value => {
    value /= 255; return value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4; });
    return .2126 * r + .7152 * g + .0722 * b; };
  const behind = node => { while (node) { const found = getComputedStyle(node).backgroundColor;
    if (!found.startsWith('rgba(0, 0, 0, 0')) return found; node = node.parentElement; }
    return 'rgb(255, 255, 255)'; };
  const texts = [...document.querySelectorAll('main *')].filter(node => node.checkVisibility() &&
    [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim()));
  return texts.map(node => {
    const style = getComputedStyle(node);
    const [a, b] = [light(node.namespaceURI.endsWith('svg') ? style.fill : style.color),
                    light(behind(node))];
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), node.textContent.slice(0, 40)];
  }).sort((x, y) => x[0] - y[0])[0]; })()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chrome(tmp_path_factory.mktemp("chrome")) as browser:
        yield browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    folder = tmp_path_factory.mktemp("runs")
    tree = tiny_config(write_feed(str(folder / "feed")), folder / "base").model_dump(mode="json")
    write_run(folder / "base", hosts=4, slots=8, tree=tree)
    write_run(folder / "<b>small</b>", steps=300)
    with serving(Dashboard([str(folder / "base"), str(folder / "<b>small</b>")], "127.0.0.1",
                           0)) as server:
        yield server


def shown(browser: Chrome, server: Dashboard, width: int = 1280, dark: bool = False) -> None:
    browser.open(server.url, width=width, dark=dark)
    browser.wait("document.querySelectorAll('#charts polyline').length === 10 && "
                 "document.querySelectorAll('#hosts button').length === 32")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_and_can_be_read(browser: Chrome, server: Dashboard, width: int,
                                 dark: bool) -> None:
    shown(browser, server, width, dark)
    browser.value("document.querySelector('#list button').click()")
    browser.wait("!!document.querySelector('#detail pre')")
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    ratio, text = browser.value(CONTRAST)
    assert ratio >= 4.5, text
    assert browser.value("performance.getEntriesByType('resource').every("
                         "entry => entry.name.startsWith(location.origin))")
    assert browser.problems == []


def test_names_of_runs_are_text(browser: Chrome, server: Dashboard) -> None:
    shown(browser, server)
    assert "b>small</b>" not in browser.value("document.querySelector('#runs').innerHTML")
    assert browser.value("document.querySelectorAll('main b:not(.state)').length") == 0


def test_a_step_that_is_done_while_one_looks_is_drawn(browser: Chrome, server: Dashboard) -> None:
    shown(browser, server)
    view = server.views[0]
    append_rows(view.run_dir.uri + "/metrics.jsonl", [
        {**metrics_row(601), "loss": 7.25, "time": time.time()}])
    browser.wait("document.querySelector('#runs dl').innerText.includes('7.25')")
    browser.value("document.getElementById('range').value = '100'; "
                  "document.getElementById('range').dispatchEvent(new Event('change'))")
    label = "document.querySelector('[data-chart=loss]').ariaLabel"
    label = browser.wait(f"{label}.includes('steps 200') && {label}")
    assert label.startswith("Loss, steps 200 to 601: base ") and "to 7.25;" in label


def test_all_of_it_works_by_keyboard(browser: Chrome, server: Dashboard) -> None:
    shown(browser, server)
    focused = "document.activeElement"
    order = []
    for _ in range(60):  # by Tab alone to everything that can be operated
        browser.press("Tab")
        order.append(browser.value(
            f"{focused}.id || {focused}.dataset.chart || {focused}.dataset.event && 'event' || "
            f"{focused}.dataset.rank && 'rank' || {focused}.type || {focused}.className"))
        if order[-1] == "rank":
            break
    assert set(order) >= {"skip", "checkbox", "range", "loss", "data_wait", "checkpoint_s", "level",
                          "event", "host-run", "measure", "rank"}
    assert browser.value(f"getComputedStyle({focused}).outlineStyle") == "solid"
    browser.press("ArrowRight")
    assert browser.value("document.getElementById('rank').textContent").startswith(
        "Rank 1 on node0")
    browser.press("ArrowDown")
    browser.press("End")
    assert "Rank 31 on node3" in browser.value("document.getElementById('rank').textContent")
    browser.value("document.querySelector('[data-chart=loss]').focus()")
    browser.press("End")
    last = browser.value("document.getElementById('reading').textContent")
    browser.press("Home")
    first = browser.value("document.getElementById('reading').textContent")
    browser.press("ArrowRight", shift=True)
    assert first.startswith("Step 1: loss")
    assert len({first, last, browser.value("document.getElementById('reading').textContent")}) == 3


def test_an_event_is_opened_and_stays_focused(browser: Chrome, server: Dashboard) -> None:
    shown(browser, server)
    browser.value("[...document.querySelectorAll('#list button')].find("
                  "node => node.closest('tr').innerText.includes('step 462')).focus()")
    browser.press("Enter")
    browser.wait("!!document.querySelector('#detail pre b')")
    detail = browser.value("document.getElementById('detail').innerText")
    assert "loss spike" in detail and "Samples at positions" in detail and "blobs" in detail
    assert browser.value("document.querySelector('#detail pre b').textContent").startswith("step 4")
    assert browser.value("document.querySelectorAll('#charts .chosen').length") == 6
    browser.wait("performance.getEntriesByType('resource').filter("
                 "entry => entry.name.endsWith('/api/runs')).length > 2")
    assert "skip" in browser.value("document.activeElement.textContent")
    browser.value("document.getElementById('level').value = 'problem'; "
                  "document.getElementById('level').dispatchEvent(new Event('change'))")
    assert browser.value("[...new Set([...document.querySelectorAll('#list button')].map("
                         "node => node.textContent))].join()") == "✖ host_lost"


def test_a_server_that_is_gone_is_told(browser: Chrome, tmp_path: Path) -> None:
    write_run(tmp_path / "base")
    with serving(Dashboard([str(tmp_path / "base")], "127.0.0.1", 0)) as server:
        browser.open(server.url)
        browser.wait("!!document.querySelector('#runs .run')")
    browser.wait("document.getElementById('pulse').textContent.startsWith('What is shown is old')")
