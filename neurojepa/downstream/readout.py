"""The linear readout of embeddings that ``probe`` tests, as numbers: a weight for each feature."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neurojepa.downstream.crossval import linear
from neurojepa.downstream.features import plain
from neurojepa.downstream.targets import Target
from neurojepa.errors import ConfigError


@dataclass(frozen=True)
class Readout:
    """score = weight_D . embedding + constant: a number in its own unit, or the log odds of the
    positive class."""

    weight_D: np.ndarray  # float64
    constant: float

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Scores [n] of embeddings [n, D]."""
        return values @ self.weight_D + self.constant


def readout(target: Target, values: np.ndarray, family: np.ndarray) -> Readout:
    """Taught by embeddings [n, D] of these families, with a penalty chosen as ``probe`` does.

    Raises
    ------
    ConfigError
        The label is of more classes than two.
    """
    if target.kind not in ("binary", "regression"):
        raise ConfigError(f"label {target.name!r}: {len(target.classes)} classes have no single "
                          "score to explain; name one of them by --positive")
    everyone = np.arange(len(values))
    taught, _ = plain(values)(everyone, everyone[:0])
    # the model is a plane: what it says of unit vectors are its weights
    unit = np.vstack([np.zeros(taught.shape[1]), np.eye(taught.shape[1])])
    said = linear(target, taught, unit, target.truth, family)
    if target.kind == "binary":
        said = np.log(said) - np.log1p(-said)
    mean, std = values.mean(0), values.std(0)
    kept = std > 1e-9 * max(std.max(initial=0.0), 1e-30)
    weight_D = np.zeros(values.shape[1])
    weight_D[kept] = (said[1:] - said[0]) / std[kept] / np.sqrt(max(kept.sum(), 1))
    return Readout(weight_D, float(said[0] - mean @ weight_D))
