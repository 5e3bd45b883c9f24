"""The benchmarks' command: what it offers, refuses and prints last."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.helpers import ROOT
from tests.helpers.waiting import wait_until
from tools.bench import _many_ranks as many
from tools.bench import downstream, gpu, ranks


def bench(*arguments: str, limit_s: float = 280) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tools.bench", *arguments], cwd=ROOT, text=True,
                          capture_output=True, timeout=limit_s)


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


# ---- downstream ----------------------------------------------------------------------------------

@pytest.mark.slow(6)
def test_our_way_and_monai_embed_the_same_scan(tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    downstream.pack_brains(tmp_path, 1, downstream.GRID)
    downstream.write_files(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    assert downstream.ours(1)().values.shape == (1, 96)
    work = downstream.monai(1, cached=True)
    assert len(list(tmp_path.glob("cache/*.pt"))) == 1
    assert torch.cat(work()).shape == (1, 96)
    spent = downstream.spent_by_all()
    assert spent["cpu_s"] > 1 and spent["peak_mib"] > 100


# ---- ranks ---------------------------------------------------------------------------------------

def test_fake_ranks_save_read_and_are_watched_by_the_real_code(tmp_path: Path) -> None:
    sizes = many.manifests(32, 4)
    assert sizes["rows"] == 4 * 32
    assert sizes["new_mib"] < sizes["old_mib"] / 4
    found = many.save_and_read(tmp_path, 6, 5, 3)
    assert found["files"] == 6 * 5 + 2  # four of tensors and a manifest each; buffers and the root
    assert (found["same_size_parts"], found["other_size_parts"]) == (1, 2)
    assert many.watched(tmp_path, 3)["look_s"] > 0
    assert many.order_and_metrics(tmp_path, 5)["positions"] == 10


def test_the_line_through_measurements_is_read_where_it_is_asked() -> None:
    real = [{"ranks": n, "ms": 2 + 3 * n} for n in (2, 8, 32)]
    assert ranks._at(1024, real, "ms") == pytest.approx(2 + 3 * 1024)


# ---- gpu -----------------------------------------------------------------------------------------

def test_without_a_gpu_one_line_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = bench("gpu")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no CUDA GPU is visible here; --rehearse" in done.stderr
    assert "masks has no use for it; only gpu does" in bench("masks", "--rehearse").stderr


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Stages of a test's own, for processes that are forked."""
    from tools.bench import _gpu_stages

    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    monkeypatch.setattr(gpu, "start_method", lambda: "fork")
    return vars(_gpu_stages)


def answer(name: str, limit_s: float) -> dict[str, Any]:
    return gpu.answer(gpu.Stage(name, name, 60), {"tiny": False}, limit_s)


def test_a_stage_that_fails_or_hangs_is_named_and_ends(
        tmp_path: Path, stages: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stages, "late", lambda given: time.sleep(100))
    wrong, late, never = (answer(*what) for what in (("wrong", 60), ("late", 0.1), ("never", -1)))
    assert wrong["failed"].startswith("status 1: KeyError: 'wrong'")
    assert late["failed"].startswith("stopped after its 0 s") and late["seconds"] < 60
    assert "of the whole command are over" in never["failed"]
    assert "Traceback" in (tmp_path / "wrong.log").read_text()


def test_a_stage_ends_with_all_that_it_started_and_may_say_more_than_its_result(
        tmp_path: Path, stages: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(given: dict[str, Any]) -> dict[str, Any]:
        atexit.register(print, "WARNING: at the very end")
        return {"ms": 2.5}

    def late(given: dict[str, Any]) -> None:
        child = subprocess.Popen(["sleep", "100"])
        (tmp_path / "child").write_text(str(child.pid))
        child.wait()

    monkeypatch.setitem(stages, "noisy", noisy)
    monkeypatch.setitem(stages, "late", late)
    assert answer("noisy", 60)["ms"] == 2.5
    for limit_s in (1, 10, 60):
        assert f"stopped after its {limit_s} s" in answer("late", limit_s)["failed"]
        if (tmp_path / "child").exists() and (tmp_path / "child").read_text():
            break  # else the machine is so busy that it had not begun
    child = int((tmp_path / "child").read_text())
    wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie")


@pytest.mark.slow(30)
@pytest.mark.timeout(600)
def test_every_stage_answers_in_a_rehearsal() -> None:
    done = bench("gpu", "--rehearse", limit_s=560)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["rehearsal"] and found["failed"] == []
    stages = found["stages"]
    assert {stage.name for stage in gpu.stages(False, None, True)} == set(stages)
    assert {stage.function for stage in gpu.stages(False, None, False)} == {
        stage.function for stage in gpu.stages(False, None, True)}
    assert stages["killed"]["deterministic_equal"] and stages["killed"]["deterministic_killed_at"]
    assert stages["agreement"]["masks_equal"] and stages["agreement"]["gradients_differ_by"] < 1e-5
    losses = [stages["zero"][name] for name in ("zero1", "zero2", "zero3", "fp32")]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)
    assert stages["profile"]["costliest"] and stages["profile"]["predicted"]["products"] > 0
