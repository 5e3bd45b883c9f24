"""What columns are called and what their values say: ages in every spelling, sexes, codes."""

from __future__ import annotations

import pytest

from data_prep.cohorts.words import is_missing_word, meaning, role, roles, sex, unit_of, years


@pytest.mark.parametrize("column", [
    "age", "Age", "AGE", "age_at_scan", "AgeAtScan", "Age (years)", "Age [months]", "age_months",
    "AgeYears", "interview_age", "Age at MRI", "age_at_first_scan_years", "subject_age", "age_yrs"])
def test_columns_of_ages(column: str) -> None:
    assert (role(column) or ("",))[0] == "age"


@pytest.mark.parametrize("column", [
    "age_of_onset", "age_at_diagnosis", "gestational_age", "birth_age", "bone_age", "age_group",
    "agegroup", "average", "image", "scan_age", "age_m", "mental_age", "stage", "paternal_age"])
def test_columns_that_are_no_age_at_the_scan(column: str) -> None:
    assert role(column) is None


@pytest.mark.parametrize(("column", "what"), [
    ("Gender", "sex"), ("SEX_ID (1=m, 2=f)", "sex"), ("PTGENDER", "sex"), ("Sex at birth", "sex"),
    ("Participant ID", "participant_id"), ("SubjectID", "participant_id"),
    ("PTID", "participant_id"),
    ("src_subject_id", "participant_id"), ("record_id", "participant_id"), ("SITE_ID", "site"),
    ("Centre", "site"), ("Family_ID", "family_id"), ("redcap_event_name", "session_id"),
    ("Session", "session_id"), ("sexual_history", ""), ("website", "")])
def test_other_columns(column: str, what: str) -> None:
    assert (role(column) or ("",))[0] == what


def test_the_best_named_column_of_a_role_is_taken() -> None:
    assert roles(["age_at_scan", "Age", "gender", "Sex", "id", "subject", "x"]) == {
        "age": "Age", "sex": "Sex", "participant_id": "subject"}


@pytest.mark.parametrize(("column", "described", "unit"), [
    ("age", {"Units": "months"}, "months"), ("age", {"units": "Month(s)"}, "months"),
    ("age", {"Units": "weeks"}, "weeks"), ("age", {"Unit": "days"}, "days"),
    ("age", {"Units": "yrs"}, "years"), ("age", {"Units": "year"}, "years"), ("age", None, "years"),
    ("age", {"Description": "age of the infant in weeks"}, "weeks"),
    ("age", {"LongName": "Age (months)"}, "months"),
    ("age", {"Description": "Age in years, to the nearest month"}, "years"),
    ("age", {"Description": "Age at the scan, within 3 months of the diagnosis"}, "years"),
    ("age", {"Description": "Age in months (scan up to 90 days later)"}, "months"),
    ("age", {"Units": "years", "Description": "in months before 2010"}, "years"),
    ("age", {"Levels": "months"}, "months"), ("age", {"Levels": ["weeks"]}, "weeks"),
    ("age", {"Levels": {"months": "age in months"}}, "months"),
    ("age_in_months", None, "months"), ("Age [weeks]", {}, "weeks"), ("Age (d)", {}, "days"),
    ("interview_age", None, "months"), ("age_months", {"Units": "years"}, "years"),
    ("age", {"Units": "decades"}, None), ("age", {"Units": "ISO8601 duration"}, None),
    ("age", {"Units": "weeks", "Description": "postmenstrual age at scan"}, ""),
    ("age", {"Units": "weeks PMA"}, ""), ("age", {"Description": "weeks since conception"}, ""),
])
def test_units_of_a_dictionary_and_of_a_name(column: str, described: object, unit: str | None):
    assert meaning(column, described).unit == unit


def test_a_unit_is_not_guessed_where_a_text_names_two() -> None:
    assert unit_of("years and months") is None and unit_of("something else") is None


@pytest.mark.parametrize(("text", "unit", "age"), [
    ("96", "months", 8.0), ("9", "months", 0.75), ("52.18", "weeks", 1.0), ("730.5", "days", 2.0),
    ("61.5", "years", 61.5), ("61,5", "years", 61.5), ("0", "months", 0.0),
    ("9 months", "years", 0.75), ("P9M", "years", 0.75), ("P1Y6M", "months", 1.5),
    ("009M", "years", 0.75), ("058Y", "months", 58.0), ("3y 6m", "years", 3.5),
    ("3 years, 6 months", "years", 3.5), ("1 year and 6 months old", "years", 1.5),
    ("18 mo.", "years", 1.5), ("12 weeks old", "years", 0.23), ("61 yrs", "months", 61.0)])
def test_ages(text: str, unit: str, age: float) -> None:
    assert years(text, unit) == (pytest.approx(age, abs=1e-4), "")


@pytest.mark.parametrize(("text", "unit", "why"), [
    ("89+", "years", "such as 89+"), (">89", "years", "such as 89+"),
    ("90 or older", "years", "such as 89+"), ("≥ 90", "years", "such as 89+"),
    ("about 60", "years", "such as 89+"), ("2011-05-06", "years", "such as 89+"),
    ("60-65", "years", "a range"), ("20 to 25 years", "years", "a range"),
    ("-9", "years", "a code for missing"), ("999", "years", "a code for missing"),
    ("9999", "months", "a code for missing"), ("730", "years", "not plausible in years"),
    ("1500", "months", "not plausible in months"), ("200 years", "years", "not plausible")])
def test_what_is_no_age_is_unknown_and_says_why(text: str, unit: str, why: str) -> None:
    age, said = years(text, unit)
    assert age is None and why in said


def test_levels_and_codes_in_a_header() -> None:
    told = meaning("sex", {"Levels": {"1": "male", "2": {"Description": "female"}, "9": "Refused"}})
    assert [told.word(code) for code in ("1", "2.0", "9", "3", None)] == [
        "male", "female", None, "3", None]
    assert meaning("SEX_ID (1=m, 2=f)", None).word("2") == "f"
    assert meaning("Sex [0: female; 1: male]", None).levels == {}  # only "=" is a code
    assert meaning("group", {"Levels": ["a", "b"]}).word("a") == "a"
    assert meaning("group", {"Levels": {"1": None, "2": "b"}}).word("1") == "1"
    assert meaning("pain", {"Levels": {"0": "None", "1": "mild"}}).word("0") == "None"


def test_words_of_sex_and_of_nothing() -> None:
    assert [sex(word) for word in ("Female", "F", "male (self-reported)", "weiblich", "Woman")] == [
        "F", "F", "M", "F", "F"]
    assert [sex(word) for word in ("1", "other", "diverse", "")] == [None] * 4
    assert [sex(word) for word in ("M/F", "m/w", "female or male", "not male")] == [None] * 4
    assert [sex(word) for word in ("female (F)", "m.", "F, female")] == ["F", "M", "F"]
    assert all(map(is_missing_word, ["Missing", "n/a", "not available", "Prefer not to answer",
                                     "don't know", "Refused", "Not applicable (child)"]))
    assert not any(map(is_missing_word, ["normal", "never", "control", "nausea"]))
