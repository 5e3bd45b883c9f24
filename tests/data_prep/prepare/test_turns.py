"""The table of turns: read, found by the end of a name, refused where it cannot be meant."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from data_prep.prepare.turns import read_turns, with_turns
from data_prep.scan import SCAN_SCHEMA, Scan
from neurojepa.errors import ConfigError
from tests.helpers.synthetic_head import scan

SCANS = [scan("/d/sub-1/anat/sub-1_T1w.nii.gz", facts='{"Units": "SUV"}'),
         scan("/d/sub-2/anat/sub-2_T1w.nii.gz"), scan("/e/sub-2/anat/sub-2_T1w.nii.gz"),
         scan("/d/a.zip", member="T1/T1.nii.gz")]
TABLE = pa.Table.from_pylist([one.__dict__ for one in SCANS], SCAN_SCHEMA)


def turned(turns: dict[str, str]) -> list[str | None]:
    return [Scan(**row).turn for row in with_turns(TABLE, turns, "turns.tsv").to_pylist()]


def test_a_scan_goes_by_the_end_of_its_name():
    assert turned({"sub-1_T1w.nii.gz": "LPS"}) == ["LPS", None, None, None]
    assert turned({"e/sub-2/anat/sub-2_T1w.nii.gz": "LAS"}) == [None, None, "LAS", None]
    assert turned({"a.zip::T1/T1.nii.gz": "RAS"}) == [None, None, None, "RAS"]
    assert turned({}) == [None] * 4
    facts = with_turns(TABLE, {"sub-1_T1w.nii.gz": "LPS"}, "t")["facts"][0].as_py()
    assert json.loads(facts) == {"Units": "SUV", "Turn": "LPS"}


@pytest.mark.parametrize(("file", "count"), [("sub-2_T1w.nii.gz", 2), ("sub-9.nii.gz", 0),
                                             ("T1w.nii.gz", 0)])
def test_a_name_of_no_scan_or_of_two_is_refused(file, count):
    with pytest.raises(ConfigError, match=f"{file} is the end of {count} scans"):
        turned({file: "LPS"})


@pytest.mark.parametrize(("text", "what"), [
    ("file\tturn\na\tLPX\n", "row 2: 'LPX'"), ("file\tturn\na\tLPS\nb\t\n", "row 3 has no turn"),
    ("name\tturn\na\tLPS\n", "has no file"), ("file\tturn\na\tLPS\na\tLAS\n", "two turns")])
def test_a_table_that_cannot_be_meant_is_refused_with_its_row(tmp_path, text, what):
    path = tmp_path / "turns.tsv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=what):
        read_turns(str(path))
    path.write_text("file,turn\na,LPS\nb,RAS\n")
    path = path.rename(tmp_path / "turns.csv")
    assert read_turns(str(path)) == {"a": "LPS", "b": "RAS"}
