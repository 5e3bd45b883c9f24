"""The engine against a plain torch loop, and its state at other world sizes and ZeRO stages."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from neurojepa.config import RootConfig
from neurojepa.feed.format import open_feed
from neurojepa.feed.loader import Loader
from neurojepa.model.build import build_model
from neurojepa.model.moe import moe_layers, update_router_bias
from neurojepa.objective.views import make_views
from neurojepa.storage import read_rows
from neurojepa.train.checkpoint import Checkpoint, open_checkpoint
from neurojepa.train.engine import param_groups
from neurojepa.train.schedule import rates_at
from tests.helpers.feeds import tiny_config, write_feed
from tests.helpers.worker import deaden, job, run_ranks

pytestmark = pytest.mark.slow(8)

VARIANTS = {f"{dtype}-zero{zero}": {"dtype": dtype, "zero": zero}
            for dtype, zero in (("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 3))}
OFFLOADED = {f"{dtype}-zero{zero}-{what}": {"dtype": dtype, "zero": zero, "offload": what}
             for dtype, zero, what in (("fp32", 2, "optimizer"), ("fp32", 3, "optimizer"),
                                       ("fp32", 3, "all"), ("bf16", 3, "all"))}
MIDDLE, END = 4, 8


def plain_loop(config: RootConfig, start: Callable[[Any], Any] = lambda model: model,
               ) -> dict[str, Any]:
    """The same training in a few lines of torch, without DeepSpeed: what the engine must equal.

    In bf16 the weights that compute are rounded copies of float32 masters, which begin rounded.
    """
    torch.set_num_threads(1)
    feed = open_feed(config.data.feed)
    master: Any = start(build_model(config, feed.grid))
    model = master if config.train.dtype == "fp32" else deepcopy(master)
    pairs = list(zip(master.parameters(), model.parameters(), strict=True))
    if model is not master:
        for exact, _ in pairs:
            exact.data = exact.detach().bfloat16().float()
    adam = torch.optim.AdamW(param_groups(master, config.optim.weight_decay),
                             betas=config.optim.betas)
    loader = Loader(feed, config, rank=0, world=1, first_step=0)
    batches, losses = iter(loader), []
    for step in range(config.train.steps):
        if model is not master:
            for exact, rounded in pairs:
                rounded.data = exact.detach().bfloat16()
        rates, total = rates_at(step, config), 0.0
        for _ in range(loader.micro_steps):
            views = make_views(next(batches), config, feed.grid, config.train.seed)
            loss = model(views, rates.l1)[0] / config.train.global_batch
            loss.backward()
            total += loss.item()
            for exact, rounded in pairs:
                if rounded is not exact and rounded.grad is not None:
                    grad, rounded.grad = rounded.grad.float(), None
                    exact.grad = grad if exact.grad is None else exact.grad + grad
        torch.nn.utils.clip_grad_norm_([p for g in adam.param_groups for p in g["params"]],
                                       config.optim.grad_clip)
        for group in adam.param_groups:
            group["lr"] = rates.lr
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            for target, source in zip(master.target.parameters(), master.encoder.parameters(),
                                      strict=True):
                target.lerp_(source, 1 - rates.ema)
        layers = moe_layers(model)
        update_router_bias(layers, torch.stack([layer.load for layer in layers]),
                           config.optim.router_bias_rate)
        model.code.update_usage(model.code.active, applied=True)
        losses.append(total)
    loader.close()
    return {"losses": losses, "model": master}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs: every variant at 2 ranks, two at 1 rank, two poisoned."""
    folder = tmp_path_factory.mktemp("engine")
    feed = write_feed(str(folder / "feed"))

    def named(name: str, **train: Any) -> dict[str, Any]:
        return job(tiny_config(feed, folder / name, **train), folder)

    two = [named(name, **train) for name, train in {**VARIANTS, **OFFLOADED}.items()]
    two += [named("filled", dtype="fp32", micro_batch=3)]  # 2 of 6 places repeat, with weight 0
    two += [{**named(f"poisoned{zero}", zero=zero), "poison": [2, 1]} for zero in (1, 3)]
    two += [{**named("poisoned-offloaded", zero=3, offload="all"), "poison": [2, 1]}]
    two += [{**named(f"starved{zero}", zero=zero, dtype="fp32"), "starve": True}
            for zero in (1, 3)]

    def gated(name: str, **train: Any) -> dict[str, Any]:
        return {**job(with_gates(tiny_config(feed, folder / name, **train)), folder),
                "deaden": True}

    two += [gated(f"gated{zero}", zero=zero, dtype="fp32") for zero in (1, 3)]
    two += [gated("gated-bf16", zero=3, dtype="bf16")]
    expect_success(run_ranks(two, folder, ranks=2))
    three = [named(f"three-zero{zero}", zero=zero, dtype="fp32") for zero in (1, 3)]
    expect_success(run_ranks(three, folder, ranks=3))  # 2 of 6 places repeat, with weight 0
    one = [named("one", zero=1, dtype="fp32"), named("one-bf16", zero=1, dtype="bf16")]
    expect_success(run_ranks(one, folder))
    return folder


