"""masks: drawing context and target masks, ours in one pass beside the official Python loops."""

from __future__ import annotations

from typing import Any

import torch

from neurojepa.config import MaskConfig
from neurojepa.feed.format import TRAINING_GRIDS
from neurojepa.objective.masks import draw_masks
from neurojepa.objective.views import patch_centres_mm
from tools.bench.common import Spent, best, machine, print_table
from tools.bench.official import OFFICIAL_SCALES, official_modules

GRID, PATCH = TRAINING_GRIDS["paper"], 12


def run(quick: bool, official: str | None) -> dict[str, Any]:
    """Both sides on 8 x 9 x 8 tokens, three masks a volume; returns ratio_vs_official."""
    batch = 16 if quick else 48
    print(machine())
    torch.set_num_threads(1)
    coords_N3 = patch_centres_mm(GRID, PATCH)
    radius = torch.tensor([70.0, 86.0, 70.0])  # an ellipsoid head, as brains fill this grid
    foreground_N = ((coords_N3 / radius).square().sum(-1) < 1).float()
    coords_BN3, foreground_BN = coords_N3.expand(batch, -1, -1), foreground_N.expand(batch, -1)
    valid_BN = torch.ones(batch, len(coords_N3), dtype=torch.bool)
    masks = MaskConfig()  # type: ignore[call-arg]
    position_B = torch.arange(batch)

    def ours() -> None:
        draw_masks(coords_BN3, foreground_BN, valid_BN, masks, PATCH * GRID.spacing_mm, 0,
                   position_B)

    rows = [("ours, one pass, CPU", best(5, ours))]
    if torch.cuda.is_available():
        rows.append(("ours, one pass, GPU", _on_gpu(coords_BN3, foreground_BN, valid_BN, masks,
                                                    position_B)))
    if official:
        rows.append(("official, Python loops", _official(official, batch, foreground_N)))
    print_table(("masks of a batch of " + str(batch), "CPU ms/volume", "wall ms/volume"),
                [(name, 1e3 * spent.cpu_s / batch, 1e3 * spent.wall_s / batch)
                 for name, spent in rows])
    ratio = rows[-1][1].cpu_s / rows[0][1].cpu_s if official else None
    return {"ratio_vs_official": ratio, "cpu_ms_per_volume": 1e3 * rows[0][1].cpu_s / batch}


def _on_gpu(coords: torch.Tensor, foreground: torch.Tensor, valid: torch.Tensor,
            masks: MaskConfig, position: torch.Tensor) -> Spent:
    inputs = [tensor.cuda() for tensor in (coords, foreground, valid)]
    position = position.cuda()

    def draw() -> None:
        draw_masks(*inputs, masks, PATCH * GRID.spacing_mm, 0, position)
        torch.cuda.synchronize()

    draw()
    return best(5, draw)


def _official(official: str, batch: int, foreground_N: torch.Tensor) -> Spent:
    (masking,) = official_modules(official, "neurojepa.masks.masking")
    shape = tuple(size // PATCH for size in GRID.shape)
    collator = masking.MaskCollator(OFFICIAL_SCALES, GRID.shape, (PATCH,) * 3,
                                    foreground_aware=True)
    foreground = foreground_N.bool().view(1, *shape).expand(batch, -1, -1, -1)

    def draw() -> None:
        for generator in collator.mask_generators:
            generator(batch, foreground_mask=foreground)

    return best(2, draw)
