"""The documents: the site builds without a network and says what the code says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [path for package in ("neurojepa", "data_prep", "cluster")
           for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a broken link or a page without a place stops it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(  # without -q, which hides warnings from --strict, too
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)], cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow(8)
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    loads = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//")
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    assert not [page.name for page in pages if loads.search(page.read_text())]


@pytest.mark.slow(8)
def test_references_have_every_key_and_command(site: Path) -> None:
    from neurojepa.config import RootConfig

    keys = (site / "reference/config.html").read_text()

    def leaves(model: type, path: str = "") -> list[str]:
        found = []
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            branch = hasattr(field.annotation, "model_fields")
            found += leaves(field.annotation, f"{path}{name}.") if branch else [path + name]
            assert branch or field.description, f"{path}{name}: say what it does"
        return found

    assert not [key for key in leaves(RootConfig) if f"<code>{key}</code>" not in keys]
    commands = (site / "reference/commands.html").read_text()
    for name in ("synth", "index", "prepare", "pack", "verify", "withdraw", "report", "export",
                 "embed", "probe", "atoms", "supervise", "status", "watch"):
        assert re.search(rf"id=\"[a-z_]+-{name}\"", commands), name


def test_every_event_is_explained() -> None:
    written = {name for path in SOURCES
               for name in re.findall(r"\b_?event\(\"(\w+)\"", path.read_text())}
    written |= {name for path in SOURCES for pair in re.findall(
        r"\bevent\(\"(\w+)\" if \w+ else \"(\w+)\"", path.read_text()) for name in pair}
    explained = entries("## Events")
    assert {"start", "resume", "rollback", "give_up"} <= written
    assert written == set(explained)


def entries(heading: str) -> dict[str, str]:
    """Name -> text of the entries of operations.md below a heading, up to the next of its level."""
    text = (ROOT / "docs/operations.md").read_text().partition(f"\n{heading}\n")[2]
    text = re.split(rf"^{heading.split()[0]} ", text, maxsplit=1, flags=re.M)[0]
    found = re.findall(r"^(\*\*`.*)<br>\n((?:.+\n)+)", text, re.M)
    return {name: body for names, body in found for name in re.findall(r"`(\w+)`", names)}


def test_every_alert_is_explained() -> None:
    """What it means, what to look at, what to do: a sentence each, at least."""
    rules = yaml.safe_load((ROOT / "cluster/alerts.yaml").read_text())["groups"][0]["rules"]
    explained = entries("### Alerts")
    assert list(explained) == [rule["alert"] for rule in rules]
    assert not [name for name, text in explained.items() if len(re.findall(r"[.:]\s", text)) < 3]


def test_every_event_that_matters_says_what_to_do() -> None:
    from cluster.levels import PROBLEMS, WARNINGS
    from cluster.notify import TOLD

    explained = entries("## Events")
    assert set(PROBLEMS) | set(WARNINGS) | set(TOLD) <= set(explained)
    assert not [name for name in (*PROBLEMS, *TOLD)
                if len(re.findall(r"[.:]\s", explained[name])) < 2]
    told = (ROOT / "docs/operations.md").read_text().partition("### To be told")[2]
    assert all(f"`{name}`" in told.partition("\n## ")[0] for name in (*TOLD, "old_checkpoint"))


def test_messages_in_the_faq_are_those_of_the_code() -> None:
    joined = "\n".join(path.read_text() for path in [*SOURCES, ROOT / "tools/setup.sh"])
    joined = re.sub(r"\"\s*\n\s*f?\"", "", joined)  # a literal that goes on in the next line
    joined = re.sub(r"\{[^{}]*(\{[^{}]*\}[^{}]*)*\}", "...", joined)  # what is filled in
    unknown = []
    for shown in re.findall(r"\*\*`([^`]+)`", (ROOT / "docs/faq.md").read_text()):
        parts = re.split(r"\.\.\.|'[^']*'|\b\d[\w.]*\b|\[.*?\]|\{.*?\}", shown)
        unknown += [part for part in parts if len(part.strip()) > 9 and part.strip() not in joined]
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    names = re.findall(r"`((?:neurojepa|data_prep|cluster|configs|tools|tests|docs)/[\w./-]*)`",
                       page.read_text())
    assert not [name for name in names if not (ROOT / name).exists()]


def test_files_that_the_pictures_name_exist() -> None:
    for picture in sorted((ROOT / "docs/pictures").glob("*.svg")):
        names = re.findall(r">((?:neurojepa|data_prep|tests)/[\w./]*\w/?)[<, ]",
                           picture.read_text())
        assert not [name for name in names if not (ROOT / name).exists()], picture.name
