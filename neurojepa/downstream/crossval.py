"""Predictions of people who taught nothing: repeated nested cross-validation by family.

In every outer fold features (features.py) are fitted, and the penalty of a linear model or the
number of neighbours is chosen, on the people of the other folds alone; families stay whole.
Features [n, D] enter the linear model rotated into the span of the people who teach, which changes
no prediction under an L2 penalty and makes D of no cost.

The grid of penalties grows where its best value lies at an edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from neurojepa.downstream.features import Features
from neurojepa.downstream.targets import Kind, Target
from neurojepa.errors import DataError

INNER = 5  # folds that choose the penalty
PENALTIES = 10.0 ** np.arange(-3, 4)  # times the mean squared length of a row
WIDEN = 3  # decades
WIDEST = (1e-6, 1e6)
NEWTON = 1000  # numbers to be fitted up to which Newton's method is faster


@dataclass(frozen=True)
class Plan:
    """Outer folds: for each repeat, pairs of who teaches and who is tested (indices)."""

    repeats: list[list[tuple[np.ndarray, np.ndarray]]]
    pooled: bool = True  # scores that compare nobody with others are of all folds of a repeat

    def folds(self, number: int) -> np.ndarray:
        """int [n, R]: the fold of each repeat that tests each of ``number`` people, or -1."""
        found = np.full((number, len(self.repeats)), -1)
        for r, folds in enumerate(self.repeats):
            for fold, (_, test) in enumerate(folds):
                found[test, r] = fold
        return found

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
    return Plan([list(whole_families(target.kind, target.truth, family, folds, seed))
                 for seed in range(repeats)])


def plan_sites(site: np.ndarray, family: np.ndarray) -> Plan:
    """One fold a site: all others teach, but for relatives of those tested."""
    folds = []
    for name in np.unique(site):
        test = np.flatnonzero(site == name)
        folds.append((np.flatnonzero((site != name) & ~np.isin(family, family[test])), test))
    return Plan([folds], pooled=False)


def whole_families(kind: Kind, truth: np.ndarray, family: np.ndarray, folds: int, seed: int
           ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of who teaches and who is tested, members of a family on one side.

    Raises
    ------
    DataError
        All are of one family.
    """
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    if len(set(family.tolist())) < 2:
        raise DataError(f"{len(truth)} who teach in one fold are all of one family or person, so "
                        "no penalty can be chosen among them; bring more people")
    number = np.unique(truth, return_counts=True)[1].min()  # of the rarest class
    kind_of_folds = GroupKFold if kind == "regression" or number < folds else StratifiedGroupKFold
    yield from kind_of_folds(folds, shuffle=True, random_state=seed).split(
        truth[:, None], truth, family)


