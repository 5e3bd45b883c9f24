"""Linear probes on frozen embeddings: regression (ridge) and classification (logistic).

Fitted on the people of split ``train``, tested on those of another split.  The penalty is chosen
by cross-validation that keeps each person in one fold.  Before anything is fitted, the split is
checked: a person or family on both sides is an error, not a warning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from neurojepa.downstream.embed import Embeddings
from neurojepa.downstream.stats import Score, auroc, mean_absolute_error, r_squared, score
from neurojepa.errors import DataError
from neurojepa.feed.labels import as_numbers

Kind = Literal["regression", "classification"]


@dataclass(frozen=True)
class ProbeResult:
    """Test scores of one target, the predictions behind them, and how many people taught it."""

    target: str
    kind: Kind
    scores: dict[str, Score]
    truth: np.ndarray
    predicted: np.ndarray
    num_train_people: int
    classes: tuple[str, str] | None = None  # (negative, positive)


def check_leak(embeddings: Embeddings, split: str = "test") -> None:
    """Raise DataError when a person or family stands in both train and ``split``."""
    for name, values in (("participant", embeddings.participant), ("family", embeddings.family)):
        both = set(values[embeddings.split == "train"]) & set(values[embeddings.split == split])
        if both:
            raise DataError(f"{len(both)} {name}s are in both train and {split} (first: "
                            f"{sorted(both)[0]}); run: python -m data_prep verify FEED")


def probe(embeddings: Embeddings, target: str, values: np.ndarray, split: str = "test",
          fit_on: str | None = None, test_on: str | None = None) -> ProbeResult:
    """Fit on train, test on another split.

    Parameters
    ----------
    values : [n] array of str
        The label of each scan, "" where unknown (left out).  Numbers make a regression, two
        names a classification with the alphabetically later one as positive.
    split : str
        The split to test on.
    fit_on, test_on : str
        Modality of the scans to learn from and to test on; None takes all.

    Raises
    ------
    DataError
        Too few labelled people, more than two classes, or a class missing from a split.
    """
    check_leak(embeddings, split)
    known = values != ""
    train = known & (embeddings.split == "train") & _shows(embeddings, fit_on)
    test = known & (embeddings.split == split) & _shows(embeddings, test_on)
    people = len(set(embeddings.participant[train])), len(set(embeddings.participant[test]))
    if people[0] < 5 or people[1] < 2:
        raise DataError(f"label {target!r}: known for {people[0]} people of split train and "
                        f"{people[1]} of split {split}; a probe needs at least 5 and 2")
    numeric = as_numbers(values[known])
    if numeric is not None:
        truth = np.zeros(len(values))
        truth[known] = numeric
        return _regression(embeddings, target, truth, train, test, people[0])
    return _classification(embeddings, target, values, train, test, people[0])


def _shows(embeddings: Embeddings, modality: str | None) -> np.ndarray:
    return np.isin(embeddings.modality, embeddings.modality if modality is None else modality)


def _regression(embeddings: Embeddings, target: str, truth: np.ndarray, train: np.ndarray,
                test: np.ndarray, num_people: int) -> ProbeResult:
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GroupKFold

    folds = GroupKFold(5, shuffle=True, random_state=0)
    model = _tuned(Ridge(), "alpha", np.logspace(-1, 5, 13), "neg_mean_squared_error", folds)
    model.fit(embeddings.values[train], truth[train], groups=embeddings.participant[train])
    predicted = model.predict(embeddings.values[test])
    who = embeddings.participant[test], embeddings.family[test]
    scores = {"mae": score(mean_absolute_error, truth[test], predicted, *who),
              "r2": score(r_squared, truth[test], predicted, *who)}
    return ProbeResult(target, "regression", scores, truth[test], predicted, num_people)


def _classification(embeddings: Embeddings, target: str, values: np.ndarray, train: np.ndarray,
                    test: np.ndarray, num_people: int) -> ProbeResult:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss, make_scorer
    from sklearn.model_selection import StratifiedGroupKFold

    names = sorted(set(values[train | test].tolist()))
    if len(names) != 2 or any(len(set(values[part])) != 2 for part in (train, test)):
        raise DataError(f"label {target!r}: a probe needs two classes in both splits; train has "
                        f"{sorted(set(values[train].tolist()))}, test has "
                        f"{sorted(set(values[test].tolist()))}")
    truth = (values == names[1]).astype(float)
    rarer = min(len(set(embeddings.participant[train & (truth == side)])) for side in (0, 1))
    if rarer < 2:
        raise DataError(f"label {target!r}: one class of split train has {rarer} person; choosing "
                        "the penalty by cross-validation needs at least 2")
    folds = StratifiedGroupKFold(min(5, rarer), shuffle=True, random_state=0)
    loss = make_scorer(log_loss, response_method="predict_proba", greater_is_better=False,
                       labels=[0, 1])  # a fold may hold one class alone
    model = _tuned(LogisticRegression(max_iter=10_000, class_weight="balanced"), "C",
                   np.logspace(-5, 0, 11), loss, folds)
    model.fit(embeddings.values[train], truth[train], groups=embeddings.participant[train])
    predicted = model.predict_proba(embeddings.values[test])[:, 1]
    scores = {"auroc": score(auroc, truth[test], predicted, embeddings.participant[test],
                             embeddings.family[test])}
    return ProbeResult(target, "classification", scores, truth[test], predicted, num_people,
                       (names[0], names[1]))


def _tuned(estimator: Any, parameter: str, grid: np.ndarray, scoring: Any, folds: Any) -> Any:
    """Standardise, then the estimator with its penalty chosen over folds of people."""
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    pipeline = Pipeline([("scale", StandardScaler()), ("model", estimator)])
    # a fold that cannot be scored is an error: without scores the first penalty would win
    return GridSearchCV(pipeline, {f"model__{parameter}": grid}, scoring=scoring, cv=folds,
                        error_score="raise")
