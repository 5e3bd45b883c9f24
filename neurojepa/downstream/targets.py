"""What a label asks for, and how its predictions are scored.

    binary       two values, one of them named positive; 0 and 1 are a diagnosis, not a number
    multiclass   more names than two
    ordinal      levels whose order is given
    regression   numbers

Predictions are [n, R] over R repeats of cross-validation, or [n, R, K] probabilities of K classes;
a score is the mean over repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from neurojepa.downstream.stats import Metric, auroc, mean_absolute_error, r_squared
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.labels import as_numbers

Kind = Literal["binary", "multiclass", "ordinal", "regression"]
# positive without being named, where this is the other value; 1 and 2 mean either in some cohort
OBVIOUS = {"1": "0", "1.0": "0.0", "yes": "no", "true": "false", "y": "n"}
MOST_CLASSES = 20
SPECIFICITY = 0.9  # that is asked for where sensitivity is told
SENSITIVITY = f"sensitivity_at_{100 * SPECIFICITY:.0f}_specificity"


@dataclass(frozen=True)
class Target:
    """A label of n people: a number, or the place of its class in ``classes``."""

    name: str
    kind: Kind
    truth: np.ndarray  # float64 [n]
    classes: tuple[str, ...] = ()  # binary: negative, positive


def target_of(name: str, values: np.ndarray, positive: Sequence[str] = (),
              order: Sequence[str] = ()) -> Target:
    """The target of known values [n] of str.

    Raises
    ------
    ConfigError
        No positive class is named, or the order leaves out a level.
    DataError
        All values are the same, or they are too many names for classes.
    """
    found = sorted(set(values.tolist()))
    if len(found) < 2:
        raise DataError(f"label {name!r}: " + (f"all {len(values)} people have {found[0]!r}"
                        if found else "nobody has it") + "; there is nothing to tell apart")
    if order and set(order) & set(found):
        if left_out := set(found) - set(order):
            raise ConfigError(f"label {name!r}: --order leaves out {', '.join(sorted(left_out))}; "
                              "name every level, from low to high")
        classes = tuple(level for level in order if level in found)
        return Target(name, "ordinal", _places(values, classes), classes)
    if named := [value for value in positive if value in found]:
        rest = [value for value in found if value != named[0]]
        negative = rest[0] if len(rest) == 1 else "not " + named[0]
        return Target(name, "binary", (values == named[0]).astype(float), (negative, named[0]))
    numbers = as_numbers(values)
    if len(found) == 2:
        lower = [value.lower() for value in found]
        obvious = [value for value in found if OBVIOUS.get(value.lower()) in lower]
        if len(obvious) != 1:
            raise ConfigError(f"label {name!r} has {found[0]!r} and {found[1]!r}: which is the "
                              f"positive class? add --positive {found[0]} or {found[1]}")
        negative = next(value for value in found if value != obvious[0])
        return Target(name, "binary", (values == obvious[0]).astype(float),
                      (negative, obvious[0]))
    if numbers is not None:
        return Target(name, "regression", numbers)
    if len(found) > MOST_CLASSES:
        words = [value for value in found if as_numbers(np.array([value])) is None]
        if len(words) < len(found) / 2:
            raise DataError(f"label {name!r}: {words[0]!r} is no number, most others are; correct "
                            f"it, or add --missing {words[0]} if it stands for nothing")
        raise DataError(f"label {name!r}: {len(found)} different names (first: {found[0]!r}) are "
                        "no classes; is it a column of text?")
    return classes_of(name, values)


def classes_of(name: str, values: np.ndarray) -> Target:
    """The target that takes each value [n] of str as a class: numbers of sites are names, too."""
    classes = tuple(sorted(set(values.tolist())))
    return Target(name, "multiclass", _places(values, classes), classes)


def _places(values: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:
    return np.array([classes.index(value) for value in values.tolist()], dtype=float)


def shares_text(classes: Sequence[str], shares: np.ndarray) -> str:
    """Probabilities [K] of classes as a cell of a table."""
    return " ".join(f"{name}={value:.4f}" for name, value in zip(classes, shares, strict=True))


# ---- scores --------------------------------------------------------------------------------------

def scorers(kind: Kind) -> dict[str, Metric]:
    """The scores of a kind by name, the one that tells most first: (truth [n], predicted)."""
    named: dict[Kind, dict[str, Metric]] = {
        "binary": {"auroc": auroc, "auprc": auprc, "balanced_accuracy": _binary_accuracy,
                   SENSITIVITY: _sensitivity, "brier": _binary_brier},
        "multiclass": {"auroc": _class_auroc, "balanced_accuracy": _class_accuracy,
                       "brier": _class_brier},
        "ordinal": {"rank_correlation": _level_correlation, "balanced_accuracy": _class_accuracy,
                    "mean_absolute_error": _level_error},
        "regression": {"r2": r_squared, "mean_absolute_error": mean_absolute_error,
                       "rank_correlation": _rank_r},
    }
    return {name: _over_repeats(scorer) for name, scorer in named[kind].items()}


def _over_repeats(scorer: Metric) -> Metric:
    def mean(truth: np.ndarray, predicted: np.ndarray) -> float:
        return float(np.mean([scorer(truth, predicted[:, r]) for r in range(predicted.shape[1])]))
    return mean


def auprc(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Average precision; nan without a positive."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(truth, predicted)) if (truth == 1).any() else float("nan")


def _recalls(truth: np.ndarray, chosen: np.ndarray) -> float:
    return float(np.mean([(chosen[truth == each] == each).mean() for each in np.unique(truth)]))


def _binary_accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean of sensitivity and specificity where the share of positives is the threshold: what a
    calibrated probability must exceed to be above chance."""
    return _recalls(truth, (predicted > truth.mean()).astype(float))


def _sensitivity(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Share of positives above the lowest threshold that as many negatives keep below as
    ``SPECIFICITY`` asks; nan for one class."""
    negative, positive = np.sort(predicted[truth == 0]), predicted[truth == 1]
    if not len(negative) or not len(positive):
        return float("nan")
    threshold = negative[int(np.ceil(SPECIFICITY * len(negative))) - 1]
    return float((positive > threshold).mean())


def _binary_brier(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(np.square(truth - predicted).mean())


def _class_auroc(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over classes of one against the rest."""
    return float(np.nanmean([auroc((truth == k).astype(float), predicted[:, k])
                             for k in np.unique(truth).astype(int)]))


def _class_accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean recall of classes, each probability over its class's share."""
    share = np.array([max((truth == k).mean(), 1e-9) for k in range(predicted.shape[1])])
    return _recalls(truth, (predicted / share).argmax(1).astype(float))


def _class_brier(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(np.square(predicted - np.eye(predicted.shape[1])[truth.astype(int)]).sum(1).mean())


def _level(predicted: np.ndarray) -> np.ndarray:
    return predicted @ np.arange(predicted.shape[1])


def _level_correlation(truth: np.ndarray, predicted: np.ndarray) -> float:
    return _rank_r(truth, _level(predicted))


def _level_error(truth: np.ndarray, predicted: np.ndarray) -> float:
    return mean_absolute_error(truth, _level(predicted))


def _rank_r(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Spearman's correlation; nan where the truth does not vary, 0 where the prediction does not.
    """
    from scipy.stats import rankdata

    if not np.ptp(truth) or not np.ptp(predicted):
        return 0.0 if np.ptp(truth) else float("nan")
    return float(np.corrcoef(rankdata(truth), rankdata(predicted))[0, 1])
