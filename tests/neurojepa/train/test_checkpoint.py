"""Checkpoints on disk: commit, damage, retention, free space, refusal of another run."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors.torch
import torch

from neurojepa import weights
from neurojepa.config import RootConfig
from neurojepa.errors import CheckpointError, ConfigError
from neurojepa.model.build import build_model
from neurojepa.storage import Patience, append_rows, read_rows, sha256
from neurojepa.train import checkpoint, saver
from neurojepa.train.engine import Fragment
from neurojepa.train.resume import check_fits, check_same_run
from tests.helpers.feeds import GRID, tiny_config, write_feed
from tests.helpers.worker import job, run_ranks


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RootConfig, Path]:
    """A run of 6 steps with a checkpoint every 2, of which 2 are kept."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = tiny_config(write_feed(str(folder / "feed")), folder / "run", steps=6,
                         checkpoint_every=2, keep_last=2)
    (process,) = run_ranks([job(config, folder)], folder)
    assert process.returncode == 0, process.stdout
    return config, folder / "run"


@pytest.fixture
def run(finished: tuple[RootConfig, Path], tmp_path: Path) -> Path:
    """A copy of the run to spoil."""
    return Path(shutil.copytree(finished[1], tmp_path / "run"))


def test_only_the_last_ones_are_kept(run: Path) -> None:
    assert checkpoint.committed_steps(str(run)) == [4, 6]
    assert (run / "latest").read_text() == "step-6"
    assert not list(run.rglob("*.tmp"))


def test_without_its_manifest_a_checkpoint_does_not_count(run: Path) -> None:
    (run / "checkpoints" / "step-6" / "manifest.json").unlink()
    assert checkpoint.committed_steps(str(run)) == [4]
    with pytest.raises(CheckpointError, match=r"says 'step-6'.*step-4"):
        checkpoint.latest_step(str(run))
    (run / "latest").unlink()
    assert checkpoint.latest_step(str(run)) == 4


def test_an_empty_run_has_no_latest(tmp_path: Path) -> None:
    assert checkpoint.latest_step(str(tmp_path / "none")) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_is_named_with_the_way_back(run: Path, damage: str) -> None:
    file = next((run / "checkpoints" / "step-6").glob("rank-00000-*.exp_avg.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(CheckpointError, match=r"rank-00000.*step-6 is damaged.*step-4.*latest"):
        checkpoint.open_checkpoint(str(run), 6).state_sha256()


def test_reading_by_range_joins_what_ranks_wrote(run: Path) -> None:
    found = checkpoint.open_checkpoint(str(run), 6)
    name, whole = max(found.parameters("master").items(), key=lambda item: item[1].numel())
    flat = whole.flatten()
    part = found.read(fragment(name, tuple(whole.shape), start=5, length=11), "master")
    assert part.equal(flat[5:16])
    with pytest.raises(CheckpointError, match="another model"):
        found.read(fragment(name, (), start=len(flat) - 2, length=3), "master")
    with pytest.raises(CheckpointError, match="0 of 1 values of nothing"):
        found.read(fragment("nothing", (1,), start=0, length=1), "master")


def test_the_state_hash_sees_a_single_bit_and_no_file_layout(run: Path) -> None:
    found = checkpoint.open_checkpoint(str(run), 6)
    assert found.state_sha256() == read_rows(str(run / "events.jsonl"))[-1]["state_sha256"]
    found.manifest["adam_step"] += 1
    assert found.state_sha256() != read_rows(str(run / "events.jsonl"))[-1]["state_sha256"]


def test_an_unreadable_manifest(run: Path) -> None:
    manifest = run / "checkpoints" / "step-6" / "manifest.json"
    manifest.write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match=r"manifest.json: format 99"):
        checkpoint.open_checkpoint(str(run), 6)
    manifest.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.open_checkpoint(str(run), 6)


def test_too_little_space_is_said_before_writing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda path: usage(1, 1, 3 * 2**20))
    saver._check_space(str(tmp_path / "step-1"), 2**20)
    with pytest.raises(CheckpointError, match=r"3 MiB free.*needs 10 MiB"):
        saver._check_space(str(tmp_path / "step-1"), 10 * 2**20)


def test_files_are_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    tensors = {"a|0": torch.arange(7.0), "b|3": torch.zeros(0), "c": torch.ones(2, 3).bfloat16()}
    found = saver._write_files(str(tmp_path), {"x.safetensors": tensors}, Patience(0))
    data = (tmp_path / "x.safetensors").read_bytes()
    assert found["x.safetensors"] == {"size": len(data), "sha256": sha256(data)}
    read = safetensors.torch.load(data)
    assert read.keys() == tensors.keys()
    assert all(read[name].equal(tensor) for name, tensor in tensors.items())


@pytest.mark.slow(6)
def test_strangers_of_a_killed_attempt_are_removed_and_milestones_stay(
        finished: tuple[RootConfig, Path], tmp_path: Path) -> None:
    config, _ = finished
    config = config.model_copy(update={
        "run": config.run.model_copy(update={"dir": str(tmp_path / "run")}),
        "train": config.train.model_copy(update={"keep_last": 1, "milestone_every": 2})})
    left = tmp_path / "run" / "checkpoints" / "step-4" / "rank-00000-dead.ema.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    (process,) = run_ranks([job(config, tmp_path)], tmp_path)
    assert process.returncode == 0, process.stdout
    assert checkpoint.committed_steps(str(tmp_path / "run")) == [2, 4, 6]
    assert not left.exists()
    assert weights.load(str(tmp_path / "run" / "weights" / "step-4")).step == 4
    events = read_rows(str(tmp_path / "run" / "events.jsonl"))
    assert [row["step"] for row in events if row["event"] == "checkpoint"] == [2, 4, 6]


