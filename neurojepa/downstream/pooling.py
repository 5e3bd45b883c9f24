"""From the tokens of a scan to one row: what they differ by from their place and its head's size.

A token says most of all where it lies and how much of its patch is brain, and a larger head has
other tissue at the same place.  A plain mean over tokens therefore measures the size of the head.
So each token is compared with what one would expect there:

    expected = mean[m, p] + slope[m, p] * (share - mean share[m, p])

for its modality m, its patch p of the grid and the share of that patch which is brain.  The
differences are averaged, weighted by that share.  From this mean a line in the logarithm of the
brain's volume is taken, as volumes are adjusted for head size: without it the first principal
component between people stays head size at r = .95 even for patches deep in the brain
(docs/results/quality.md).

Means, slopes and lines are least squares over scans of split ``train`` of the feed that is
embedded, so nothing of the people tested goes into them.  What follows from head size, such as sex
in part, has to be read from the volume of the brain.

Shape letters: B scans, N tokens, T tokens of a modality, n patches of the grid, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from neurojepa.errors import DataError
from neurojepa.feed.format import MODALITIES

LEAST_SCANS = 2  # of train with brain at a place; tokens at other places are left out
# Sums of squared deviations that count against a slope: few or equal shares and sizes tell none.
SHARE_PRIOR, SIZE_PRIOR = 0.1, 0.01


@dataclass(frozen=True)
class Tokens:
    """Tokens of a batch of scans, all on one device."""

    z_BND: Tensor  # float32
    patch_BN: Tensor  # int64, patch of the grid
    share_BN: Tensor  # float32, of the patch that is brain
    modality_B: Tensor  # int64, index into MODALITIES

    def log_size_B(self) -> Tensor:
        """Logarithm of the volume of the brain, in patches."""
        return self.share_BN.sum(1).clamp(min=1e-3).log()


class Places:
    """What tokens are at each place in each modality, from the scans that it was given."""

    def __init__(self, num_patches: int) -> None:
        self.num_patches = num_patches
        self.sums: dict[int, Sums] = {}
        self.fits: dict[int, Fit] = {}
        self.lines: dict[int, Line] = {}

    @classmethod
    def fit(cls, read: Callable[[], Iterable[Tokens]], num_patches: int) -> Places:
        """Learn from scans of split train, which are read twice."""
        places = cls(num_patches)
        for tokens in read():
            for modality in tokens.modality_B.unique().tolist():
                of_BN = (tokens.modality_B == modality)[:, None] & (tokens.share_BN > 0)
                if modality not in places.sums:
                    places.sums[modality] = Sums.empty(num_patches, tokens.z_BND)
                places.sums[modality].add(tokens.z_BND[of_BN], tokens.patch_BN[of_BN],
                                          tokens.share_BN[of_BN])
        places.fits = {modality: sums.fit() for modality, sums in places.sums.items()}
        parts = [(places._differences(tokens), tokens.log_size_B(), tokens.modality_B)
                 for tokens in read()]
        value_SD, log_size_S, modality_S = (torch.cat(part) for part in zip(*parts, strict=True))
        places.lines = {modality: Line.fit(value_SD[modality_S == modality],
                                           log_size_S[modality_S == modality])
                        for modality in places.fits}
        return places

    def pool(self, tokens: Tokens) -> Tensor:
        """float32 [B, D]: how the tokens of each scan differ from what is expected of them.

        Raises
        ------
        DataError
            A scan's modality is none of those fitted.
        """
        unknown = set(tokens.modality_B.tolist()) - set(self.fits)
        if unknown:
            raise DataError(f"no {MODALITIES[min(unknown)]} scan in split train to compare with; "
                            "it has " + ", ".join(MODALITIES[m] for m in sorted(self.fits))
                            + "; embed other modalities, or add such scans to the feed")
        by_size = [self.lines[modality](log_size) for modality, log_size in zip(
            tokens.modality_B.tolist(), tokens.log_size_B(), strict=True)]
        return self._differences(tokens) - torch.stack(by_size)

    def _differences(self, tokens: Tokens) -> Tensor:
        """As ``pool``, before the line in head size is taken."""
        return torch.stack([
            self.fits[modality].differences(tokens.z_BND[b], tokens.patch_BN[b],
                                            tokens.share_BN[b])
            for b, modality in enumerate(tokens.modality_B.tolist())])

    def variance(self) -> tuple[float, float, float]:
        """Variance of the tokens, weighted by share of brain, as sums of squares: all of it, that
        between places, and that between places of each modality."""
        parts = list(self.sums.values())
        weight_n = torch.stack([part.weight_n for part in parts]).sum(0)
        token_nD = torch.stack([part.token_nD for part in parts]).sum(0)
        constant = float(token_nD.sum(0).square().sum() / weight_n.sum())
        return (sum(float(part.energy) for part in parts) - constant,
                _energy(weight_n, token_nD) - constant,
                sum(_energy(part.weight_n, part.token_nD) for part in parts) - constant)


@dataclass
class Sums:
    """Sums over tokens of one modality at each patch, weighted by share of brain; float64."""

    scans_n: Tensor
    weight_n: Tensor
    share_n: Tensor
    square_n: Tensor  # of share
    token_nD: Tensor
    product_nD: Tensor  # of share and token
    energy: Tensor  # of squared lengths over all patches

    @classmethod
    def empty(cls, num_patches: int, like: Tensor) -> Sums:
        n, D = num_patches, like.shape[-1]
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=like.device)
                     for shape in [(n,)] * 4 + [(n, D)] * 2 + [()]))

    def add(self, z_TD: Tensor, patch_T: Tensor, share_T: Tensor) -> None:
        z_TD, share_T1 = z_TD.double(), share_T.double()[:, None]
        self.scans_n.index_add_(0, patch_T, torch.ones_like(share_T1[:, 0]))
        self.weight_n.index_add_(0, patch_T, share_T1[:, 0])
        self.share_n.index_add_(0, patch_T, share_T1[:, 0] ** 2)
        self.square_n.index_add_(0, patch_T, share_T1[:, 0] ** 3)
        self.token_nD.index_add_(0, patch_T, share_T1 * z_TD)
        self.product_nD.index_add_(0, patch_T, share_T1 ** 2 * z_TD)
        self.energy += (share_T1 * z_TD.square()).sum()

    def fit(self) -> Fit:
        weight_n = self.weight_n.clamp(min=1e-9)
        share_n, mean_nD = self.share_n / weight_n, self.token_nD / weight_n[:, None]
        spread_n = self.square_n - self.share_n * share_n
        together_nD = self.product_nD - self.share_n[:, None] * mean_nD
        slope_nD = together_nD / (spread_n + SHARE_PRIOR)[:, None]
        return Fit(mean_nD.float(), slope_nD.float(), share_n.float(),
                   self.scans_n >= LEAST_SCANS)


@dataclass(frozen=True)
class Fit:
    """What is expected of a token of one modality at each patch."""

    mean_nD: Tensor  # float32, at the mean share
    slope_nD: Tensor  # float32, from no brain to all brain
    share_n: Tensor  # float32, the mean share
    known_n: Tensor  # bool, seen often enough

    def differences(self, z_ND: Tensor, patch_N: Tensor, share_N: Tensor) -> Tensor:
        """[D]: mean difference of a scan's tokens, weighted by share; 0 where none is known."""
        more_N1 = (share_N - self.share_n[patch_N])[:, None]
        differing_ND = z_ND - self.mean_nD[patch_N] - more_N1 * self.slope_nD[patch_N]
        weight_N = share_N * self.known_n[patch_N]
        return (weight_N[:, None] * differing_ND).sum(0) / weight_N.sum().clamp(min=1e-9)


@dataclass(frozen=True)
class Line:
    """How the mean difference of a scan's tokens follows the size of its head."""

    log_size: Tensor  # the mean
    slope_D: Tensor

    @classmethod
    def fit(cls, value_SD: Tensor, log_size_S: Tensor) -> Line:
        more_S = log_size_S - log_size_S.mean()
        return cls(log_size_S.mean(),
                   more_S @ (value_SD - value_SD.mean(0)) / (more_S.square().sum() + SIZE_PRIOR))

    def __call__(self, log_size: Tensor) -> Tensor:
        """[D]: what is expected of a scan above that of a mean one."""
        return (log_size - self.log_size) * self.slope_D


def _energy(weight_n: Tensor, token_nD: Tensor) -> float:
    """Sum over patches of weight times the squared length of the mean token."""
    return float((token_nD.square().sum(-1) / weight_n.clamp(min=1e-9)).sum())
