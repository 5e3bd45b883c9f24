"""A supervised 3D residual network (He et al. 2016) on whole volumes, and the labels it learns.

One label a run, ``objective.label``: a number is learnt standardised, by Huber's loss; two names
by cross-entropy, the alphabetically later one as positive.  A scan without the label weighs 0.
Volumes are put together from the views' tokens, so that they are augmented as for the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurojepa.config import RootConfig
from neurojepa.errors import ConfigError
from neurojepa.feed.format import Feed, Grid
from neurojepa.feed.labels import as_numbers, scan_labels
from neurojepa.model.averaged import Averaged
from neurojepa.objective.losses import sample_sums
from neurojepa.objective.views import Views

SIZES = {"tiny": (12, 1), "small": (24, 1), "base": (32, 2), "large": (64, 2), "huge": (64, 3)}
STAGES = 4  # each halves the volume and doubles the width
NORM_GROUPS = 4  # not batch norm: batches are small, and its running means know no EMA


@dataclass(kw_only=True)
class LabelledViews(Views):
    """Views with the label of each scan; its weight is 0 where that is unknown."""

    label_B: Tensor  # float32, standardised number, or 0 and 1
    is_binary: bool


class Labels:
    """The label of every scan of a feed.

    ``names`` are the classes (negative, positive) of a classification, None for a number, which
    was ``mean`` + ``std`` * label.

    Raises
    ------
    ConfigError
        The label is neither a number nor one of two names, or does not vary in the split.
    DataError
        No one has it.
    """

    def __init__(self, feed: Feed, config: RootConfig) -> None:
        name = config.objective.label
        column = {key: feed.index[key].to_pylist()
                  for key in ("participant", "session", "split", "scan_id")}
        text = scan_labels(feed.labels(), name, people=column["participant"],
                           sessions=column["session"])
        known = text != ""
        taught = known & (np.array(column["split"]) == config.data.split)
        self.names: tuple[str, str] | None = None
        self.mean, self.std = 0.0, 1.0
        values, found = np.full(len(text), np.nan), sorted(set(text[taught].tolist()))
        numbers = as_numbers(text[known])
        if len(found) < 2 or (numbers is None and len(found) > 2):
            raise ConfigError(f"objective.label = {name!r}: split {config.data.split} has the "
                              f"values {found[:5]}; a label is a number that varies, or two names")
        if numbers is not None:
            values[known] = numbers
            self.mean, self.std = float(values[taught].mean()), float(values[taught].std())
            values = (values - self.mean) / self.std
        else:
            self.names = (found[0], found[1])
            values[known] = text[known] == found[1]
        self._of = dict(zip(column["scan_id"], values.tolist(), strict=True))

    def attach(self, views: Views, scan_ids: list[str]) -> LabelledViews:
        """The same views with their labels."""
        device = views.weight_B.device
        label_B = torch.tensor([self._of[scan_id] for scan_id in scan_ids],
                               pin_memory=device.type == "cuda").to(device, non_blocking=True)
        whole: dict[str, Any] = vars(views) | {"weight_B": views.weight_B * label_B.isfinite()}
        return LabelledViews(**whole, is_binary=self.names is not None,
                             label_B=label_B.nan_to_num())


class CNN(Averaged):
    """A residual network as ``encoder``, its moving average, and a linear head."""

    def __init__(self, config: RootConfig, grid: Grid) -> None:
        super().__init__(config, grid)
        width, _ = SIZES[config.model.size]
        self.head = nn.Linear(width * 2 ** (STAGES - 1), 1)

    @staticmethod
    def make_encoder(config: RootConfig, grid: Grid) -> nn.Module:
        """Of tokens alone: they are the whole grid's."""
        width, blocks = SIZES[config.model.size]
        patch = config.model.patch_voxels
        counts = tuple(length // patch for length in grid.shape)
        return ResNet(width, blocks=blocks, counts=counts, patch=patch)

    def forward(self, views: LabelledViews, l1: float | Tensor
                ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch and its metrics, as of ``SparseJEPA.forward``; no ``l1`` here."""
        return self.losses(views, self.predict(views))

    def losses(self, views: LabelledViews, output_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What ``forward`` returns, of ``predict``'s output."""
        loss_of = F.binary_cross_entropy_with_logits if views.is_binary else F.smooth_l1_loss
        error_B = loss_of(output_B, views.label_B, reduction="none")
        loss_B = views.weight_B * error_B
        return loss_B.sum(), sample_sums(views, loss_B.detach(), {"prediction": error_B})

    @staticmethod
    def flops(config: RootConfig, grid: Grid) -> tuple[float, float]:
        """As ``Averaged.flops``: of the convolutions, all of them trained."""
        width, blocks = SIZES[config.model.size]
        voxels = _halved(grid.shape)
        forward = _conv_flops(1, width, kernel=5, voxels=voxels)
        width_in = width
        for stage in range(STAGES):
            for block in range(blocks):
                voxels = _halved(voxels) if stage and not block else voxels
                forward += _conv_flops(width_in, width, kernel=3, voxels=voxels)
                forward += _conv_flops(width, width, kernel=3, voxels=voxels)
                if width_in != width:
                    forward += _conv_flops(width_in, width, kernel=1, voxels=voxels)
                width_in = width
            width *= 2
        return forward, forward

    @staticmethod
    def labels(feed: Feed, config: RootConfig) -> Labels:
        return Labels(feed, config)

    def predict(self, views: Views) -> Tensor:
        """float32 [B]: standardised number, or the logit of the positive class."""
        return self.head(self.encoder(views.tokens_BNP)).squeeze(-1).float()

    @torch.no_grad()
    def embed(self, views: Views) -> Tensor:
        """float32 [B, D]: the features before the head, of the moving average."""
        return self.target(views.tokens_BNP).float()


class ResNet(nn.Module):
    """Tokens of the whole grid, as a volume, through residual stages to pooled features."""

    def __init__(self, width: int, *, blocks: int, counts: tuple[int, ...], patch: int) -> None:
        super().__init__()
        self.counts, self.patch = counts, patch
        self.stem = nn.Conv3d(1, width, 5, stride=2, padding=2, bias=False)
        self.norm = nn.GroupNorm(NORM_GROUPS, width)
        widths = [width * 2**stage for stage in range(STAGES)]
        self.blocks = nn.Sequential(*(
            Residual(widths[max(stage - (block == 0), 0)], widths[stage],
                     stride=2 if stage and not block else 1)
            for stage in range(STAGES) for block in range(blocks)))

    def forward(self, tokens_BNP: Tensor) -> Tensor:
        """[B, D] of tokens [B, N, P]."""
        volume = unpatchify(tokens_BNP.to(self.stem.weight.dtype), self.counts, self.patch)
        x = F.relu(self.norm(self.stem(volume[:, None])))
        return self.blocks(x).mean((2, 3, 4))


class Residual(nn.Module):
    """Two 3 x 3 x 3 convolutions beside a shortcut."""

    def __init__(self, width_in: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(NORM_GROUPS, width)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, width)
        same = width_in == width and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv3d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def _halved(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-length // 2) for length in shape)


def _conv_flops(width_in: int, width: int, *, kernel: int, voxels: tuple[int, ...]) -> float:
    return 2.0 * width_in * width * kernel**3 * math.prod(voxels)


def unpatchify(tokens_BNP: Tensor, counts: tuple[int, ...], patch: int) -> Tensor:
    """Undo ``patchify``: [B, N, P] of the whole grid -> [B, X, Y, Z]."""
    x, y, z = counts
    split = tokens_BNP.view(len(tokens_BNP), x, y, z, patch, patch, patch)
    return split.permute(0, 1, 4, 2, 5, 3, 6).reshape(len(tokens_BNP), x * patch, y * patch,
                                                      z * patch)
