"""The dry run's estimates against what a run leaves behind and what torch counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from neurojepa.config import RootConfig, dump_config, validate
from neurojepa.dry_run import (
    Plan,
    activation_bytes,
    largest_micro_batch,
    plan,
    render_fit,
    state_bytes,
)
from neurojepa.errors import ConfigError
from neurojepa.feed.format import LABELS_SCHEMA, commit_feed, open_feed
from neurojepa.feed.loader import Loader
from neurojepa.methods import METHODS
from neurojepa.model.build import build_model
from neurojepa.model.flops import peak_flops
from neurojepa.objective.views import make_views
from neurojepa.pretrain import main
from neurojepa.train.checkpoint import open_checkpoint
from neurojepa.train.engine import STATE_KEYS
from tests.helpers.feeds import GRID, tiny_config, write_feed


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = write_feed(str(tmp_path_factory.mktemp("dry") / "feed"))
    index = open_feed(uri).index
    labels = [{"participant": row["participant"], "session": "", "name": "size",
               "value": str(row["num_foreground"])} for row in index.to_pylist()]
    commit_feed(uri, GRID, rows=index,
                labels=pa.Table.from_pylist(labels, schema=LABELS_SCHEMA))
    return uri


def plan_of(config: RootConfig, gpus: int = 1) -> Plan:
    return plan(config, open_feed(config.data.feed), gpus, "h100", 0.4)


@pytest.mark.slow(7)
def test_sizes_of_a_real_run(feed: str, tmp_path: Path, run_cli: Any) -> None:
    config = tiny_config(feed, tmp_path / "run", steps=2, checkpoint_every=2)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(config))
    done = run_cli("-m", "neurojepa.pretrain", "--config", str(recipe))
    assert done.returncode == 0, done.stderr

    found = plan_of(config)
    checkpoint = open_checkpoint(str(tmp_path / "run"), 2)
    tensors = {key: checkpoint.parameters(key) for key in STATE_KEYS}
    assert sum(tensor.numel() for tensor in tensors["master"].values()) == found.weights.trained
    held = sum(tensor.nbytes for part in tensors.values() for tensor in part.values())
    assert held == state_bytes(found.weights) == found.memory[1]["state"]
    folder = tmp_path / "run" / "checkpoints" / "step-2"
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert size == pytest.approx(found.checkpoint, rel=0.02)


def test_what_is_offloaded_moves_to_the_host(feed: str, tmp_path: Path) -> None:
    plain = plan_of(tiny_config(feed, tmp_path, zero=3, dtype="fp32"), gpus=2)
    assert plain.host["offloaded"] == 0
    for what, names in (("optimizer", ["gradients", "state"]),
                        ("all", ["weights", "gradients", "state"])):
        found = plan_of(tiny_config(feed, tmp_path, zero=3, dtype="fp32", offload=what), gpus=2)
        assert found.host["offloaded"] == sum(plain.memory[3][name] for name in names) > 0
        assert found.memory[3] == {**plain.memory[3], **dict.fromkeys(names, 0.0)}
        assert found.memory[2]["weights"] == plain.memory[2]["weights"]


def of_method(config: RootConfig, method: str, **model: Any) -> RootConfig:
    tree = config.model_dump(mode="json")
    tree["objective"] |= {"method": method, "label": "size"}
    tree["model"] |= model
    if METHODS[method].whole_volumes:
        tree["model"]["token_budget"] = None
    return validate(tree, "tests")


@pytest.mark.parametrize("method", METHODS)
def test_flops_are_those_that_torch_counts(feed: str, tmp_path: Path, method: str) -> None:
    config = of_method(tiny_config(feed, tmp_path), method, moe=False)
    model = build_model(config, GRID)
    labels = METHODS[method].load().labels(open_feed(feed), config)
    batch = next(iter(Loader(open_feed(feed), config, rank=0, world=1, first_step=0)))
    views = make_views(batch, config, GRID, 0)
    views = labels.attach(views, batch.scan_ids) if labels else views
    with (FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad(),
          torch.backends.mkldnn.flags(enabled=False)):  # whose products torch does not count
        model(views, 0.0)
    forward, trained = METHODS[method].load().flops(config, GRID)
    assert trained < forward if METHODS[method].latents else trained == forward
    # the covariance of the targets is left out
    assert counter.get_total_flops() / len(batch.scan_ids) == pytest.approx(forward, rel=0.02)


def test_activations_shrink_with_checkpointing_and_grow_with_the_batch(
        feed: str, tmp_path: Path) -> None:
    config, opened = tiny_config(feed, tmp_path), open_feed(feed)
    none, all_blocks, second, selective = (activation_bytes(config, opened, every)
                                           for every in (0, 1, 2, "selective"))
    assert all_blocks < second < none and selective < none
    double = tiny_config(feed, tmp_path, micro_batch=4)
    assert 1.6 * none < activation_bytes(double, opened, 0) <= 2 * none


MEASURE = """
import gc, json, sys
import torch
from neurojepa import dry_run
from neurojepa.config import load_config
from neurojepa.planning.memory import Live
from neurojepa.planning import reduction
from neurojepa.train.loop import Run
from neurojepa.train.world import start_world

reduction.USUAL_BUCKET = 200_000  # as for a model of this size

def storages():
    tensors = [item for item in gc.get_objects()
               if type(item) in (torch.Tensor, torch.nn.Parameter)]
    found = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in found}

def read_ahead(run):  # which on a GPU waits in the host's memory
    return sum(batch.voxels.nbytes for batch, _ in run.loader._ahead)

