"""What index prints of tables: which column was taken for what, and the labels of how many people.

Names of columns and labels alone: values, ids and dates of people are never printed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import pyarrow as pa

from data_prep.tables import as_float

_MOST = 40  # names on a line; a questionnaire may have thousands


def tell_columns(tables: Mapping[str, Mapping[str, str]]) -> None:
    """Print, by table, what was taken for what and what was left out with its reason."""
    for table, columns in sorted(tables.items()):
        alike: dict[str, list[str]] = defaultdict(list)
        for column, told in columns.items():
            alike[told].append(column)
        print(f"  columns of {table}:" + ("" if columns else " none that are used"))
        for told, names in alike.items():
            print(f"    {told}: {_some(names)}")


def tell_labels(labels: pa.Table) -> None:
    """Print the labels (LABELS_SCHEMA), of how many people each is known, and of how many kinds."""
    told = []
    for name in labels["name"].unique().sort().to_pylist() if labels.num_rows else []:
        own = labels.filter(pa.compute.equal(labels["name"], name))
        people = len(own["participant"].unique())
        values = own["value"].unique().to_pylist()
        are_numbers = all(as_float(value) is not None for value in values)
        kinds = "" if are_numbers else f", {len(values)} classes"
        told.append(f"{name} ({people} people{kinds})")
    print(f"  labels: {_some(told) if told else 'none'}")


def _some(names: list[str]) -> str:
    more = len(names) - _MOST
    return ", ".join(names[:_MOST]) + (f" and {more} more" if more > 0 else "")
