"""Regions become one graph each, once, and compute what they did before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from neurojepa.baselines.cnn import LabelledViews
from neurojepa.config import RootConfig, validate
from neurojepa.methods import METHODS
from neurojepa.model.build import build_model
from neurojepa.objective.views import Views, make_views
from neurojepa.train import compiling
from neurojepa.train.compiling import choose, compile_regions
from tests.helpers.batches import GRID, make_batch, make_config
from tests.helpers.feeds import write_feed

STEPS = 3
CUDA = torch.device("cuda")


def config_of(method: str, **model: Any) -> RootConfig:
    whole = METHODS[method].whole_volumes
    return make_config(objective={"method": method}, model={
        "size": "tiny", "patch_voxels": 3, "token_budget": None if whole else 128, **model})


def views_of(step: int, config: RootConfig, build: compiling.Build | None) -> Views:
    batch = make_batch(2)
    batch.position = batch.position + step  # other masks and other noise
    batch.all_scanned = True
    views = make_views(batch, config, GRID, 0, build)
    if not METHODS[config.objective.method].whole_volumes:
        return views
    return LabelledViews(**vars(views), label_B=torch.tensor([-1.0, 1.0]), is_binary=False)


def assert_same(before: Views, ours: Views) -> None:
    """Masks, indices and flags to the bit; what is augmented to rounding."""
    for name, value in vars(before).items():
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            assert torch.equal(getattr(ours, name), value), name
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(ours, name), value)


@pytest.mark.slow(12)
@pytest.mark.parametrize(("method", "every", "graphs"), [
    ("jepa", 0, 8), ("jepa", 2, 8), ("jepa", "selective", 8), ("mae", 0, 6),
    ("mae", 2, 6), ("cnn", 0, 6)])
def test_every_region_is_one_graph_and_computes_the_same(
        method: str, every: int | str, graphs: int) -> None:
    """JEPA: dense and MoE blocks with and without gradient, predictor's blocks and its last one,
    losses, views."""
    torch._dynamo.reset()
    counters.clear()
    config = config_of(method, activation_checkpointing=every)
    plain, model = build_model(config, GRID), build_model(config, GRID)
    build = compile_regions(model, "aot_eager")
    seen = []
    for step in range(STEPS):
        before, ours = (views_of(step, config, made) for made in (None, build))
        assert_same(before, ours)
        losses = [net(views, 1e-3 * (step + 1))[0] for net, views in (
            (plain, before), (model, ours))]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
        seen.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert seen == [graphs] * STEPS  # none after the first step
    for weight, expected in zip(model.parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-4, atol=1e-5)


# ---- whole steps of the trainer ------------------------------------------------------------------

STEPS_OF = """
import json, sys
from torch._dynamo.utils import counters
from neurojepa.train import compiling
from neurojepa.train.loop import Run
from neurojepa.train.world import leave_world, start_world
from tests.helpers.feeds import tiny_config

compiling.BACKENDS["cpu"] = "eager"  # traced and run as it is: the quickest
world, found = start_world(), []
for folder, train in json.loads(sys.argv[2]).items():
    run = Run(tiny_config(sys.argv[1], folder, **train), world)
    step, graphs = run._train_step, []
    def counted():
        applied = step()
        graphs.append(counters["stats"]["unique_graphs"])
        return applied
    run._train_step = counted
    run.to_end()
    run.close()
    found.append({"graphs": graphs, "breaks": len(counters["graph_break"])})
print(json.dumps(found))
leave_world()
"""


def trained(run_cli: Any, feed: str, runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What a process that makes these runs counts in each; by folder, what differs of ``train``."""
    train = {"steps": 6, "checkpoint_every": 3, "log_every": 1}
    done = run_cli("-c", STEPS_OF, feed, json.dumps({
        folder: train | changes for folder, changes in runs.items()}))
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.slow(17)
def test_compiled_training_equals_plain_and_continues_to_the_bit(run_cli: Any,
                                                                 tmp_path: Path) -> None:
    feed, off, on = write_feed(str(tmp_path / "feed")), tmp_path / "off", tmp_path / "on"
    three = tmp_path / "three"
    plain, *compiled = trained(run_cli, feed, {
        str(off): {"compile": "off", "zero": 1}, str(on): {"zero": 2}, str(three): {"zero": 3}})
    assert plain["graphs"] == [0] * 6
    before, *others = ([row["loss"] for row in rows_of(folder, "metrics.jsonl")]
                       for folder in (off, on, three))
    for found, losses in zip(compiled, others, strict=True):
        assert found["breaks"] == 0 and found["graphs"][0] > 0
        assert len(set(found["graphs"][1:])) == 1, found
        assert len(losses) == 6 and losses == pytest.approx(before, abs=1e-5)
    assert compiled[1]["graphs"][0] > compiled[0]["graphs"][-1]  # ZeRO-3 has graphs of its own
    start = rows_of(on, "events.jsonl")[0]
    assert start["compiled"] == "eager, by region"

    again = tmp_path / "again"
    shutil.copytree(on, again)
    shutil.rmtree(again / "checkpoints" / "step-6")
    (again / "latest").write_text("step-3")
    trained(run_cli, feed, {str(again): {"zero": 2}})
    ends = [rows_of(folder, "events.jsonl")[-1]["state_sha256"] for folder in (on, again)]
    assert ends[0] == ends[1]


# ---- what is chosen ------------------------------------------------------------------------------

def chosen(device: torch.device, **train: Any) -> compiling.Choice:
    tree = make_config().model_dump(mode="json")
    tree["train"] |= train
    return choose(validate(tree, "tests"), device)


def test_a_gpu_compiles_and_a_cpu_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_missing", lambda _: "")
    assert chosen(CUDA).backend == "inductor"
    assert chosen(CUDA, compile="off") == compiling.Choice(None, "train.compile is off")
    assert chosen(torch.device("cpu")).backend is None


def test_what_is_missing_is_said_and_steps_stay_as_they_are(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda _: None)
    assert chosen(CUDA).backend is None and "triton is not installed" in chosen(CUDA).why
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(compiling.shutil, "which", lambda _: None)
    monkeypatch.delenv("CC", raising=False)
    assert "no C compiler (gcc, clang) is on the PATH" in chosen(CUDA).why
    monkeypatch.setenv("CC", "nowhere-cc")
    assert "no C compiler (nowhere-cc) is on the PATH" in chosen(CUDA).why
    monkeypatch.setattr(compiling.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda *_: "/nowhere")
    assert "/nowhere/Python.h of Python's development files is missing" in chosen(CUDA).why


def test_what_is_compiled_is_kept_with_the_run(monkeypatch: pytest.MonkeyPatch,
                                               tmp_path: Path) -> None:
    import torch._inductor.config as inductor

    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    tree = make_config().model_dump(mode="json")
    tree["run"] = {"dir": str(tmp_path / "run"), "deterministic": True}
    # inductor.patch, as monkeypatch would delete the setting at its end
    with inductor.patch(deterministic=False), monkeypatch.context() as patch:
        patch.setattr(compiling.os, "environ", found := {names[1]: "/elsewhere"})
        compiling.keep_compiled(validate(tree, "tests"))
        assert inductor.deterministic
    assert found == {names[0]: str(tmp_path / "run/compiled/inductor"), names[1]: "/elsewhere"}