def test_verify_names_what_is_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert weights.main(["verify", str(run)]) == 0
    file = next((run / "checkpoints" / "step-4").glob("buffers-*.safetensors"))
    file.write_bytes(b"x" + file.read_bytes()[1:])
    assert weights.main(["verify", str(run)]) == 1
    said = capsys.readouterr().out
    assert "step-6: whole" in said
    assert file.name in said
    (run / "checkpoints" / "step-4" / "manifest.json").write_bytes(b"{")
    assert weights.main(["verify", str(run)]) == 1
    assert "step-4/manifest.json: cannot be read" in capsys.readouterr().out


def test_verify_of_a_live_run_calls_a_removed_checkpoint_removed(
        run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def late(run_dir: str, step: int) -> checkpoint.Checkpoint:
        if step == 4:  # the run's next checkpoint ends this one
            checkpoint.remove(run_dir, step)
        return open_checkpoint(run_dir, step)

    open_checkpoint = checkpoint.open_checkpoint
    monkeypatch.setattr(checkpoint, "open_checkpoint", late)
    assert weights.main(["verify", str(run)]) == 0
    said = capsys.readouterr().out
    assert "step-4: removed by the run meanwhile" in said and "step-6: whole" in said


def test_another_run_is_refused_with_both_values(finished: tuple[RootConfig, Path]) -> None:
    config, run = finished
    found = checkpoint.open_checkpoint(str(run), 6)
    same = fingerprints(found)
    tree = config.model_dump(mode="json")

    def changed(section: str, **values: object) -> RootConfig:
        return RootConfig.model_validate({**tree, section: {**tree[section], **values}})

    for free in (config, changed("train", zero=3, micro_batch=1, log_every=1, steps=9),
                 changed("run", ranks=4), changed("data", feed="elsewhere", read_threads=1)):
        check_same_run(found, free, same)
    for section, values, message in (
            ("model", {"size": "small"}, r"model.size: checkpoint 'tiny', now 'small'"),
            ("train", {"seed": 5, "global_batch": 8},
             r"train.global_batch: checkpoint 4, now 8; train.seed: checkpoint 0, now 5"),
            ("train", {"steps": 5}, r"train.steps = 5: .* at step 6 already"),
            ("data", {"weights": {"blobs/T1w": 1.0}}, r"data.weights: checkpoint {}, now")):
        with pytest.raises(ConfigError, match=message):
            check_same_run(found, changed(section, **values), same)
    for name, value in same.items():
        said = f"{name} fingerprint: checkpoint {value}, now other"
        with pytest.raises(ConfigError, match=said):
            check_same_run(found, config, same | {name: "other"})


def test_changes_are_listed_where_they_are_accepted(finished: tuple[RootConfig, Path]) -> None:
    config, run = finished
    found = checkpoint.open_checkpoint(str(run), 6)
    tree = config.model_dump(mode="json")

    def accepting(**sections: dict[str, object]) -> RootConfig:
        sections["run"] = {"accept_changes": True}
        return RootConfig.model_validate(
            tree | {name: {**tree[name], **values} for name, values in sections.items()})

    changed = accepting(optim={"lr": 0.01}, train={"global_batch": 8})
    assert check_same_run(found, changed, fingerprints(found) | {"feed": "other"}) == [
        "optim.lr: checkpoint 0.0005, now 0.01", "train.global_batch: checkpoint 4, now 8",
        f"feed fingerprint: checkpoint {found.manifest['feed']}, now other"]
    assert check_same_run(found, accepting(), fingerprints(found)) == []
    with pytest.raises(ConfigError, match=r"optim.lr.*run\.accept_changes=true"):
        check_same_run(found, accepting(optim={"lr": 0.01}).model_copy(
            update={"run": config.run}), fingerprints(found))
    with pytest.raises(ConfigError, match=r"train\.steps = 5: .* is at step 6 already"):
        check_same_run(found, accepting(train={"steps": 5}), fingerprints(found))

    check_fits(found, build_model(changed, GRID))
    for section, values, message in (
            ("model", {"patch_voxels": 4}, r"encoder\.patch\.weight \[\d+, 216\] -> \[\d+, 64\]"),
            ("model", {"size": "small"}, r"and \d+ more"),
            ("objective", {"method": "mae"}, r"code\.\w+ \[.*\] -> absent")):
        model = build_model(accepting(**{section: values}), GRID)
        with pytest.raises(ConfigError, match=f"another model.*{message}"):
            check_fits(found, model)


def fragment(name: str, shape: tuple[int, ...], *, start: int, length: int) -> Fragment:
    return Fragment(name=name, shape=shape, start=start, length=length, flat=0, offset=0)


def fingerprints(found: checkpoint.Checkpoint) -> dict[str, str]:
    return {name: found.manifest[name] for name in ("feed", "order", "regions")}


def test_rows_survive_a_cut_last_line(tmp_path: Path) -> None:
    uri = str(tmp_path / "sub" / "rows.jsonl")
    append_rows(uri, [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": float("nan")}])
    with open(uri, "a") as file:
        file.write('{"step": 3, "lo')
    assert read_rows(uri) == [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": None}]
    append_rows(uri, [{"step": 3}])
    lines = Path(uri).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
