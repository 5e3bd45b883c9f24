"""What a recipe on trial changes in the sparse JEPA: here, until it has shown a gain.

    teacher   targets come from exported weights, which stay as they are (a frozen teacher)
    centred   targets are what tokens differ by from their place and modality, by its deviation
    head      the tissue head and the spread alone, without prediction
    code      weights stay as they are, and a code of their tokens is learnt (_session.py)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neurojepa.feed.format import MODALITIES, Grid
from neurojepa.model.averaged import Averaged
from neurojepa.model.jepa import SparseJEPA
from neurojepa.objective.views import Views, patch_numbers
from neurojepa.weights import load
from tools.bench._quality_run import head_alone

LEAST_DEVIATION = 0.1  # of a place's tokens: below it they are not made larger
LEAST_RATE = 0.02  # at which the running means of places follow


def apply(changes: dict[str, Any], grid: Grid, patch: int) -> None:
    """Change ``SparseJEPA`` in this process."""
    if changes.get("head_alone"):
        SparseJEPA.forward = head_alone  # type: ignore[method-assign, assignment]
    targets = SparseJEPA.targets
    if changes.get("teacher") and not changes.get("code"):
        targets = from_teacher(load(changes["teacher"]).model)  # type: ignore[assignment]
    if changes.get("centred"):
        targets = centred(targets, grid, patch)  # type: ignore[assignment]
    SparseJEPA.targets = targets  # type: ignore[method-assign]


def from_teacher(teacher: Averaged) -> Any:
    """Targets: the layer-normed mean of the layer-normed outputs of a model's last two blocks."""
    blocks: list[Tensor] = []
    for block in list(teacher.target.blocks)[-2:]:  # type: ignore[arg-type]
        block.register_forward_hook(lambda module, inputs, output: blocks.append(output[0]))

    @torch.no_grad()
    def targets(model: SparseJEPA, views: Views) -> Tensor:
        blocks.clear()
        teacher.latents(views.of_targets())
        width = blocks[0].shape[-1:]
        return F.layer_norm(sum(F.layer_norm(each.float(), width) for each in blocks), width)

    return targets


def centred(targets: Any, grid: Grid, patch: int) -> Any:
    """Targets less the running mean of their place and modality, over its running deviation."""
    state: dict[str, Tensor] = {}

    @torch.no_grad()
    def of_place(model: SparseJEPA, views: Views) -> Tensor:
        z_BND = targets(model, views)
        number_BN = (patch_numbers(views.coords_BN3, grid, patch) * len(MODALITIES)
                     + views.target_modality_B[:, None])
        flat_Q, z_QD = number_BN.flatten(), z_BND.flatten(0, 1)
        if not state:
            cells = int(torch.tensor(grid.shape).prod()) // patch**3 * len(MODALITIES)
            state["count"] = torch.zeros(cells)
            state["mean"], state["square"] = (torch.zeros(cells, z_QD.shape[1]) for _ in range(2))
        seen = torch.zeros_like(state["count"]).index_add_(0, flat_Q, torch.ones_like(z_QD[:, 0]))
        state["count"] += seen
        rate = torch.where(seen > 0, (seen / state["count"].clamp(min=1)).clamp(min=LEAST_RATE), 0)
        for name, value_QD in (("mean", z_QD), ("square", z_QD.square())):
            now = torch.zeros_like(state[name]).index_add_(0, flat_Q, value_QD)
            now /= seen.clamp(min=1)[:, None]
            state[name] += rate[:, None] * (now - state[name])
        mean_QD, square_QD = state["mean"][flat_Q], state["square"][flat_Q]
        deviation_QD = (square_QD - mean_QD.square()).clamp(min=0).sqrt()
        return ((z_QD - mean_QD) / deviation_QD.clamp(min=LEAST_DEVIATION)).view_as(z_BND)

    return of_place
