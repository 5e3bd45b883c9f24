"""Labels of scans: what labels.parquet says of a scan's session, or else of its person."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from neurojepa.errors import DataError


def scan_labels(table: pa.Table, name: str, *, people: Sequence[str],
                sessions: Sequence[str]) -> np.ndarray:
    """The label ``name`` of each scan.

    Parameters
    ----------
    table : as from ``Feed.labels``.
    people, sessions : [n], of the scans.

    Returns
    -------
    [n] array of str, "" where unknown

    Raises
    ------
    DataError
        No one has a label of this name.
    """
    by_session, by_person = {}, {}
    for row in table.to_pylist():
        if row["name"] == name and row["value"]:
            if row["session"]:
                by_session[row["participant"], row["session"]] = row["value"]
            else:
                by_person[row["participant"]] = row["value"]
    if not by_session and not by_person:
        raise DataError(f"labels.parquet has no label {name!r}; it has "
                        f"{sorted(set(table['name'].to_pylist()))}")
    return np.array([by_session.get((person, session), by_person.get(person, ""))
                     for person, session in zip(people, sessions, strict=True)])


def as_numbers(values: np.ndarray) -> np.ndarray | None:
    """Labels [n] as float64 [n], or None where one is not a finite number."""
    if any("_" in value for value in values.tolist()):
        return None  # Python reads 1_0 as 10
    try:
        numbers = values.astype(float)
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None
