"""The benchmarks' command: what it offers, refuses and prints last."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tools.bench", *arguments], cwd=ROOT, text=True,
                          capture_output=True, timeout=200)


@pytest.mark.slow(10)
def test_masks_are_measured_and_the_last_line_is_json() -> None:
    done = bench("masks", "--quick")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cpu_ms_per_volume"] > 0
    assert found["ratio_vs_official"] is None  # nothing to compare with, so nothing is claimed
    assert "|" in done.stdout


def test_a_folder_without_the_official_code_is_refused(tmp_path: Path) -> None:
    done = bench("masks", "--official", str(tmp_path))
    assert done.returncode == 2
    assert f"--official {tmp_path}" in done.stderr
    assert bench("nothing").returncode == 2
