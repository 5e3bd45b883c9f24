"""Predictions of people who taught nothing: repeated nested cross-validation by family.

In every outer fold features are standardised, adjusted and the penalty of a linear model is chosen
on the people of the other folds alone; families stay whole.  Features [n, D] enter the linear model
rotated into the span of the people who teach, which changes no prediction under an L2 penalty and
makes D of no cost.

The grid of penalties grows where its best value lies at an edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from neurojepa.downstream.targets import Kind, Target
from neurojepa.errors import DataError
from neurojepa.feed.labels import as_numbers

Features = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
INNER = 5  # folds that choose the penalty
PENALTIES = 10.0 ** np.arange(-3, 4)  # times the mean squared length of a row
WIDEN = 3  # decades
WIDEST = (1e-6, 1e6)
NEWTON = 1000  # numbers to be fitted up to which Newton's method is faster


@dataclass(frozen=True)
class Plan:
    """Outer folds: for each repeat, pairs of who teaches and who is tested (indices)."""

    repeats: list[list[tuple[np.ndarray, np.ndarray]]]
    pooled: bool = True  # the folds of a repeat are scored together

    def testing(self, tested: np.ndarray) -> Plan:
        """The same folds, of which only the people of this mask [n] are tested."""
        return Plan([[(train, test[tested[test]]) for train, test in folds]
                     for folds in self.repeats], self.pooled)


def plan_folds(target: Target, family: np.ndarray, folds: int, repeats: int) -> Plan:
    """Folds of whole families, alike in their share of classes.

    Raises
    ------
    DataError
        A class, or the whole, has fewer families than folds.
    """
    for number, name in enumerate(target.classes):
        count = len(set(family[target.truth == number].tolist()))
        if count < folds:
            raise DataError(f"label {target.name!r}: class {name!r} has {count} people or "
                            f"families, {folds} folds need {folds}; use fewer folds (--cv "
                            f"{repeats}x{max(2, count)}) or more people")
    if (count := len(set(family.tolist()))) < folds:
        raise DataError(f"label {target.name!r}: known for {count} people or families, {folds} "
                        f"folds need {folds}")
    return Plan([list(_folds(target.kind, target.truth, family, folds, seed))
                 for seed in range(repeats)])


def plan_sites(site: np.ndarray, family: np.ndarray) -> Plan:
    """One fold a site: all others teach, but for relatives of those tested."""
    folds = []
    for name in np.unique(site):
        test = np.flatnonzero(site == name)
        folds.append((np.flatnonzero((site != name) & ~np.isin(family, family[test])), test))
    return Plan([folds], pooled=False)


def _folds(kind: Kind, truth: np.ndarray, family: np.ndarray, folds: int, seed: int
           ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    number = np.unique(truth, return_counts=True)[1].min()  # of the rarest class
    kind_of_folds = GroupKFold if kind == "regression" or number < folds else StratifiedGroupKFold
    yield from kind_of_folds(folds, shuffle=True, random_state=seed).split(
        truth[:, None], truth, family)


def predict(target: Target, features: Features, plan: Plan, family: np.ndarray) -> np.ndarray:
    """float64 [n, R] or, of classes, [n, R, K]; nan where nobody predicted a person.

    Who is tested is missing from those who teach, so a fold with many positives is predicted from
    fewer of them.  Where folds are scored together this alone puts chance below a half; therefore
    each fold's predictions are moved from the share (or mean) that taught to that of all.
    """
    shape = (len(target.truth), len(plan.repeats))
    classes = len(target.classes) if target.kind in ("multiclass", "ordinal") else 0
    predicted = np.full((*shape, classes) if classes else shape, np.nan)
    for r, folds in enumerate(plan.repeats):
        for train, test in folds:
            known = set(target.truth[train].tolist())
            if len(test) and (target.kind == "regression" or len(known) == len(target.classes)):
                found = _fit_predict(target, *features(train, test), target.truth[train],
                                     family[train])
                predicted[test, r] = (moved(target, found, target.truth[train], target.truth)
                                      if plan.pooled else found)
    return predicted


def moved(target: Target, found: np.ndarray, taught: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Predictions [n, ...] by people of labels ``taught``, under the share of each class, or the
    mean, of labels ``to``."""
    if target.kind == "regression":
        return found + to.mean() - taught.mean()
    ratio = np.array([(to == k).mean() / (taught == k).mean()
                      for k in range(len(target.classes))])
    if target.kind == "binary":
        return found * ratio[1] / (found * ratio[1] + (1 - found) * ratio[0])
    return found * ratio / (found * ratio).sum(-1, keepdims=True)


