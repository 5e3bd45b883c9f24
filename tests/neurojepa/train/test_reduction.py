"""How two ranks sum their gradients: as planned, and how much a sum in bf16 differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from neurojepa.baselines.cnn import LabelledViews
from neurojepa.config import RootConfig
from neurojepa.feed.format import open_feed
from neurojepa.methods import METHODS
from neurojepa.model.build import build_model
from neurojepa.objective.views import make_views
from neurojepa.planning.network import PARTS
from neurojepa.planning.reduction import Reduction, arriving
from neurojepa.planning.scaling import messages_of
from neurojepa.planning.step import hollow_model
from neurojepa.train.engine import param_groups
from neurojepa.train.gathers import part_of
from tests.helpers.batches import GRID, make_batch, make_config
from tests.helpers.feeds import tiny_config, write_feed
from tests.helpers.worker import job, run_module

EXACT = {"overlap": False, "bucket": 100_000, "width": 4}
WAYS = {"exact": EXACT, "overlapped": {**EXACT, "overlap": True},
        "small": {"overlap": True, "bucket": 30_000, "width": 4},
        "bf16": {"overlap": True, "bucket": 100_000, "width": 2}}


def config_of(folder: Path, name: str) -> RootConfig:
    return tiny_config(str(folder / "feed"), folder / name, dtype="bf16", steps=6)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a rank of two did in each way, and what was planned."""
    folder = tmp_path_factory.mktemp("reduction")
    write_feed(str(folder / "feed"))
    jobs = [job(config_of(folder, name), folder, way=way) for name, way in WAYS.items()]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    for process in run_module("tests.helpers.collectives",
                              [str(folder / "jobs.json"), str(folder / "out.json")], 2):
        assert process.returncode == 0, process.stdout
    grid = open_feed(str(folder / "feed")).grid
    answers = dict(zip(WAYS, json.loads((folder / "out.json").read_text()), strict=True))
    for name, way in WAYS.items():
        answers[name]["planned"] = messages_of(config_of(folder, name), grid, 1, Reduction(**way))
    return answers


@pytest.mark.slow(14)
def test_the_engine_sends_what_the_plan_says(found: dict[str, dict[str, Any]]) -> None:
    for name, answer in found.items():
        assert answer["set"] == WAYS[name]
        planned = {message.name: message for message in answer["planned"]}
        # the loss, in float64, is the first that follows the backward
        behind = [dtype for _, _, dtype in answer["sent"]].index("torch.float64")
        gradients = [elements for _, elements, _ in answer["sent"][:behind]]
        assert {(kind, dtype) for kind, _, dtype in answer["sent"][:behind]} == {
            ("all_reduce", "torch.bfloat16" if WAYS[name]["width"] == 2 else "torch.float32")}
        assert sum(gradients) == planned["gradients"].elements
        # within a block gradients come in another order than the plan has them
        assert len(gradients) == pytest.approx(planned["gradients"].pieces, rel=0.1)
        assert gradients[-1] == planned["gradients"].last
        gathered = [elements for kind, elements, _ in answer["sent"] if kind != "all_reduce"]
        assert len(gathered) == planned["target"].pieces + planned["weights"].pieces
        # padded to a multiple of the ranks
        assert sum(gathered) == pytest.approx(
            planned["target"].elements + planned["weights"].elements, rel=1e-3)
        agreements = [elements for kind, elements, _ in answer["sent"][behind:]
                      if kind == "all_reduce"]
        assert len(agreements) == planned["agreements"].pieces and max(agreements) < 1000


def test_every_block_waits_for_its_weights_and_no_longer(found: dict[str, dict[str, Any]]) -> None:
    for answer in found.values():
        assert answer["order"] == ["part 0", "block 0", "part 1", "block 1", "part 2", "block 2",
                                   "part 3", "block 3", "weights", "encoder"]


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_the_encoder_follow_its_blocks(method: str) -> None:
    model = hollow_model(make_config(None, objective={"method": method}), GRID)
    groups = param_groups(model, 0.1)
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    assert sum(sizes) == sum(arriving(model))
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        assert len({part_of(names[id(p)], model) if names[id(p)].startswith("encoder.") else None
                    for p in group["params"]}) == 1
    parts = [part_of(f"encoder.blocks.{i}.x", model)
             for i in range(len(model.get_submodule("encoder.blocks")))]
    assert parts == sorted(parts) and parts[0] == part_of("encoder.norm.weight", model) == 0
    assert len(set(parts)) == min(PARTS, len(parts))


class Weights(TorchFunctionMode):
    """Notes the weights that operations take, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.taken += [id(leaf) for leaf in tree_leaves((args, kwargs))
                       if isinstance(leaf, nn.Parameter)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_no_method_takes_other_trained_weights_before_the_encoder_has_waited(method: str) -> None:
    """They are all on their way until its forward begins."""
    whole = METHODS[method].whole_volumes
    config = make_config(None if whole else 256, objective={"method": method})
    model = build_model(config, GRID)
    views = make_views(make_batch(2), config, GRID, 0)
    if whole:
        views = LabelledViews(**vars(views), label_B=torch.tensor([-1.0, 1.0]), is_binary=False)
    weights = Weights()
    model.encoder.register_forward_pre_hook(lambda *_: weights.taken.append(0))
    with weights:
        model(views, 0.0)
    names = {0: "waited"} | {id(p): name for name, p in model.named_parameters()}
    order = [names[taken] for taken in weights.taken]
    before = order[:order.index("waited")]
    assert all(name.startswith("target.") for name in before)
    assert {name for name, _ in model.encoder.named_parameters()} <= {
        name.removeprefix("encoder.") for name in order[len(before):]}


def test_travelling_beside_the_backward_changes_no_bit(found: dict[str, dict[str, Any]]) -> None:
    for name in ("overlapped", "small"):
        assert found[name]["gradient"] == found["exact"]["gradient"]
        assert found[name]["loss"] == found["exact"]["loss"]


def test_a_sum_in_bf16_is_off_by_its_rounding(found: dict[str, dict[str, Any]]) -> None:
    """bf16 keeps 8 bits: a sum of two is off by up to 2^-8 of itself."""
    exact, rounded = (torch.tensor(found[name]["gradient"]) for name in ("exact", "bf16"))
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 2**-8
    assert ((rounded - exact).abs() <= 2**-8 * exact.abs() + 1e-12).all()
    assert found["bf16"]["loss"] == pytest.approx(found["exact"]["loss"], abs=2e-3)


@pytest.mark.parametrize(("ranks", "bound"), [(2, 0.002), (8, 0.004), (64, 0.012)])
def test_the_rounding_of_a_ring_grows_slowly(ranks: int, bound: float) -> None:
    """As a ring adds, rank after rank, here on random gradients that are bf16 themselves."""
    parts = torch.randn(ranks, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    ring = parts[0]
    for part in parts[1:]:
        ring = ring + part
    exact = parts.float().sum(0)
    assert bound / 4 < float((ring.float() - exact).norm() / exact.norm()) < bound
