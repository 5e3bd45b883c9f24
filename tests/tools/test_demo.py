"""tools/demo.sh as a newcomer runs it, on a small cohort; its page is opened in a browser."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from neurojepa.storage import read_rows
from tests.helpers import ROOT
from tests.helpers.browser import look
from tests.helpers.synthetic_head import brain, save

PARTICIPANTS = "12"  # fewest for which every split has people of both diagnoses


def run_demo(out: Path, scans: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "tools/demo.sh", "--out", str(out), "--scans", str(scans),
         "--participants", PARTICIPANTS], cwd=ROOT, capture_output=True, text=True,
        timeout=1500, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The output folder, the folder of scans given (one is cut short), and what was printed."""
    root = tmp_path_factory.mktemp("demo")
    scans = root / "scans"
    scans.mkdir()
    good = Path(save(scans / "made_T1w.nii.gz", *brain()))
    (scans / "cut_T1w.nii.gz").write_bytes(good.read_bytes()[:200_000])
    done = run_demo(root / "out", scans)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return root / "out", scans, done.stdout


@pytest.mark.slow(200)
@pytest.mark.cluster
@pytest.mark.timeout(1600)
def test_the_killed_run_is_bit_equal_and_the_summary_says_what_happened(demo) -> None:
    out, scans, printed = demo
    summary = json.loads((out / "summary.json").read_text())
    assert summary["bit_equal"] is True and summary["difference"] is None
    assert 0 < summary["resumed_from_step"] <= summary["killed_at_step"] < 100
    assert summary["scans"]["quarantined"] == 1
    assert summary["scans"]["accepted"] + summary["scans"]["flagged"] >= 30 + len(
        list(scans.iterdir())) - 1
    assert set(summary["probe"]) == {"neurojepa", "random init"}
    assert {"age", "diagnosis"} <= set(summary["probe"]["neurojepa"])
    assert "killed rank 1" in printed
    events = [row["event"] for row in read_rows(str(out / "run/events.jsonl"))]
    assert events.count("restart") == 1 and "finish" in events
    losses = [read_rows(str(out / name / "metrics.jsonl")) for name in ("run", "run-undisturbed")]
    assert [row["loss"] for row in losses[0]] == [row["loss"] for row in losses[1]]


@pytest.mark.slow(40)
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_second_run_reuses_what_the_first_made(demo) -> None:
    out, scans, _ = demo
    before = (out / "run/metrics.jsonl").read_bytes(), (out / "summary.json").stat().st_mtime
    done = run_demo(out, scans)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (out / "run/metrics.jsonl").read_bytes() == before[0]
    assert (out / "summary.json").stat().st_mtime > before[1]
    assert json.loads((out / "summary.json").read_text())["bit_equal"] is True


@pytest.mark.slow(5)
@pytest.mark.cluster
@pytest.mark.browser
@pytest.mark.timeout(600)
def test_the_report_shows_in_a_browser(demo, tmp_path: Path) -> None:
    facts = look(demo[0] / "report.html", tmp_path,
                 "facts.text = document.querySelector('main').innerText;")
    assert facts["images"] >= 4 and facts["broken"] == 0
    assert facts["overflow"] <= 0  # nothing runs out of a narrow window
    assert "bit-equal" in facts["text"]
    assert "truncated" in facts["text"]  # why a scan is quarantined
    assert facts["requests"] == 0  # the page needs no network


def test_a_missing_scans_folder_is_one_clear_line(tmp_path: Path) -> None:
    done = run_demo(tmp_path / "out", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "--scans" in done.stderr and "nowhere: no such folder" in done.stderr
    assert not (tmp_path / "out").exists()
