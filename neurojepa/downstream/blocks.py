"""Tables beside an image: blocks of columns such as genotype, cognition or fluid, with gaps.

A person whose block is missing stays.  In each fold a gap becomes the mean of those who teach, and
a column of its own says that it was one: so a model may read a gap as it likes, and is right under
any reason for it, as long as that is the same in those who teach and those who are told (Van Ness
et al. 2023).  What gaps alone tell is looked at by itself (fuse.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neurojepa.downstream.features import Features, plain
from neurojepa.downstream.labels import People
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.labels import as_numbers

MOST_NAMES = 20  # of a column that is no number


@dataclass(frozen=True)
class Block:
    """Columns of a table that are measured together."""

    name: str
    columns: tuple[str, ...]
    values: np.ndarray  # float64 [n, c], nan in gaps

    @property
    def known(self) -> np.ndarray:
        """Bool [n]: who has any of it."""
        return np.isfinite(self.values).any(1)


def parse_blocks(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Columns of blocks by name, from texts such as ``fluid=abeta,tau``.

    Raises
    ------
    ConfigError
        A text is not of this form, or a name or column stands twice.
    """
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, _, rest = text.partition("=")
        columns = tuple(each.strip() for each in rest.split(","))
        if not name or not all(columns):
            raise ConfigError(f"--block {text}: write a name and its columns, such as "
                              "fluid=abeta,tau")
        if name in found:
            raise ConfigError(f"--block {text}: there is a block {name!r} already")
        found[name] = columns
    every = [column for columns in found.values() for column in columns]
    if twice := sorted({column for column in every if every.count(column) > 1}):
        raise ConfigError(f"--block: column {twice[0]!r} stands in two blocks, or twice in one")
    return found


def block_of(people: People, name: str, columns: Sequence[str]) -> Block:
    """A block of the table: numbers, and of words a column for each but the first.

    Raises
    ------
    ConfigError
        A column is not there.
    DataError
        Nobody has any of it, a column has numbers and words, or too many words.
    """
    parts = [_numbers(column, people.column(column)) for column in columns]
    block = Block(name, tuple(columns), np.hstack(parts))
    if not block.known.any():
        raise DataError(f"block {name!r}: nobody with a scan has a value in "
                        f"{', '.join(columns)}")
    return block


def _numbers(name: str, values: np.ndarray) -> np.ndarray:
    """float64 [n, c] of a column of str, nan where it is empty."""
    known = values != ""
    numbers = as_numbers(values[known])
    if numbers is not None:
        found = np.full((len(values), 1), np.nan)
        found[known, 0] = numbers
        return found
    names = np.unique(values[known])
    words = [each for each in names.tolist() if as_numbers(np.array([each])) is None]
    if len(words) < len(names):
        raise DataError(f"column {name!r}: {words[0]!r} is no number, others are; correct it, or "
                        f"add --missing {words[0]} if it stands for nothing")
    if len(names) > MOST_NAMES:
        raise DataError(f"column {name!r}: {len(names)} different words (first: {names[0]!r}), "
                        f"{MOST_NAMES} at most; is it a column of text?")
    found = (values[:, None] == names[None, len(names) > 1:]).astype(float)
    found[~known] = np.nan
    return found


def filled(blocks: Sequence[Block], image: np.ndarray | None = None) -> Features:
    """Blocks, what is missing of them, and an image's features [n, D]; each column weighs as much
    as the whole image, as covariates do in ``features.beside``."""
    values = np.hstack([block.values for block in blocks])
    gaps = _gaps(values)

    def build(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        known = np.isfinite(values[train])
        mean = np.where(known, values[train], 0).sum(0) / np.maximum(known.sum(0), 1)
        table = np.column_stack([np.where(np.isfinite(values), values, mean), gaps])
        parts = [_of_equal_weight(table, train, test)]
        if image is not None:
            parts.append(plain(image)(train, test))
        return np.hstack([part[0] for part in parts]), np.hstack([part[1] for part in parts])
    return build


def gaps_alone(blocks: Sequence[Block]) -> Features | None:
    """What is missing of blocks; None where nothing is."""
    gaps = _gaps(np.hstack([block.values for block in blocks]))
    return (lambda train, test: _of_equal_weight(gaps, train, test)) if gaps.size else None


def _gaps(values: np.ndarray) -> np.ndarray:
    """float64 [n, g]: each pattern of gaps once, columns without a gap not at all."""
    gaps = np.unique(np.isnan(values), axis=1)
    return gaps[:, gaps.any(0) & ~gaps.all(0)].astype(float)


def _of_equal_weight(table: np.ndarray, train: np.ndarray,
                     test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns of variance 1 among those who teach; those that do not vary there are left out."""
    taught, tested = plain(table)(train, test)
    scale = np.sqrt(max(taught.shape[1], 1))
    return taught * scale, tested * scale
