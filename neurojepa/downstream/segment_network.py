"""The network of ``segment``: what it adds to where labels lie on average.

    coordinates of a window --> prior: log of the labelled people's mean shares there
    window --SegResNet (Myronenko, MICCAI BrainLes 2018; MONAI's)--> what it makes of the image
    both, summed --> a map a label

From a few labelled people SegResNet is long in learning rare regions, presumably because it
normalises every group of its channels over the window, by which it loses where the window lies.
The prior tells both from the first step on (docs/results/segment.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.networks.nets.segresnet import SegResNet
from scipy import ndimage
from torch.nn import functional as F

NODES = 40  # of the prior, along each axis from -1 to 1 of the coordinates
LEAST = 1e-3  # share of a label where nobody has it


def segresnet(filters: int, num_labels: int) -> SegResNet:
    """[B, 4, x, y, z] -> [B, num_labels + 1, x, y, z]."""
    return SegResNet(init_filters=filters, in_channels=4, out_channels=num_labels + 1,
                     blocks_down=(1, 2, 2), blocks_up=(1, 1))


class Guided(torch.nn.Module):
    """SegResNet and a prior; without people the prior is flat."""

    prior: torch.Tensor  # float32 [num_labels + 1, NODES, NODES, NODES]

    def __init__(self, filters: int, num_labels: int) -> None:
        super().__init__()
        self.network = segresnet(filters, num_labels)
        last = self.network.conv_final[-1].conv
        torch.nn.init.zeros_(last.weight)  # the first step starts from the prior alone
        torch.nn.init.zeros_(last.bias)
        self.register_buffer("prior", torch.zeros(num_labels + 1, NODES, NODES, NODES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x) + self.expected(x)

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        """[B, num_labels + 1, x, y, z]: the prior where the windows [B, 4, x, y, z] lie."""
        where = x[:, 1:4].movedim(1, -1).flip(-1)  # grid_sample counts the last axis first
        prior = self.prior[None].expand(len(x), -1, -1, -1, -1)
        return F.grid_sample(prior, where, padding_mode="border", align_corners=True)


def prior_of(people: Sequence[tuple[np.ndarray, np.ndarray]], num_labels: int) -> torch.Tensor:
    """The prior of people's coordinates [3, x, y, z] and ranks of labels [x, y, z]."""
    counts = np.zeros((num_labels + 1) * NODES**3)
    for points, target in people:
        node = np.rint((points.clip(-1, 1) + 1) / 2 * (NODES - 1)).astype(np.int64)
        flat = np.ravel_multi_index((target, *node), (num_labels + 1, *[NODES] * 3))
        counts += np.bincount(flat.ravel(), minlength=len(counts))
    counts = counts.reshape(num_labels + 1, *[NODES] * 3)
    soft = np.stack([ndimage.gaussian_filter(each, 1.0, mode="nearest") for each in counts])
    soft[0] += 1e-6  # where nobody has a voxel there is no label
    return torch.from_numpy(np.log(np.maximum(soft / soft.sum(0), LEAST)).astype(np.float32))
