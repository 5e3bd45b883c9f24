"""What a step sends, against sums worked by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from neurojepa.config import RunConfig, dump_config
from neurojepa.errors import ConfigError
from neurojepa.planning.network import (
    NETWORKS,
    Message,
    Network,
    agreements,
    buckets,
    gradients,
    step_on,
    weights,
)
from neurojepa.planning.reduction import Reduction
from neurojepa.planning.scaling import messages_of
from neurojepa.pretrain import main
from tests.helpers.batches import GRID, make_config
from tests.helpers.feeds import tiny_config, write_feed

PLAIN = Network(within=100e9, between=50e9, per_host=8, latency_s=0.0)
GRADIENTS = Message(name="gradients", collective="all_reduce", elements=1e9, width=4, pieces=1,
                    beside="backward", last=1e9)


@pytest.mark.parametrize(("collective", "ranks", "sent"), [
    ("all_reduce", 2, 4e9), ("all_reduce", 8, 7e9), ("reduce_scatter", 8, 3.5e9),
    ("all_gather", 4, 3e9), ("all_reduce", 1, 0.0)])
def test_a_ring_passes_its_part(collective: Any, ranks: int, sent: float) -> None:
    assert replace(GRADIENTS, collective=collective).sent(ranks) == sent


def test_the_slowest_link_and_every_message_count() -> None:
    assert GRADIENTS.seconds(1, PLAIN) == 0
    assert GRADIENTS.seconds(8, PLAIN) == pytest.approx(7e9 / 80e9)  # 0.8 of NVLink
    assert GRADIENTS.seconds(16, PLAIN) == pytest.approx(7.5e9 / 40e9)  # two hosts
    late = replace(PLAIN, latency_s=1e-3)
    ten = replace(GRADIENTS, pieces=10)
    assert ten.seconds(16, late) == pytest.approx(7.5e9 / 40e9 + 10 * 2e-3)
    assert agreements(moe=True).seconds(16, late) == pytest.approx(4 * 2e-3)


@pytest.mark.parametrize(("arriving", "pieces"), [
    ([40, 40, 40], [80, 40]), ([30, 90, 30], [30, 90, 30]), ([100], [100]), ([250, 1], [250, 1]),
    ([50, 50, 1], [100, 1]), ([], [])])
def test_whole_gradients_fill_buckets(arriving: list[int], pieces: list[int]) -> None:
    assert buckets(arriving, 100) == pieces


@pytest.mark.parametrize(("stage", "expected"), [
    (1, {"gradients": ("all_reduce", 400e6, 5), "weights": ("all_gather", 200e6, 10),
         "target": ("all_gather", 120e6, 8)}),
    (2, {"gradients": ("all_reduce", 1200e6, 15), "weights": ("all_gather", 200e6, 10),
         "target": ("all_gather", 120e6, 8)}),
    (3, {"gradients": ("reduce_scatter", 1200e6, 15), "weights": ("all_gather", 1560e6, 36)})])
def test_bytes_by_stage(stage: int, expected: dict[str, tuple[str, float, int]]) -> None:
    """100 M weights, 60 M of them the encoder's, bf16, three micro-steps."""
    found = [gradients([10_000_000] * 10, stage, 20_000_000, width=4, micro_steps=3),
             *weights(100_000_000, 60_000_000, stage, width=2, micro_steps=3, gathers=12)]
    assert {message.name: (message.collective, message.bytes, message.pieces)
            for message in found} == expected
    assert found[0].last == 20e6
    half = gradients([10_000_000] * 10, stage, 20_000_000, width=2, micro_steps=3)
    assert half.bytes == found[0].bytes / 2


