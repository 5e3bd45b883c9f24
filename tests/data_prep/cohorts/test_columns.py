"""Tables of people as they are delivered: units, levels, aliases, codes for missing, classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.cohorts.columns import Columns
from data_prep.cohorts.source import Source
from neurojepa.errors import DataError
from tests.helpers.trees import DESCRIPTION, Read, write

DATASET = {"dataset_description.json": DESCRIPTION}


def people(root: Path, table: str | bytes, described: object = None, *, sessions: str = "",
           **files: str) -> Read:
    """A dataset of the people a, b, c, d with a participants.tsv and its dictionary."""
    return Read(write(root / "d", {
        **DATASET, "participants.tsv": table, **files,
        **({"participants.json": json.dumps(described)} if described is not None else {}),
        **({"sub-a/sub-a_sessions.tsv": sessions} if sessions else {}),
        **{f"sub-{one}/anat/sub-{one}_T1w.nii": "x" for one in "abcd"}}))


def column(rows: dict[str, str], header: str = "age") -> str:
    return f"participant_id\t{header}\n" + "".join(f"sub-{one}\t{value}\n"
                                                  for one, value in rows.items())


def ages(read: Read) -> list[float | None]:
    return [read.scans[f"sub-{one}_T1w"].age_at_scan for one in "abcd"]


def values(read: Read, name: str) -> dict[str, str]:
    return {person: value for person, _, label, value in read.labels if label == name}


# ---- units ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(("header", "described", "told", "want"), [
    ("age", {"age": {"Units": "months"}}, ["9", "96", "108", "131"], [0.75, 8, 9, 10.9167]),
    ("Age", {"age": {"units": "Months"}}, ["9", "n/a", "-9", "P2Y"], [0.75, None, None, 2]),
    ("age", {"Age": {"Description": "Age in weeks"}}, ["52.18", "0", "4", "n/a"],
     [1, 0, 0.0767, None]),
    ("age_days", None, ["365.25", "730.5", "1e9", ""], [1, 2, None, None]),
    ("Age (years)", None, ["61.5", "61,5", "89+", "60-65"], [61.5, 61.5, None, None]),
    ("interview_age", None, ["120", "126", "132", "999"], [10, 10.5, 11, None]),
    ("age", {"age": {"Units": "decades"}}, ["6", "7", "61 years", "8"], [None, None, 61, None]),
    ("age", {"age": {"Units": "weeks", "Description": "postmenstrual age"}},
     ["38", "40", "42", "44"], [None] * 4),
    ("age", {"age": {"Levels": {"1": "20-25 years", "2": "30 years"}}}, ["1", "2", "2", "1"],
     [None, 30, 30, None]),
])
def test_ages_come_in_years(tmp_path: Path, header: str, described: object, told: list,
                            want: list) -> None:
    read = people(tmp_path, column(dict(zip("abcd", told, strict=True)), header), described)
    assert ages(read) == [age if age is None else pytest.approx(age, abs=1e-3) for age in want]
    assert [float(values(read, "age")[one]) for one in values(read, "age")] == [
        pytest.approx(age, abs=1e-3) for age in want if age is not None]


def test_an_implausible_age_is_named_with_column_unit_and_value(tmp_path: Path) -> None:
    read = people(tmp_path, column({"a": "730", "b": "800", "c": "61", "d": "-4"}, "Age"))
    assert ages(read) == [None, None, 61, None]
    assert read.notes["age is not plausible in years (column Age of participants.tsv, such as 730)"
                      ": unknown"] == 2
    assert read.notes["age is a code for missing (such as -9): unknown"] == 1


@pytest.mark.parametrize("where", ["sub-a/sub-a_sessions.json", "sessions.json"])
def test_units_of_sessions_stand_beside_the_table_or_at_the_top(tmp_path: Path, where: str) -> None:
    read = Read(write(tmp_path / "d", {
        **DATASET, where: json.dumps({"age": {"Units": "months"}}),
        "sub-a/sub-a_sessions.tsv": "session_id\tage\nses-01\t17\nses-02\t3y\n",
        "sub-a/ses-1/anat/sub-a_ses-1_T1w.nii": "x",
        "sub-a/ses-02/anat/sub-a_ses-02_T1w.nii": "x"}))
    assert [scan.age_at_scan for scan in read.scans.values()] == [
        3, pytest.approx(17 / 12, abs=1e-3)]


def test_a_letter_behind_an_age_is_no_unit_where_it_is_a_sex(tmp_path: Path) -> None:
    read = people(tmp_path, column({"a": "45M", "b": "38F", "c": "51", "d": "62 m"}))
    assert ages(read) == [None, None, 51, None]
    assert read.notes["age is written with a sex (such as 45M): unknown"] == 3
    months = people(tmp_path / "months", column({"a": "9M", "b": "18m", "c": "24 m", "d": "P1Y"}))
    assert ages(months) == [0.75, 1.5, 2, 1]


def visits(root: Path, table: str, **files: str) -> Read:
    return Read(write(root / "d", {
        **DATASET, "sub-a/sub-a_sessions.tsv": table, **files,
        **{f"sub-a/ses-{visit}/anat/sub-a_ses-{visit}_T1w.nii": "x" for visit in "12"}}))


def test_a_repeated_visit_is_said_and_what_contradicts_itself_is_unknown(tmp_path: Path) -> None:
    read = visits(tmp_path, "session_id\tage\tmmse\nses-01\t61\t28\nses-2\t62\t27\n"
                            "ses-01\t70\t30\n")
    assert [scan.age_at_scan for scan in read.scans.values()] == [None, 62]
    assert [value for _, _, name, value in read.labels if name == "mmse"] == ["28", "27"]
    assert read.notes == {"sessions.tsv: repeated row, the first is used": 1,
                          "contradictory age: unknown": 1}


def test_a_persons_few_rows_tell_no_code_for_missing_but_levels_do(tmp_path: Path) -> None:
    table = "session_id\tmmse\nses-1\t28\nses-2\t-9\n"
    kept = visits(tmp_path, table)
    assert [value for *_, value in kept.labels] == ["28", "-9"]
    assert kept.notes == {"sessions.tsv: -9 of mmse taken as a number; if it means missing, say so "
                          "in Levels": 1}
    told = visits(tmp_path / "told", table, **{"sessions.json": json.dumps(
        {"mmse": {"Levels": {"-9": "missing"}}})})
    assert [value for *_, value in told.labels] == ["28"] and not told.notes


# ---- columns and codes ---------------------------------------------------------------------------

def test_what_was_taken_for_what_is_told(tmp_path: Path) -> None:
    read = people(
        tmp_path, "Participant_ID\tAGE\tGender\tGroup\tSITE_ID\tbmi\tname\tscanned\tessay\tempty\n"
        "sub-a\t9\t1\t0\tx\t21\tJane\t2011-05-06\tlong text one\t\n"
        "sub-b\t8\t2\t1\ty\t-9\tJoe\t2011-05-07\tother text\tn/a\n"
        "sub-c\t7\t2\t1\tx\t25\tAnn\t2012-05-08\tmore text\t\n",
        {"gender": {"Levels": {"1": "Male", "2": "Female"}},
         "group": {"Levels": {"0": {"Description": "control"}, "1": "patient"}},
         "Age": {"Units": "months"}})
    assert read.source.columns == {"participants.tsv": {
        "Participant_ID": "participant_id", "AGE": "age in months",
        "Gender": "sex, decoded by its levels", "SITE_ID": "site",
        "Group": "label, words (2 classes)", "bmi": "label, numbers (-9 taken as missing)",
        "name": "left out: may name people", "scanned": "left out: dates",
        "essay": "left out: free text"}}
    scan = read.scans["sub-b_T1w"]
    assert (scan.sex, scan.site, scan.age_at_scan) == ("F", "y", pytest.approx(2 / 3, abs=1e-3))
    assert values(read, "group") == {"a": "control", "b": "patient", "c": "patient"}
    assert values(read, "bmi") == {"a": "21", "c": "25"}


@pytest.mark.parametrize(("told", "described", "sexes"), [
    (["Female", "female", "M", "male"], None, ["F", "F", "M", "M"]),
    (["F", "n/a", "unknown", "-9"], {"sex": {"Levels": {"-9": "missing"}}},
     ["F", None, None, None]),
    (["1", "2", "1", "2"], {"Sex": {"Levels": {"1": "F", "2": "M"}}}, ["F", "M", "F", "M"]),
    (["0", "1", "0.0", "1.0"], {"sex": {"levels": {"0": "girl", "1": "boy"}}},
     ["F", "M", "F", "M"]),
    (["1", "2", "F", "M"], None, [None, None, "F", "M"]),
    (["weiblich", "männlich", "Woman", "divers"], None, ["F", "M", "F", None]),
])
def test_sexes_are_decoded(tmp_path: Path, told: list, described: object, sexes: list) -> None:
    read = people(tmp_path, column(dict(zip("abcd", told, strict=True)), "sex"), described)
    assert [read.scans[f"sub-{one}_T1w"].sex for one in "abcd"] == sexes
    codes = read.notes.get("sex is a code (1) that no Levels of a data dictionary explain: unknown")
    assert (codes == 1) is (told == ["1", "2", "F", "M"])


def test_a_code_in_the_header_is_decoded(tmp_path: Path) -> None:
    read = people(tmp_path, column({"a": "1", "b": "2"}, "SEX_ID (1=m, 2=f)"))
    assert (read.scans["sub-a_T1w"].sex, read.scans["sub-b_T1w"].sex) == ("M", "F")


def test_repeated_rows_are_compared_decoded(tmp_path: Path) -> None:
    read = people(tmp_path, column({"a": "1", "b": "2"}, "sex") + "sub-a\tF\nsub-b\tF\n",
                  {"sex": {"Levels": {"1": "female", "2": "male"}}})
    assert (read.scans["sub-a_T1w"].sex, read.scans["sub-b_T1w"].sex) == ("F", None)
    assert read.notes["contradictory sex: unknown"] == 1


# ---- labels --------------------------------------------------------------------------------------

@pytest.mark.parametrize(("header", "told", "want"), [
    ("diagnosis", ["AD", "MCI", "CN", "FTD"], ["AD", "MCI", "CN", "FTD"]),
    ("DX", ["AD", "MCI", "CN", "n/a"], ["AD", "MCI", "CN"]),
    ("treatment", ["drug", "placebo", "drug", "drug"], ["drug", "placebo", "drug", "drug"]),
    ("treatment", ["one", "two", "three", "four"], []),  # each person's own: free text
    ("site_name2", ["2001-02-03", "2001-02-03", "2001-02-04", "2001-02-04"], []),  # dates
    ("comment", ["good", "good", "good", "good"], []),
    ("email", ["a@b", "a@b", "a@b", "a@b"], []),
    ("tau", ["8.5", ">1700", "12", "9"], ["8.5", "12", "9"]),  # numbers, a stray word left out
    ("mmse", ["29", "-9", "30", "999"], ["29", "30"]),
    ("change", ["-9", "3", "-2", "999"], ["-9", "3", "-2"]),  # -9 among negative numbers is one
    ("count", ["999", "800", "1200", "7"], ["999", "800", "1200", "7"]),
    ("never", ["-9", "-9", "-8", "-9"], []), ("all", ["999", "888", "999", ""], ["999", "888",
                                                                               "999"]),
    ("score", ["12,5", "3", "4,25", "n/a"], ["12.5", "3", "4.25"]),
])
def test_numbers_and_classes_become_labels_and_free_text_does_not(
        tmp_path: Path, header: str, told: list, want: list) -> None:
    read = people(tmp_path, column(dict(zip("abcd", told, strict=True)), header))
    name = header.lower() if header == "DX" else header
    assert list(values(read, name).values()) == want
    assert header in read.source.columns["participants.tsv"]


def test_a_table_given_tells_what_participants_tsv_does_not(tmp_path: Path) -> None:
    given = write(tmp_path, {
        "lab.csv": "Subject;Age;Sex;group;dx;dx01;family_id\n"
                   "a;61,5;F;x;AD;1;f\nb;62;M;y;MCI;0;f\nc;63;M;x;CN;0;\nd;64;F;y;AD;1;\n",
        "lab.json": json.dumps({"dx01": {"Levels": {"0": "no", "1": "yes"}}})})
    write(tmp_path / "d", {**DATASET, "participants.tsv": column({"a": "70"}),
                           **{f"sub-{one}/anat/sub-{one}_T1w.nii": "x" for one in "abcd"}})
    read = Read(tmp_path / "d", tables=[str(given / "lab.csv")])
    assert ages(read) == [70, 62, 63, 64]
    assert read.scans["sub-b_T1w"].sex == "M" and read.ties == [("a", "family_id:f"),
                                                               ("b", "family_id:f")]
    assert values(read, "lab.group") == {"a": "x", "b": "y", "c": "x", "d": "y"}
    assert values(read, "lab.dx") == {"a": "AD", "b": "MCI", "c": "CN", "d": "AD"}
    assert values(read, "lab.dx01")["b"] == "no"


@pytest.mark.parametrize(("table", "says"), [
    ("name,score\na,1\n", r"lab\.csv: has no column participant_id \(it has name, score\)"),
    ("participant_id,score\nz,1\n", r"lab\.csv: none of its 1 participants has a scan here"),
    ("participant_id,score\n", r"lab\.csv: has no row"),
])
def test_a_table_given_in_vain_is_refused(tmp_path: Path, table: str, says: str) -> None:
    write(tmp_path, {"lab.csv": table, "d/sub-a/anat/sub-a_T1w.nii": "x",
                     "d/dataset_description.json": DESCRIPTION, "loose/a_T1w.nii": "x"})
    for folder in ("d", "loose"):
        with pytest.raises(DataError, match=says):
            Read(tmp_path / folder, tables=[str(tmp_path / "lab.csv")])


@pytest.mark.parametrize(("visits", "used", "unused"), [
    ("1,baseline_arm_1,29\n", 1, 0),  # the tree has no sessions and the person one row
    ("1,baseline_arm_1,29\n1,month_6_arm_1,28\n", 0, 2), ("1,01,29\n1,02,28\n", 1, 1)])
def test_rows_of_visits_without_a_scan_are_counted(tmp_path: Path, visits: str, used: int,
                                                   unused: int) -> None:
    write(tmp_path, {"cap.csv": "record_id,redcap_event_name,mmse\n" + visits,
                     "loose/sub-1_T1w.nii": "x"})
    read = Read(tmp_path / "loose", tables=[str(tmp_path / "cap.csv")])
    assert len(read.labels) == used
    assert read.notes.get("rows of visits without a scan that is taken: not used", 0) == unused


def test_columns_that_differ_in_case_alone_are_two_labels(tmp_path: Path) -> None:
    read = people(tmp_path, "participant_id\tDX\tGroup\tgroup\nsub-a\tAD\tx\tp\n"
                            "sub-b\tCN\ty\tq\n")
    assert {name: values(read, name) for name in ("dx", "Group", "group")} == {
        "dx": {"a": "AD", "b": "CN"}, "Group": {"a": "x", "b": "y"}, "group": {"a": "p", "b": "q"}}


def test_ids_of_spreadsheets(tmp_path: Path) -> None:
    write(tmp_path, {"t.csv": "id,x\n7.0,1\n12.0,2\n", "loose/sub-007_T1w.nii": "x",
                     "loose/sub-12_T1w.nii": "x"})
    read = Read(tmp_path / "loose", tables=[str(tmp_path / "t.csv")])
    assert values(read, "x") == {"007": "1", "12": "2"}


def test_a_data_dictionary_that_is_no_json_is_said(tmp_path: Path) -> None:
    read = people(tmp_path, column({"a": "9"}), sessions="session_id\tage\n",
                  **{"sessions.json": "not JSON"})
    assert read.notes["data dictionary unreadable, units and levels of its table are unknown"] == 1


def test_columns_of_no_rows_are_none() -> None:
    assert Columns([], {}, name="t", source=Source("/tmp")).roles == {}
