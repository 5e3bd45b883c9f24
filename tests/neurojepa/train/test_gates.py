"""Gates tell what latents were made of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
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
                             torch.ones(SCANS, 20, dtype=torch.bool))
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
    assert apart["gate_modality"] > 0.9 and apart["gate_place_modality"] > 0.9


def by_hand(z_BND: torch.Tensor, patch_BN: torch.Tensor, modality_B: torch.Tensor,
            used_BN: torch.Tensor) -> dict[str, float]:
    """The shares by a loop over all pairs of tokens."""
    tokens = [(b, int(modality_B[b]), int(patch_BN[b, n]), z_BND[b, n].double().numpy())
              for b, n in used_BN.nonzero().tolist()]
    centre = np.mean([z for *_, z in tokens], 0)
    tokens = [(*of, z - centre) for *of, z in tokens]

    def mean(cell: Callable[[tuple], object], allowed: Callable[[tuple, tuple], bool]) -> float:
        found = []
        for name in {cell(token) for token in tokens}:
            held = [token for token in tokens if cell(token) == name]
            products = [one[3] @ other[3] for one in held for other in held if allowed(one, other)]
            if products:
                found.append((len(held), np.mean(products)))
        return sum(num * value for num, value in found) / sum(num for num, _ in found)

    own = np.mean([z @ z for *_, z in tokens])
    any_two = mean(lambda t: 0, lambda a, b: a[0] != b[0])
    across = {name: mean(cell, lambda a, b: a[0] != b[0]) for name, cell in (
        ("gate_modality", lambda t: t[1]), ("gate_place", lambda t: t[2]),
        ("gate_place_modality", lambda t: t[1:3]))}
    within = mean(lambda t: t[0], lambda a, b: a[2] != b[2])
    elsewhere = mean(lambda t: t[1], lambda a, b: a[0] != b[0] and a[2] != b[2])
    found = {name: value - any_two for name, value in across.items()}
    found["gate_person"] = within - elsewhere
    return {name: value / (own - any_two) for name, value in found.items()}


def uneven(offset: float = 0.0) -> tuple[torch.Tensor, ...]:
    """Latents of scans of which few are of the second modality and some lack many tokens."""
    draw = torch.Generator().manual_seed(5)
    modality_B = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    patch_BN = torch.stack([torch.randperm(9, generator=draw)[:6] for _ in modality_B])
    used_BN = torch.rand(7, 6, generator=draw) < 0.7
    z_BND = (torch.randn(9, 4, generator=draw)[patch_BN]
             + torch.randn(2, 4, generator=draw)[modality_B][:, None]
             + torch.randn(7, 6, 4, generator=draw) + offset)
    return z_BND, patch_BN, modality_B, used_BN


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_shares_equal_a_loop_over_pairs_whatever_all_tokens_have_in_common(offset: float):
    found = {name: float(value) for name, value in shares(*pair_sums(*uneven(offset))).items()}
    for name, value in by_hand(*uneven()).items():
        assert found[name] == pytest.approx(value, abs=1e-4), name


@pytest.mark.parametrize("rare", [0, 1])
def test_a_rare_modality_counts_for_its_share_of_the_tokens(rare: int):
    modality_B = torch.where(torch.arange(SCANS) < 4, rare, 1 - rare)
    draw = torch.Generator().manual_seed(0)
    z_BND = 0.1 * torch.randn(SCANS, 20, WIDTH, generator=draw)
    z_BND[..., 0] += 2.0 * modality_B[:, None]  # the variance between the two is 0.1 * 0.9 * 4
    patch_BN = torch.stack([torch.randperm(PATCHES, generator=draw)[:20] for _ in range(SCANS)])
    found = shares(*pair_sums(z_BND, patch_BN, modality_B, torch.ones(SCANS, 20, dtype=torch.bool)))
    assert float(found["gate_modality"]) == pytest.approx(0.36 / (0.36 + WIDTH * 0.01), abs=0.05)


def test_sums_of_ranks_add_up_and_unused_tokens_count_for_nothing():
    draw = torch.Generator().manual_seed(1)
    z_BND, used_BN = torch.randn(4, 6, 8, generator=draw), torch.ones(4, 6, dtype=torch.bool)
    used_BN[2:] = False
    patch_BN, modality_B = torch.arange(6).expand(4, 6), torch.zeros(4, dtype=torch.int64)
    whole = pair_sums(z_BND, patch_BN, modality_B, used_BN)
    part = pair_sums(z_BND[:2], patch_BN[:2], modality_B[:2], used_BN[:2])
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
