"""Which samples a run saw at which positions, from its configuration and feed alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from neurojepa.config import validate
from neurojepa.errors import DataError
from neurojepa.feed.format import open_feed
from neurojepa.feed.order import Order


@dataclass(frozen=True)
class Sample:
    """A sample of a feed; its ids are pseudonyms."""

    scan_id: str
    participant: str
    session: str
    cohort: str
    modality: str


class Samples:
    """The samples of a run, by position.

    Parameters
    ----------
    tree
        The run's config.yaml.
    where
        Its name, for errors.
    order
        The fingerprint of the run's order; another one means that the feed was packed anew.

    Raises
    ------
    ConfigError, DataError
        The configuration does not fit this version, or the feed cannot be read or is another one.
    """

    def __init__(self, tree: dict[str, Any], where: str, order: str | None = None) -> None:
        config = validate(tree, where)
        self._index = open_feed(config.data.feed).index
        self._order = Order(self._index, config.data, config.train.seed)
        if order and order != self._order.fingerprint:
            raise DataError(f"{config.data.feed}: gives the order {self._order.fingerprint}, the "
                            f"run was trained in the order {order}; the feed has changed since")

    def at(self, begin: int, end: int) -> list[Sample]:
        """The samples at positions ``begin`` to ``end``, in their order."""
        rows = self._order.rows(np.arange(begin, end))
        columns = [self._index[name].take(rows).to_pylist() for name in Sample.__annotations__]
        return [Sample(*map(str, values)) for values in zip(*columns, strict=True)]
