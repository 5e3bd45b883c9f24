"""From the tokens of a scan to one row: what they differ by from their place and its head's size.

A token says most of all where it lies and how much of its patch is brain, and a larger head has
other tissue at the same place.  A plain mean over tokens therefore measures the size of the head.
Here

    tokens of patches that are brain (``LEAST_SHARE`` of the voxels)
    -> less the mean token of this modality at this patch
    -> mean over the scan's patches
    -> less a line in the logarithm of the brain's volume, as volumes are adjusted for head size

Without the last step the first principal component between people stays head size, deep in the
brain too.  So what follows from head size, such as sex in part, has to be read from the volume of
the brain.  docs/results/quality.md compares this with the plain mean.

A region's row is the same mean over its part of the patches, less a line at each patch.

Mean tokens and lines come from scans of split ``train`` (embed.reference_rows), so nothing of the
people tested goes into them.  ``weights export`` fits them on the feed of the run and stores them
with the weights, so that an embedding does not depend on what is embedded beside it.

Shape letters: B scans, N tokens, T tokens of a modality, n patches of the grid, D width, R regions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from neurojepa.errors import DataError
from neurojepa.feed.format import MODALITIES

LEAST_SHARE = 0.9  # of a patch that must be brain: others tell of the edge
LEAST_SCANS = 2  # of train with such a patch at a place; tokens at other places are left out
SIZE_PRIOR = 0.01  # sum of squares that counts against the line: a few scans tell none


@dataclass(frozen=True)
class Tokens:
    """Tokens of a batch of scans, all on one device."""

    z_BND: Tensor  # float32
    patch_BN: Tensor  # int64, patch of the grid
    share_BN: Tensor  # float32, of the patch that is brain
    modality_B: Tensor  # int64, index into MODALITIES

    def brain_BN(self) -> Tensor:
        """Bool: the tokens that are pooled."""
        return self.share_BN >= LEAST_SHARE

    def log_size_B(self) -> Tensor:
        """Logarithm of the volume of the brain, in patches."""
        return self.share_BN.sum(1).clamp(min=1e-3).log()


class Places:
    """What tokens are at each place in each modality, from the scans that it was given."""

    def __init__(self, num_patches: int) -> None:
        self.num_patches = num_patches
        self.sums: dict[int, Sums] = {}
        self.lines: dict[int, Line] = {}

    @property
    def width(self) -> int:
        """Features of the tokens."""
        return next(iter(self.sums.values())).token_nD.shape[1]

    @classmethod
    def fit(cls, read: Callable[[], Iterable[Tokens]], num_patches: int) -> Places:
        """Learn from scans of split train, which are read twice."""
        places = cls(num_patches)
        for tokens in read():
            log_size_BN = tokens.log_size_B()[:, None].expand_as(tokens.patch_BN)
            for modality in tokens.modality_B.unique().tolist():
                of_BN = tokens.brain_BN() & (tokens.modality_B == modality)[:, None]
                if modality not in places.sums:
                    places.sums[modality] = Sums.empty(num_patches, tokens.z_BND)
                places.sums[modality].add(tokens.z_BND[of_BN], tokens.patch_BN[of_BN],
                                          log_size_BN[of_BN])
        parts = [(places._differences(tokens), tokens.log_size_B(), tokens.modality_B)
                 for tokens in read()]
        value_SD, log_size_S, modality_S = (torch.cat(part) for part in zip(*parts, strict=True))
        places.lines = {modality: Line.fit(value_SD[modality_S == modality],
                                           log_size_S[modality_S == modality])
                        for modality in places.sums}
        return places

    def pool(self, tokens: Tokens) -> Tensor:
        """float32 [B, D]: how the tokens of each scan differ from what is expected of them.

        Raises
        ------
        DataError
            A scan's modality is none of those fitted, or its tokens have other features.
        """
        self._check(tokens)
        by_size = [self.lines[modality](log_size) for modality, log_size in zip(
            tokens.modality_B.tolist(), tokens.log_size_B(), strict=True)]
        return self._differences(tokens) - torch.stack(by_size)

    def values(self, tokens: Tokens, b: int) -> tuple[Tensor, Tensor]:
        """The tokens of scan b that are pooled, float32 [T, D], and how each differs from what is
        expected of it [T, D]: the mean of these is the row of ``pool``.

        Raises
        ------
        DataError
            As ``pool``.
        """
        self._check(tokens)
        used_N = self._used(tokens, b)
        modality, patch_T = int(tokens.modality_B[b]), tokens.patch_BN[b, used_N]
        z_TD, by_size = tokens.z_BND[b, used_N], self.lines[modality](tokens.log_size_B()[b])
        return z_TD, (z_TD - self.sums[modality].mean(patch_T) - by_size).float()

    def patches(self, tokens: Tokens, b: int) -> Tensor:
        """int64 [T]: the patches of the tokens of ``values``."""
        self._check(tokens)
        return tokens.patch_BN[b, self._used(tokens, b)]

    def pool_regions(self, tokens: Tokens, share_nR: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of parts of the brain, as ``pool`` makes them of the whole.

        Parameters
        ----------
        share_nR : float, how much of each patch lies in each region

        Returns
        -------
        float32 [B, R, D], 0 where nothing of a region was seen; float32 [B, R], how many patches of
        it were

        Raises
        ------
        DataError
            A scan's modality is none of those fitted, or its tokens have other features.
        """
        self._check(tokens)
        rows, seen = [], []
        for b, modality in enumerate(tokens.modality_B.tolist()):
            patch_T, differing_TD = self._differing(tokens, b)
            differing_TD = differing_TD - self.sums[modality].by_size(
                patch_T, tokens.log_size_B()[b])
            share_TR = share_nR[patch_T].to(differing_TD)
            rows.append(share_TR.T @ differing_TD / share_TR.sum(0).clamp(min=1e-9)[:, None])
            seen.append(share_TR.sum(0))
        return torch.stack(rows).float(), torch.stack(seen).float()

    def to(self, device: torch.device) -> Places:
        """The same on a device."""
        return Places.from_tensors({name: value.to(device)
                                    for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """All that was learnt, exactly, by names such as T1w.token_nD.

        Of what has a width, only patches that were seen: most of a grid is no brain.
        """
        return {f"{MODALITIES[modality]}.{name}":
                value[self.sums[modality].scans_n > 0] if name.endswith("_nD") else value
                for modality in sorted(self.sums)
                for part in (self.sums[modality], self.lines[modality])
                for name, value in vars(part).items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Places:
        """What ``tensors`` gave; or as it was once, with all patches."""
        parts: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            known, _, field = name.partition(".")
            parts.setdefault(MODALITIES.index(known), {})[field] = value
        places = cls(len(next(iter(parts.values()))["scans_n"]))
        for modality, part in parts.items():
            line = {name: part.pop(name) for name in ("log_size", "slope_D")}
            seen_n = part["scans_n"] > 0
            for name in ("token_nD", "sized_nD"):
                if len(part[name]) < len(seen_n):
                    part[name] = part[name].new_zeros(len(seen_n), part[name].shape[1]
                                                      ).index_put_((seen_n,), part[name])
            places.sums[modality], places.lines[modality] = Sums(**part), Line(**line)
        return places

    def _check(self, tokens: Tokens) -> None:
        unknown = set(tokens.modality_B.tolist()) - set(self.sums)
        if unknown:
            raise DataError(f"no {MODALITIES[min(unknown)]} scan to compare with; "
                            "it has " + ", ".join(MODALITIES[m] for m in sorted(self.sums))
                            + "; embed other modalities, or add such scans to the feed")
        width = tokens.z_BND.shape[-1]
        if self.width != width:
            raise DataError(f"places tell of {self.width} features and tokens have {width}; "
                            "compare latents with places of latents, and atoms with places of "
                            "atoms")

    def _differences(self, tokens: Tokens) -> Tensor:
        """[B, D]: mean difference from the mean token of the place; 0 where no place is known."""
        rows = []
        for b in range(len(tokens.z_BND)):
            _, differing_TD = self._differing(tokens, b)
            rows.append(differing_TD.sum(0) / max(len(differing_TD), 1))
        return torch.stack(rows).float()

    def _differing(self, tokens: Tokens, b: int) -> tuple[Tensor, Tensor]:
        """Patches [T] of scan b whose place is known, and what their tokens differ by [T, D]."""
        used_N, sums = self._used(tokens, b), self.sums[int(tokens.modality_B[b])]
        patch_T = tokens.patch_BN[b, used_N]
        return patch_T, tokens.z_BND[b, used_N] - sums.mean(patch_T)

    def _used(self, tokens: Tokens, b: int) -> Tensor:
        """Bool [N]: the tokens of scan b that are brain, at places that are known."""
        scans_n = self.sums[int(tokens.modality_B[b])].scans_n
        return tokens.brain_BN()[b] & (scans_n[tokens.patch_BN[b]] >= LEAST_SCANS)

    def variance(self) -> tuple[float, float, float]:
        """Variance of the tokens that were learnt from, as sums of squares: all of it, that between
        places, and that between places of each modality."""
        parts = list(self.sums.values())
        scans_n = torch.stack([part.scans_n for part in parts]).sum(0)
        token_nD = torch.stack([part.token_nD for part in parts]).sum(0)
        constant = float(token_nD.sum(0).square().sum() / scans_n.sum())
        return (sum(float(part.energy) for part in parts) - constant,
                _energy(scans_n, token_nD) - constant,
                sum(_energy(part.scans_n, part.token_nD) for part in parts) - constant)


@dataclass
class Sums:
    """Sums over tokens of one modality at each patch; float64."""

    scans_n: Tensor
    token_nD: Tensor
    energy: Tensor  # of squared lengths over all patches
    size_n: Tensor  # of the logarithm of the brain's volume
    size2_n: Tensor  # of its square
    sized_nD: Tensor  # of it times the token

    @classmethod
    def empty(cls, num_patches: int, like: Tensor) -> Sums:
        n, D = num_patches, like.shape[-1]
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=like.device)
                     for shape in ((n,), (n, D), (), (n,), (n,), (n, D))))

    def add(self, z_TD: Tensor, patch_T: Tensor, log_size_T: Tensor) -> None:
        z_TD, log_size_T = z_TD.double(), log_size_T.double()
        self.scans_n.index_add_(0, patch_T, torch.ones_like(log_size_T))
        self.token_nD.index_add_(0, patch_T, z_TD)
        self.energy += z_TD.square().sum()
        self.size_n.index_add_(0, patch_T, log_size_T)
        self.size2_n.index_add_(0, patch_T, log_size_T.square())
        self.sized_nD.index_add_(0, patch_T, log_size_T[:, None] * z_TD)

    def by_size(self, patch_T: Tensor, log_size: Tensor) -> Tensor:
        """[T, D]: what a head of this size differs by at these patches: a line at each of them."""
        scans_T, size_T = self.scans_n[patch_T], self.size_n[patch_T]
        spread_T = self.size2_n[patch_T] - size_T.square() / scans_T
        slope_TD = ((self.sized_nD[patch_T] - size_T[:, None] * self.mean(patch_T))
                    / (spread_T.clamp(min=0) + SIZE_PRIOR)[:, None])
        return (log_size - size_T / scans_T)[:, None] * slope_TD

    def mean(self, patch_T: Tensor) -> Tensor:
        """[T, D]: the mean tokens of patches that were seen."""
        return self.token_nD[patch_T] / self.scans_n[patch_T, None]


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


def _energy(scans_n: Tensor, token_nD: Tensor) -> float:
    """Sum over patches of the number of tokens times the squared length of their mean."""
    return float((token_nD.square().sum(-1) / scans_n.clamp(min=1)).sum())
