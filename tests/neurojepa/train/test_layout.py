"""Checkpoints of many ranks: which rank holds what, and that only that is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neurojepa.errors import CheckpointError
from neurojepa.storage import Patience
from neurojepa.train import checkpoint
from neurojepa.train.layout import layout_of, overlapping
from neurojepa.train.ownership import Ownership
from neurojepa.train.saver import Saver
from neurojepa.train.world import World
from tests.helpers.ranks import FakeEngine, fake_worlds, on_all, values_of

SHAPES = {"encoder.a": (7, 5), "encoder.b": (3,), "encoder.c": (1,), "predictor.d": (40, 2, 3),
          "predictor.e": (11,)}


def save(run_dir: Path, size: int, zero: int, broken: int | None = None) -> list[Any]:
    """A checkpoint of step 3 by so many ranks; rank ``broken`` cannot write its files."""
    def saved(world: World) -> int | None:
        engine: Any = FakeEngine(SHAPES, world, zero)
        saver = Saver(Ownership(str(run_dir)), engine, world, keep_last=1, milestone_every=0,
                      patience=Patience(0))
        try:
            saver.start(3, {"config": {}})
            if world.rank == broken:
                folder = run_dir / "checkpoints" / "step-3"
                path = folder / f"rank-{broken:05d}-{saver.attempt}.json"
                saver._pending.job.result()
                path.unlink()
                path.mkdir()
                saver._pending.job = saver._pool.submit(path.read_text)
            return saver.finish()
        finally:
            saver.close()

    return on_all(fake_worlds(size), saved)


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (4, 4), (8, 3), (3, 8), (8, 1)])
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path: Path, zero: int, before: int,
                                                        after: int) -> None:
    assert save(tmp_path, before, zero) == [3] * before
    for stage in (2, 3):
        for world in fake_worlds(after):
            found = checkpoint.open_checkpoint(str(tmp_path), 3)
            engine = FakeEngine(SHAPES, world, stage)
            for fragment in engine.fragments:
                for key, values in engine.tensors(fragment).items():
                    assert found.read(fragment, key).equal(values)
    assert found.shapes == SHAPES
    assert found.problems() == []


def test_a_rank_reads_only_the_files_of_those_that_hold_its_part(tmp_path: Path) -> None:
    save(tmp_path, 8, zero=3)
    found = checkpoint.open_checkpoint(str(tmp_path), 3)
    engine = FakeEngine({"predictor.d": (40, 2, 3)}, fake_worlds(4)[1], zero=3)
    (fragment,) = engine.fragments
    assert found.read(fragment, "master").equal(values_of(fragment, "master"))
    assert {name[:10] for name in found._known} == {"rank-00002", "rank-00003"}
    assert {name[:10] for name in found._files} == {"rank-00002", "rank-00003"}


@pytest.mark.parametrize(("damage", "says"), [
    ("gone", r"rank-00001-\w+\.json"),
    ("changed", r"rank-00001-\w+\.json: does not match the sha256"),
    ("unlisted", r"manifest\.json: does not list rank-00001-\w+\.json"),
    ("shorter", r"has no predictor\.d\|0 of 120 elements")])
def test_a_bad_manifest_of_a_rank_is_named_and_nothing_is_read_in_part(
        tmp_path: Path, damage: str, says: str) -> None:
    save(tmp_path, 4, zero=3)
    folder = tmp_path / "checkpoints" / "step-3"
    (part,), root = folder.glob("rank-00001-*.json"), folder / "manifest.json"
    facts = json.loads(root.read_text())
    if damage == "gone":
        part.unlink()
    elif damage == "changed":
        part.write_text(part.read_text().replace('"size"', '"Size"'))
    elif damage == "unlisted":
        del facts["files"][part.name]
    else:  # a root that is of another division
        facts["parameters"]["predictor.d"]["runs"] = [[0, 1, 120], [1, 2, 60]]
    root.write_text(json.dumps(facts))
    found = checkpoint.open_checkpoint(str(tmp_path), 3)
    with pytest.raises(CheckpointError, match=says + r".*step-3 is damaged"):
        found.parameters("master")
    if damage in ("gone", "changed"):
        assert len(found.problems()) == 1


def test_a_rank_that_cannot_write_is_named_on_all_and_nothing_is_committed(tmp_path: Path) -> None:
    answers = save(tmp_path, 4, zero=3, broken=2)
    assert len({str(answer) for answer in answers}) == 1
    assert all(isinstance(answer, CheckpointError) for answer in answers)
    assert "checkpoint not written: rank 2: " in str(answers[0])
    assert checkpoint.committed_steps(str(tmp_path)) == []


def test_checkpoints_of_format_3_are_read(tmp_path: Path) -> None:
    save(tmp_path, 4, zero=3)
    found = checkpoint.open_checkpoint(str(tmp_path), 3)
    state = found.state_sha256()
    folder, manifest = tmp_path / "checkpoints" / "step-3", dict(found.manifest)
    attempt, layout = manifest.pop("attempt"), manifest.pop("parameters")
    files = {name: entry for name, entry in manifest["files"].items() if name[-5:] != ".json"}
    for part in folder.glob("rank-*.json"):
        files |= json.loads(part.read_text())["files"]
        part.unlink()
    fragments = [[name, entry["shape"], start, length, f"rank-{rank:05d}-{attempt}"]
                 for name, entry in layout.items() for start, length, rank in
                 overlapping(layout, name, 0, math.prod(entry["shape"]))]
    (folder / "manifest.json").write_text(json.dumps(
        {**manifest, "format": 3, "files": files, "fragments": fragments[::-1]}))
    old = checkpoint.open_checkpoint(str(tmp_path), 3)
    assert old.state_sha256() == state
    assert old.problems() == []


# ---- runs of ranks -------------------------------------------------------------------------------

def test_1024_ranks_take_a_few_numbers() -> None:
    """A root of 600 parameters under ZeRO 3 is hundreds of kilobytes smaller than their parts."""
    parts = [(5 * rank, 5, rank) for rank in range(1023)] + [(5 * 1023, 2, 1023)]
    layout = layout_of({"w": (5 * 1023 + 2,)}, {"w": parts})
    assert layout["w"]["runs"] == [[0, 1023, 5], [1023, 1, 2]]
    assert list(overlapping(layout, "w", 5 * 1000 + 3, 5 * 1002)) == parts[1000:1002]


def test_runs_say_what_the_parts_said() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.choice([1, 4, 4, 4, 9], rng.integers(1, 12)).tolist()
        ranks = rng.permutation(20)[:len(lengths)] if rng.random() < 0.3 else \
            np.arange(len(lengths)) + rng.integers(3)
        starts = np.cumsum([0, *lengths]).tolist()
        parts = list(zip(starts, lengths, ranks.tolist()))  # noqa: B905 (one start more)
        layout = layout_of({"w": (starts[-1],)}, {"w": rng.permutation(parts).tolist()})
        low, high = sorted(rng.integers(0, starts[-1] + 1, 2).tolist())
        assert list(overlapping(layout, "w", low, high)) == [
            part for part in parts if part[0] < high and low < part[0] + part[1]]


@pytest.mark.parametrize(("parts", "says"), [
    ([(0, 4, 0), (5, 5, 1)], "gap or overlap at element 4 of 10"),
    ([(0, 4, 0), (3, 7, 1)], "gap or overlap at element 3 of 10"),
    ([(0, 4, 0), (4, 4, 1)], "hold 8 of its 10"), ([], "hold 0 of its 10")])
def test_parts_that_are_not_the_whole_parameter_are_refused(
        parts: list[tuple[int, int, int]], says: str) -> None:
    with pytest.raises(CheckpointError, match=f"w: .*{says}"):
        layout_of({"w": (10,)}, {"w": parts})
