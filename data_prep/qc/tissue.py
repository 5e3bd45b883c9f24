"""Grey and white matter, noise and bias field of a brain, from a fixed sample of its voxels.

Intensities of the brain are a mixture of three normal classes, fitted by expectation maximisation
on a histogram; their order (which one is white matter) is the modality's.  A quadratic field in
log intensity is fitted in turn with the classes, as N4 and its kin do, to find white matter under
a bias field.  Everything is deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SAMPLE = 30_000  # voxels; figures move by less than 1 % with more
ROUNDS = 4
# (grey, white) among the three classes from dark to bright; the third is fluid
ORDER = {"T1w": (1, 2), "T2w": (1, 0), "FLAIR": (2, 1)}
# percentiles of the brain at which the three classes are sought: fluid is the smallest
START = {"T1w": (8, 40, 80), "T2w": (25, 65, 95), "FLAIR": (8, 40, 80)}
# FreeSurferColorLUT: cortex, cerebellar cortex, DKT parcels; cerebral and cerebellar white matter
GREY_CODES = (3, 42, 8, 47, *range(1000, 1036), *range(2000, 2036))
WHITE_CODES = (2, 41, 7, 46)
MIN_CLASS_VOXELS = 100


@dataclass(frozen=True)
class Tissue:
    grey_mean: float
    grey_sd: float
    white_mean: float
    white_sd: float
    noise: float  # standard deviation of noise in white matter
    field_range: float  # 95th minus 5th percentile of the multiplicative field, mean 1


def draw(mask: np.ndarray) -> np.ndarray:
    """Flat indices of at most SAMPLE voxels of the mask, the same on every call."""
    inside = np.flatnonzero(mask)
    if inside.size <= SAMPLE:
        return inside
    return np.sort(np.random.default_rng(0).choice(inside, SAMPLE, replace=False))


def neighbours(data: np.ndarray, sample: np.ndarray, *, axis: int, step: int
               ) -> tuple[np.ndarray, np.ndarray]:
    """Values ``step`` voxels further along an axis, and whether there is such a voxel."""
    place = sample // int(np.prod(data.shape[axis + 1:])) % data.shape[axis] + step
    inside = (place >= 0) & (place < data.shape[axis])
    moved = sample + np.where(inside, step, 0) * int(np.prod(data.shape[axis + 1:]))
    return data.ravel()[moved], inside


def split(data: np.ndarray, sample: np.ndarray, *, values: np.ndarray, spacing: np.ndarray,
          modality: str, codes: np.ndarray | None) -> Tissue | str:
    """Grey and white matter of the sampled voxels, or the reason why they cannot be told apart.

    Parameters
    ----------
    data : [x, y, z]
    sample : [n] flat indices of brain voxels, ``values`` [n] their intensities
    codes : label map [x, y, z]; None: classes are estimated from intensities
    """
    low, high = np.percentile(values, (1, 99))
    if high <= max(low, 0):
        return "the brain is constant"
    places = np.stack(np.unravel_index(sample, data.shape), 1) * spacing
    field, shares = _fit_field(values, _polynomial(places), modality)
    grey, white = ((np.isin(codes.ravel()[sample], group) for group in (GREY_CODES, WHITE_CODES))
                   if codes is not None else (shares[:, k] > 0.5 for k in ORDER[modality]))
    if min(grey.sum(), white.sum()) < MIN_CLASS_VOXELS:
        return "grey or white matter is missing"
    if codes is not None:
        moments = [(float(values[group].mean()), float(values[group].std()))
                   for group in (grey, white)]
    else:  # of whole classes, tails and all, and with the field: it widens them
        means, sds, _ = _mixture(values, modality)
        moments = [(means[k], sds[k]) for k in ORDER[modality]]
    edges = np.percentile(np.exp(field - np.median(field)), (5, 95))
    return Tissue(*moments[0], *moments[1], _noise(data, sample[white], spacing),
                  float(edges[1] - edges[0]))


def _noise(data: np.ndarray, sample: np.ndarray, spacing: np.ndarray) -> float:
    """Noise from differences with the mean of the neighbours; along finely sampled axes only."""
    axes = [axis for axis in range(3) if spacing[axis] < 1.5 * spacing.min()]
    pairs = [neighbours(data, sample, axis=axis, step=step) for axis in axes for step in (-1, 1)]
    inside = np.all([there for _, there in pairs], axis=0)
    mean = np.mean([value for value, _ in pairs], axis=0, dtype=np.float64)
    residual = (data.ravel()[sample] - mean)[inside] * (len(pairs) / (len(pairs) + 1)) ** 0.5
    if residual.size == 0:
        return 0.0
    return float(1.4826 * np.median(np.abs(residual - np.median(residual))))


# ---- classes and field ---------------------------------------------------------------------------

def _mixture(values: np.ndarray, modality: str
             ) -> tuple[list[float], list[float], np.ndarray]:
    """Three normal classes: means in rising order, standard deviations, and [n, 3] shares."""
    low, high = np.percentile(values, (0.5, 99.5))
    counts, edges = np.histogram(values, bins=256, range=(low, high))
    x = (edges[:-1] + edges[1:]) / 2
    mean = np.percentile(values, START[modality])
    sd, weight = np.full(3, (high - low) / 8), np.full(3, 1 / 3)
    for _ in range(150):
        shares = _shares(x, mean, sd, weight) * counts[:, None]
        total = shares.sum(0) + 1e-9
        mean, old = (shares * x[:, None]).sum(0) / total, mean
        sd = np.sqrt((shares * (x[:, None] - mean) ** 2).sum(0) / total)
        sd = np.maximum(sd, (high - low) / 256)
        weight = total / total.sum()
        if np.abs(mean - old).max() < 1e-4 * (high - low):
            break
    order = np.argsort(mean)
    return (mean[order].tolist(), sd[order].tolist(),
            _shares(values, mean[order], sd[order], weight[order]))


def _shares(x: np.ndarray, mean: np.ndarray, sd: np.ndarray, weight: np.ndarray) -> np.ndarray:
    log = np.log(weight) - np.log(sd) - 0.5 * ((x[:, None] - mean) / sd) ** 2
    shares = np.exp(log - log.max(1, keepdims=True))
    return shares / shares.sum(1, keepdims=True)


def _polynomial(places: np.ndarray) -> np.ndarray:
    """[n, 9] terms of a quadratic in the three coordinates, without a constant."""
    x, y, z = ((places - places.mean(0)) / np.ptp(places, axis=0).max()).T
    terms = np.stack([x, y, z, x * x, y * y, z * z, x * y, x * z, y * z], 1)
    return terms - terms.mean(0)


def _fit_field(values: np.ndarray, terms: np.ndarray, modality: str
               ) -> tuple[np.ndarray, np.ndarray]:
    """Log field [n] and the shares [n, 3] of the classes after it is taken out."""
    log = np.log(np.maximum(values, np.percentile(values, 1) + 1e-6))
    field = np.zeros(len(values))
    for _ in range(ROUNDS):
        means, _, shares = _mixture(np.exp(log - field), modality)
        expected = shares @ np.log(np.maximum(means, 1e-6))
        weight = shares[:, list(ORDER[modality])].sum(1)
        weighted = terms * weight[:, None]
        solution = np.linalg.solve(weighted.T @ terms + 1e-6 * np.eye(terms.shape[1]),
                                   weighted.T @ (log - expected))
        field = terms @ solution
    return field, shares
