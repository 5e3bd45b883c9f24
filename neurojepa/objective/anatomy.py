"""Anatomical priors: what the MNI152 template, or an atlas, says of the patches of a grid.

Regions: every patch belongs to one, for masks that hide whole regions (masks.py).  By default they
are parcels of the template's grey matter, mirrored and with the hemispheres apart; any label volume
in MNI space will do.

Tissue: how much of a patch is air, fluid, grey and white matter *in this scan*, for the head that
tells it from a token (jepa.py).  A region's share of a patch would be no target: it follows from
the coordinates, which every token has.  So the template only gives the priors, and the scan's own
intensities decide, by expectation-maximisation of one Gaussian per tissue (as in the unified
segmentation of Ashburner & Friston 2005, without its deformation and bias field).  That knows no
contrast: what is bright in a T1w is dark in a T2w, its tissue is the same.  Where intensities tell
nothing (as in some PET) the prior is left.

The template comes inside nilearn; nothing is fetched.

Of the shape letters (neurojepa/__init__.py): K are air and the tissues.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.metadata import distribution
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neurojepa.config import RootConfig
from neurojepa.errors import ConfigError
from neurojepa.feed.format import FeedCode, Grid

PARCELS = 24  # of a hemisphere: about seven 18 mm patches each
TISSUES = ("fluid", "grey", "white")
PRIOR_SIGMA_MM = 4.0  # heads keep their size, so the template fits to within some millimetres
PRIOR_FLOOR = 0.02  # of each tissue anywhere inside a brain
EM_STEPS = 5
LEAST_VARIANCE = 25.0  # of a tissue's codes (1..254): no class shrinks to a single value
_AIR, _NOT_SCANNED = int(FeedCode.AIR), int(FeedCode.NOT_SCANNED)  # torch traces plain numbers
_BRAIN_ABOVE = 0.2  # of the head's brightest voxel, as nilearn draws its mask
_SAMPLED_MM = 3.0
_STRIDE_MM, _LLOYD_STEPS = 3, 30


def check_anatomy(config: RootConfig, grid: Grid) -> str:
    """Read the template or atlas that the config asks for, so that what is wrong shows at once.

    Returns
    -------
    str
        Fingerprint of the regions of all patches; empty where no mask uses them.
    """
    if not config.objective.masks.region_share:
        return ""
    region = patch_regions(grid, config.model.patch_voxels, config.objective.regions)
    return hashlib.sha256(region.tobytes()).hexdigest()[:16]


# ---- regions -------------------------------------------------------------------------------------

@lru_cache(maxsize=4)
def regions_on(device: torch.device, grid: Grid, patch: int,
               atlas: str | None) -> tuple[Tensor, int]:
    """``patch_regions`` as int64 [n] on a device, and the number of regions."""
    region = patch_regions(grid, patch, atlas)
    return torch.from_numpy(region).to(device), int(region.max()) + 1


@lru_cache(maxsize=4)
def patch_regions(grid: Grid, patch: int, atlas: str | None = None) -> np.ndarray:
    """The region of every patch: the one with most of its voxels, else the nearest patch's.

    Parameters
    ----------
    atlas : path of a label volume in MNI space (0 is no region); None for the template's parcels.

    Returns
    -------
    int64 [n], in the order of ``patchify``; all numbers from 0 on are used

    Raises
    ------
    ConfigError
        The atlas cannot be read, is no label volume, or gives fewer than two regions here.
    """
    labels = (_parcels(grid) if atlas is None
              else read_atlas(atlas, grid, f"objective.regions = {atlas}"))
    region = _majority(ranked(labels)[1], patch)
    centres = _centres_mm(grid, patch)
    covered = np.flatnonzero(region >= 0)
    if len(np.unique(region[covered])) < 2:
        raise ConfigError(
            f"objective.regions = {atlas}: {len(np.unique(region[covered]))} region(s) in the "
            f"{len(region)} patches of grid {grid.name!r}, which spans {_span(grid)} mm (x, y, z); "
            "two are needed; is it a label volume in MNI space?")
    distance = ((centres[:, None] - centres[covered]) ** 2).sum(-1)
    region = region[covered[distance.argmin(1)]]
    if atlas is None:  # a patch astride the midline belongs to neither hemisphere
        half = patch * grid.spacing_mm / 2
        side = np.sign(centres[:, 0]) * (np.abs(centres[:, 0]) >= half)
        region = 3 * region + side.astype(np.int64) + 1
    return np.unique(region, return_inverse=True)[1].astype(np.int64)


def ranked(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The labels > 0 that occur, ascending, and for each voxel the rank of its label from 1 on."""
    values = np.unique(labels[labels > 0])
    return values, np.where(labels > 0, np.searchsorted(values, labels) + 1, 0)


def _majority(labels: np.ndarray, patch: int) -> np.ndarray:
    """int64 [n]: the label > 0 with most voxels in each patch, less one; -1 where there is none."""
    split = by_patch(labels, patch)
    number = int(split.max()) + 1
    flat = (np.arange(len(split))[:, None] * number + split).ravel()
    counts = np.bincount(flat, minlength=len(split) * number).reshape(len(split), number)[:, 1:]
    if not counts.size:
        return np.full(len(split), -1)
    return np.where(counts.any(1), counts.argmax(1), -1)