Read = Callable[[Target, np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def held_out(plan: Plan, features: Features, number: int,
             read: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray | None],
             tail: tuple[int, ...] = ()) -> np.ndarray:
    """float64 [n, R, *tail] of what ``read(train, test, taught, tested)`` says of the tested people
    of each fold; nan where nobody was tested, or it says nothing."""
    predicted = np.full((number, len(plan.repeats), *tail), np.nan)
    for r, folds in enumerate(plan.repeats):
        for train, test in folds:
            if not len(train) or not len(test):
                continue
            if (found := read(train, test, *features(train, test))) is not None:
                predicted[test, r] = found
    return predicted


def predict(target: Target, features: Features, plan: Plan, family: np.ndarray,
            model: Read | None = None) -> np.ndarray:
    """float64 [n, R] or, of classes, [n, R, K]; nan where nobody predicted a person.

    Who is tested is missing from those who teach, so a fold with many positives is predicted from
    fewer of them.  Where folds are scored together each fold's predictions are therefore moved from
    the share (or mean) that taught to that of all.  Ranks need more than that (scoring.py).

    Parameters
    ----------
    model : ``linear`` (None) or ``nearest``
    """
    truth = target.truth
    fit = model or linear

    def read(train: np.ndarray, test: np.ndarray, taught: np.ndarray,
             tested: np.ndarray) -> np.ndarray | None:
        known = set(truth[train].tolist())
        if target.kind != "regression" and len(known) < len(target.classes):
            return None
        found = fit(target, taught, tested, truth[train], family[train])
        return moved(target, found, truth[train], truth) if plan.pooled else found

    classes = target.kind in ("multiclass", "ordinal")
    return held_out(plan, features, len(truth), read, (len(target.classes),) if classes else ())


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


# ---- the linear model ----------------------------------------------------------------------------

def linear(target: Target, taught: np.ndarray, tested: np.ndarray, truth: np.ndarray,
           family: np.ndarray) -> np.ndarray:
    """Predictions [m] or [m, K] of ``tested`` [m, D] by a linear model with an L2 penalty."""
    taught, tested = in_span(taught, tested)
    fit = _ridge if target.kind == "regression" else _ordinal if target.kind == "ordinal" \
        else logistic
    penalty = _best_penalty(target, fit, taught, truth, family)
    found = fit(taught, truth, tested, np.array([penalty]), len(target.classes))[0]
    return found[:, 1] if target.kind == "binary" else found


def in_span(taught: np.ndarray, tested: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both rotated into the span of those who teach, where features outnumber them."""
    if taught.shape[1] <= len(taught):
        return taught, tested
    _, _, basis = np.linalg.svd(taught, full_matrices=False)
    return taught @ basis.T, tested @ basis.T


Fit = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


def _best_penalty(target: Target, fit: Fit, taught: np.ndarray, truth: np.ndarray,
                  family: np.ndarray) -> float:
    """The penalty of least loss over inner folds; the grid grows while it lies at an edge."""
    folds = max(2, min(INNER, len(set(family.tolist())), *(
        len(set(family[truth == k].tolist())) for k in range(len(target.classes)))))
    splits = list(whole_families(target.kind, truth, family, folds, seed=0))

    def losses(penalties: np.ndarray) -> np.ndarray:
        total = np.zeros(len(penalties))
        for train, test in splits:
            if target.kind != "regression" and len(set(truth[train])) < len(target.classes):
                continue
            found = fit(taught[train], truth[train], taught[test], penalties, len(target.classes))
            total += [_loss(target.kind, truth[test], each) for each in found]
        return total

    return least(losses)


def least(losses_of: Callable[[np.ndarray], np.ndarray]) -> float:
    """The penalty of least loss; the grid grows while it lies at an edge.

    Parameters
    ----------
    losses_of : the losses of an array of penalties
    """
    grid, losses = PENALTIES, dict[float, float]()
    while True:
        new = np.array([each for each in grid if each not in losses])
        losses |= dict(zip(new.tolist(), losses_of(new).tolist(), strict=True))
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


def logistic(taught: np.ndarray, truth: np.ndarray, tested: np.ndarray, penalties: np.ndarray,
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
    above = np.stack([logistic(taught, (truth > level).astype(float), tested, penalties, 2)[..., 1]
                      for level in range(classes - 1)], -1)
    above = np.minimum.accumulate(above, -1)  # being above a level is no less likely than the next
    edges = np.concatenate([np.ones_like(above[..., :1]), above, np.zeros_like(above[..., :1])], -1)
    return edges[..., :-1] - edges[..., 1:]


# ---- nearest neighbours --------------------------------------------------------------------------

def nearest(target: Target, taught: np.ndarray, tested: np.ndarray, truth: np.ndarray,
            family: np.ndarray) -> np.ndarray:
    """Predictions [m] or [m, K]: means over the k people who are nearest.

    k is chosen among powers of two by the predictions of those who teach, each from the other
    families; shares of classes count one more person, of the classes' shares in all.
    """
    counts = 2 ** np.arange(int(np.log2(max(len(taught), 1))) + 1)
    of_each = _means(target, taught, taught, truth, counts, family, family)
    known = np.isfinite(of_each).reshape(len(counts), len(truth), -1).all((0, 2))
    losses = [_loss(target.kind, truth[known], each[known]) for each in of_each]
    best = counts[[int(np.argmin(losses))]] if known.any() else counts[:1]
    found = _means(target, taught, tested, truth, best)[0]
    return found[:, 1] if target.kind == "binary" else found


def _means(target: Target, taught: np.ndarray, tested: np.ndarray, truth: np.ndarray,
           counts: np.ndarray, family: np.ndarray | None = None,
           own: np.ndarray | None = None) -> np.ndarray:
    """[counts, m] or [counts, m, K]; of nobody's own family, where families are told."""
    distance = (np.square(tested).sum(1)[:, None] - 2 * tested @ taught.T
                + np.square(taught).sum(1))
    if family is not None and own is not None:
        distance[own[:, None] == family] = np.inf
    order = np.argsort(distance, 1, kind="stable")
    far = ~np.isfinite(np.take_along_axis(distance, order, 1))
    number = len(target.classes)
    each = truth[:, None] if target.kind == "regression" else np.eye(number)[truth.astype(int)]
    near = np.where(far[..., None], 0.0, each[order])
    sums, seen = near.cumsum(1), (~far).cumsum(1)
    if target.kind == "regression":
        with np.errstate(invalid="ignore"):
            means = sums[..., 0] / np.where(seen > 0, seen, np.nan)
    else:
        means = (sums + each.mean(0)) / (seen[..., None] + 1)
    return np.stack([means[:, min(count, means.shape[1]) - 1] for count in counts])