def test_what_hides_costs_nothing_until_it_is_longer_than_the_backward() -> None:
    sent = [replace(GRADIENTS, pieces=10, last=1e8),
            Message(name="weights", collective="all_gather", elements=1e8, width=2, pieces=1,
                    beside="target")]
    gathered = sent[1].seconds(64, PLAIN)
    reduced = sent[0].seconds(64, PLAIN)
    plain, hidden, half = (step_on(64, PLAIN, sent, compute_s=1.0, backward_s=seconds)
                           for seconds in (0.0, 10.0, reduced / 2 / 0.9))
    assert plain.exposed_s == pytest.approx(reduced + gathered)
    assert hidden.exposed_s == pytest.approx(reduced / 10 + gathered)  # the last piece
    assert half.exposed_s == pytest.approx(reduced / 2 + gathered)
    assert hidden.efficiency > half.efficiency > plain.efficiency
    assert step_on(1, PLAIN, sent, compute_s=1.0).efficiency == 1


def test_weights_come_behind_the_targets_and_hide_with_them() -> None:
    target, rest = weights(10**8, 10**8, 2, width=2, micro_steps=1, gathers=0)
    each = target.seconds(64, PLAIN)
    assert each == rest.seconds(64, PLAIN)

    def exposed(views: float, forward: float) -> float:
        return step_on(64, PLAIN, [target, rest], compute_s=1.0, views_s=views * each / 0.9,
                       target_s=forward * each / 0.9).exposed_s / each

    # a quarter of the target's weights is needed before its first block, all before its last
    found = [exposed(*hidden) for hidden in (
        (0, 0), (0.5, 0), (1, 0), (1, 0.5), (1, 1), (0.25, 1), (0, 1), (0.5, 0.5), (5, 5))]
    assert found == pytest.approx([2, 1.5, 1, 0.5, 0, 0.75, 1, 1, 0], abs=1e-9)
    alone = [step_on(64, PLAIN, [target], compute_s=1.0, views_s=views * each / 0.9,
                     target_s=forward * each / 0.9).exposed_s / each
             for views, forward in ((0, 0), (0.25, 0), (0.25, 1), (0, 1), (0.25, 0.5), (0, 9))]
    assert alone == pytest.approx([1, 0.75, 0, 0.25, 0.375, 0.25], abs=1e-9)


def test_more_ranks_never_scale_better() -> None:
    sent = [gradients([10**7] * 10, 1, 20_000_000, width=4, micro_steps=1),
            *weights(10**8, 10**8, 1, width=2, micro_steps=1, gathers=12), agreements(moe=True)]
    for network in NETWORKS.values():
        shares = [step_on(ranks, network, sent, compute_s=0.05).efficiency
                  for ranks in (1, 8, 64, 512, 1024)]
        assert shares == sorted(shares, reverse=True) and shares[0] == 1


@pytest.mark.parametrize(("method", "gathers"), [("jepa", 16), ("mae", 16), ("cnn", 12)])
def test_zero_3_gathers_a_trained_block_twice_and_a_targets_once(method: str, gathers: int) -> None:
    config = make_config(None, objective={"method": method}, train={"steps": 1, "zero": 3})
    _, gathered, _ = messages_of(config, GRID, 2, Reduction(overlap=True, bucket=10**6))
    assert gathered.pieces == 2 * gathers


def test_the_networks_of_recipes_are_those_of_the_plan() -> None:
    assert get_args(RunConfig.model_fields["network"].annotation) == tuple(NETWORKS)


@pytest.mark.slow(8)
def test_the_dry_run_tells_how_a_step_scales(tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                             ) -> None:
    recipe = tmp_path / "recipe.yaml"
    config = tiny_config(write_feed(str(tmp_path / "feed")), tmp_path / "run", dtype="bf16")
    recipe.write_text(dump_config(config))
    arguments = ["--config", str(recipe), "--dry-run", "--network"]
    assert main([*arguments, "efa"]) == 0
    text = capsys.readouterr().out
    assert "weak scaling with run.network=efa, 4 scans a rank" in text
    assert "gradients" in text and "(all_reduce, " in text
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[-5:-1]] == ["8", "64", "512", "1024"]
    assert all(line.endswith(", beside the backward") for line in lines[-5:-1])


def test_a_network_that_is_not_known(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(tiny_config(write_feed(str(tmp_path / "feed")), tmp_path)))
    with pytest.raises(ConfigError, match="--network token-ring: not known; one of nvlink"):
        main(["--config", str(recipe), "--dry-run", "--network", "token-ring"])
