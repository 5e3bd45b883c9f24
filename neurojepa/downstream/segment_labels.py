"""Label maps that are given to ``segment``: whose they are, and whether they say the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neurojepa.downstream.images import Image, read_labels, stem_of
from neurojepa.downstream.regions import names_beside
from neurojepa.errors import ConfigError

COMMON = 0.5  # of the codes of a label map and of the others, both must have


@dataclass(frozen=True)
class Labels:
    """Label maps of one protocol."""

    maps: list[Image]
    codes: list[int]  # of any of them, sorted
    names: list[str]  # of codes
    notes: list[str]  # what not all of them have


def read_all(paths: Sequence[str]) -> Labels:
    """Read label maps and bring their codes and names together.

    Raises
    ------
    ConfigError
        They are of different protocols: codes that differ, or one code with two names.
    DataError
        One cannot be read.
    """
    maps = [read_labels(path) for path in paths]
    own = [set(np.unique(each.data).tolist()) - {0} for each in maps]
    codes = sorted(set.union(*own))
    _check_codes(paths, own)
    lacking = {code: sum(code not in each for each in own) for code in codes}
    names = names_of(paths, codes)
    told = [f"{name} ({len(own) - lacking[code]})" for code, name in zip(codes, names, strict=True)
            if lacking[code]]
    return Labels(maps, codes, names, [f"regions that not all of {len(own)} label maps have, and "
                                       f"how many have them: {', '.join(told)}"] if told else [])


def _check_codes(paths: Sequence[str], own: Sequence[set[int]]) -> None:
    for number, (path, codes) in enumerate(zip(paths, own, strict=True)):
        others = set[int]().union(*own[:number], *own[number + 1:])
        if others and len(codes & others) < COMMON * len(codes | others):
            raise ConfigError(f"--labels {path}: shares {len(codes & others)} of its {len(codes)} "
                              f"codes with the other label maps, which have {len(others)}; label "
                              "maps must have one set of codes")


def names_of(paths: Sequence[str], codes: Sequence[int]) -> list[str]:
    """Names of codes from the tables beside label maps; those that none names are their code.

    Raises
    ------
    ConfigError
        Two codes have one name, or one code has two.
    """
    known, told = dict[int, str](), dict[int, str]()
    for path in paths:
        for code, name in names_beside(path).items():
            if code in codes and known.setdefault(code, name) != name:
                raise ConfigError(f"{path}: code {code} is named {name!r} in the .tsv beside it, "
                                  f"and {known[code]!r} beside {told[code]}; label maps must have "
                                  "one set of codes")
            told.setdefault(code, path)
    names = [known.get(code, str(code)) for code in codes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        both = [code for code, name in zip(codes, names, strict=True) if name == twice]
        raise ConfigError(f"{told.get(both[0], paths[0])}: codes {both[0]} and {both[1]} are both "
                          f"named {twice!r} in the .tsv beside it; give each a name of its own")
    return names


def check_pairs(scans: Sequence[str], maps: Sequence[str], option: str) -> None:
    """Raise ConfigError where label maps are not as many as scans, or names tell other people."""
    if len(scans) != len(maps):
        raise ConfigError(f"{len(scans)} scans and {option} of {len(maps)} files: each scan needs "
                          "its label map, in the same order")
    for scan, path in zip(scans, maps, strict=True):
        own, other = entities_of(scan), entities_of(path)
        for key in own.keys() & other.keys():
            if own[key] != other[key]:
                raise ConfigError(f"{option} {path}: is of {key}-{other[key]}, its scan {scan} of "
                                  f"{key}-{own[key]}; name label maps in the order of the scans")


def entities_of(path: str) -> dict[str, str]:
    """BIDS's person and visit (sub, ses), as far as a file's name tells them."""
    return dict(re.findall(r"(?:^|_)(sub|ses)-([A-Za-z0-9]+)", stem_of(path)))
