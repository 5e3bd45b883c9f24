"""What completes a missing modality: latents by a linear map, voxels by a network on top of them.

    sources' tokens, less what is usual at their place -> ridge -> those of the target
    sources' voxels -> a cubic in the intensities, with the target's mean map -> first guess
    sources, mean map, first guess, latents laid on the grid -> three convolutions -> correction

All of it works on the feed's grid, on intensities of the brain between 0 and 1.  The network is
small, and begins at the first guess, so that it can be no worse where it learns nothing.

Where there are several sources, a visit may lack some of them, and a scan may end before the brain
does.  So what is there is asked at each voxel and at each patch: maps and polynomials are fitted
apart for each *pattern*, the set of sources that show brain there (bit k is source k), and the
network sees a mask beside each source.  Nothing stands in for what is missing.

Shape letters: X Y Z voxels, v of them, n patches, T tokens, D width, K sources, L channels of
latents.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def missing(shape: tuple[int, ...]) -> Volume:
    """What a source is in a visit that lacks it: nowhere brain."""
    return Volume(np.zeros(shape, np.float32), np.zeros(shape, bool))


def brain_of(sources: Sequence[Volume]) -> np.ndarray:
    """Bool [X, Y, Z]: where any source shows brain, which is where the target is made."""
    found: np.ndarray = np.any([each.brain_XYZ for each in sources], 0)
    return found


def members(pattern: int) -> list[int]:
    """The sources of a pattern."""
    return [k for k in range(pattern.bit_length()) if pattern >> k & 1]


def terms(value_vK: np.ndarray, mean: np.ndarray, kind: str) -> np.ndarray:
    """float64 [v, terms] of the intensities of sources and the target's mean map at v voxels.

    A source that is not of the pattern has value 0 at these voxels, which makes its terms 0.
    """
    value_vK, mean = value_vK.astype(float), mean.astype(float)[:, None]
    powers = np.stack([value_vK, value_vK**2, value_vK**3], -1).reshape(
        len(mean), 3 * value_vK.shape[1])
    cubic = [np.ones_like(mean), powers]
    return np.concatenate(cubic if kind == "cubic" else [*cubic, mean, mean * value_vK], -1)


class Completion(nn.Module):
    """All that is learnt of a target and its sources.

    What there is of each pattern is stacked by number, from pattern 1 on; of a single source, which
    has one pattern, it is not stacked.
    """

    mean_map: Tensor  # [X, Y, Z] of the target
    cubic: Tensor  # [patterns, 1 + 3 K]
    first: Tensor  # [patterns, 2 + 4 K]
    line: Tensor  # [patterns, K D, D], from the sources' differences to the target's

    def __init__(self, shape: tuple[int, int, int], dim: int, patch: int, sources: int = 1) -> None:
        super().__init__()
        self.patch, self.sources, self.dim = patch, sources, dim
        stacked = (2**sources - 1,) if sources > 1 else ()
        for name, sizes in (("mean_map", shape), ("cubic", (*stacked, 1 + 3 * sources)),
                            ("first", (*stacked, 2 + 4 * sources)),
                            ("line", (*stacked, sources * dim, dim))):
            self.register_buffer(name, torch.zeros(sizes))
        planes = 3 if sources == 1 else 2 * sources + 2
        self.narrow = nn.Linear(dim, LATENTS, bias=False)
        self.one = nn.Conv3d(planes + LATENTS, CHANNELS, 3, padding=1)
        self.two = nn.Conv3d(CHANNELS, CHANNELS, 3, padding=2, dilation=2)
        self.three = nn.Conv3d(CHANNELS, 1, 3, padding=1)
        nn.init.zeros_(self.three.weight)
        assert self.three.bias is not None
        nn.init.zeros_(self.three.bias)

    @property
    def patterns(self) -> range:
        """Numbers of all patterns."""
        return range(1, 2**self.sources)

    def of_pattern(self, name: str, pattern: int) -> Tensor:
        """What is learnt of a pattern, a view: of ``cubic``, ``first`` or ``line``."""
        whole: Tensor = getattr(self, name)
        return whole if self.sources == 1 else whole[pattern - 1]

    def guess(self, sources: Sequence[Volume], kind: str) -> np.ndarray:
        """float32 [X, Y, Z] without the network: one of ``TERMS``; 0 outside the brain."""
        mean, where = self.mean_map.cpu().numpy(), brain_of(sources)
        if kind == "mean map":
            return np.where(where, mean, 0)
        name = "cubic" if kind == "cubic" else "first"
        pattern_v = sum(each.brain_XYZ[where].astype(int) << k for k, each in enumerate(sources))
        value_vK = np.stack([each.value_XYZ[where] for each in sources], -1)
        design, told = terms(value_vK, mean[where], kind), np.zeros(len(value_vK))
        for pattern in np.unique(pattern_v).tolist():
            of = pattern_v == pattern
            told[of] = design[of] @ self.of_pattern(name, pattern).double().cpu().numpy()
        found = np.zeros(where.shape, np.float32)
        found[where] = told
        return np.clip(found, 0, 1)

    def planes(self, sources: Sequence[Volume]) -> Tensor:
        """float32 [1, p, X, Y, Z]: sources, where each shows brain if there are several, mean map
        and first guess."""
        masks = [each.brain_XYZ for each in sources] if self.sources > 1 else []
        planes = np.stack([
            *(each.value_XYZ for each in sources), *masks,
            np.where(brain_of(sources), self.mean_map.cpu().numpy(), 0),
            self.guess(sources, "first guess")])
        return torch.from_numpy(planes.astype(np.float32))[None].to(self.mean_map.device)

    def told(self, sources: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor]:
        """Patches [T] and differences [T, D] of the target, from those of each source, None where
        it is missing; of the patches where any source has a token."""
        if self.sources == 1:
            assert sources[0] is not None
            return sources[0][0], sources[0][1] @ self.line
        patch_T, pattern_T, x_TKD = self.joined(sources)
        told_TD = x_TKD.new_zeros(len(patch_T), self.dim)
        for pattern in pattern_T.unique().tolist():
            of = pattern_T == pattern
            told_TD[of] = x_TKD[of].flatten(1) @ self.of_pattern("line", pattern).to(x_TKD)
        return patch_T, told_TD

    def joined(self, sources: Sequence[tuple[Tensor, Tensor] | None]
               ) -> tuple[Tensor, Tensor, Tensor]:
        """Patches [T], the pattern at each, and differences [T, K, D], which are 0 where a source
        has no token."""
        there = [(k, *each) for k, each in enumerate(sources) if each is not None]
        patch_T = torch.unique(torch.cat([patch for _, patch, _ in there]))
        pattern_T = torch.zeros_like(patch_T)
        x_TKD = there[0][2].new_zeros(len(patch_T), self.sources, self.dim)
        for k, patch, x in there:
            place = torch.searchsorted(patch_T, patch)
            pattern_T[place] += 1 << k
            x_TKD[place, k] = x
        return patch_T, pattern_T, x_TKD

    def laid(self, shape: tuple[int, ...], patch_T: Tensor, latent_TD: Tensor | None) -> Tensor:
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
        found: Tensor = planes[:, -1] + self.three(hidden)[:, 0]
        return found

    @torch.no_grad()
    def complete(self, sources: Sequence[Volume], patch_T: Tensor,
                 latent_TD: Tensor | None) -> np.ndarray:
        """float32 [X, Y, Z] in [0, 1]; 0 where no source shows brain."""
        where = brain_of(sources)
        told = self(self.planes(sources), self.laid(where.shape, patch_T, latent_TD))
        return np.where(where, told[0].clamp(0, 1).cpu().numpy(), 0)


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
