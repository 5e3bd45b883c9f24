"""Splits by person and family: a keyed hash, so that they stay put when scans are added.

People tied to each other (a family, a common anatomy) form a group, found by union-find; the
group's name, hashed under the site's key, gives a number below 1000, and that the split.  A new
tie between two existing groups is the one thing that can move people; ``check`` finds people who
ended up in two splits.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import defaultdict
from collections.abc import Iterable

SPLIT_BELOW = (("train", 700), ("val", 800), ("test", 1000))  # of 1000: 70 %, 10 %, 20 %


def group_people(people: Iterable[str], ties: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The group of each person: people with a common tag, directly or through others.

    A group is named by its first tag in alphabetical order, so more people of the same tags do
    not rename it; a person without ties is a group alone.
    """
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    people = set(people)
    for person, tag in ties:
        first, second = root(f"person:{person}"), root(f"tag:{tag}")
        if first != second:
            winner, loser = sorted((first, second), key=lambda name: (name[:4] != "tag:", name))
            parent[loser] = winner
    return {person: root(f"person:{person}") for person in people}


def split_of(key: bytes, cohort: str, group: str) -> str:
    """train, val or test for a group of people."""
    digest = hmac.new(key, f"split|{cohort}|{group}".encode(), hashlib.sha256).digest()
    number = int.from_bytes(digest[:8], "big") % 1000
    return next(name for name, limit in SPLIT_BELOW if number < limit)


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
            "cohort together with one key"
            for (kind, name), splits in sorted(seen.items()) if len(splits) > 1]
