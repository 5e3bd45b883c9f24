"""What the soak plans, and that it would see what it looks for."""

from __future__ import annotations

import copy
import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cluster.rundir import RunDir
from neurojepa.storage import sha256
from neurojepa.train.checkpoint import FORMAT_VERSION
from tests.helpers.waiting import wait_until
from tools.bench import _soak_eye
from tools.bench._soak_eye import Eye
from tools.bench.soak import GROUNDS, compare, plan


@pytest.mark.parametrize("ground", GROUNDS)
def test_a_plan_has_every_kind_and_follows_its_seed(ground: str) -> None:
    kinds = GROUNDS[ground].kinds
    assert {kind.name for _, kind in plan(kinds, 60, 1)} == {kind.name for kind in kinds}
    assert plan(kinds, 60, 1) == plan(kinds, 60, 1) and plan(kinds, 60, 1) != plan(kinds, 60, 2)
    assert [number for number, _ in plan(kinds, 7, 3)] == list(range(7))
    assert len({kind.name for _, kind in plan(kinds, 7, 3)}) == 7
    assert len(plan(kinds, 200, 1)) == 200


PLAIN = {"begins": [[0, 3]], "rows": [[step, 1.0 / step, 0.5] for step in range(1, 21)],
         "states": {"10": "aa", "20": "bb"}, "samples": {"0": ["s1"], "1": ["s2"]}}


def change(found: dict[str, Any], place: list[Any], value: Any) -> None:
    *way, last = place
    for key in way:
        found = found[key]
    found[last] = value


@pytest.mark.parametrize(("place", "value", "begins", "wrong"), [
    (["rows", 0, 1], 1.0, [[0, 3], [10, 3]], ""),
    (["rows", 4, 1], 0.2000001, [[0, 3], [10, 3]], "step 5: "),
    (["rows", 4, 1], 0.2000001, [[0, 3], [10, 2]], "step 5: "),
    (["rows", 14, 1], 1 / 15 + 1e-4, [[0, 3], [10, 2]], ""),
    (["rows", 14, 1], 1 / 15 + 1e-2, [[0, 3], [10, 2]], "0.01 apart"),
    (["rows", 14, 1], math.nan, [[0, 3], [10, 2]], "losses nan apart"),
    (["rows", 4, 1], math.nan, [[0, 3], [10, 2]], "step 5: "),
    (["states", "20"], "cc", [[0, 3]], "weights of step 20 differ"),
    (["states", "20"], "cc", [[0, 3], [10, 2]], ""),
    (["states", "10"], "cc", [[0, 3], [10, 2]], "weights of step 10 differ"),
    (["samples", "1"], ["s1", "s2"], [[0, 3]], "1 positions had other samples, first 1"),
    (["samples", "1"], ["s3"], [[0, 3], [0, 2]], "1 positions had other samples, first 1")])
def test_what_differs_from_an_undisturbed_run_is_named(
        place: list[Any], value: Any, begins: list[list[int]], wrong: str) -> None:
    found = copy.deepcopy(PLAIN)
    found["begins"] = begins
    change(found, place, value)
    said = compare(found, PLAIN)["wrong"]
    assert (wrong in said[0] and len(said) == 1) if wrong else said == []


def commit(run: Path, step: int, content: bytes = b"\2\0\0\0\0\0\0\0{}") -> None:
    """A checkpoint of empty files."""
    folder = run / f"checkpoints/step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "buffers-a.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    (folder / "manifest.json").write_text(json.dumps({
        "format": FORMAT_VERSION, "step": step, "adam_step": step, "attempt": "a",
        "parameters": {},
        "files": {"buffers-a.safetensors": {"size": 10, "sha256": sha256(content)}}}))
    (run / "latest").write_text(f"step-{step}")


@pytest.fixture
def eye(tmp_path: Path) -> Eye:
    made = Eye(RunDir(str(tmp_path)), same_world=True)
    made.close()  # looks only when asked
    return made


def test_an_eye_reads_what_is_committed(eye: Eye, tmp_path: Path) -> None:
    eye.look()
    for step in (10, 20):
        commit(tmp_path, step)
        eye.look()
    eye.look()
    assert eye.wrong == [] and eye.read == 2 and set(eye.states) == {10, 20}


def test_an_eye_stays_open_whatever_it_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                            ) -> None:
    monkeypatch.setattr(_soak_eye, "LOOK_S", 0.01)
    (tmp_path / "latest").write_text("step-ten")
    with closing(Eye(RunDir(str(tmp_path)), same_world=True)) as eye:
        wait_until(lambda: eye.wrong)
        commit(tmp_path, 10)
        wait_until(lambda: eye.read == 1)
    assert len(eye.wrong) == 1 and "ValueError" in eye.wrong[0]


def test_an_eye_sees_what_goes_back_is_lost_or_damaged(eye: Eye, tmp_path: Path) -> None:
    commit(tmp_path, 20)
    eye.look()
    commit(tmp_path, 10)
    eye.look()
    assert "goes back" in eye.wrong[-1]
    (tmp_path / "latest").write_text("step-30")
    eye.look()
    assert "step 30 cannot be read" in eye.wrong[-1]
    commit(tmp_path, 40, content=b"other")
    eye.look()
    assert "does not match the sha256" in eye.wrong[-1]
    (tmp_path / "latest").unlink()
    eye.look()
    assert "names nothing after step 40" in eye.wrong[-1]
