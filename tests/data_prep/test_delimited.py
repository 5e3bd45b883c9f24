"""Delimited text as people have it: no row is lost, whatever its encoding, delimiter and quotes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from data_prep.delimited import decoded, delimiter
from data_prep.tables import as_float, parse_table, read_tsv
from data_prep.wide import read_columns
from neurojepa.errors import DataError

STRAY = "t.csv: row with a stray quote, taken as a character"
LONG = "x" * 200_000  # above the csv module's own limit


def parsed(text: str | bytes, name: str = "t.csv") -> tuple[list[dict], Counter]:
    notes: Counter[str] = Counter()
    data = text.encode() if isinstance(text, str) else text
    return parse_table(data, name, notes), notes


# ---- quotes: each in small tables and in wide ones, which must agree -----------------------------

@pytest.mark.parametrize(("body", "notes", "stray"), [
    ('1,"two\nlines, and ""quotes""",3\n2,b,4\n', ['two\nlines, and "quotes"', "b"], 0),
    ('1,"open,3\n2,b,4\n', ['"open', "b"], 1),
    ('1,"open,3\n2,b,4\n3,"closes",5\n', ['"open', "b", "closes"], 1),
    ('1,"open,3\n2,b,4\n3,close",5\n', ['"open', "b", 'close"'], 1),
    ('1,5\'10",3\n2,"Tom" said,4\n', ['5\'10"', None], 0),
    ('1,"a, "b" c",3\n', ['a, "b" c'], 0),
    (f'1,"{LONG},3\n2,b,4\n', [f'"{LONG}', "b"], 1),
    (f'1,"{LONG}",3\n2,"b\n\nc",4\n', [LONG, "b\n\nc"], 0),
], ids=["legal", "open", "open-then-legal", "two-strays", "inside", "undoubled", "long",
        "long-legal"])
def test_a_stray_quote_swallows_no_row(tmp_path: Path, body: str, notes: list, stray: int) -> None:
    (tmp_path / "t.csv").write_text("id,note,x\n" + body)
    small, counted = parsed("id,note,x\n" + body)
    wide_notes: Counter[str] = Counter()
    wide = list(read_columns(str(tmp_path / "t.csv"), lambda name: True, wide_notes))
    assert [row["x"] for row in small] == [row["x"] for row in wide] == [
        str(number) for number in range(3, 3 + len(notes))]
    for rows, found in ((small, counted), (wide, wide_notes)):
        assert all(want in (None, row["note"]) for row, want in zip(rows, notes, strict=True))
        assert found[STRAY] >= stray if stray else STRAY not in found or None in notes


def test_every_row_of_a_long_table_with_strays_is_there(tmp_path: Path) -> None:
    lines = [f'{n},{chr(34) if n % 97 == 0 else ""}text {n},{n}' for n in range(5000)]
    (tmp_path / "t.csv").write_text("eid,note,x\n" + "\n".join(lines))
    rows = list(read_columns(str(tmp_path / "t.csv"), {"eid", "x"}.__contains__))
    assert [row["eid"] for row in rows] == [row["x"] for row in rows] == [
        str(n) for n in range(5000)]


# ---- encodings and delimiters --------------------------------------------------------------------

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be",
                                      "utf-32", "latin-1", "windows-1252"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path: Path, encoding: str, end: str) -> None:
    text = end.join(["id\tsite", "1\tKöln", "2\tMünster", ""])
    (tmp_path / "t.tsv").write_bytes(text.encode(encoding))
    rows, notes = parsed(text.encode(encoding), "t.tsv")
    assert rows == [{"id": "1", "site": "Köln"}, {"id": "2", "site": "Münster"}]
    assert list(read_columns(str(tmp_path / "t.tsv"), lambda name: True)) == rows
    assert bool(notes) is not encoding.startswith("utf-8")


def test_a_utf_16_table_of_several_blocks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("data_prep.wide._BLOCK_BYTES", 1001)  # cuts characters and lines
    text = "eid,name\n" + "".join(f"{n},Zoë {n}\n" for n in range(500))
    for encoding in ("utf-16", "utf-8", "latin-1"):
        (tmp_path / "t.csv").write_bytes(text.encode(encoding))
        rows = list(read_columns(str(tmp_path / "t.csv"), lambda name: True))
        assert [row["name"] for row in rows] == [f"Zoë {n}" for n in range(500)]


@pytest.mark.parametrize(("header", "name", "mark"), [
    ("a\tb", "t.tsv", "\t"), ("a,b", "t.tsv", ","), ("a;b", "t.csv", ";"), ("a|b", "t.txt", "|"),
    ("ID1 ID2 Kinship", "r.dat", " "), ('"a;b",c', "t.csv", ","), ("a,b;c;d", "t.csv", ";"),
    ("participant_id", "t.tsv", "\t"), ("eid", "t.csv", ","),
    ("id;SEX_ID (1=m, 2=f)", "t.csv", ";"), ("id,dx [0: no; 1: yes; 2: ?]", "t.csv", ",")])