def expect_success(finished: list[Any]) -> None:
    for process in finished:
        assert process.returncode == 0, process.stdout


def config_of(runs: Path, run: str, **train: Any) -> RootConfig:
    return tiny_config(str(runs / "feed"), runs / run, **train)


def with_gates(config: RootConfig) -> RootConfig:
    sparse = config.objective.sparse.model_copy(update={"code": "gated"})
    return config.model_copy(update={
        "objective": config.objective.model_copy(update={"sparse": sparse})})


def losses(runs: Path, run: str) -> list[float]:
    rows = read_rows(str(runs / run / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, END + 1))
    return [row["loss"] for row in rows]


def final(runs: Path, run: str) -> Checkpoint:
    return open_checkpoint(str(runs / run), END)


def test_engine_equals_the_plain_loop(runs: Path) -> None:
    oracle = plain_loop(config_of(runs, "oracle", dtype="fp32"))
    parameters = dict(oracle["model"].named_parameters())
    for run in ("fp32-zero1", "fp32-zero2", "fp32-zero3", "one", "filled", "three-zero1",
                "three-zero3"):
        assert losses(runs, run) == pytest.approx(oracle["losses"], abs=1e-5)
        masters, ema = final(runs, run).parameters("master"), final(runs, run).parameters("ema")
        assert set(masters) == {n for n in parameters if not n.startswith("target.")}
        assert set(ema) == {n for n in parameters if n.startswith("encoder.")}
        for name, tensor in ema.items():
            target = parameters[name.replace("encoder.", "target.", 1)]
            torch.testing.assert_close(tensor, target.detach(), atol=1e-5, rtol=0)
        for name, tensor in masters.items():
            torch.testing.assert_close(tensor, parameters[name].detach(), atol=1e-5, rtol=0)
        stored = final(runs, run).buffers()
        router_bias = {n: t for n, t in oracle["model"].named_buffers()
                       if n.startswith("encoder.") and n.endswith(".bias")}
        assert len(router_bias) == len(moe_layers(oracle["model"]))
        for name, tensor in router_bias.items():
            torch.testing.assert_close(stored[name], tensor)


def test_the_target_moves_under_every_stage(runs: Path) -> None:
    for run in ("fp32-zero1", "fp32-zero3", "bf16-zero3", "three-zero3"):
        ema = final(runs, run).parameters("ema")
        first = dict(build_model(config_of(runs, run), open_feed(
            str(runs / "feed")).grid).named_parameters())
        name = max(ema, key=lambda name: ema[name].numel())
        assert not torch.allclose(ema[name], first[name].detach(), atol=1e-4, rtol=0)


