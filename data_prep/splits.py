"""Splits by person and family: a keyed hash, so that they stay put when scans are added.

People tied to each other (a family, a common anatomy, the same person in another cohort) form a
group, found by union-find; the group's name, hashed under the site's key, gives a number below
1000, and that the split.  People who had a split keep it, whatever their group is called now.  A
new tie between groups of two splits is the one thing that moves people: test beats val beats
train, for nobody who was tested on may be trained on.  ``check`` finds people who ended up in two
splits all the same.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import defaultdict
from collections.abc import Iterable, Mapping

SPLIT_BELOW = (("train", 700), ("val", 800), ("test", 1000))  # of 1000: 70 %, 10 %, 20 %
LINK = "link:"  # tags that mean the same in every cohort


def group_people(people: Iterable[str], ties: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The group of each person: people with a common tag, directly or through others.

    A group is named by its first tag in alphabetical order, links before others, so more people
    of the same tags do not rename it; a person without ties is a group alone.
    """
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    def rank(node: str) -> tuple[bool, bool, str]:
        return not node.startswith("tag:" + LINK), not node.startswith("tag:"), node

    people = set(people)
    for person, tag in ties:
        first, second = root(f"person:{person}"), root(f"tag:{tag}")
        if first != second:
            winner, loser = sorted((first, second), key=rank)
            parent[loser] = winner
    return {person: root(f"person:{person}") for person in people}


def scope(cohort: str, group: str) -> str:
    """What a group's name is unique in: its cohort, or nothing where a link names it."""
    return "" if group.startswith("tag:" + LINK) else cohort


def split_of(key: bytes, cohort: str, group: str) -> str:
    """train, val or test for a group of people; of a linked group the same in every cohort."""
    text = f"split|{scope(cohort, group)}|{group}"
    digest = hmac.new(key, text.encode(), hashlib.sha256).digest()
    number = int.from_bytes(digest[:8], "big") % 1000
    return next(name for name, limit in SPLIT_BELOW if number < limit)


def settle(key: bytes, cohort: str, *, groups: Mapping[str, str],
           earlier: Mapping[str, str]) -> dict[str, str]:
    """The split of each group: what its people had, else by hash.

    Parameters
    ----------
    groups
        Group of each person.
    earlier
        Split that a person has had so far; where the people of a group differ, the last of
        train, val, test wins.
    """
    had: dict[str, set[str]] = defaultdict(set)
    for person, group in groups.items():
        if person in earlier:
            had[group].add(earlier[person])
    order = [name for name, _ in SPLIT_BELOW]
    return {group: max(had[group], key=order.index) if group in had
            else split_of(key, cohort, group) for group in set(groups.values())}


def check(rows: Iterable[dict[str, str]]) -> list[str]:
    """Persons and families found in more than one split, one line each.

    Parameters
    ----------
    rows
        Rows with ``cohort``, ``participant``, ``family`` and ``split``.
    """
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        for kind in ("participant", "family"):
            seen[kind, row[kind]].add(row["split"])
    return [f"{kind} {name} is in the splits {', '.join(sorted(splits))}; index all scans of the "
            "cohort together with one key, and linked cohorts with --beside"
            for (kind, name), splits in sorted(seen.items()) if len(splits) > 1]