# ---- features ------------------------------------------------------------------------------------

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


# ---- the linear model ----------------------------------------------------------------------------

def _fit_predict(target: Target, taught: np.ndarray, tested: np.ndarray, truth: np.ndarray,
                 family: np.ndarray) -> np.ndarray:
    if taught.shape[1] > len(taught):
        _, _, basis = np.linalg.svd(taught, full_matrices=False)
        taught, tested = taught @ basis.T, tested @ basis.T
    fit = _ridge if target.kind == "regression" else _ordinal if target.kind == "ordinal" \
        else _logistic
    penalty = _best_penalty(target, fit, taught, truth, family)
    found = fit(taught, truth, tested, np.array([penalty]), len(target.classes))[0]
    return found[:, 1] if target.kind == "binary" else found


Fit = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


def _best_penalty(target: Target, fit: Fit, taught: np.ndarray, truth: np.ndarray,
                  family: np.ndarray) -> float:
    """The penalty of least loss over inner folds; the grid grows while it lies at an edge."""
    folds = min(INNER, len(set(family.tolist())), *(
        max(2, len(set(family[truth == k].tolist()))) for k in range(len(target.classes))))
    splits = list(_folds(target.kind, truth, family, folds, seed=0))
    grid, losses = PENALTIES, dict[float, float]()
    while True:
        new = np.array([each for each in grid if each not in losses])
        total = np.zeros(len(new))
        for train, test in splits:
            if target.kind != "regression" and len(set(truth[train])) < len(target.classes):
                continue
            found = fit(taught[train], truth[train], taught[test], new, len(target.classes))
            total += [_loss(target.kind, truth[test], each) for each in found]
        losses |= dict(zip(new.tolist(), total.tolist(), strict=True))
        best = min(losses, key=lambda each: (losses[each], -each))
        if best == min(losses) and best > WIDEST[0]:
            grid = best / 10.0 ** np.arange(1, WIDEN + 1)
        elif best == max(losses) and best < WIDEST[1]:
            grid = best * 10.0 ** np.arange(1, WIDEN + 1)
        else:
            return best


def _loss(kind: Kind, truth: np.ndarray, predicted: np.ndarray) -> float:
    """Sum of squared errors, or of minus log probabilities."""
    if kind == "regression":
        return float(np.square(truth - predicted).sum())
    chosen = predicted[np.arange(len(truth)), truth.astype(int)]
    return float(-np.log(np.clip(chosen, 1e-6, 1)).sum())


def _ridge(taught: np.ndarray, truth: np.ndarray, tested: np.ndarray, penalties: np.ndarray,
           classes: int) -> np.ndarray:
    """[penalties, m] from one decomposition."""
    mean = taught.mean(0)
    left, singular, right = np.linalg.svd(taught - mean, full_matrices=False)
    along = left.T @ (truth - truth.mean())
    shrunk = singular * along / (singular**2 + penalties[:, None])
    return truth.mean() + shrunk @ (right @ (tested - mean).T)


def _logistic(taught: np.ndarray, truth: np.ndarray, tested: np.ndarray, penalties: np.ndarray,
              classes: int) -> np.ndarray:
    """[penalties, m, K] probabilities; each fit begins where the one of more penalty ended."""
    from sklearn.linear_model import LogisticRegression

    solver = "newton-cholesky" if taught.shape[1] * classes <= NEWTON else "lbfgs"
    model = LogisticRegression(solver=solver, max_iter=5000, warm_start=True)
    found = np.zeros((len(penalties), len(tested), classes))
    for place in np.argsort(-penalties):
        model.set_params(C=1 / penalties[place]).fit(taught, truth)
        found[place] = model.predict_proba(tested)
    return found


def _ordinal(taught: np.ndarray, truth: np.ndarray, tested: np.ndarray, penalties: np.ndarray,
             classes: int) -> np.ndarray:
    """[penalties, m, K]: a logistic model for each step between levels (Frank & Hall 2001)."""
    above = np.stack([_logistic(taught, (truth > level).astype(float), tested, penalties, 2)[..., 1]
                      for level in range(classes - 1)], -1)
    above = np.minimum.accumulate(above, -1)  # being above a level is no less likely than the next
    edges = np.concatenate([np.ones_like(above[..., :1]), above, np.zeros_like(above[..., :1])], -1)
    return edges[..., :-1] - edges[..., 1:]
