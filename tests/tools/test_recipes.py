"""The variants of MAE that the comparison tries, on toy batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from neurojepa.baselines.mae import MAE
from neurojepa.config import RootConfig, load_config
from neurojepa.methods import METHODS
from neurojepa.model.build import build_model
from neurojepa.objective.views import Views, make_views
from tests.helpers.batches import GRID, make_batch, make_config
from tools.bench import _recipes, compare
from tools.bench._runs import write_recipe

AIR = -2.0  # as tokens have it


@pytest.fixture(autouse=True)
def methods() -> Iterator[None]:
    """As they are; tests change them."""
    found = dict(METHODS)
    yield
    METHODS.update(found)


def made(arm: str) -> tuple[RootConfig, MAE]:
    recipe = compare.ARMS[arm].recipe
    config = make_config(400, objective={name.removeprefix("objective."): value for name, value in
                                        recipe.items() if name in ("objective.method",
                                                                   "objective.tissue_weight")})
    _recipes.apply(compare.ARMS[arm].changes, GRID, 3)
    model = build_model(config, GRID)
    assert isinstance(model, MAE)
    return config, model


def pairs(config: RootConfig, num: int = 3) -> Views:
    """Views of scans whose targets are of other heads, in another modality."""
    batch = make_batch(num)
    batch.target_voxels, batch.target_modality = batch.voxels.flip(0), (batch.modality + 1) % 3
    return make_views(batch, config, GRID, seed=0)


@pytest.mark.parametrize("name", compare.ARMS)
def test_the_recipe_of_every_arm_is_valid(name: str, tmp_path: Path) -> None:
    arm = compare.ARMS[name]
    write_recipe(tmp_path, "feed", steps=100, rate=arm.rate, seed=0, overrides=arm.recipe)
    config = load_config(tmp_path / "recipe.yaml")
    assert config.optim.lr == arm.rate and METHODS[config.objective.method]


# ---- the session aim -----------------------------------------------------------------------------

def test_the_session_aim_reaches_the_encoder_and_not_its_target() -> None:
    config, model = made("session aim")
    assert isinstance(model, _recipes.SessionMAE)
    views = pairs(config)
    loss, metrics = model(views, 2e-3)
    plain, _ = MAE.forward(build_plain(config, model), views, 0.0)
    torch.testing.assert_close(loss - metrics["session"], plain)
    y_BCD = model.encoder(*(_recipes.take(value, views.context_BMC)[:, 0] for value in (
        views.tokens_BNP, views.coords_BN3, views.valid_BN)))
    model.session_error(views, y_BCD).sum().backward()
    assert float(model.encoder.patch.weight.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in model.target.parameters())


def build_plain(config: RootConfig, model: MAE) -> MAE:
    plain = MAE(config, GRID)
    own = set(plain.state_dict())
    plain.load_state_dict({name: value for name, value in model.state_dict().items()
                           if name in own})
    return plain


@pytest.mark.parametrize("l1", [0.0, 0.1])
def test_the_session_aim_is_the_mean_of_both_scans_where_both_show_brain(l1: float) -> None:
    config, model = made("session aim")
    assert isinstance(model, _recipes.SessionMAE)
    model.l1, views = l1, pairs(config)
    B, C = len(views.weight_B), views.context_BMC.shape[-1]
    y_BCD = torch.randn(B, C, 96, generator=torch.Generator().manual_seed(0))
    own_BND, other_BND = model.latents(views), model.latents(views.of_targets())
    expected = []
    for b in range(B):
        errors = []
        for c, n in enumerate(views.context_BMC[b, 0].tolist()):
            if views.foreground_BN[b, n] < 0.5 or views.target_foreground_BN[b, n] == 0:
                continue
            y_D = y_BCD[b, c]
            h_A = model.head((y_D - y_D.mean()) / (y_D.var(correction=0) + 1e-5).sqrt())
            mean_D = (own_BND[b, n] + other_BND[b, n]) / 2
            errors.append((model.head.told(h_A) - mean_D).square().mean() + l1 * h_A.sum())
        expected.append(torch.stack(errors).mean())
        assert 0 < len(errors) < C
    torch.testing.assert_close(model.session_error(views, y_BCD), torch.stack(expected),
                               rtol=1e-4, atol=1e-5)


def test_where_the_other_scan_shows_nothing_there_is_no_session_aim() -> None:
    config, model = made("session aim")
    assert isinstance(model, _recipes.SessionMAE)
    views = pairs(config)
    views.target_foreground_BN[1] = 0
    y_BCD = torch.randn(3, views.context_BMC.shape[-1], 96)
    assert (model.session_error(views, y_BCD) > 0).tolist() == [True, False, True]


# ---- curves --------------------------------------------------------------------------------------

def test_curves_rise_or_fall_and_leave_air() -> None:
    ramp = torch.linspace(0.01, 1, 400) / 0.25 - 2  # as standardised voxels
    tokens = torch.cat([ramp[ramp != 0], torch.tensor([AIR, 0.0])]).expand(64, 1, -1)
    found = _recipes.curved(tokens, torch.Generator().manual_seed(0))[:, 0]
    assert (found[:, -2:] == torch.tensor([AIR, 0.0])).all()
    steps = found[:, :-2].diff(dim=1)
    rises, falls = (steps > 0).all(1), (steps < 0).all(1)
    assert (rises | falls).all() and 16 < rises.sum() < 48
    value = found[:, :-2] * 0.25 + 0.5
    assert value.min() >= _recipes.CURVE_LEAST - 1e-5 and value.max() <= 1 + 1e-5
    assert len({round(each, 4) for each in value[:, 200].tolist()}) == 64  # each its own
    again = _recipes.curved(tokens, torch.Generator().manual_seed(1))[:, 0]
    assert not torch.equal(again, found)


def test_what_is_filled_in_is_the_scan_before_its_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = made("session code with curves")
    views = make_views(make_batch(2), config, GRID, seed=0)
    monkeypatch.setattr(_recipes, "curved", lambda tokens, draws: tokens)
    plain, _ = MAE.forward(build_plain(config, model), views, 0.0)
    torch.testing.assert_close(model(views, 0.0)[0], plain)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(_recipes, "curved", lambda tokens, draws: torch.zeros_like(tokens))
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    monkeypatch.setattr(MAE, "losses", lambda self, views, **latents: (views.tokens_BNP, {}))
    assert torch.equal(model(views, 0.0)[0], views.tokens_BNP) and not seen[0].any()


# ---- slices --------------------------------------------------------------------------------------

def test_a_token_of_slices_sees_the_middle_of_its_own_layer() -> None:
    config, model = made("session code, 2D slices")
    views = make_views(make_batch(2), config, GRID, seed=0)
    before = model.latents(views)
    cube = views.tokens_BNP.view(2, -1, 3, 3, 3)  # x, y, z
    outer = torch.where(torch.tensor([True, False, True]), cube + 1, cube).flatten(2)
    assert torch.equal(model.latents(replace(views, tokens_BNP=outer)), before)
    layer_BN = views.coords_BN3[..., 2]
    layer = layer_BN[0].median()
    moved = torch.where((layer_BN == layer)[..., None], views.tokens_BNP + 1, views.tokens_BNP)
    changed_BN = (model.latents(replace(views, tokens_BNP=moved)) != before).any(-1)
    assert (changed_BN <= (layer_BN == layer)).all() and changed_BN.any()
    one = views.tokens_BNP.clone()
    first = int((layer_BN[0] == layer).nonzero()[0])
    one[0, first] = torch.randn(27, generator=torch.Generator().manual_seed(0))
    reached_N = (model.latents(replace(views, tokens_BNP=one)) != before)[0].any(-1)
    assert reached_N.sum() > 1  # and others of its layer read it


def test_what_fills_in_slices_reads_from_the_same_layer() -> None:
    config, model = made("session code, 2D slices")
    views = make_views(make_batch(2), config, GRID, seed=0)
    order_BN = torch.cat([views.context_BMC, views.target_BMT], -1)[:, 0]
    coords_BN3 = views.coords_BN3[torch.arange(2)[:, None], order_BN]
    valid_BN, C = torch.ones_like(order_BN, dtype=torch.bool), views.context_BMC.shape[-1]
    y_BCD = torch.randn(2, C, 96, generator=torch.Generator().manual_seed(0))
    layer_BN = coords_BN3[..., 2]
    layer = layer_BN[0, 0]
    other = torch.where((layer_BN[:, :C] == layer)[..., None], -y_BCD, y_BCD)
    found, again = (model.decoder(each, coords_BN3, valid_BN, views.modality_B)
                    for each in (y_BCD, other))
    changed_BT = (found != again).any(-1)
    assert (changed_BT <= (layer_BN[:, C:] == layer)).all() and changed_BT.any()
    loss, _ = model(views, 0.0)
    loss.backward()
    assert float(model.encoder.patch.weight.grad.abs().sum()) > 0
