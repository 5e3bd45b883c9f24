"""Gates tell what latents were made of."""

from __future__ import annotations

import pytest
import torch

from neurojepa.config import validate
from neurojepa.model.build import build_model
from neurojepa.objective.views import make_views
from neurojepa.train.gates import EVERY, Gates, pair_sums, shares
from neurojepa.train.world import World
from tests.helpers.batches import GRID, make_batch, make_config

SCANS, PATCHES, WIDTH = 40, 30, 16
ALONE = World(rank=0, size=1, device=torch.device("cpu"), control=None)


def figures(**parts: float) -> dict[str, float]:
    """Gates of latents whose parts have these standard deviations."""
    draw = torch.Generator().manual_seed(3)

    def part(name: str, *shape: int) -> torch.Tensor:
        return parts.get(name, 0.0) * torch.randn(*shape, WIDTH, generator=draw)

    modality_B = torch.arange(SCANS) % 2
    patch_BN = torch.stack([torch.randperm(PATCHES, generator=draw)[:20] for _ in range(SCANS)])
    place, kind = part("place", PATCHES), part("modality", 2)
    z_BND = (place[patch_BN] + kind[modality_B][:, None] + part("person", SCANS)[:, None]
             + part("token", SCANS, 20) + 5)
    sums, spread = pair_sums(z_BND, patch_BN, modality_B,
                             torch.ones(SCANS, 20, dtype=torch.bool), PATCHES)
    return {name: float(value) for name, value in shares(sums, spread).items()}


@pytest.mark.parametrize("part", ["place", "person", "token"])
def test_what_latents_are_made_of_has_all_the_variance(part: str):
    found = figures(**{part: 1.0})
    for name in ("place", "person"):
        assert found[f"gate_{name}"] == pytest.approx(float(name == part), abs=0.05)
    assert found["gate_modality"] == pytest.approx(0, abs=0.05)
    assert found["gate_place_modality"] == pytest.approx(float(part == "place"), abs=0.05)


def test_parts_share_the_variance():
    found = figures(place=2.0, person=1.0, token=1.0)
    assert found["gate_place"] == pytest.approx(4 / 6, abs=0.05)
    assert found["gate_person"] == pytest.approx(1 / 6, abs=0.05)
    assert 1 < found["rank_people"] < WIDTH
    apart = figures(modality=3.0, token=0.1)
    # two modalities differ in one direction: half of the pairs are of one of them
    assert apart["gate_modality"] > 0.9 and apart["gate_place_modality"] > 0.9


def test_sums_of_ranks_add_up_and_unused_tokens_count_for_nothing():
    draw = torch.Generator().manual_seed(1)
    z_BND, used_BN = torch.randn(4, 6, 8, generator=draw), torch.ones(4, 6, dtype=torch.bool)
    used_BN[2:] = False
    patch_BN, modality_B = torch.arange(6).expand(4, 6), torch.zeros(4, dtype=torch.int64)
    whole = pair_sums(z_BND, patch_BN, modality_B, used_BN, 6)
    part = pair_sums(z_BND[:2], patch_BN[:2], modality_B[:2], used_BN[:2], 6)
    for one, other in zip(whole, part, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("objective", [{}, {"method": "mae"}])
def test_a_run_looks_now_and_then(objective: dict):
    config = make_config(96, objective=objective)
    model = build_model(config, GRID)
    views = make_views(make_batch(3), config, GRID, seed=0)
    gates = Gates(config, GRID, ALONE)
    assert gates.look(model, views, EVERY + 1) == {}
    found = gates.look(model, views, 2 * EVERY)
    assert all(bool(torch.isfinite(value)) for value in found.values()) and len(found) == 5


def test_a_network_without_tokens_has_none():
    tree = make_config(96).model_dump()
    tree["objective"]["method"], tree["model"]["token_budget"] = "cnn", None
    gates = Gates(validate(tree, "test"), GRID, ALONE)
    assert gates.look(torch.nn.Identity(), None, EVERY) == {}
