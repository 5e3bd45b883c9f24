"""What a recipe on trial changes in the sparse JEPA: here, until it has shown a gain.

    teacher   targets come from exported weights, which stay as they are (a frozen teacher)
    centred   targets are what tokens differ by from their place and modality, by its deviation
    head      the tissue head and the spread alone, without prediction
    variant   an MAE of ``VARIANTS`` is trained in place of the recipe's method
    code      weights stay as they are, and a code of their tokens is learnt (_session.py)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurojepa.baselines.mae import MAE
from neurojepa.config import RootConfig
from neurojepa.downstream.sessions import ATOMS, LEAST_SHARE, WIDER
from neurojepa.feed.format import MODALITIES, Grid
from neurojepa.methods import METHODS
from neurojepa.model.averaged import Averaged
from neurojepa.model.encoder import Encoder
from neurojepa.model.jepa import SparseJEPA
from neurojepa.model.predictor import Predictor
from neurojepa.model.session_code import SessionCode
from neurojepa.model.sizes import SIZES
from neurojepa.objective.losses import take
from neurojepa.objective.views import INTENSITY_MEAN, INTENSITY_STD, Views, patch_numbers
from neurojepa.weights import load
from tools.bench._quality_run import head_alone
from tools.bench.common import device_here

LEAST_DEVIATION = 0.1  # of a place's tokens: below it they are not made larger
LEAST_RATE = 0.02  # at which the running means of places follow
CURVE_PARTS = 8  # straight pieces of a curve of intensity
CURVE_LEAST = 0.1  # where curves begin: no tissue becomes air


def apply(changes: dict[str, Any], grid: Grid, patch: int) -> None:
    """Change ``SparseJEPA``, or what a method is, in this process."""
    if "variant" in changes:
        method, model = VARIANTS[changes["variant"]]
        METHODS[method] = replace(METHODS["mae"], model=f"{__name__}:{model.__name__}",
                                  latents=METHODS[method].latents)
    if changes.get("head_alone"):
        SparseJEPA.forward = head_alone  # type: ignore[method-assign, assignment]
    targets = SparseJEPA.targets
    if changes.get("teacher") and not changes.get("code"):
        teacher = load(changes["teacher"]).model.to(device_here())
        targets = from_teacher(teacher)  # type: ignore[assignment]
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
            state["count"] = z_QD.new_zeros(cells)
            state["mean"], state["square"] = (z_QD.new_zeros(cells, z_QD.shape[1])
                                              for _ in range(2))
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


# ---- variants of MAE -----------------------------------------------------------------------------

class SessionMAE(MAE):
    """MAE whose visible tokens also tell, through a session code, the mean of the target encoder's
    tokens of this scan and of another one of its session at the same patch; the gradient of that
    reaches the encoder.

    The target encoder sees both scans whole, each augmented by its own draws.
    """

    def __init__(self, config: RootConfig, grid: Grid) -> None:
        super().__init__(config, grid)
        dim = SIZES[config.model.size].dim
        self.head = SessionCode.sized(dim, WIDER * dim, ATOMS * dim)
        self.l1: float | Tensor = 0.0  # of this step

    def forward(self, views: Views, l1: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.l1 = l1
        return super().forward(views, l1)

    def losses(self, views: Views, *, y_BCD: Tensor, decoded_BTd: Tensor
               ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().losses(views, y_BCD=y_BCD, decoded_BTd=decoded_BTd)
        told_B = views.weight_B * self.session_error(views, y_BCD)
        return loss + told_B.sum(), metrics | {"session": told_B.sum().detach()}

    def session_error(self, views: Views, y_BCD: Tensor) -> Tensor:
        """float32 [B]: the session code's loss over the visible tokens that are brain in both."""
        visible_BMC = views.context_BMC[:, :1]
        mean_BND = (self.latents(views) + self.latents(views.of_targets())) / 2
        used_BN = ((views.foreground_BN >= LEAST_SHARE) & views.target_valid_BN
                   & (views.target_foreground_BN > 0))
        used_BC = take(used_BN, visible_BMC)[:, 0].float()
        h_BCA = self.head(F.layer_norm(y_BCD.float(), y_BCD.shape[-1:]))
        left_BCD = self.head.told(h_BCA) - take(mean_BND, visible_BMC)[:, 0]
        error_BC = left_BCD.square().mean(-1) + self.l1 * h_BCA.sum(-1)
        return (used_BC * error_BC).sum(1) / used_BC.sum(1).clamp(min=1)


