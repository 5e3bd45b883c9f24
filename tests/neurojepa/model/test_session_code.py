"""A session code: its loss is the formula, its atoms can be dropped, and it is read in place of
latents."""

from __future__ import annotations

import pytest
import torch

from neurojepa.model.build import build_model
from neurojepa.model.session_code import SessionCode
from neurojepa.objective.views import make_views
from tests.helpers.batches import GRID, make_batch, make_config

Z, MEAN = torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(1))


def make_code(dim: int = 5, hidden: int = 7, atoms: int = 12) -> SessionCode:
    torch.manual_seed(0)
    code = SessionCode.sized(dim, hidden, atoms)
    torch.nn.init.normal_(code.offset)
    return code


@pytest.mark.parametrize("l1", [0.0, 0.3])
def test_the_loss_is_the_formula(l1: float) -> None:
    code = make_code()
    one, two = code.encode[0], code.encode[2]
    hidden = torch.nn.functional.gelu(Z @ one.weight.T + one.bias)
    h = (hidden @ two.weight.T + two.bias).clamp(min=0)
    atoms = code.decoder.weight / code.decoder.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(code(Z), h)
    torch.testing.assert_close(code.told(h), h @ atoms + code.offset)
    error = (h @ atoms + code.offset - MEAN).square().mean() + l1 * h.sum() / len(Z)
    torch.testing.assert_close(code.error(Z, MEAN, l1), error)


def test_atoms_that_are_kept_say_and_tell_what_they_did() -> None:
    code = make_code()
    h = code(Z)
    used = h.sum(0) > 3
    told = code.told(h * used)
    code.keep(used)
    assert 0 < code.atoms == int(used.sum()) < 12
    torch.testing.assert_close(code(Z), h[:, used])
    torch.testing.assert_close(code.told(code(Z)), told)


def test_a_code_comes_back_from_its_tensors_and_other_draws_stay() -> None:
    code = make_code()
    state = torch.get_rng_state()
    again = SessionCode.from_tensors({name: tensor.clone()
                                      for name, tensor in code.state_dict().items()})
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again(Z), code(Z)) and again.atoms == code.atoms
    assert not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("method", ["jepa", "mae"])
def test_a_model_gives_h_in_place_of_latents_and_gradients_reach_the_voxels(method: str) -> None:
    config = make_config(objective={"method": method})
    model = build_model(config, GRID).eval()
    views = make_views(make_batch(2), config, GRID, 0)
    z_BND = model.latents(views)
    code = make_code(z_BND.shape[-1]).requires_grad_(False)
    model.session_code = code
    assert torch.equal(model.latents(views), code(z_BND))
    valid = views.valid_BN[..., None]
    torch.testing.assert_close(model.embed(views), (code(z_BND) * valid).sum(1) / valid.sum(1))
    views.tokens_BNP.requires_grad_()
    model.latents_with_gradient(views).sum().backward()
    assert views.tokens_BNP.grad is not None and views.tokens_BNP.grad.abs().max() > 0
