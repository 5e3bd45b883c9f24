"""masks: from voxels to context and target masks, ours in one pass beside the official loops.

Both sides find the foreground patches of a batch of heads and draw three masks a volume on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neurojepa.config import MaskConfig
from neurojepa.feed.format import TRAINING_GRIDS
from neurojepa.objective.masks import draw_masks
from neurojepa.objective.views import count_brain, patch_counts
from neurojepa.train.world import keep_memory
from tools.bench.common import Spent, best, machine, print_table
from tools.bench.official import OFFICIAL_SCALES, official_modules, random_heads

GRID, PATCH = TRAINING_GRIDS["paper"], 12


def run(quick: bool, official: str | None) -> dict[str, Any]:
    """Both sides on 8 x 9 x 8 tokens; returns ratio_vs_official, of foreground and masks together.
    """
    batch = 16 if quick else 48
    print(machine())
    torch.set_num_threads(1)
    heads = random_heads(GRID.shape, batch)
    rows: dict[str, list[Spent]] = {}
    if official:
        rows["official"] = [best(2, part) for part in _official(official, heads)]
    keep_memory()  # as our training does on a CPU
    voxels = (254 * heads[:, 0]).byte()
    rows["ours"] = [best(9, part) for part in _ours(voxels)]
    if torch.cuda.is_available():
        rows["ours, GPU"] = [best(9, part) for part in _ours(voxels.cuda())]
    if official:
        rows["official, memory kept"] = [best(2, part) for part in _official(official, heads)]
    both = {name: sum(1e3 * part.cpu_s for part in parts) / batch for name, parts in rows.items()}
    print_table(
        (f"CPU ms/volume, batch of {batch}", "foreground", "masks", "both", "official / ours",
         "both, wall"),
        [(name, *(1e3 * part.cpu_s / batch for part in parts), both[name],
          both[name] / both["ours"], _wall(parts, batch)) for name, parts in rows.items()])
    return {"ratio_vs_official": both["official"] / both["ours"] if official else None,
            "cpu_ms_per_volume": both["ours"]}


def _wall(parts: list[Spent], batch: int) -> float:
    return sum(1e3 * part.wall_s for part in parts) / batch


Parts = tuple[Callable[[], object], Callable[[], object]]  # the foreground, and masks upon it


def _ours(voxels: Tensor) -> Parts:
    counts, config = patch_counts(GRID, PATCH), MaskConfig()  # type: ignore[call-arg]
    position_B = torch.arange(len(voxels), device=voxels.device)
    brain_Bn, scanned_Bn = count_brain(voxels, PATCH)
    keep_Bn = torch.arange(brain_Bn.shape[1], device=voxels.device).expand_as(brain_Bn)

    def timed(work: Callable[[], object]) -> Callable[[], object]:
        def until_done() -> None:
            work()
            if voxels.is_cuda:
                torch.cuda.synchronize()
        return until_done

    return (timed(lambda: count_brain(voxels, PATCH)),
            timed(lambda: draw_masks(keep_Bn, counts, foreground_BN=brain_Bn / PATCH**3,
                                     valid_BN=scanned_Bn, masks=config, seed=0,
                                     position_B=position_B)))


def _official(checkout: str, heads: Tensor) -> Parts:
    (masking,) = official_modules(checkout, "neurojepa.masks.masking")
    patch = (PATCH,) * 3
    collator = masking.MaskCollator(OFFICIAL_SCALES, GRID.shape, patch, foreground_aware=True)

    def find() -> Tensor:  # as its collator does
        return masking.compute_foreground_patches(
            heads, patch, threshold=collator.foreground_threshold,
            min_foreground_fraction=collator.min_foreground_fraction)

    foreground = find()

    def draw() -> None:
        for generator in collator.mask_generators:
            generator(len(heads), foreground_mask=foreground)

    return find, draw
