"""Toy batches of ellipsoid brains on a small grid, and a config that fits them."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from neurojepa.config import RootConfig, validate
from neurojepa.feed.format import Grid

GRID = Grid("test", (24, 30, 24), 3.0)  # 8 x 10 x 8 patches of 3 voxels


def make_config(budget: int | None = 256, **changes: object) -> RootConfig:
    tree = {"data": {"feed": "x"}, "run": {"dir": "y"}, "train": {"steps": 1},
            "model": {"size": "tiny", "patch_voxels": 3, "token_budget": budget}, **changes}
    return validate(tree, "test")


def make_batch(num: int, grid: Grid = GRID) -> SimpleNamespace:
    """Ellipsoid brains with a smooth pattern and noise, each of its own size and phase."""
    axes = [torch.linspace(-1, 1, size) for size in grid.shape]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    radius = (x**2 + y**2 + z**2).sqrt()
    size, phase = (torch.linspace(low, high, num).view(-1, 1, 1, 1)
                   for low, high in ((0.75, 0.95), (0, 1)))
    noise = torch.randn(num, *grid.shape, generator=torch.Generator().manual_seed(0))
    voxels = 128 + 50 * torch.sin(5 * x + 3 * y + phase) + 50 * torch.cos(4 * z) + 8 * noise
    return SimpleNamespace(
        voxels=torch.where(radius < size, voxels.clamp(1, 254), 0).to(torch.uint8),
        modality=torch.arange(num) % 3, position=1000 + torch.arange(num), weight=torch.ones(num),
        target_voxels=None, target_modality=None, all_scanned=False)


def part(batch: SimpleNamespace, index: list[int]) -> SimpleNamespace:
    """The samples of a batch at these places."""
    return SimpleNamespace(**{name: value[index] if isinstance(value, torch.Tensor) else value
                              for name, value in vars(batch).items()})
