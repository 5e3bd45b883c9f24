"""Tables of labels: what a label asks for, and how ids meet scans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.identity import pseudonym
from neurojepa.downstream.labels import People, join, suspected_codes
from neurojepa.downstream.table import read_embeddings
from neurojepa.downstream.targets import target_of
from neurojepa.errors import DataError, NeurojepaError
from neurojepa.feed.labels import as_numbers
from tests.helpers.embedded import KEY, cohort
from tests.helpers.trees import write

# ---- targets -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("values", "how", "kind", "classes"), [
    (["0", "1", "1"], {}, "binary", ("0", "1")),
    (["no", "yes"], {}, "binary", ("no", "yes")),
    (["CN", "AD"], {"positive": ["AD"]}, "binary", ("CN", "AD")),
    (["AD", "CN"], {"positive": ["CN"]}, "binary", ("AD", "CN")),
    (["AD", "CN", "MCI"], {"positive": ["AD"]}, "binary", ("not AD", "AD")),
    (["AD", "CN", "MCI"], {}, "multiclass", ("AD", "CN", "MCI")),
    (["AD", "CN", "MCI"], {"order": ["CN", "MCI", "AD"]}, "ordinal", ("CN", "MCI", "AD")),
    (["0", "0.5", "1"], {"order": ["0", "0.5", "1", "2"]}, "ordinal", ("0", "0.5", "1")),
    (["1", "2", "2.5"], {}, "regression", ()),
])
def test_what_a_label_asks_for(values: list[str], how: dict, kind: str,
                               classes: tuple[str, ...]) -> None:
    found = target_of("x", np.array(values), **how)
    assert (found.kind, found.classes) == (kind, classes)
    expected = [float(v) for v in values] if kind == "regression" else [
        float(classes.index(v) if v in classes else 0) for v in values]
    assert found.truth.tolist() == expected


@pytest.mark.parametrize(("values", "how", "words"), [
    (["AD", "AD"], {}, "all 2 people have 'AD'"),
    ([], {}, "nobody has it"),
    (["AD", "CN"], {}, "--positive AD or CN"),
    (["1", "2"], {}, "--positive 1 or 2"),  # in some cohorts 2 is the case
    (["1", "2"], {"order": ["1", "3"]}, "--order leaves out 2"),
    ([f"text {n}" for n in range(30)], {}, "30 different names"),
    ([*map(str, range(30)), "old"], {}, "'old' is no number, most others are"),
    ([*map(str, range(30)), "inf"], {}, "'inf' is no number"),
    ([*map(str, range(30)), "1_0"], {}, "'1_0' is no number"),
])
def test_a_label_that_cannot_be_told_says_why(values: list[str], how: dict, words: str) -> None:
    with pytest.raises(NeurojepaError, match=words):
        target_of("x", np.array(values), **how)


# ---- joining -------------------------------------------------------------------------------------

def joined(folder: Path, text: str, **how: object) -> People:
    write(folder, {"labels.csv": text})
    return join(read_embeddings(str(folder)), str(folder / "labels.csv"), key=str(folder / "key"),
                **{"id_column": "id", **how})


def test_ids_meet_through_the_key_and_what_does_not_is_counted(embedded: Path) -> None:
    found = joined(embedded, "id,dx\nsub-p1,AD\np0,CN\np99,AD\np2,\n,CN\np1,AD\n")
    assert found.ids.tolist() == ["p0", "p1", "p2"] and found.seen.tolist() == [True, False, False]
    assert found.columns["dx"].tolist() == ["CN", "AD", ""]
    assert found.columns["age"].tolist() == ["50.0", "51.0", "52.0"]
    values, _ = cohort(40, signal=8)
    assert np.allclose(found.values, values[:3] + 0.5, atol=1e-6)  # the mean of two visits
    assert found.notes == ["1 rows without an id", "1 rows that stand twice, alike: counted once",
                           "1 rows of the table without a scan",
                           "37 people or visits with a scan but no row in the table"]


def test_visits_meet_by_session(embedded: Path) -> None:
    found = joined(embedded, "id;visit;mmse\np1;1;30\np1;2;28\n", session_column="visit")
    assert found.columns["mmse"].tolist() == ["30", "28"] and len(set(found.participant)) == 1
    assert np.allclose(found.values[1] - found.values[0], 1, atol=1e-6)


def test_codes_are_missing_values(embedded: Path) -> None:
    found = joined(embedded, "id\tx\np1\t-9\np2\tNaN\np3\t4\n", missing=["-9"])
    assert found.columns["x"].tolist() == ["", "", "4"]


def test_a_code_is_a_value_no_id_or_visit(embedded: Path) -> None:
    found = joined(embedded, "id,visit,x\np1,1,1\np2,2,7\n", missing=["p1", "2", "1"],
                   session_column="visit")
    assert found.ids.tolist() == ["p1", "p2"] and found.columns["x"].tolist() == ["", "7"]


@pytest.mark.parametrize(("values", "codes"), [
    (["70", "71.5", "-9.0", "68", "-9.0"], ["2 values -9.0"]),  # as pandas writes it
    (["CN", "AD", "-9", "CN"], ["1 values -9"]), (["0", "1", "-9", "0", "1"], ["1 values -9"]),
    (["-1", "1", "1", "-1"], []), (["99", "98", "100"], []), (["CN", "AD"], []),
])
def test_codes_are_suspected_among_numbers_and_names(values: list[str], codes: list[str]) -> None:
    assert suspected_codes("x", np.array(values)) == [
        f"x: {each} look like a code for missing; add --missing {each.split()[-1]} if so"
        for each in codes]


def test_a_table_is_read_as_index_reads_tables(embedded: Path) -> None:
    write(embedded, {"labels.csv": "id;score\np1;0,5\np2;-\n".encode("utf-16")})
    found = join(read_embeddings(str(embedded)), str(embedded / "labels.csv"),
                 key=str(embedded / "key"), id_column="id")
    assert found.columns["score"].tolist() == ["0.5", ""]
    assert "1 x labels.csv: is utf-16, not UTF-8: decoded" in found.notes


def test_who_taught_is_unknown_where_one_scan_does_not_say(embedded: Path) -> None:
    rows = pq.read_table(embedded / "embeddings.parquet").to_pylist()
    rows[5]["seen"] = None  # of p2
    pq.write_table(pa.Table.from_pylist(rows), embedded / "embeddings.parquet")
    assert joined(embedded, "id\np2\np3\n").seen is None
    assert joined(embedded, "id\np0\np3\n").seen.tolist() == [True, False]


def test_an_id_of_two_cohorts_is_not_taken_for_either(embedded: Path) -> None:
    rows = pq.read_table(embedded / "embeddings.parquet").to_pylist()
    other = [{**row, "cohort": "other", "participant": pseudonym(KEY, "other", "p1")}
             for row in rows[2:4]]
    pq.write_table(pa.Table.from_pylist(rows + other), embedded / "embeddings.parquet")
    assert joined(embedded, "id\np0\np2\n").ids.tolist() == ["p0", "p2"]
    with pytest.raises(DataError, match="id 'p1' is a person in each of 2 cohorts"):
        joined(embedded, "id\np0\np1\n")


def test_infinity_is_no_number() -> None:
    assert as_numbers(np.array(["1", "2.5"])).tolist() == [1, 2.5]
    assert as_numbers(np.array(["1", "inf"])) is None


@pytest.mark.parametrize(("text", "how", "words"), [
    ("PK\3\4", {}, "save it as .csv"),
    ("id,dx\np1,AD\np1,CN\n", {}, "id 'p1' stands twice, with dx 'AD' and 'CN'"),
    ("id,dx\nq1,AD\n", {}, "none of its 1 ids"),
    ("id,dx\np1,AD\n", {"id_column": "eid"}, "no column 'eid'; it has id, dx"),
    ("id,dx\np1,AD,7\n", {}, "line 2: more cells"),
    ("id,dx\n", {}, "no table of text"),
    ("id,dx\np1,AD\n", {"modality": "PET"}, "the embeddings are of T1w"),
    ("id,visit\nq1,v1\np1,v1\n", {"session_column": "visit"},
     "visit 'v1' of id 'p1' is no visit of the embeddings, .*theirs are 1, 2: write visits"),
    ("id,visit\nq1,1\n", {"session_column": "visit"}, "none of its 1 ids"),
])
def test_a_table_that_does_not_fit_says_why(embedded: Path, text: str, how: dict,
                                            words: str) -> None:
    with pytest.raises(NeurojepaError, match=words):
        joined(embedded, text, **how)
