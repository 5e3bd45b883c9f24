"""What completes a missing modality: latents by a linear map, voxels by a network on top of them.

    source's tokens, less what is usual at their place -> ridge -> those of the target
    source's voxels -> a cubic in the intensity, with the target's mean map -> first guess
    source, mean map, first guess, latents laid on the grid -> three convolutions -> correction

All of it works on the feed's grid, on intensities of the brain between 0 and 1.  The network is
small, and begins at the first guess, so that it can be no worse where it learns nothing.

Shape letters: X Y Z voxels, n patches, T tokens of a scan, D width, L channels of latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neurojepa.feed.format import is_brain

CHANNELS = 16
LATENTS = 8  # channels that the latents are seen through
TERMS = ("mean map", "cubic", "first guess")  # ways to guess without a network


@dataclass(frozen=True)
class Volume:
    """A scan on the grid: intensities in [0, 1], 0 outside the brain."""

    value_XYZ: np.ndarray  # float32
    brain_XYZ: np.ndarray  # bool


def volume_of(codes: np.ndarray) -> Volume:
    """A feed's image (uint8 codes) as intensities."""
    brain = is_brain(codes)
    return Volume(np.where(brain, (codes.astype(np.float32) - 1) / 253, 0).astype(np.float32),
                  brain)


def terms(value: np.ndarray, mean: np.ndarray, kind: str) -> np.ndarray:
    """float64 [v, terms] of source intensities and the target's mean map at v voxels."""
    value, mean = value.astype(float), mean.astype(float)
    cubic = [np.ones_like(value), value, value**2, value**3]
    return np.stack(cubic if kind == "cubic" else [*cubic, mean, mean * value], -1)


class Completion(nn.Module):
    """All that is learnt of a pair of modalities."""

    mean_map: Tensor  # [X, Y, Z] of the target
    cubic: Tensor  # [4]
    first: Tensor  # [6]
    line: Tensor  # [D, D], from the source's differences to the target's

    def __init__(self, shape: tuple[int, int, int], dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        for name, sizes in (("mean_map", shape), ("cubic", (4,)), ("first", (6,)),
                            ("line", (dim, dim))):
            self.register_buffer(name, torch.zeros(sizes))
        self.narrow = nn.Linear(dim, LATENTS, bias=False)
        self.one = nn.Conv3d(3 + LATENTS, CHANNELS, 3, padding=1)
        self.two = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=2, dilation=2)
        self.three = nn.Conv3d(CHANNELS, 1, 3, padding=1)
        nn.init.zeros_(self.three.weight)
        assert self.three.bias is not None
        nn.init.zeros_(self.three.bias)

    def guess(self, source: Volume, kind: str) -> np.ndarray:
        """float32 [X, Y, Z] without the network: one of ``TERMS``; 0 outside the source's brain."""
        mean = self.mean_map.cpu().numpy()
        if kind == "mean map":
            return np.where(source.brain_XYZ, mean, 0)
        found = np.zeros_like(source.value_XYZ)
        where = source.brain_XYZ
        weight = (self.cubic if kind == "cubic" else self.first).double().cpu().numpy()
        found[where] = terms(source.value_XYZ[where], mean[where], kind) @ weight
        return np.clip(found, 0, 1)

    def planes(self, source: Volume) -> Tensor:
        """float32 [1, 3, X, Y, Z]: source, mean map and first guess."""
        planes = np.stack([source.value_XYZ, np.where(source.brain_XYZ, self.mean_map.cpu().numpy(),
                                                      0), self.guess(source, "first guess")])
        return torch.from_numpy(planes.astype(np.float32))[None].to(self.mean_map.device)

    def laid(self, shape: tuple[int, int, int], patch_T: Tensor,
             latent_TD: Tensor | None) -> Tensor:
        """float32 [1, L, X, Y, Z]: latents at their patches, interpolated; zeros without."""
        counts = [length // self.patch for length in shape]
        if latent_TD is None:
            return torch.zeros(1, LATENTS, *shape, device=self.mean_map.device)
        field = torch.zeros(int(np.prod(counts)), LATENTS, device=latent_TD.device)
        field = field.index_copy(0, patch_T, self.narrow(latent_TD))
        return F.interpolate(field.T.reshape(1, LATENTS, *counts), size=shape, mode="trilinear")

    def forward(self, planes: Tensor, laid: Tensor) -> Tensor:
        """float32 [1, X, Y, Z]: the completed target, from ``planes`` and ``laid``."""
        hidden = F.gelu(self.one(torch.cat([planes, laid], 1)))
        hidden = F.gelu(self.two(hidden))
        found: Tensor = planes[:, 2] + self.three(hidden)[:, 0]
        return found

    @torch.no_grad()
    def complete(self, source: Volume, patch_T: Tensor, latent_TD: Tensor | None) -> np.ndarray:
        """float32 [X, Y, Z] in [0, 1]; 0 outside the source's brain."""
        shape = source.value_XYZ.shape
        told = self(self.planes(source), self.laid(shape, patch_T, latent_TD))
        return np.where(source.brain_XYZ, told[0].clamp(0, 1).cpu().numpy(), 0)


# ---- how good it is ------------------------------------------------------------------------------

def psnr(truth: np.ndarray, told: np.ndarray, where: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB at the voxels of a mask, where the peak is 1."""
    error = float(np.square(truth[where] - told[where], dtype=float).mean())
    return float(-10 * np.log10(max(error, 1e-12)))


def ssim(truth: np.ndarray, told: np.ndarray, where: np.ndarray, width: int = 7) -> float:
    """Structural similarity (Wang et al. 2004), mean over the voxels of a mask; windows are cubes
    of ``width`` voxels."""
    from scipy.ndimage import uniform_filter

    one, other = truth.astype(float), told.astype(float)

    def mean(values: np.ndarray) -> np.ndarray:
        return uniform_filter(values, width)

    m1, m2 = mean(one), mean(other)
    v1, v2 = mean(one**2) - m1**2, mean(other**2) - m2**2
    both = mean(one * other) - m1 * m2
    found = ((2 * m1 * m2 + 0.01**2) * (2 * both + 0.03**2)
             / ((m1**2 + m2**2 + 0.01**2) * (v1 + v2 + 0.03**2)))
    return float(found[where].mean())