def _parcels(grid: Grid) -> np.ndarray:
    """int [X, Y, Z]: parcels 1.. of the template's grey matter on the grid, mirrored; 0 outside.

    K-means of one hemisphere's grey matter (Lloyd 1982) from points as far apart as can be, on
    whole millimetres, so that the same parcels come out everywhere.  White matter goes to the
    nearest parcel.
    """
    origin, _, grey, white = template()
    coarse = grey[::_STRIDE_MM, ::_STRIDE_MM, ::_STRIDE_MM] > 0.5
    points = np.argwhere(coarse) * _STRIDE_MM + origin
    centres = _k_means(points[points[:, 0] >= 0], PARCELS)
    where = grid_mm(grid)
    brain = values_at(grey + white, origin=origin, where=where) > 0.5
    points = where[brain] * np.where(where[brain] < 0, [-1, 1, 1], 1)  # x mirrored
    labels = np.zeros(grid.shape, np.int64)
    labels[brain] = _nearest(points, centres) + 1
    return labels


def _k_means(points: np.ndarray, number: int) -> np.ndarray:
    """[number, 3] centres, in whole millimetres."""
    centres = points[:1]
    distance = ((points - centres) ** 2).sum(-1)
    while len(centres) < number:
        centres = np.concatenate([centres, points[[distance.argmax()]]])
        distance = np.minimum(distance, ((points - centres[-1]) ** 2).sum(-1))
    for _ in range(_LLOYD_STEPS):
        of = _nearest(points, centres)
        sums = np.stack([np.bincount(of, points[:, axis], number) for axis in range(3)], 1)
        centres = np.rint(sums / np.bincount(of, minlength=number).clip(1)[:, None])
    return centres


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    best, nearest = np.full(len(points), np.inf), np.zeros(len(points), np.int64)
    for number, centre in enumerate(centres):
        distance = ((points - centre) ** 2).sum(-1)
        closer = distance < best
        best[closer], nearest[closer] = distance[closer], number
    return nearest


def read_atlas(path: str, grid: Grid, named: str) -> np.ndarray:
    """int64 [X, Y, Z]: an atlas's labels at the centres of the grid's voxels, 0 beyond its edges.

    Raises
    ------
    ConfigError
        It cannot be read or is no label volume; ``named`` says whose setting it is.
    """
    import nibabel as nib

    try:
        image: Any = nib.load(path)
        values, affine = np.asarray(image.dataobj), image.affine
    except (OSError, ValueError, AttributeError, nib.filebasedimages.ImageFileError) as error:
        raise ConfigError(f"{named}: cannot be read as an image ({error})") from error
    values = values[..., 0] if values.ndim == 4 and values.shape[3] == 1 else values
    if values.ndim != 3:
        raise ConfigError(f"{named}: has shape {values.shape}; one label volume "
                          "[x, y, z] is needed")
    if not (np.isfinite(values).all() and (values == np.rint(values)).all() and values.min() >= 0):
        raise ConfigError(f"{named}: has values that are no labels, from "
                          f"{values.min()} to {values.max()}; labels are whole numbers from 0 on")
    if abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise ConfigError(f"{named}: its affine cannot be inverted")
    to_voxel = np.linalg.inv(affine)
    voxel = grid_mm(grid) @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    return values_at(values.astype(np.int64), origin=np.zeros(3), where=voxel)


# ---- tissue --------------------------------------------------------------------------------------

def tissue_shares(codes_BNP: Tensor, keep_BN: Tensor,
                  priors_on_grid: tuple[Tensor, Tensor]) -> Tensor:
    """float32 [B, N, K]: shares of air and of each tissue in the scanned part of each token.

    Sums of a scan are of whole numbers, hence exact: they depend on no batch or device.  Voxels
    about 3 mm apart are enough.

    Parameters
    ----------
    codes_BNP : uint8, stored voxels of the kept patches.
    keep_BN : int64, which patches these are.
    priors_on_grid : from ``priors_on``.
    """
    priors, chosen = priors_on_grid
    codes_BNP = codes_BNP[..., chosen]
    brain_BNP = (codes_BNP != _AIR) & (codes_BNP != _NOT_SCANNED)
    value_BNP = codes_BNP.float()
    prior = [(prior_nP[keep_BN] * brain_BNP).float() for prior_nP in priors]
    belongs = prior  # 0..255, summing to about 255 in the brain
    for _ in range(EM_STEPS):
        likely = [before * _density(value_BNP, now)
                  for before, now in zip(prior, belongs, strict=True)]
        scale = 255 / torch.stack(likely).sum(0).clamp(min=1e-30)
        belongs = [(part * scale).round() for part in likely]
    tissue = torch.stack([part.sum(-1) for part in belongs], -1)
    brain_BN1 = brain_BNP.sum(-1, keepdim=True)
    tissue = brain_BN1 * tissue / tissue.sum(-1, keepdim=True).clamp(min=1)
    scanned_BN1 = (codes_BNP != _NOT_SCANNED).sum(-1, keepdim=True)
    return torch.cat([scanned_BN1 - brain_BN1, tissue], -1) / scanned_BN1.clamp(min=1)