def test_an_expert_without_tokens_hangs_no_stage(runs: Path) -> None:
    assert losses(runs, "starved1") == pytest.approx(losses(runs, "starved3"), abs=1e-5)
    assert losses(runs, "starved1") != losses(runs, "fp32-zero1")
    ends, config = final(runs, "starved3").parameters("master"), config_of(runs, "starved3")
    decay = math.prod(1 - rates_at(step, config).lr * config.optim.weight_decay
                      for step in range(config.train.steps))
    for name, start in build_model(config, open_feed(
            str(runs / "feed")).grid).named_parameters():
        if name.endswith(".w1") and name.startswith("encoder."):
            moved = (ends[name] - decay * start.detach()).abs().amax((1, 2))
            assert moved[0] < 1e-7 and moved[1:].min() > 1e-5  # only decay reached the first expert


def test_a_gated_code_with_dead_atoms_equals_the_plain_loop(runs: Path) -> None:
    oracle = plain_loop(with_gates(config_of(runs, "oracle", dtype="fp32")), start=deaden)
    parameters = dict(oracle["model"].named_parameters())
    for run in ("gated1", "gated3"):
        assert losses(runs, run) == pytest.approx(oracle["losses"], abs=1e-5)
        masters, buffers = final(runs, run).parameters("master"), final(runs, run).buffers()
        for name, tensor in masters.items():
            torch.testing.assert_close(tensor, parameters[name].detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(buffers["code.usage"], oracle["model"].code.usage)
        assert masters["code.gate_bias"][::2].mean() > -0.0995  # on their way back
    rounded = plain_loop(with_gates(config_of(runs, "rounded", dtype="bf16")), start=deaden)
    assert losses(runs, "gated-bf16") == pytest.approx(rounded["losses"], abs=2e-3)
    assert final(runs, "gated-bf16").buffers()["code.usage"].dtype == torch.float32


def test_bf16_equals_the_plain_loop_and_keeps_fp32_state(runs: Path) -> None:
    oracle = plain_loop(config_of(runs, "rounded", dtype="bf16"))
    for run in ("bf16-zero1", "bf16-zero3", "one-bf16"):
        assert losses(runs, run) == pytest.approx(oracle["losses"], abs=2e-3)
        assert losses(runs, run)[:3] == pytest.approx(oracle["losses"][:3], abs=1e-5)
        buffers = {name: tensor for name, tensor in final(runs, run).buffers().items()
                   if not name.startswith("health.")}
        tensors = {**final(runs, run).parameters("ema"), **buffers}
        assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_offloading_changes_nothing_but_the_last_bits(runs: Path) -> None:
    for run, train in OFFLOADED.items():
        plain = f"{train['dtype']}-zero{train['zero']}"
        tolerance = 2e-3 if train["dtype"] == "bf16" else 1e-5  # the norm is summed otherwise
        assert losses(runs, run) == pytest.approx(losses(runs, plain), abs=tolerance), run
    assert (final(runs, "fp32-zero3-all").state_sha256()
            == final(runs, "fp32-zero3-optimizer").state_sha256())


def test_nan_on_one_rank_skips_the_step_on_all(runs: Path) -> None:
    clean = losses(runs, "fp32-zero1")
    for run in ("poisoned1", "poisoned3", "poisoned-offloaded"):
        rows = read_rows(str(runs / run / "metrics.jsonl"))
        assert [row["skipped"] for row in rows] == [step == 2 for step in range(END)]
        assert rows[2]["loss"] is None  # not finite
        assert [row["loss"] for row in rows[:2]] == pytest.approx(clean[:2], abs=1e-5)
        assert all(row["loss"] is not None for row in rows[3:])
        assert final(runs, run).manifest["adam_step"] == END - 1
        assert final(runs, run).manifest["health"]["skipped"] == 1
        events = read_rows(str(runs / run / "events.jsonl"))
        assert [e["step"] for e in events if e["event"] == "skip"] == [3]
    assert losses_after(runs, "poisoned1") == pytest.approx(losses_after(runs, "poisoned3"),
                                                            abs=1e-5)


def losses_after(runs: Path, run: str) -> list[float]:
    return [row["loss"] for row in read_rows(str(runs / run / "metrics.jsonl"))[3:]]


def back_at_the_middle(runs: Path, run: str, copy: str) -> None:
    """A copy of a run as it was at its middle checkpoint."""
    shutil.copytree(runs / run, runs / copy)
    shutil.rmtree(runs / copy / "checkpoints" / f"step-{END}")
    (runs / copy / "latest").write_text(f"step-{MIDDLE}")


def test_continuation_is_bit_equal_and_other_worlds_follow(runs: Path) -> None:
    same = {f"{run}-again": run for run in {**VARIANTS, **OFFLOADED}}
    other_two = {"one-at-2": ("one", {"zero": 2}), "one-to-3": ("one", {"zero": 3}),
                 "1-to-3": ("fp32-zero1", {"zero": 3}), "3-to-2": ("fp32-zero3", {"zero": 2}),
                 "bf16-3-to-1": ("bf16-zero3", {"zero": 1, "dtype": "bf16"}),
                 "to-host": ("fp32-zero1", {"zero": 2, "offload": "optimizer"}),
                 "from-host": ("fp32-zero3-all", {"zero": 1})}
    other_one = {"host-at-1": ("fp32-zero2-optimizer", {"zero": 3, "offload": "all"}),
                 "3-at-1": ("fp32-zero3", {"zero": 1}), "2-at-1": ("fp32-zero2", {"zero": 3}),
                 "one-again": ("one", {"zero": 1})}
    for copy, run in same.items():
        back_at_the_middle(runs, run, copy)
    for copy, (run, _) in {**other_two, **other_one}.items():
        back_at_the_middle(runs, run, copy)
    jobs = [job(config_of(runs, copy, **{**VARIANTS, **OFFLOADED}[run]), runs)
            for copy, run in same.items()]
    jobs += [job(config_of(runs, copy, **train), runs) for copy, (_, train) in other_two.items()]
    expect_success(run_ranks(jobs, runs, ranks=2))
    jobs = [job(config_of(runs, copy, **train), runs) for copy, (_, train) in other_one.items()]
    expect_success(run_ranks(jobs, runs))

    for copy, run in {**same, "one-again": "one"}.items():
        assert losses(runs, copy) == losses(runs, run), copy
        assert final(runs, copy).state_sha256() == final(runs, run).state_sha256(), copy
        assert finish_of(runs, copy)["state_sha256"] == finish_of(runs, run)["state_sha256"]
    for copy, (run, train) in {**other_two, **other_one}.items():
        tolerance = 2e-3 if train.get("dtype") == "bf16" else 1e-5
        assert losses(runs, copy) == pytest.approx(losses(runs, run), abs=tolerance), copy


def finish_of(runs: Path, run: str) -> dict[str, Any]:
    return read_rows(str(runs / run / "events.jsonl"))[-1]


def test_loading_elsewhere_restores_every_bit(runs: Path) -> None:
    changes = {"a": ("fp32-zero1", {"zero": 3}), "b": ("fp32-zero3", {"zero": 2}),
               "c": ("bf16-zero3", {"zero": 1, "dtype": "bf16"}),
               "d": ("bf16-zero1", {"zero": 3, "dtype": "bf16", "offload": "all"}),
               "e": ("one", {"zero": 3})}
    jobs = []
    for name, (run, train) in changes.items():
        shutil.copytree(runs / run, runs / name)
        jobs.append(job(config_of(runs, name, **train), runs, resave=str(runs / f"{name}-out")))
    expect_success(run_ranks(jobs[:3], runs))  # 2 -> 1 ranks
    expect_success(run_ranks(jobs[3:], runs, ranks=2))  # d: other stage, e: 1 -> 2 ranks
    for name, (run, _) in changes.items():
        out = open_checkpoint(str(runs / f"{name}-out"), END)
        assert out.state_sha256() == final(runs, run).state_sha256(), name
        assert out.manifest["world"] == (1 if name in "abc" else 2)
        assert json.dumps(out.manifest["config"]["model"]) == json.dumps(
            final(runs, run).manifest["config"]["model"])
