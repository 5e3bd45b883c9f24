"""Demons on several channels at once, and tokens of the encoder as channels, for comparison alone.

    head, centred on the weights' grid --encoder--> tokens, eight times, shifted by half a patch
    --first principal components of both heads--> maps on the tokens' grid --> interpolated

The forces are those of ``neurojepa/downstream/register.py`` summed over channels (symmetric demons,
Vercauteren et al., NeuroImage 2009), the updates exponentials that are composed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from neurojepa.downstream.embed import with_all_brain, without_augmentation
from neurojepa.feed.format import MODALITIES, MaskCode, quantise
from neurojepa.feed.loader import Batch
from neurojepa.objective.views import make_views, patch_numbers

if TYPE_CHECKING:
    from neurojepa.weights import Weights

COMPONENTS = 4
LEVELS = ((4, 20), (2, 20), (1, 20))  # shrinking, iterations
SMOOTH, STEP, SQUARINGS = 1.0, 2.0, 4


# ---- tokens --------------------------------------------------------------------------------------

@torch.no_grad()
def token_maps(weights: Weights, brains: list[np.ndarray],
               components: int = COMPONENTS) -> list[np.ndarray]:
    """Of each brain [x, y, z], scaled to [0, 1] and 0 outside, on the weights' grid: float32
    [components, x, y, z], the first of unit variance, 0 outside; components are those of all the
    brains' tokens."""
    patch = weights.config.model.patch_voxels
    dense = [_dense(weights, brain, patch) for brain in brains]
    rows = np.concatenate([each[np.isfinite(each).all(-1)] for each in dense])
    mean = rows.mean(0)
    _, _, axes = np.linalg.svd(rows - mean, full_matrices=False)
    found = []
    for each, brain in zip(dense, brains, strict=True):
        maps = np.moveaxis((each - mean) @ axes[:components].T, -1, 0)
        maps /= (rows - mean).dot(axes[0]).std()
        known = np.isfinite(maps[0])
        nearest = ndimage.distance_transform_edt(~known, return_indices=True)[1]
        full = maps[:, *nearest]
        # token k of the dense grid lies at voxel k * patch / 2 + (patch - 1) / 2
        where = (np.indices(brain.shape, np.float32) - (patch - 1) / 2) / (patch / 2)
        found.append(np.stack([ndimage.map_coordinates(m, where, order=1, mode="nearest")
                               for m in full]).astype(np.float32) * (brain > 0))
    return found


def _dense(weights: Weights, brain: np.ndarray, patch: int) -> np.ndarray:
    """[2a, 2b, 2c, D] tokens half a patch apart; NaN where there is no brain."""
    half = patch // 2
    grid = tuple(n // patch for n in brain.shape)
    found: np.ndarray | None = None
    for shift in np.ndindex(2, 2, 2):
        moved = np.pad(brain, [(0, s * half) for s in shift])[
            tuple(slice(s * half, None) for s in shift)]
        codes = quantise(moved, np.where(moved > 0, MaskCode.BRAIN, MaskCode.AIR))
        batch = Batch(voxels=torch.from_numpy(np.ascontiguousarray(codes))[None],
                      modality=torch.tensor([MODALITIES.index("T1w")]),
                      position=torch.zeros(1, dtype=torch.int64), weight=torch.ones(1),
                      scan_ids=["head"])
        config = without_augmentation(with_all_brain(weights.config, batch.voxels))
        views = make_views(batch, config, weights.grid, 0)
        z = weights.model.latents(views)[0].numpy()
        where = patch_numbers(views.coords_BN3, weights.grid, patch)[0].numpy()
        keep = views.foreground_BN[0].numpy() > 0
        if found is None:
            found = np.full((*(2 * n for n in grid), z.shape[-1]), np.nan, np.float32)
        index = np.stack(np.unravel_index(where[keep], grid))
        found[tuple(2 * part + s for part, s in zip(index, shift, strict=True))] = z[keep]
    assert found is not None
    return found


# ---- demons --------------------------------------------------------------------------------------

def demons(fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """Displacement [x, y, z, 3] in voxels, of channels [channel, x, y, z]."""
    target, source = (torch.from_numpy(each)[None] for each in (fixed, moving))
    u = None
    for factor, iterations in LEVELS:
        a, b = (F.avg_pool3d(each, factor, ceil_mode=True, count_include_pad=False)
                if factor > 1 else each for each in (target, source))
        here = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in a.shape[2:]),
                                          indexing="ij"))[None]
        u = torch.zeros_like(here) if u is None else 2 * F.interpolate(
            u, size=a.shape[2:], mode="trilinear", align_corners=False)
        for _ in range(iterations):
            warped = _read(b, u, here)
            missing = a - warped
            slopes = (_gradient(warped) + _gradient(a)) / 2  # [1, channel, 3, ...]
            force = (missing[:, :, None] * slopes).sum(1)
            size = (slopes**2).sum((1, 2)) + (missing**2).sum(1) / (4 * STEP**2) + 1e-6
            update = force / size[:, None] / 2**SQUARINGS
            for _ in range(SQUARINGS):
                update = update + _read(update, update, here)
            u = _smooth(update + _read(u, update, here))
    assert u is not None
    return u[0].permute(1, 2, 3, 0).numpy()


def _read(values: torch.Tensor, u: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """Values [1, channel, ...] at here + u."""
    size = torch.tensor(values.shape[2:]).view(1, 3, 1, 1, 1) - 1
    points = (here + u) * 2 / size - 1
    return F.grid_sample(values, points.permute(0, 2, 3, 4, 1).flip(-1), align_corners=True,
                         padding_mode="border")


def _gradient(values: torch.Tensor) -> torch.Tensor:
    return torch.stack(torch.gradient(values, dim=(2, 3, 4)), 2)


def _smooth(u: torch.Tensor) -> torch.Tensor:
    x = torch.arange(-3.0, 4.0)
    kernel = torch.exp(-x**2 / (2 * SMOOTH**2))
    kernel /= kernel.sum()
    for axis in range(3):
        shape, pad = [1, 1, 1], [0] * 6
        shape[axis] = len(x)
        pad[2 * (2 - axis):2 * (2 - axis) + 2] = [3, 3]
        u = F.conv3d(F.pad(u, pad, mode="replicate"), kernel.view(1, 1, *shape).expand(
            3, 1, *shape), groups=3)
    return u
