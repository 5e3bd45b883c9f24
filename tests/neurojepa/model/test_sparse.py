"""The sparse code: the loss is the formula, atoms have unit norm, identity is the dense JEPA."""

from __future__ import annotations

import pytest
import torch

from neurojepa.config import SparseConfig
from neurojepa.model.sparse import SparseCode
from neurojepa.objective.losses import take, token_weights

TARGET = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(1))
PREDICTED = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(2))
VALID = torch.ones(3, 7, dtype=torch.bool)


def make_code(**changes: object) -> SparseCode:
    torch.manual_seed(0)
    return SparseCode(SparseConfig(**changes), input_dim=8, dim=12)  # type: ignore[arg-type]


def test_parts_equal_the_formula():
    code = make_code()
    coded = code(PREDICTED, TARGET, VALID)
    h = torch.relu(PREDICTED @ code.encode.weight.T + code.encode.bias)
    assert code.decoder is not None
    atoms = code.decoder.weight / code.decoder.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(coded.error, ((TARGET - h @ atoms) ** 2).mean(-1))
    torch.testing.assert_close(coded.penalty, h.abs().sum(-1))
    torch.testing.assert_close(coded.num_active, (h != 0).sum(-1).float())
    assert h.shape[-1] == 4 * 12 and coded.gate_error is None


def test_atoms_stay_unit_norm_while_learning():
    code = make_code(atoms=20)
    optimizer = torch.optim.AdamW(code.parameters(), lr=0.05)
    before = None
    for _ in range(40):
        coded = code(PREDICTED, TARGET, VALID)
        loss = (coded.error + 1e-3 * coded.penalty).mean()
        before = before or float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.8 * before
    assert code.decoder is not None
    torch.testing.assert_close(code.decoder.atoms().norm(dim=1), torch.ones(20))


def test_penalty_makes_codes_sparser():
    active = []
    for l1 in (0.0, 0.1):
        code = make_code()
        optimizer = torch.optim.AdamW(code.parameters(), lr=0.02)
        for _ in range(60):
            coded = code(PREDICTED, TARGET, VALID)
            optimizer.zero_grad()
            (coded.error + l1 * coded.penalty).mean().backward()
            optimizer.step()
        active.append(float(code(PREDICTED, TARGET, VALID).num_active.mean()))
    assert active[1] < 0.7 * active[0]


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_identity_is_the_dense_loss(kind: str):
    code = make_code(code="identity", dense_loss=kind)
    coded = code(PREDICTED, TARGET, VALID)
    difference = PREDICTED @ code.encode.weight.T + code.encode.bias - TARGET
    dense = difference.abs() if kind == "l1" else difference**2
    torch.testing.assert_close(coded.error, dense.mean(-1))
    assert not coded.penalty.any() and code.dead_share() == 0


def test_a_gated_code_equals_the_formula():
    code = make_code(code="gated")
    assert code.decoder is not None
    with torch.no_grad():
        for parameter in (code.gate_bias, code.log_scale, code.magnitude_bias):
            parameter.normal_(std=0.1)
    coded = code(PREDICTED, TARGET, VALID)
    linear = PREDICTED @ code.encode.weight.T
    pi = linear + code.gate_bias
    h = (pi > 0) * torch.relu(linear * code.log_scale.exp() + code.magnitude_bias)
    atoms = code.decoder.atoms()
    torch.testing.assert_close(coded.error, ((TARGET - h @ atoms) ** 2).mean(-1))
    torch.testing.assert_close(coded.penalty, pi.relu().sum(-1))
    torch.testing.assert_close(coded.num_active, (h > 0).sum(-1).float())
    assert coded.gate_error is not None
    torch.testing.assert_close(coded.gate_error, ((TARGET - pi.relu() @ atoms) ** 2).mean(-1))

    # the gate learns by its own two terms, which leave the decoder alone
    gate = torch.autograd.grad((coded.gate_error + coded.penalty).sum(), code.decoder.weight,
                               allow_unused=True, retain_graph=True)
    bias = torch.autograd.grad(coded.error.sum(), code.gate_bias, allow_unused=True,
                               retain_graph=True)
    assert gate == (None,) and bias == (None,)
    (coded.error + coded.penalty + coded.gate_error).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in code.parameters())