def test_the_delimiter_is_the_headers_not_the_endings(header: str, name: str, mark: str) -> None:
    assert delimiter(header, name) == mark


def test_tables_of_spreadsheets_and_of_spaces() -> None:
    want = [{"id": "1", "age": "2"}, {"id": "3", "age": None}]
    for text in ("sep=;\nid;age\n1;2\n3;\n", "\n\nid,age,\n1,2,\n3,,\n", "id  age\n1   2\n3 .\n",
                 "id,age,,\n1,2,,\n3,n/a,,\n", "id\tage\n1\t2\n3\n", "id|age\n1|2\n3|NaN\n"):
        assert parsed(text)[0] == want


@pytest.mark.parametrize(("damage", "place"), [(b"\x4b", -1), (b"\x00\xd8", 30)])
def test_damage_to_utf_16_is_said_or_refused(tmp_path: Path, damage: bytes, place: int) -> None:
    whole = "id\tsite\n1\tKöln\n2\tMünster\n".encode("utf-16-le")
    data = whole[:place] + damage + whole[place:] if place > 0 else whole + damage
    rows, notes = parsed(data, "t.tsv")
    assert len(rows) == 2 + (place < 0) and notes["t.tsv: is damaged utf-16, not UTF-8: decoded"]
    (tmp_path / "t.tsv").write_bytes(data)
    with pytest.raises(DataError, match=r"t\.tsv: not a table \('utf-16-le' codec can't decode"):
        list(read_columns(str(tmp_path / "t.tsv"), lambda name: True))


def test_decoding_names_what_it_was() -> None:
    assert decoded("ö".encode()) == ("ö", "utf-8")
    assert decoded("ö€".encode("windows-1252")) == ("ö€", "windows-1252")
    assert decoded(b"\x81\xf6") == ("\x81ö", "latin-1")
    assert decoded("Köln, x".encode("utf-16-be")) == ("Köln, x", "utf-16")


# ---- numbers -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "values"), [
    ("x;y\n1,5;1\n12,25;1\n", ["1.5", "12.25"]),
    ("x;y\n1,234;1\n0,5;1\n", ["1.234", "0.5"]),
    ('x,y\n"1,234",1\n"2,500.5",1\n7,1\n', ["1234", "2500.5", "7"]),
    ("x;y\n1.234,5;1\n7;1\n", ["1234.5", "7"]),
    ("x\ty\n1,2,3\t1\n4\t2\n", ["1,2,3", "4"]),
    ('x,y\n"1,5","a, b"\n', ["1.5"]),
])
def test_decimal_commas_and_thousands(text: str, values: list[str]) -> None:
    rows, notes = parsed(text)
    assert [row["x"] for row in rows] == values
    assert bool(notes) is ("1,2,3" not in values)


@pytest.mark.parametrize(("text", "number"), [
    ("61,5", 61.5), ("0,125", 0.125), ("1,234", None), ("1e3", 1000.0), (" 7 ", 7.0),
    ("1_000", None), ("nan", None), ("inf", None), ("89+", None), (None, None), (3, 3.0)])
def test_numbers(text: object, number: float | None) -> None:
    assert as_float(text) == number


# ---- what cannot be read as it claims ------------------------------------------------------------

@pytest.mark.parametrize(("text", "says"), [
    ("id,age\n1,61,5\n2,60\n", r"t\.csv line 2: more cells \(3\) than the header has \(2\); put"),
    ("id,age\n\n\n1,2\n3,4,5\n", r"t\.csv line 5: more cells"),
    ('id,note\n1,"two\nlines"\n2,a,b\n', r"t\.csv line 4: more cells"),
    ("id,age,age\n1,2,2\n3,4,5\n", r"t\.csv line 3: two columns 'age' hold '4' and '5'; rename"),
])
def test_a_small_table_is_named_with_its_row(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        read_tsv(str(tmp_path / "t.csv"))


@pytest.mark.parametrize(("text", "says"), [
    ("eid,a\n1,2\n3,4,5\n", r"t\.csv: not a table \(line 3 has 3 cells, the header 2: put"),
    ("eid,a\n1,2\n3\n", r"line 3 has 1 cells, the header 2: .* fill in what is missing"),
    ("eid,a,a\n1,2,3\n", r"has two columns 'a': rename"),
    ('eid,a\n1,"two\nlines"\n2\n', r"line 4 has 1 cells"),
])
def test_a_wide_table_is_named_with_its_row(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        list(read_columns(str(tmp_path / "t.csv"), lambda name: True))


def test_a_folder_or_nothing_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such table"):
        list(read_columns(str(tmp_path / "gone.csv"), lambda name: True))
    with pytest.raises(DataError, match="is a folder"):
        list(read_columns(str(tmp_path), lambda name: True))


def test_equal_columns_of_one_name_are_one() -> None:
    assert parsed("id,age,age\n1,2,\n3,4,4\n")[0] == [{"id": "1", "age": "2"},
                                                     {"id": "3", "age": "4"}]
