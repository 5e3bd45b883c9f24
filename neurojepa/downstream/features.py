"""What a model reads of people: features that are fitted on those who teach, fold by fold.

    plain        standardised
    adjusted     less what a line in covariates tells of them
    harmonised   less what sites do to their means and spreads (harmonise.py)
    beside       covariates and features together
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from neurojepa.downstream.harmonise import Combat
from neurojepa.errors import DataError
from neurojepa.feed.labels import as_numbers

Features = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def plain(values: np.ndarray) -> Features:
    """Features as they are, standardised by those who teach; rows have a mean square of 1."""
    def build(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, std = values[train].mean(0), values[train].std(0)
        kept = std > 1e-9 * max(std.max(initial=0.0), 1e-30)
        scaled = (values[:, kept] - mean[kept]) / std[kept] / np.sqrt(max(kept.sum(), 1))
        return scaled[train].astype(float), scaled[test].astype(float)
    return build


def adjusted(values: np.ndarray, covariates: np.ndarray) -> Features:
    """Features less what a line in the covariates [n, c] tells of them, fitted on who teaches."""
    def build(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        design = np.column_stack([np.ones(len(covariates)), covariates])
        line = np.linalg.lstsq(design[train], values[train], rcond=None)[0]
        return plain(values - design @ line)(train, test)
    return build


def harmonised(values: np.ndarray, site: np.ndarray,
               covariates: np.ndarray | None = None) -> Features:
    """Features whose sites [n] were made alike by ComBat, fitted on who teaches; what
    ``covariates`` [n, c] tell of them is kept."""
    def build(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kept = np.zeros((len(values), 0)) if covariates is None else covariates
        fitted = Combat.fit(values[train], site[train], kept[train])
        alike = fitted.apply(values, site, kept)
        return plain(alike)(train, test)
    return build


def beside(values: np.ndarray, covariates: np.ndarray) -> Features:
    """Both; each covariate weighs as much as all features together."""
    def build(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        one, other = plain(values)(train, test), plain(covariates)(train, test)
        scale = np.sqrt(covariates.shape[1])
        return (np.hstack([one[0], other[0] * scale]), np.hstack([one[1], other[1] * scale]))
    return build


def design_of(columns: dict[str, np.ndarray], names: Sequence[str | None] = ()) -> np.ndarray:
    """float64 [n, c] of columns of str without missing values: numbers, or one of each name.

    Of the columns in ``names`` numbers are names, too, as those of sites are.

    Raises
    ------
    DataError
        A column has numbers and words.
    """
    parts = []
    for name, values in columns.items():
        numbers = None if name in names else as_numbers(values)
        if numbers is not None:
            parts.append(numbers[:, None])
            continue
        found = np.unique(values)
        words = [value for value in found.tolist() if as_numbers(np.array([value])) is None]
        if name not in names and len(words) < len(found):
            raise DataError(f"column {name!r}: {words[0]!r} is no number, others are; correct it, "
                            f"or add --missing {words[0]} if it stands for nothing")
        parts.append((values[:, None] == found[None, 1:]).astype(float))
    return np.hstack(parts)
