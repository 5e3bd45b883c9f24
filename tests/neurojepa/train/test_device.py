"""A GPU that cannot train a recipe is refused with the arithmetic; a CPU is never asked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from neurojepa.config import validate
from neurojepa.dry_run import resting_bytes
from neurojepa.errors import ConfigError
from neurojepa.train.device import check_device
from tests.helpers.batches import GRID, make_config

CUDA = torch.device("cuda")


def of_size(size: str, **train: object):
    tree = make_config().model_dump(mode="json")
    tree["model"]["size"] = size
    tree["train"] |= train
    return validate(tree, "tests")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    facts = SimpleNamespace(name="Some GPU", major=7, minor=0, total_memory=80 * 2**30, bf16=True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: facts.bf16)
    return facts


def test_bf16_is_asked_of_those_that_have_it(gpu: SimpleNamespace) -> None:
    check_device(of_size("tiny", dtype="bf16"), GRID, CUDA, 1)
    gpu.bf16 = False
    with pytest.raises(ConfigError, match=r"train.dtype bf16: Some GPU \(compute capability 7.0\)"):
        check_device(of_size("tiny", dtype="bf16"), GRID, CUDA, 1)
    check_device(of_size("tiny", dtype="fp32"), GRID, CUDA, 1)
    check_device(of_size("huge", dtype="bf16"), GRID, torch.device("cpu"), 1)


@pytest.mark.parametrize(("size", "train", "ranks"), [
    ("base", {}, 1), ("base", {"zero": 3}, 4), ("base", {"dtype": "fp32"}, 2)])
def test_memory_is_enough_or_told_part_by_part(
        gpu: SimpleNamespace, size: str, train: dict, ranks: int) -> None:
    config = of_size(size, **train)
    gpu.total_memory = int(sum(resting_bytes(config, GRID, ranks, None).values())) + 1
    check_device(config, GRID, CUDA, ranks)
    gpu.total_memory -= 2**20
    with pytest.raises(ConfigError, match=(
            f"model.size {size} on {ranks} rank.*weights .* [+] gradients .* [+] state .* = .* GiB "
            "under train.zero .*; Some GPU has")):
        check_device(config, GRID, CUDA, ranks)
