"""What a step sends, against sums worked by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from neurojepa.config import dump_config
from neurojepa.errors import ConfigError
from neurojepa.planning.network import NETWORKS, Message, Network, messages, step_on
from neurojepa.planning.scaling import messages_of
from neurojepa.pretrain import main
from tests.helpers.batches import GRID, make_config
from tests.helpers.feeds import tiny_config, write_feed

PLAIN = Network(within=100e9, between=50e9, per_host=8, latency_s=0.0)
GRADIENTS = Message("gradients", "all_reduce", 1e9, 4, 1, True)


@pytest.mark.parametrize(("collective", "ranks", "sent"), [
    ("all_reduce", 2, 4e9), ("all_reduce", 8, 7e9), ("reduce_scatter", 8, 3.5e9),
    ("all_gather", 4, 3e9), ("all_reduce", 1, 0.0)])
def test_a_ring_passes_its_part(collective: str, ranks: int, sent: float) -> None:
    assert replace(GRADIENTS, collective=collective).sent(ranks) == sent


def test_the_slowest_link_and_every_message_count() -> None:
    assert GRADIENTS.seconds(1, PLAIN) == 0
    assert GRADIENTS.seconds(8, PLAIN) == pytest.approx(7e9 / 80e9)  # 0.8 of NVLink
    assert GRADIENTS.seconds(16, PLAIN) == pytest.approx(7.5e9 / 40e9)  # two hosts
    late = replace(PLAIN, latency_s=1e-3)
    ten = replace(GRADIENTS, pieces=10)
    assert ten.seconds(16, late) == pytest.approx(7.5e9 / 40e9 + 10 * 2e-3)


@pytest.mark.parametrize(("stage", "expected"), [
    (1, {"gradients": ("all_reduce", 400e6), "weights": ("all_gather", 200e6),
         "target": ("all_gather", 120e6)}),
    (2, {"gradients": ("all_reduce", 1200e6), "weights": ("all_gather", 200e6),
         "target": ("all_gather", 120e6)}),
    (3, {"gradients": ("reduce_scatter", 1200e6), "weights": ("all_gather", 1560e6)})])
def test_bytes_by_stage(stage: int, expected: dict[str, tuple[str, float]]) -> None:
    """100 M weights, 60 M of them the encoder's, bf16, three micro-steps."""
    found = messages(100_000_000, 60_000_000, stage, width=2, micro_steps=3, gathers=12)
    assert {message.name: (message.collective, message.bytes) for message in found} == expected


def test_what_hides_costs_nothing_until_it_is_longer_than_the_backward() -> None:
    sent = [replace(GRADIENTS, pieces=10), Message("weights", "all_gather", 1e8, 2, 1, False)]
    gradients, weights = (message.seconds(64, PLAIN) for message in sent)
    plain, hidden, half = (step_on(64, PLAIN, sent, compute_s=1.0, hiding_s=seconds)
                           for seconds in (0.0, 10.0, gradients / 2 / 0.9))
    assert plain.exposed_s == pytest.approx(gradients + weights)
    assert hidden.exposed_s == pytest.approx(gradients / 10 + weights)  # the last piece
    assert half.exposed_s == pytest.approx(gradients / 2 + weights)
    assert hidden.efficiency > half.efficiency > plain.efficiency
    assert step_on(1, PLAIN, sent, compute_s=1.0).efficiency == 1


def test_the_target_comes_while_the_next_batch_becomes_views() -> None:
    (target,) = (message for message in messages(10**8, 10**8, 2, width=2, micro_steps=1, gathers=0)
                 if message.name == "target")
    seconds = target.seconds(64, PLAIN)
    exposed = [step_on(64, PLAIN, [target], compute_s=1.0, views_s=views_s).exposed_s
               for views_s in (0.0, seconds / 2 / 0.9, seconds / 0.9, 1.0)]
    assert exposed == pytest.approx([seconds, seconds / 2, 0, 0], abs=1e-9)


def test_more_ranks_never_scale_better() -> None:
    sent = messages(10**8, 10**8, 1, width=2, micro_steps=1, gathers=12)
    for network in NETWORKS.values():
        shares = [step_on(ranks, network, sent, compute_s=0.05).efficiency
                  for ranks in (1, 8, 64, 512, 1024)]
        assert shares == sorted(shares, reverse=True) and shares[0] == 1


@pytest.mark.parametrize(("method", "gathers"), [("jepa", 16), ("mae", 16), ("cnn", 12)])
def test_zero_3_gathers_a_trained_block_twice_and_a_targets_once(method: str, gathers: int) -> None:
    config = make_config(None, objective={"method": method}, train={"steps": 1, "zero": 3})
    _, weights = messages_of(config, GRID, micro_steps=2)
    assert weights.pieces == 2 * gathers


@pytest.mark.slow(8)
def test_the_dry_run_tells_how_a_step_scales(tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                             ) -> None:
    recipe = tmp_path / "recipe.yaml"
    config = tiny_config(write_feed(str(tmp_path / "feed")), tmp_path / "run", dtype="bf16")
    recipe.write_text(dump_config(config))
    arguments = ["--config", str(recipe), "--dry-run", "--network"]
    assert main([*arguments, "efa"]) == 0
    text = capsys.readouterr().out
    assert "weak scaling over efa, 4 scans a rank" in text
    assert "gradients" in text and "(all_reduce, 32 bit)" in text
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["8", "64", "512", "1024"]


def test_a_network_that_is_not_known(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(tiny_config(write_feed(str(tmp_path / "feed")), tmp_path)))
    with pytest.raises(ConfigError, match="--network token-ring: not known; one of nvlink"):
        main(["--config", str(recipe), "--dry-run", "--network", "token-ring"])
