"""Who can be studied, and who may be tested: the same rule for every task on embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neurojepa.downstream.labels import People
from neurojepa.errors import DataError


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