def _density(value_BNP: Tensor, weight_BNP: Tensor) -> Tensor:
    """Density of a Gaussian of the values' weighted mean and variance in each scan."""
    # products stay below 2^24, so float32 holds them exactly
    moments = [part.sum((1, 2), dtype=torch.float64) for part in (
        weight_BNP, weight_BNP * value_BNP, weight_BNP * value_BNP.square())]
    total_B = moments[0].clamp(min=1)
    mean_B = moments[1] / total_B
    variance_B = (moments[2] / total_B - mean_B.square()).clamp(min=LEAST_VARIANCE)
    mean_B11, variance_B11 = (part.float()[:, None, None] for part in (mean_B, variance_B))
    return torch.exp((value_BNP - mean_B11).square() / (-2 * variance_B11)) * variance_B11.rsqrt()


@lru_cache(maxsize=4)
def priors_on(device: torch.device, grid: Grid, patch: int) -> tuple[Tensor, Tensor]:
    """uint8 [K - 1, n, P]: the template's tissues at P voxels of every patch, of 255, smoothed; and
    int64 [P]: which of a patch's voxels these are."""
    codes = np.rint(255 * tissue_priors(grid)).astype(np.uint8)
    at = np.arange(patch) % max(1, round(_SAMPLED_MM / grid.spacing_mm)) == 0
    chosen = np.flatnonzero(at[:, None, None] & at[:, None] & at)
    found = np.stack([by_patch(part, patch)[:, chosen] for part in codes])
    return torch.from_numpy(found).to(device), torch.from_numpy(chosen).to(device)


@lru_cache(maxsize=2)
def tissue_priors(grid: Grid) -> np.ndarray:
    """float [K - 1, X, Y, Z]: how likely each of ``TISSUES`` is in a brain's voxel, by the
    smoothed template; they add up to 1."""
    from scipy.ndimage import gaussian_filter

    origin, brain, grey, white = template()
    fluid = (brain - grey - white).clip(0)
    where, sigma = grid_mm(grid), PRIOR_SIGMA_MM / grid.spacing_mm
    prior = np.stack([gaussian_filter(values_at(part, origin=origin, where=where), sigma)
                      for part in (fluid, grey, white)]) + PRIOR_FLOOR
    return prior / prior.sum(0)


# ---- template and grid ---------------------------------------------------------------------------

def template() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Corner in mm, and MNI152's brain, grey and white matter, float32 [x, y, z] at 1 mm in RAS."""
    (origin, head), (_, grey), (_, white) = map(_shipped, ("t1", "gm", "wm"))
    return origin, (head > _BRAIN_ABOVE).astype(np.float32), grey, white


def _shipped(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Corner and values, at most 1, of a map in nilearn's wheel.

    Read without nilearn: importing it costs every rank a second at its start.
    """
    import nibabel

    name = f"nilearn/datasets/data/mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
    image = nibabel.nifti1.Nifti1Image.from_filename(str(distribution("nilearn").locate_file(name)))
    values = np.asanyarray(image.dataobj).astype(np.float32)
    return image.affine[:3, 3], values / values.max()


def by_patch(volume: np.ndarray, patch: int) -> np.ndarray:
    """[X, Y, Z] -> [n, P], as ``patchify``."""
    x, y, z = (size // patch for size in volume.shape)
    split = volume.reshape(x, patch, y, patch, z, patch).transpose(0, 2, 4, 1, 3, 5)
    return split.reshape(x * y * z, -1)


def values_at(volume: np.ndarray, *, origin: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Values of the nearest voxels (voxel 0 lies at ``origin``), 0 outside; [..., 3] -> [...]."""
    index = np.rint(where - origin).astype(int)
    inside = ((index >= 0) & (index < volume.shape)).all(-1)
    found = np.zeros(where.shape[:-1], volume.dtype)
    found[inside] = volume[tuple(index[inside].T)]
    return found


def grid_mm(grid: Grid) -> np.ndarray:
    """float64 [X, Y, Z, 3]: MNI coordinates of the grid's voxels."""
    affine = grid.affine
    axes = [np.arange(size) * affine[a, a] + affine[a, 3] for a, size in enumerate(grid.shape)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1)


def _centres_mm(grid: Grid, patch: int) -> np.ndarray:
    """float64 [n, 3]: MNI coordinates of the patches' centres."""
    mm = grid_mm(grid)[::patch, ::patch, ::patch] + (patch - 1) * grid.spacing_mm / 2
    return mm.reshape(-1, 3)


def _span(grid: Grid) -> str:
    half = np.array(grid.shape) * grid.spacing_mm / 2
    return ", ".join(f"{centre - h:g} to {centre + h:g}"
                     for centre, h in zip(grid.centre_mm, half, strict=True))
