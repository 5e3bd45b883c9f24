"""JSON as converters, scanners and people write it; numbers that came as strings or in lists."""

from __future__ import annotations

import json

import pytest

from data_prep.cohorts.sidecars import load_json, plain_facts


@pytest.mark.parametrize(("data", "mended"), [
    ('{"a": "Tübingen"}'.encode(), ""), ('\ufeff{"a": "Tübingen"}'.encode(), ""),
    ('{"a": "Tübingen"}'.encode("latin-1"), "windows-1252"),
    ('{"a": "Tübingen"}'.encode("utf-16"), "utf-16"),
    ('{"a": "Tübingen"}'.encode("utf-16-le"), "utf-16"),
    ('{"a": "Tübingen", }'.encode(), "mended"),
    ('{"a": "Tübingen", "b": [1,\n],}'.encode(), "mended"),
    (b'{"b": "x\x01\ty\nz", "a": "T\xc3\xbcbingen"}', "mended"),
    (b'{"b": "C:\\scans\\x", "a": "T\xc3\xbcbingen"}', "mended"),
    (b'{"b": "x, }", "a": "T\xc3\xbcbingen",}', "mended")])
def test_json_that_is_odd_is_read_and_said(data: bytes, mended: str) -> None:
    content, notes = load_json(data)
    assert content is not None and content["a"] == "Tübingen"
    assert (mended in " ".join(notes)) if mended else notes == []
    assert content.get("b", "x, }") in ("x, }", [1], "x\x01\ty\nz", "C:\\scans\\x")


@pytest.mark.parametrize("data", [b"", b"not JSON", b"[1]", b'{"a": ', b'"a"', b"{'a': 1}",
                                  b'{"a": ' + b"[" * 9999 + b"]" * 9999 + b"}"])
def test_what_is_no_object_is_none(data: bytes) -> None:
    assert load_json(data) == (None, [])


@pytest.mark.parametrize("value", [2.0, 2, "2.0", "2", [2.0], ["2.0"], "2 s", "2.0sec", "2000 ms",
                                   "2,0", [2.0, 2.0], " 2.0 "])
def test_a_number_in_a_string_or_a_list_of_one_is_a_number(value: object) -> None:
    for key in ("RepetitionTime", "EchoTime", "SliceThickness"):
        assert plain_facts({key: value}) == ({key: 2.0}, [])


@pytest.mark.parametrize("value", [True, "fast", [2.0, 3.0], {"x": 1}, "2 apples", [[]]])
def test_what_is_no_number_is_unknown_and_named(value: object) -> None:
    assert plain_facts({"RepetitionTime": value, "Units": "x"}) == ({"Units": "x"},
                                                                    ["RepetitionTime"])


@pytest.mark.parametrize("value", [None, "", "n/a", "NaN", [], float("nan")])
def test_a_missing_number_is_missing_without_a_word(value: object) -> None:
    assert plain_facts({"EchoTime": value}) == ({}, [])


def test_lists_of_times_and_strengths_with_units() -> None:
    for value in ([0, 300], ["0", "300"], "0, 300", "[0 300]", ["0 s", "300 s"]):
        assert plain_facts({"FrameTimesStart": value})[0] == {"FrameTimesStart": [0, 300]}
    assert plain_facts({"FrameDuration": 300})[0] == {"FrameDuration": [300]}
    assert plain_facts({"VolumeTiming": ["0", "1.5"]})[0] == {"VolumeTiming": [0, 1.5]}
    assert plain_facts({"MagneticFieldStrength": "3T", "BodyWeight": "70,5 kg"})[0] == {
        "MagneticFieldStrength": 3.0, "BodyWeight": 70.5}
    odd = json.loads('{"FrameDuration": [1, null]}')  # preparation says what is wrong with it
    assert plain_facts(odd) == (odd, [])