world, result = start_world(), []
for recipe in sys.argv[1:]:
    config, before = load_config(recipe), storages()
    run = Run(config, world)
    run._train_step(), run._train_step(), gc.collect()
    kept = sum(size for key, size in storages().items() if key not in before) - read_ahead(run)
    live = Live()
    with live:
        run._train_step()
    found = dry_run.plan(config, run.feed, 1, "h100", 0.4)
    result.append([kept + live.peak, dry_run.peak_bytes(
        found.memory[config.train.zero], found.activations[config.model.activation_checkpointing],
        found.micro_steps)])
    run.close()
print(json.dumps(result))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow(10)
def test_the_peak_of_a_real_step_is_the_plans(feed: str, tmp_path: Path, run_cli: Any) -> None:
    recipes = []
    for number, (every, train) in enumerate((
            (0, {}), ("selective", {}), (0, {"micro_batch": 12}))):
        config = of_method(tiny_config(feed, tmp_path / f"run{number}", **{
            "dtype": "bf16", "zero": 2, "micro_batch": 24, "global_batch": 24, **train}), "jepa",
            activation_checkpointing=every)
        recipes.append(tmp_path / f"{number}.yaml")
        recipes[-1].write_text(dump_config(config))
    done = run_cli("-c", MEASURE, *map(str, recipes))
    assert done.returncode == 0, done.stderr[-3000:]
    for measured, planned in json.loads(done.stdout.splitlines()[-1]):
        assert planned == pytest.approx(measured, rel=0.05)


@pytest.mark.slow(16)
def test_the_largest_micro_batch_fits_and_one_more_does_not(
        feed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, opened, room = tiny_config(feed, tmp_path), open_feed(feed), 50e6
    found = {}
    for every in (0, "selective"):
        scans, needed = largest_micro_batch(config, opened, every, room)
        assert needed <= room < activation_bytes(config, opened, every, scans + 1)
        assert needed == activation_bytes(config, opened, every, scans)
        found[every] = scans
    assert found["selective"] > found[0] > 4
    assert largest_micro_batch(config, opened, 0, 1e5)[0] == 0
    lines = render_fit(config, opened, 1, "h100")
    assert "on 1 x h100 (80 GiB, of which 92% may be filled" in lines[0]
    assert lines[1].startswith("  model.activation_checkpointing=0: train.micro_batch=")


def test_memory_by_stage(feed: str, tmp_path: Path) -> None:
    found = plan_of(tiny_config(feed, tmp_path, global_batch=8, dtype="bf16"), gpus=4)
    whole, parts = found.weights.trained, found.weights.parts
    assert found.memory[1]["weights"] == found.memory[2]["weights"] == \
        2 * (whole + parts["encoder"]) == 4 * found.memory[3]["weights"]
    assert {found.memory[stage]["state"] for stage in (1, 2, 3)} == {
        (12 * whole + 4 * parts["encoder"]) / 4}
    assert found.weights.active["encoder"] < parts["encoder"]
    assert found.weights.active["predictor"] == parts["predictor"]
    assert found.micro_steps == 1 and found.filled == 1


@pytest.mark.slow(5)
def test_the_command_reads_no_voxels(feed: str, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(feed, tmp_path / "feed")
    shutil.rmtree(tmp_path / "feed" / "shards")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(tiny_config(str(tmp_path / "feed"), tmp_path / "run")))
    arguments = ["--config", str(recipe), "--dry-run", "--gpus", "3", "train.steps=600"]
    assert main([*arguments, "model.size=large", "train.micro_batch=1"]) == 0
    text = capsys.readouterr().out
    assert "600 steps, 100.0 epochs" in text  # 4 of 24 scans a step
    assert "ranks: 3, 2 micro-step(s) of 1; 33.3% of the compute fills up" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("gpus", "device", "mfu", "message"), [
    (1, "h1000", 0.4, "--device h1000: not known; one of B200"),
    (1, "H100", 1.4, "--mfu 1.4: a share of the peak lies in"),
    (5, "h100", 0.4, "--gpus 5: .* train.global_batch = 4"),
])
def test_what_cannot_be_planned(feed: str, tmp_path: Path, gpus: int, device: str, mfu: float,
                                message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(tiny_config(feed, tmp_path), open_feed(feed), gpus, device, mfu)


@pytest.mark.parametrize("given", [
    ["--fit"], ["--gpus", "8"], ["--device", "h100"], ["--mfu", "0.4"],
    ["--network", "efa", "--gpus", "8"]])
def test_a_question_about_the_plan_starts_no_training(given: list[str]) -> None:
    names = ", ".join(sorted(each for each in given if each[0] == "-"))
    with pytest.raises(ConfigError, match=f"^{names}: only for --dry-run; add that to plan"):
        main(["--config", "demo", *given, "data.feed=none", "run.dir=none"])


def test_every_method_is_planned(feed: str, tmp_path: Path) -> None:
    plans = {method: plan_of(of_method(tiny_config(feed, tmp_path), method)) for method in METHODS}
    for method, found in plans.items():
        parts = build_model(of_method(tiny_config(feed, tmp_path), method), GRID)
        assert found.weights.trained == sum(p.numel() for p in parts.parameters()
                                            if p.requires_grad)
        assert found.activations[0] > 0 and found.flops_per_volume > 0
    assert plans["mae"].flops_per_volume < plans["jepa"].flops_per_volume
    assert plans["mae"].activations[0] < plans["jepa"].activations[0]  # one mask for two


def test_peaks_by_the_name_of_the_device() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("cpu") is None
