"""Who can be studied, and who may be tested: the same rule for every task on embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neurojepa.downstream.crossval import whole_families
from neurojepa.downstream.labels import People
from neurojepa.downstream.targets import Target
from neurojepa.errors import DataError

FOLDS = 5  # where people are split once: a fifth is tested, a fifth of the others says when to stop


def complete(people: People, names: Sequence[str]) -> tuple[People, list[str]]:
    """People who have a value in each of these columns, and how many have not.

    Raises
    ------
    ConfigError
        A column is not there.
    """
    notes = []
    for name in dict.fromkeys(names):
        known = people.column(name) != ""
        if not known.all():
            notes.append(f"{int((~known).sum())} people without {name}")
            people = people.take(known)
    return people, notes


def may_test(people: People, what: str, allowed: bool) -> tuple[np.ndarray, list[str]]:
    """Bool [n], who is tested, and what is to be said of people seen in pretraining.

    Parameters
    ----------
    what : is studied, for messages: such as "label 'dx'"
    allowed : test people who were seen, too

    Raises
    ------
    DataError
        All of them were seen.
    """
    if people.seen is None or allowed or not people.seen.any():
        return np.ones(len(people.ids), bool), of_seen(people, " (--allow-seen)")
    if people.seen.all():
        raise DataError(f"{what}: all {_people(people)} people were seen in the pretraining of the "
                        "weights, so nobody is left to test; bring others, or add --allow-seen, "
                        "which stands in the report")
    return ~people.seen, [f"{_people(people.take(people.seen))} of {_people(people)} people were "
                          "seen in the pretraining of the weights: they teach, and are not tested"]


def split_people(target: Target, family: np.ndarray, may: np.ndarray) -> np.ndarray:
    """Str [n]: who is of train, val and test; families are whole, and only ``may`` are tested.

    A fifth is tested, or all who may be where these are fewer.

    Raises
    ------
    DataError
        Too few people or families, or a class would be missing from a part.
    """
    everyone = len(set(family.tolist()))
    if everyone < 2 * FOLDS:
        raise DataError(f"{target.name!r}: known for {everyone} people or families, {2 * FOLDS} "
                        "are needed")
    parts = np.full(len(family), "train", dtype="<U5")
    pool = np.flatnonzero(~np.isin(family, family[~may]))
    folds = round(len(set(family[pool].tolist())) * FOLDS / everyone)
    parts[_first_fold(target, family, pool, folds)] = "test"
    parts[_first_fold(target, family, np.flatnonzero(parts == "train"), FOLDS)] = "val"
    for part in ("train", "val", "test"):
        there = target.truth[parts == part]
        missing = [name for k, name in enumerate(target.classes) if k not in there]
        if missing or len(there) < 2:
            raise DataError(
                f"{target.name!r}: of {len(there)} people of part {part} "
                + (f"none is {missing[0]!r}" if missing else "nothing can be told")
                + "; bring more people" + (" who were not seen in the pretraining of the weights, "
                "or add --allow-seen" if not may.all() else ""))
    return parts


def _first_fold(target: Target, family: np.ndarray, pool: np.ndarray, folds: int) -> np.ndarray:
    if folds < 2:
        return pool
    return pool[next(whole_families(target.kind, target.truth[pool], family[pool], folds,
                                    seed=0))[1]]


def of_seen(people: People, how: str = "") -> list[str]:
    """What is to be said where all are tested, though some may have been seen in pretraining.

    Parameters
    ----------
    how : it came that they are
    """
    if people.seen is None:
        return ["who was in the pretraining of the weights is not known, as they were exported "
                "without its feed: if people of this table were, scores may be too good"]
    return [f"{_people(people.take(people.seen))} of {_people(people)} people were seen in the "
            f"pretraining of the weights and tested all the same{how}: scores may be too good"
            ] if people.seen.any() else []


def _people(people: People) -> int:
    return len(set(people.participant.tolist()))
