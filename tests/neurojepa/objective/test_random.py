"""Counter-based random numbers: pure, apart by key, and distributed as they say."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from neurojepa.objective import random

POSITIONS = torch.tensor([0, 1, 2, 10**12, -5])


def test_equals_splitmix64_in_exact_integers():
    """Against Python integers: wrapping and logical shifts on int64 tensors are right."""
    drawn = random.bits(7, torch.tensor([3]), 2, 2)
    state = _reference_start(7, 3, 2)
    assert drawn.tolist() == [[_reference_mix(state), _reference_mix(state + 0x9E3779B97F4A7C15)]]


def test_equal_in_any_batch_split_and_counter_form():
    whole = random.bits(1, POSITIONS, 4, 6)
    for i in range(len(POSITIONS)):
        assert torch.equal(random.bits(1, POSITIONS[i:i + 1], 4, 6)[0], whole[i])
    explicit = torch.tensor([[[5, 0], [2, 3]]]).expand(len(POSITIONS), 2, 2)
    picked = random.bits(1, POSITIONS, 4, explicit)
    assert torch.equal(picked[:, 0, 0], whole[:, 5]) and torch.equal(picked[:, 1, 0], whole[:, 2])


@pytest.mark.parametrize("change", ["seed", "position", "stream"])
def test_keys_are_independent(change: str):
    a = random.uniform(0, torch.tensor([11]), 0, 4000)[0]
    seed, position, stream = {"seed": (1, 11, 0), "position": (0, 12, 0), "stream": (0, 11, 1)}[
        change]
    b = random.uniform(seed, torch.tensor([position]), stream, 4000)[0]
    assert not bool((a == b).all())
    assert abs(np.corrcoef(a.numpy(), b.numpy())[0, 1]) < 0.06
    assert abs(np.corrcoef(a[1:].numpy(), b[:-1].numpy())[0, 1]) < 0.06


def test_distributions():
    position = torch.arange(50)
    u = random.uniform(3, position, 9, 4000).flatten()
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 20, 0, 1)
    chi2 = ((counts - len(u) / 20) ** 2 / (len(u) / 20)).sum()
    assert chi2 < 50  # 19 degrees of freedom: p ~ 1e-4
    n = random.normal(3, position, 9, 4000)
    assert abs(n.mean()) < 0.01 and abs(n.std() - 1) < 0.01 and n.abs().max() < 3.47
    assert n.shape == (50, 8000)
    assert abs((n**3).mean()) < 0.03 and abs((n**4).mean() - 2.7) < 0.05  # Irwin-Hall of four
    assert abs((n[:, ::2] * n[:, 1::2]).mean()) < 0.01  # the two of a counter


def _reference_mix(x: int) -> int:
    mask = (1 << 64) - 1
    x &= mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    x ^= x >> 31
    return x - (1 << 64) if x >> 63 else x


def _reference_start(seed: int, position: int, stream: int) -> int:
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    start = _reference_mix((_reference_mix(seed) & mask) ^ (stream * golden & mask)) & mask
    return _reference_mix((position * golden & mask) ^ start) & mask


def test_the_form_for_compilers_has_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    position = torch.tensor([0, 5, 1 << 40, -3])
    plain = [random.bits(seed, position, 2, 50) for seed in (0, 7)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for seed, expected in zip((0, 7), plain, strict=True):
        assert torch.equal(random.bits(seed, position, 2, 50), expected)


@pytest.mark.slow(12)
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_what_a_gpu_compiles_with_has_the_same_bits():
    """Inductor folds what it knows of counters; products must not grow beyond 64 bits."""
    position = torch.tensor([3, 1 << 40])

    def drawn(position_B: torch.Tensor) -> torch.Tensor:
        return random.uniform(7, position_B, 4, 1 + 6 * torch.arange(20)[None])

    compiled = torch.compile(drawn, backend="inductor", fullgraph=True, dynamic=False)
    assert torch.equal(compiled(position), drawn(position))
