"""The archive's table, put together in Arrow: a million rows are never a million dicts.

Rows of people who are not in this run stay; the others come from the people's records, a few
thousand people at a time.  Then the whole table is ordered, duplicates across people lose all but
the first row, and rows far from their cohort are flagged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.archive import slot
from data_prep.flags import OUTLIER
from data_prep.rows import (
    FIXED_SCHEMA,
    WITHDRAWN,
    WITHDRAWN_CONTENT,
    ArchiveRow,
    Judged,
    Outcome,
    duplicate_of,
    judged_by,
    scan_table,
    usable,
)
from data_prep.scan import Scan

_ORDER = ("cohort", "participant", "session", "uri", "member", "modality")


def scan_rows(scan: Scan, outcomes: list[Outcome]) -> list[ArchiveRow]:
    """The archive's rows of one scan: what the manifest says now, and each of its outcomes."""
    return [cast(ArchiveRow, vars(scan) | outcome) for outcome in outcomes]


def merge(kept: pa.Table | None, chunks: Iterable[list[ArchiveRow]]) -> pa.Table:
    """One ordered table of rows that stay and new ones: duplicates rejected, outliers flagged."""
    tables = [] if kept is None else [kept]
    tables += [scan_table(rows) for rows in chunks]
    table = _concatenated(tables)
    table = table.sort_by([(name, "ascending") for name in _ORDER])
    return _with_outliers(_without_duplicates(table))


def _concatenated(tables: list[pa.Table]) -> pa.Table:
    """All rows under the union of their columns; a figure that is text anywhere is text."""
    fields: dict[str, pa.Field] = {}
    for table in tables:
        for field in table.schema:
            if field.name not in fields or pa.types.is_string(field.type):
                fields[field.name] = field
    figures = sorted(fields.keys() - set(FIXED_SCHEMA.names))
    schema = pa.schema([*FIXED_SCHEMA, *(fields[name] for name in figures)])
    return pa.concat_tables([_with_schema(table, schema) for table in tables]
                            or [schema.empty_table()])


def _with_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, field.type))
        elif table[field.name].type == field.type:
            columns.append(table[field.name])
        else:  # numbers among texts, spelled as scan_table does
            columns.append(pa.array([None if value is None else str(value)
                                     for value in table[field.name].to_pylist()], field.type))
    return pa.table(columns, schema=schema)


def _without_duplicates(table: pa.Table) -> pa.Table:
    """Of usable rows with equal content, the first keeps its slot; later ones are rejected.

    Content of people who withdrew is not taken from others either.
    """
    withdrawn = table["scan_id"].filter(pc.equal(table["reason"], WITHDRAWN)).drop_null()
    copies = pc.and_(pc.is_in(table["scan_id"], withdrawn.combine_chunks()),
                     pa.array(usable(table)))
    table = _marked(table, {int(row): WITHDRAWN_CONTENT
                            for row in np.flatnonzero(copies.to_numpy())})
    rows = np.flatnonzero(usable(table))
    names = table["scan_id"].take(rows).combine_chunks().dictionary_encode().indices.to_numpy()
    first = np.full(names.max(initial=-1) + 1, -1)
    first[names[::-1]] = rows[::-1]  # the last to be written is the first row
    later = first[names] != rows
    people, scan_ids = table["participant"], table["scan_id"]
    return _marked(table, {
        int(row): duplicate_of(slot(people[int(original)].as_py(), scan_ids[int(original)].as_py()),
                               same_person=people[int(row)].equals(people[int(original)]))
        for row, original in zip(rows[later], first[names[later]], strict=True)})


def _marked(table: pa.Table, marks: Mapping[int, Mapping[str, Any]]) -> pa.Table:
    """The table with some columns of some rows replaced."""
    for name in {name for mark in marks.values() for name in mark}:
        values = table[name].to_pylist()
        for row, mark in marks.items():
            values[row] = mark[name]
        table = table.set_column(table.column_names.index(name), table.schema.field(name),
                                 pa.array(values, pa.string()))
    return table


def _with_outliers(table: pa.Table) -> pa.Table:
    """Flags of scans far from their cohort, computed anew from all figures that are there now."""
    from data_prep.qc.judge import rules

    flags: dict[int, list[str]] = {}
    old = pc.fill_null(pc.match_substring(table["reason"], OUTLIER), False).to_numpy()
    for number in np.flatnonzero(old & usable(table)).tolist():
        flags[number] = []
    for numbers in _groups(table):
        for figure in sorted(rules().figures.keys() & set(table.column_names)):
            for number in _outliers(table, numbers, figure).tolist():
                flags.setdefault(number, []).append(OUTLIER + figure)
    marks: dict[int, Judged] = {}
    for number, found in flags.items():
        reason = (table["reason"][number].as_py() or "").split(";")
        own = [flag for flag in reason if flag and not flag.startswith(OUTLIER)] + found
        marks[number] = judged_by(own)
    return _marked(table, marks)


def _outliers(table: pa.Table, numbers: np.ndarray, figure: str) -> np.ndarray:
    """Numbers of the rows that are far from the others in one figure; [rows] int."""
    from data_prep.qc import outliers

    values = table[figure].take(numbers)
    measured = values.is_valid().to_numpy()
    far = outliers(np.array(values.drop_null().to_pylist(), np.float64), figure)
    return np.asarray(numbers[measured][far])


def _groups(table: pa.Table) -> list[np.ndarray]:
    """Numbers of the usable rows of each cohort and modality."""
    names = pc.binary_join_element_wise(table["cohort"], table["modality"], "/")
    codes = names.combine_chunks().dictionary_encode().indices.to_numpy()
    rows = np.flatnonzero(usable(table))
    return [rows[codes[rows] == code] for code in np.unique(codes[rows])]
