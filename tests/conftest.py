"""Fixtures shared by the tests: real scans where they are at hand, and a real S3 server."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import ROOT, SCANS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow seconds come first, so that none keeps one core busy at the end."""
    seconds: Counter[Path] = Counter()
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker("scans")
        if mark := item.get_closest_marker("slow"):
            seconds[item.path] += mark.args[0] if mark.args else 5
    items.sort(key=lambda item: -seconds[item.path])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans: $NEUROJEPA_SCANS, or ../shared/data beside the checkout."""
    if not (SCANS / "README.md").exists():
        pytest.skip(f"no real scans at {SCANS}; set NEUROJEPA_SCANS to a folder that has them")
    return SCANS


@dataclass(frozen=True)
class S3:
    """A running S3 server and a fresh bucket on it; AWS_* in the environment point to it."""

    uri: str
    endpoint: str


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A real S3 server (SeaweedFS) on loopback, ended with the test session."""
    from tools.store import serve_s3

    with serve_s3(tmp_path_factory.mktemp("s3")) as environment:
        saved = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        import s3fs

        bucket = f"test-{uuid.uuid4().hex[:8]}"
        s3fs.S3FileSystem().mkdir(bucket)
        yield S3(f"s3://{bucket}", environment["AWS_ENDPOINT_URL"])
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


@pytest.fixture(scope="session")
def run_cli():
    """Run a command of the project in a fresh interpreter; returns the completed process."""

    def run(*arguments: str, env: dict[str, str] | None = None,
            timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, text=True, capture_output=True,
            timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})

    return run
