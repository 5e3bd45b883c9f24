"""Tables of text: byte-order marks and short rows."""

from __future__ import annotations

from data_prep.tables import parse_table


def test_tables_with_marks_and_short_rows():
    rows = parse_table("\ufeffa\tb\r\n1\tn/a\r\n\r\n2\r\n3\tx\t\r\n".encode(), "t.tsv")
    assert rows == [{"a": "1", "b": None}, {"a": "2", "b": None}, {"a": "3", "b": "x"}]
