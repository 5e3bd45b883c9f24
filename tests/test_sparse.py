"""The sparse code: the loss is the formula, atoms have unit norm, identity is the dense JEPA."""

from __future__ import annotations

import pytest
import torch

from neurojepa.config import SparseConfig
from neurojepa.model.sparse import SparseCode
from neurojepa.objective.losses import take, token_weights

TARGET = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(1))
PREDICTED = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(2))


def make_code(**changes: object) -> SparseCode:
    torch.manual_seed(0)
    return SparseCode(SparseConfig(**changes), 8, 12)  # type: ignore[arg-type]


def test_parts_equal_the_formula():
    code = make_code()
    coded = code(PREDICTED, TARGET)
    h = torch.relu(PREDICTED @ code.encode.weight.T + code.encode.bias)
    assert code.decoder is not None
    atoms = code.decoder.weight / code.decoder.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(coded.error, ((TARGET - h @ atoms) ** 2).mean(-1))
    torch.testing.assert_close(coded.norm_h, h.abs().sum(-1))
    torch.testing.assert_close(coded.num_active, (h != 0).sum(-1).float())
    assert h.shape[-1] == 4 * 12


def test_atoms_stay_unit_norm_while_learning():
    code = make_code(atoms=20)
    optimizer = torch.optim.AdamW(code.parameters(), lr=0.05)
    before = None
    for _ in range(40):
        coded = code(PREDICTED, TARGET)
        loss = (coded.error + 1e-3 * coded.norm_h).mean()
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
            coded = code(PREDICTED, TARGET)
            optimizer.zero_grad()
            (coded.error + l1 * coded.norm_h).mean().backward()
            optimizer.step()
        active.append(float(code(PREDICTED, TARGET).num_active.mean()))
    assert active[1] < 0.7 * active[0]


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_identity_is_the_dense_loss(kind: str):
    code = make_code(code="identity", dense_loss=kind)
    coded = code(PREDICTED, TARGET)
    difference = PREDICTED @ code.encode.weight.T + code.encode.bias - TARGET
    dense = difference.abs() if kind == "l1" else difference**2
    torch.testing.assert_close(coded.error, dense.mean(-1))
    assert not coded.norm_h.any() and code.dead_share() == 0


def test_dead_atoms_are_found():
    code = make_code(atoms=10)
    with torch.no_grad():
        code.encode.bias[:4] = -100.0
        code.encode.bias[4:] = 100.0
    for _ in range(300):
        code(PREDICTED, TARGET)
    assert float(code.dead_share()) == pytest.approx(0.4)


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
