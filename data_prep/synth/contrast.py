"""From labels to the signal of a scanner: tissue contrast, texture, coil shading, Rician noise."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

MARKER_CODE = 999

# Relative signal of each tissue: codes, T1w, T2w, FLAIR.  Chosen by eye from real scans: order and
# rough ratios are those of 1.5-3 T, and every site and scan varies them (Site.contrast_sd).
TISSUES: dict[str, tuple[tuple[int, ...], float, float, float]] = {
    "white matter": ((2, 41, 7, 46), 0.80, 0.38, 0.46),
    "cortex": ((3, 42, 136, 137, 163, 164), 0.56, 0.56, 0.60),
    "cerebellar cortex": ((8, 47), 0.56, 0.54, 0.56),
    "thalamus": ((10, 49), 0.66, 0.47, 0.54),
    "caudate and accumbens": ((11, 50, 26, 58), 0.58, 0.50, 0.57),
    "putamen": ((12, 51), 0.62, 0.46, 0.55),
    "pallidum": ((13, 52), 0.70, 0.35, 0.46),
    "brain stem and ventral diencephalon": ((16, 28, 60, 85), 0.73, 0.43, 0.52),
    "hippocampus and amygdala": ((17, 53, 18, 54), 0.57, 0.58, 0.63),
    "ventricles": ((4, 43, 5, 44, 14, 15, 72), 0.17, 0.95, 0.12),
    "cerebrospinal fluid": ((24,), 0.20, 0.90, 0.16),
    "lesion": ((25, 57), 0.42, 0.80, 0.85),
    "vessel": ((30, 62, 502), 0.40, 0.20, 0.25),
    "eye": ((506,), 0.22, 0.95, 0.25),
    "soft tissue": ((507,), 0.58, 0.34, 0.36),
    "nerve": ((508, 512), 0.68, 0.44, 0.50),
    "mucosa": ((509, 530), 0.48, 0.66, 0.58),
    "skin": ((511,), 0.78, 0.50, 0.50),
    "venous sinus": ((514,), 0.36, 0.30, 0.30),
    "bone": ((515,), 0.12, 0.06, 0.07),
    "marrow": ((516,), 0.55, 0.30, 0.34),
    "marker": ((MARKER_CODE,), 2.00, 2.00, 2.00),
}
MODALITY_COLUMN = {"T1w": 1, "T2w": 2, "FLAIR": 3}
UNKNOWN_TISSUE = 0.40


def label_names() -> dict[int, str]:
    """Tissue name of each intracranial code."""
    return {code: name for name, (codes, *_) in TISSUES.items() for code in codes if code < 256}


def signal_table(modality: str, rng: np.random.Generator, spread: float) -> np.ndarray:
    """float32 [1000]: mean signal of every code, each tissue varied by ``spread`` (log sd)."""
    table = np.full(1000, UNKNOWN_TISSUE, np.float32)
    table[0] = 0.0
    for codes, *means in TISSUES.values():
        factor = 1.0 if codes == (MARKER_CODE,) else np.exp(rng.normal(0, spread))
        table[list(codes)] = means[MODALITY_COLUMN[modality] - 1] * factor
    return table


def scan_signal(clean: np.ndarray, rng: np.random.Generator, bias: float,
                noise: float) -> np.ndarray:
    """What the scanner delivers: texture, smooth shading (log sd ``bias``), Rician noise (sd).

    Noise is relative to a signal of 1, which is somewhat above white matter in T1w.
    """
    fine = ndimage.gaussian_filter(rng.standard_normal(clean.shape, dtype=np.float32), 0.8)
    broad = ndimage.gaussian_filter(rng.standard_normal(clean.shape, dtype=np.float32), 2.5)
    image = clean * (1 + 0.03 * fine / fine.std() + 0.02 * broad / broad.std())
    image *= np.exp(_shading(rng, clean.shape, bias))
    real = image + noise * rng.standard_normal(clean.shape, dtype=np.float32)
    imaginary = noise * rng.standard_normal(clean.shape, dtype=np.float32)
    return np.sqrt(real ** 2 + imaginary ** 2)


def _shading(rng: np.random.Generator, shape: tuple[int, ...], sd: float) -> np.ndarray:
    """A smooth field: a random mixture of separable cosines of low order."""
    waves = [np.stack([np.cos(np.pi * k * (np.arange(n) + 0.5) / n) for k in range(3)])
             for n in shape]
    weights = rng.normal(0, 1, (3, 3, 3))
    weights[0, 0, 0] = 0
    field = np.einsum("abc,ax,by,cz->xyz", weights, *waves, optimize=True)
    return (field * (sd / field.std())).astype(np.float32)
