"""From labels to the signal of a scanner: tissue contrast, texture, coil shading, Rician noise."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import ndimage

from data_prep.synth import codes, warp
from data_prep.synth.cohort import Site

SCANNER_SD = 0.03  # log sd of each tissue's signal between scanners

# Signal of each tissue: codes, then T1w, T2w, FLAIR, EPI (relative), AV45, FDG (uptake relative to
# the cerebellar cortex).  Chosen by eye from real scans: order and rough ratios are those of 1.5-3
# T and of late frames.  The tracers' cortex is replaced by each person's own.
TISSUES: dict[str, tuple[tuple[int, ...], float, float, float, float, float, float]] = {
    "white matter": ((2, 41, 7, 46), 0.80, 0.38, 0.46, 0.52, 1.50, 0.55),
    "cortex": ((3, 42, 136, 137, 163, 164), 0.56, 0.56, 0.60, 0.66, 1.05, 1.20),
    "cerebellar cortex": ((8, 47), 0.56, 0.54, 0.56, 0.64, 1.00, 1.00),
    "thalamus": ((10, 49), 0.66, 0.47, 0.54, 0.58, 1.35, 1.20),
    "caudate and accumbens": ((11, 50, 26, 58), 0.58, 0.50, 0.57, 0.60, 1.15, 1.25),
    "putamen": ((12, 51), 0.62, 0.46, 0.55, 0.54, 1.25, 1.35),
    "pallidum": ((13, 52), 0.70, 0.35, 0.46, 0.40, 1.40, 0.95),
    "brain stem and ventral diencephalon": ((16, 28, 60, 85), 0.73, 0.43, 0.52, 0.52, 1.45, 0.75),
    "hippocampus and amygdala": ((17, 53, 18, 54), 0.57, 0.58, 0.63, 0.62, 1.10, 0.90),
    "ventricles": ((4, 43, 5, 44, 14, 15, 72), 0.17, 0.95, 0.12, 0.95, 0.30, 0.15),
    "cerebrospinal fluid": ((codes.FLUID,), 0.20, 0.90, 0.16, 0.85, 0.30, 0.15),
    "lesion": ((codes.LESION, 25, 57), 0.56, 0.72, 0.86, 0.62, 1.20, 0.45),
    "vessel": ((30, 62, 502), 0.40, 0.20, 0.25, 0.20, 0.60, 0.50),
    "eye": ((506,), 0.22, 0.95, 0.25, 0.30, 0.20, 0.20),
    "soft tissue": ((507,), 0.58, 0.34, 0.36, 0.10, 0.55, 0.35),
    "nerve": ((508, 512), 0.68, 0.44, 0.50, 0.20, 0.90, 0.60),
    "mucosa": ((509, 530), 0.48, 0.66, 0.58, 0.12, 0.60, 0.40),
    "skin": ((511,), 0.78, 0.50, 0.50, 0.08, 0.40, 0.30),
    "venous sinus": ((514,), 0.36, 0.30, 0.30, 0.15, 0.60, 0.50),
    "bone": ((515,), 0.12, 0.06, 0.07, 0.02, 0.50, 0.20),
    "marrow": ((516,), 0.55, 0.30, 0.34, 0.06, 0.70, 0.40),
    "marker": ((codes.MARKER,), 2.00, 2.00, 2.00, 2.00, 2.50, 2.50),
}
COLUMNS = ("T1w", "T2w", "FLAIR", "BOLD", "AV45", "FDG")
UNKNOWN_TISSUE = 0.40
TEXTURE_SD, TEXTURE_NODES = 0.025, 0.8  # of the signal; width in coarse nodes


def label_names() -> dict[int, str]:
    """Tissue name of each intracranial code."""
    return {code: name for name, (group, *_) in TISSUES.items()
            for code in group if code < codes.SKULL}


def tissue_table(column: str, spreads: dict[str, float] | None = None) -> np.ndarray:
    """float32 [1000]: signal of every code, each tissue multiplied by exp of its spread."""
    table = np.full(1000, UNKNOWN_TISSUE, np.float32)
    table[0] = 0.0
    for name, (group, *means) in TISSUES.items():
        table[list(group)] = means[COLUMNS.index(column)] * np.exp((spreads or {}).get(name, 0.0))
    return table


def signal_table(column: str, site: Site, rng: np.random.Generator,
                 spread: float = 1.0) -> np.ndarray:
    """The table of one scan: scanners differ in contrast, and a little from scan to scan.

    ``spread`` multiplies the (log) differences.
    """
    scanner = _scanner(site.name, column)
    return tissue_table(column, {name: spread * (value + rng.normal(0, site.contrast_sd))
                                 for name, value in scanner.items()})


@lru_cache(maxsize=64)
def _scanner(name: str, column: str) -> dict[str, float]:
    """How a scanner's contrast deviates, always in the same way: log factor of each tissue."""
    rng = np.random.default_rng([*name.encode(), *column.encode()])
    return {tissue: rng.normal(0, SCANNER_SD) for tissue in TISSUES if tissue != "marker"}


def scan_signal(clean: np.ndarray, *, voxel_mm: np.ndarray, rng: np.random.Generator, bias: float,
                noise: float) -> np.ndarray:
    """What the scanner delivers: texture, smooth shading (log sd ``bias``), Rician noise (sd).

    Noise is relative to a signal of 1, which is somewhat above white matter in T1w.
    """
    shape = warp.scan_nodes(clean.shape, voxel_mm)
    texture = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), TEXTURE_NODES)
    texture *= TEXTURE_SD / texture.std()
    image = warp.upsample(np.exp(texture + _shading(rng, shape, bias)), clean.shape,
                          voxel_mm / warp.COARSE_MM)
    image *= clean
    shaken = rng.standard_normal(clean.shape, dtype=np.float32)
    shaken *= noise
    image += shaken
    image *= image
    # the imaginary part: as good as independent, for half the drawing
    shaken *= shaken
    image += shaken[::-1, ::-1, ::-1]
    return np.sqrt(image, out=image)


def _shading(rng: np.random.Generator, shape: tuple[int, ...], sd: float) -> np.ndarray:
    """A smooth field: a random mixture of separable cosines of low order."""
    waves = [np.stack([np.cos(np.pi * k * (np.arange(n) + 0.5) / n) for k in range(3)])
             for n in shape]
    weights = rng.normal(0, 1, (3, 3, 3))
    weights[0, 0, 0] = 0
    field = np.einsum("abc,ax,by,cz->xyz", weights, *waves, optimize=True)
    return (field * (sd / field.std())).astype(np.float32)
