"""Tasks of ``prepare`` without Ray."""

from __future__ import annotations

import pytest

from data_prep.prepare import driver
from tests.helpers.fakes import run_here


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Tasks run from this process, in a child; the people they were for."""
    seen: list[str] = []

    def run(function, tasks, **options):
        tasks = list(tasks)
        seen.extend(each.name for each in tasks)
        return run_here(function, tasks)

    monkeypatch.setattr(driver, "run_tasks", run)
    return seen
