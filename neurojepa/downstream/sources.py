"""Visits that have a target and at least one of its sources, for a completion to learn from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neurojepa.downstream.targets import Target
from neurojepa.downstream.tested import split_people
from neurojepa.errors import DataError
from neurojepa.feed.format import Feed
from neurojepa.storage import sha256

LEAST = 5  # visits that teach and have all sources, where there are several


@dataclass(frozen=True)
class Visits:
    """n visits; of each modality the first scan of a visit counts."""

    names: tuple[str, ...]  # K sources
    sources: np.ndarray  # [n, K] rows of the feed, -1 where a visit lacks it
    target: np.ndarray  # [n] rows of the feed
    participant: np.ndarray
    family: np.ndarray
    parts: np.ndarray  # str: train, val or test

    def of(self, part: str) -> np.ndarray:
        """Indices of a part."""
        return np.flatnonzero(self.parts == part)

    def whole(self, part: str) -> np.ndarray:
        """Indices of a part, of visits that have all sources."""
        return np.flatnonzero((self.parts == part) & (self.sources >= 0).all(1))

    def fingerprint(self) -> str:
        """Of who is in which part, with which scans."""
        sources = self.sources if len(self.names) > 1 else self.sources[:, 0]
        return sha256(json.dumps([each.tolist() for each in (
            sources, self.target, self.participant, self.parts)]).encode())[:16]


def visits_of(feed: Feed, rows: np.ndarray, sources: Sequence[str], target: str,
              seen: np.ndarray) -> Visits:
    """Visits of the feed with the target and a source.

    Parameters
    ----------
    rows, seen : [k] of the feed, and whether each one's person was seen in pretraining

    Raises
    ------
    DataError
        Too few people, no scan of a source, or too few visits with all of them.
    """
    by_visit = _by_visit(feed, rows)
    chosen = [visit for visit in sorted(by_visit)
              if target in by_visit[visit] and not by_visit[visit].keys().isdisjoint(sources)]
    k_of = np.array([[by_visit[visit].get(name, -1) for name in (*sources, target)]
                     for visit in chosen], dtype=int).reshape(len(chosen), len(sources) + 1)
    _check(feed, rows, k_of >= 0, sources, target)
    first = k_of[:, -1]
    family = np.array(feed.index["family"].to_pylist())[rows][first]
    tested = ~(seen[k_of] & (k_of >= 0)).any(1)
    parts = split_people(Target(f"{target} from {spoken(sources)}", "regression",
                                np.zeros(len(chosen))), family, tested)
    found = Visits(tuple(sources), np.where(k_of < 0, -1, rows[k_of])[:, :-1], rows[first],
                   np.array([person for person, _ in chosen]), family, parts)
    _check_parts(feed, found)
    return found


def groups_of(feed: Feed, rows: np.ndarray, sources: Sequence[str]) -> np.ndarray:
    """[m, K] rows of the feed, -1 where there is none, of which an image is made each: every scan
    of a single source, or of several sources the first scans of every visit that has any.

    Parameters
    ----------
    rows : of the feed, among which the scans are
    """
    if len(sources) == 1:
        names = np.array(feed.index["modality"].to_pylist())[rows]
        return rows[names == sources[0]][:, None]
    found = [[rows[of[name]] if name in of else -1 for name in sources]
             for of in _by_visit(feed, rows).values() if not of.keys().isdisjoint(sources)]
    return np.array(found, dtype=int).reshape(len(found), len(sources))


def spoken(names: Sequence[str]) -> str:
    """T1w, T2w and FLAIR."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def had(names: Sequence[str], sources: np.ndarray) -> dict[str, int]:
    """Of rows [n, K] of sources, -1 where one is missing: how many there are with which of them,
    the most frequent first."""
    return dict(Counter(spoken([name for name, row in zip(names, each, strict=True) if row >= 0])
                        for each in sources).most_common())


def _by_visit(feed: Feed, rows: np.ndarray) -> dict[tuple[str, str], dict[str, int]]:
    """By person and session: the place in ``rows`` of the first scan of each modality."""
    columns = (np.array(feed.index[name].to_pylist())[rows].tolist()
               for name in ("participant", "session", "modality"))
    found: dict[tuple[str, str], dict[str, int]] = {}
    for k, (person, session, modality) in enumerate(zip(*columns, strict=True)):
        found.setdefault((person, session), {}).setdefault(modality, k)
    return found


def _check(feed: Feed, rows: np.ndarray, there: np.ndarray, sources: Sequence[str],
           target: str) -> None:
    """Raise DataError where no visit has the target with one of the sources."""
    lacking = [name for name, each in zip(sources, there.T, strict=False) if not each.any()]
    if lacking:
        names = sorted(set(np.array(feed.index["modality"].to_pylist())[rows].tolist()))
        raise DataError(f"{feed.uri}: no visit has both {lacking[0]} and {target}; it has "
                        f"{', '.join(names)}")


def _check_parts(feed: Feed, found: Visits) -> None:
    """Raise DataError where too few visits with all sources teach, choose or are tested."""
    counts = {part: len(found.whole(part)) for part in ("train", "val", "test")}
    if len(found.names) > 1 and (counts["train"] < LEAST or not all(counts.values())):
        raise DataError(
            f"{feed.uri}: {counts['train']} visits that teach have all of {spoken(found.names)}, "
            f"{counts['val']} that choose and {counts['test']} that are tested; {LEAST}, 1 and 1 "
            "are needed: name fewer modalities (--from), or bring more such visits")