class CurvedMAE(MAE):
    """MAE that sees each scan through a random curve of intensity, half of which fall, and fills in
    the voxels as they were."""

    def __init__(self, config: RootConfig, grid: Grid) -> None:
        super().__init__(config, grid)
        self.draws = torch.Generator().manual_seed(config.train.seed)

    def forward(self, views: Views, l1: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        seen = replace(views, tokens_BNP=curved(views.tokens_BNP, self.draws))
        return super().forward(seen, l1)

    def losses(self, views: Views, *, y_BCD: Tensor, decoded_BTd: Tensor
               ) -> tuple[Tensor, dict[str, Tensor]]:
        plain = replace(views, tokens_BNP=views.target_tokens_BNP)
        return super().losses(plain, y_BCD=y_BCD, decoded_BTd=decoded_BTd)


def curved(tokens_BNP: Tensor, draws: torch.Generator) -> Tensor:
    """Standardised voxels after a monotone curve for each scan, rising or falling by a coin.

    A curve has straight pieces of random heights.  Air, and what was not scanned, stays.
    """
    B = len(tokens_BNP)
    rise_BK = torch.empty(B, CURVE_PARTS).exponential_(generator=draws).cumsum(1)
    height_BK = F.pad(rise_BK / rise_BK[:, -1:], (1, 0))
    falls_B1 = torch.rand(B, 1, generator=draws) < 0.5
    height_BK = CURVE_LEAST + (1 - CURVE_LEAST) * torch.where(falls_B1, 1 - height_BK, height_BK)
    height_BK = height_BK.to(tokens_BNP.device)
    value_BV = (tokens_BNP * INTENSITY_STD + INTENSITY_MEAN).flatten(1).clamp(0, 1) * CURVE_PARTS
    piece_BV = value_BV.long().clamp(max=CURVE_PARTS - 1)
    new_BV = torch.lerp(height_BK.gather(1, piece_BV), height_BK.gather(1, piece_BV + 1),
                        value_BV - piece_BV)
    new_BNP = ((new_BV - INTENSITY_MEAN) / INTENSITY_STD).view_as(tokens_BNP)
    stays_BNP = (tokens_BNP == -INTENSITY_MEAN / INTENSITY_STD) | (tokens_BNP == 0)
    return torch.where(stays_BNP, tokens_BNP, new_BNP)


class SlicedMAE(MAE):
    """MAE of axial slices: of a patch it sees and fills in the middle slice alone, and tokens read
    from those of their own layer of patches alone."""

    def __init__(self, config: RootConfig, grid: Grid) -> None:
        super().__init__(config, grid)
        Layers().attach(self.decoder)

    @staticmethod
    def make_encoder(config: RootConfig, grid: Grid) -> nn.Module:
        return SlicedEncoder(config.model)

    def forward(self, views: Views, l1: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return super().forward(replace(views, tokens_BNP=middle_slice(views.tokens_BNP)), l1)


class SlicedEncoder(Encoder):
    """Tokens of middle slices, which read from their own layer."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        Layers().attach(self)

    def forward(self, tokens_BNP: Tensor, coords_BN3: Tensor, valid_BN: Tensor,
                all_scanned: bool = False) -> Tensor:
        return super().forward(middle_slice(tokens_BNP), coords_BN3, valid_BN, all_scanned)


class Layers:
    """Hooks that let the tokens of an encoder or a predictor read from their own layer alone."""

    def attach(self, network: Encoder | Predictor) -> None:
        network.register_forward_pre_hook(self.look)
        for block in network.blocks:
            block.attention.register_forward_pre_hook(self.read)

    def look(self, network: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Of coordinates and valid tokens: who may read from whom; each from itself."""
        coords_BN3, valid_BN = arguments[1:3]
        same_BNN = coords_BN3[:, :, None, 2] == coords_BN3[:, None, :, 2]
        itself_NN = torch.eye(valid_BN.shape[1], dtype=torch.bool, device=valid_BN.device)
        self.readable_B1NN = (same_BNN & valid_BN[:, None] | itself_NN)[:, None]

    def read(self, attention: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Its own mask in place of what attention was given."""
        x_BND, turn_BN1p2, _, first = arguments
        return x_BND, turn_BN1p2, self.readable_B1NN[:, :, first:], first


def middle_slice(tokens_BNP: Tensor) -> Tensor:
    """The middle axial slice of each patch in place of all of them."""
    patch = round(tokens_BNP.shape[-1] ** (1 / 3))
    slices = tokens_BNP.unflatten(-1, (patch * patch, patch))
    return slices[..., patch // 2, None].expand_as(slices).flatten(-2)


# by name: the method of the recipe that it replaces, and what it is
VARIANTS: dict[str, tuple[str, type[MAE]]] = {
    "session": ("jepa", SessionMAE),  # whose recipes may ask for pairs of scans
    "curves": ("mae", CurvedMAE), "slices": ("mae", SlicedMAE)}
