"""ComBat: what sites do to the means and spreads of features, taken out.

Each feature of a person is a mean, what covariates tell, and a shift and a scale of the site.
Shifts and scales are shrunk towards those of the site's other features (Johnson, Li & Rabinovic,
Biostatistics 2007; for images Fortin et al., NeuroImage 2018).  It is fitted on some people and
applied to others, so that inside cross-validation nothing of those tested goes into it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAST_PEOPLE = 3  # of a site that tell its shift and scale
STEPS, CLOSE = 200, 1e-5  # of the iteration for both, and the relative change that ends it


@dataclass(frozen=True)
class Combat:
    """What was fitted: D features, c covariates; sites by name."""

    mean: np.ndarray  # [D], over people
    slope: np.ndarray  # [c, D]
    sd: np.ndarray  # [D], within sites
    shift: dict[str, np.ndarray]  # [D], in units of sd
    scale: dict[str, np.ndarray]  # [D], a variance

    @classmethod
    def fit(cls, values: np.ndarray, site: np.ndarray, covariates: np.ndarray) -> Combat:
        """From features [n, D], sites [n] of str and covariates [n, c].

        Sites of fewer than ``LEAST_PEOPLE`` people are left as they are.
        """
        values = values.astype(float)
        names, number = np.unique(site, return_counts=True)
        one_each = (site[:, None] == names).astype(float)
        design = np.hstack([one_each, covariates - covariates.mean(0)])
        line = np.linalg.lstsq(design, values, rcond=None)[0]
        mean = number / len(site) @ line[:len(names)]
        slope = line[len(names):]
        sd = np.sqrt(np.square(values - design @ line).mean(0))
        sd = np.where(sd > 1e-12 * max(sd.max(initial=0.0), 1e-30), sd, 1.0)
        mean = mean - covariates.mean(0) @ slope  # of a person whose covariates are 0
        rest = (values - mean - covariates @ slope) / sd
        shift, scale = {}, {}
        for name in names[number >= LEAST_PEOPLE].tolist():
            shift[name], scale[name] = _shrunk(rest[site == name])
        return cls(mean, slope, sd, shift, scale)

    def apply(self, values: np.ndarray, site: np.ndarray, covariates: np.ndarray) -> np.ndarray:
        """float64 [n, D]; people of sites that were not fitted stay as they are."""
        expected = self.mean + covariates @ self.slope
        rest = (values - expected) / self.sd
        for name in set(site.tolist()) & set(self.shift):
            here = site == name
            rest[here] = (rest[here] - self.shift[name]) / np.sqrt(self.scale[name])
        return rest * self.sd + expected


def _shrunk(rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior means of the shift and the variance [D] of one site's people [n, D]."""
    number, features = rest.shape
    own_shift, own_scale = rest.mean(0), np.maximum(rest.var(0, ddof=1), 1e-12)
    one = 1 if features > 1 else 0
    middle, spread = own_shift.mean(), own_shift.var(ddof=one)
    level = own_scale.mean()
    varies = max(own_scale.var(ddof=one), 1e-9 * level**2)
    # an inverse gamma of that mean and variance
    shape, rate = level**2 / varies + 2, level * (level**2 / varies + 1)
    shift, scale = own_shift, own_scale
    for _ in range(STEPS):
        new_shift = (spread * number * own_shift + scale * middle) / (spread * number + scale)
        squares = np.square(rest - new_shift).sum(0)
        new_scale = (squares / 2 + rate) / (number / 2 + shape - 1)
        moved = max(np.abs(new_shift - shift).max() / max(np.abs(shift).max(), 1e-12),
                    np.abs(new_scale / scale - 1).max())
        shift, scale = new_shift, new_scale
        if moved < CLOSE:
            break
    return shift, scale