def test_usage_is_of_steps_and_of_valid_tokens():
    code = make_code(atoms=10)
    with torch.no_grad():
        code.encode.weight.zero_()
        code.encode.bias[:4], code.encode.bias[4:] = -1.0, 1.0
    valid = VALID.clone()
    valid[0] = False
    for step in range(300):
        assert float(code.dead_share()) == pytest.approx(0.4 if step >= 230 else 0)
        for _ in range(2):  # micro-steps
            code(PREDICTED, TARGET, valid)
        assert code.active.tolist() == [0.0] * 4 + [2 * 14.0] * 6
        code.update_usage(code.active, applied=True)
    before = code.usage.clone()
    code(PREDICTED, TARGET, ~VALID)
    code.update_usage(torch.ones(10), applied=False)  # a dropped step
    assert torch.equal(code.usage, before) and not code.active.any()
    with torch.no_grad():
        code(PREDICTED, TARGET, VALID)
    assert not code.active.any()  # only training counts


def deaden(code: SparseCode, atoms: slice) -> None:
    """Atoms that no token reaches, and that are known for it."""
    with torch.no_grad():
        for bias in ((code.gate_bias, code.magnitude_bias) if code.is_gated
                     else (code.encode.bias,)):
            bias[atoms] = -0.5
        code.usage[atoms] = 0.0


@pytest.mark.parametrize("kind", ["relu", "gated"])
@pytest.mark.parametrize("revive", [True, False])
def test_dead_atoms_come_back(kind: str, revive: bool):
    code = make_code(code=kind, atoms=24, revive=revive)
    deaden(code, slice(0, 12))
    optimizer = torch.optim.AdamW(code.parameters(), lr=0.01, weight_decay=0.0)
    came_back = torch.zeros(24, dtype=torch.bool)
    for _ in range(150):
        coded = code(PREDICTED, TARGET, VALID)
        loss = coded.error + 0.02 * coded.penalty
        if coded.gate_error is not None:
            loss = loss + coded.gate_error
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        came_back |= code.active > 0
        code.update_usage(code.active, applied=True)
    assert came_back[12:].all()
    assert came_back[:12].all() if revive else not came_back[:12].any()


@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_without_dead_atoms_revival_changes_nothing(kind: str):
    results = []
    for revive, dead in ((False, False), (True, False), (True, True)):
        code = make_code(code=kind, atoms=24, revive=revive)
        if dead:
            code.usage[:3] = 0.0
        coded = code(PREDICTED, TARGET, VALID)
        loss = coded.error + coded.penalty * 1e-3
        if coded.gate_error is not None:
            loss = loss + coded.gate_error
        loss.sum().backward()
        results.append([loss, *(p.grad for p in code.parameters())])
    off, on, dead_ones = results
    assert all(torch.equal(a, b) for a, b in zip(off, on, strict=True))
    assert torch.equal(off[0], dead_ones[0])  # the loss never changes
    changed = [not torch.equal(a, b) for a, b in zip(off[1], dead_ones[1], strict=True)]
    if kind == "relu":
        assert any(changed[:3]) and not any(changed[3:])  # and no other atom's gradient


def test_a_dead_atom_is_only_raised_and_only_where_it_pays():
    code = make_code(atoms=2)
    assert code.decoder is not None
    with torch.no_grad():
        code.encode.weight.zero_()
        code.encode.bias.fill_(-1.0)
        code.usage.zero_()
    for l1 in (0.0, 0.05, 1.0):
        coded = code(PREDICTED, TARGET, VALID)
        gradient, = torch.autograd.grad((coded.error + l1 * coded.penalty).sum(), code.encode.bias)
        benefit = 2 / 12 * TARGET.flatten(0, 1) @ code.decoder.atoms().T - l1
        torch.testing.assert_close(gradient, -benefit.clamp(min=0).sum(0))


def test_token_weights():
    foreground = torch.tensor([[0.0, 0.5, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    valid = torch.tensor([[True, True, True, False], [False] * 4])
    weight = token_weights(foreground, valid, 0.1)
    torch.testing.assert_close(weight[0], torch.tensor([0.1, 0.55, 1.0, 0.0]) / 1.65)
    assert not weight[1].any()


def test_take_gathers_by_sample():
    x = torch.arange(12).view(2, 3, 2)
    index = torch.tensor([[[2, 0]], [[1, 1]]])
    assert take(x, index).tolist() == [[[[4, 5], [0, 1]]], [[[8, 9], [8, 9]]]]
