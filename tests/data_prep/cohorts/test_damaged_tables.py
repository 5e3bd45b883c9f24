"""Damage to tables and sidecars that random variants found: each is noted or refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from data_prep.tables import parse_table
from neurojepa.errors import DataError
from tests.helpers.trees import DESCRIPTION, Read, write


@pytest.mark.parametrize(("data", "note"), [
    (b"", "t.tsv: is empty"), (b" \n\n", "t.tsv: is empty"),
    (b"a\tb\tc\n1\t2\n", "t.tsv: row with fewer cells than the header: the last are unknown"),
    (b"a\tb\n1\x00\t2\x1a\n", "t.tsv: control characters: removed")])
def test_what_had_to_be_mended_is_noted(data: bytes, note: str) -> None:
    notes: Counter[str] = Counter()
    rows = parse_table(data, "x/t.tsv", notes)
    assert notes == {note: 1}
    assert all(row["a"] == "1" and row["b"] == "2" for row in rows)


@pytest.mark.parametrize("data", [b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
                                  b"/annex/objects/MD5E-s3--0.tsv\n"])
def test_a_pointer_is_no_table(data: bytes) -> None:
    with pytest.raises(DataError, match=r"x/t\.tsv: a pointer of git-annex or git-lfs"):
        parse_table(data, "x/t.tsv")


def test_a_damaged_parquet_table_is_named() -> None:
    with pytest.raises(DataError, match=r"x/t\.parquet: not a table \(.*\); fix or remove it"):
        parse_table(b"PAR1" + b"x" * 100, "x/t.parquet")


def test_rows_of_sessions_and_scans_that_are_not_there(tmp_path: Path) -> None:
    anat = "sub-1/ses-{0}/anat/sub-1_ses-{0}_T1w.nii.gz"
    read = Read(write(tmp_path, {
        "dataset_description.json": DESCRIPTION, anat.format(1): "x", anat.format(2): "x",
        "sub-1/sub-1_sessions.tsv": "session_id\tage\nses-1\t50\nses-3\t52\n",
        "sub-1/ses-1/sub-1_ses-1_scans.tsv": "filename\tusable\nanat/sub-1_ses-1_T2w.nii\t1\n"}))
    assert read.notes["session without a row in sessions.tsv"] == 1
    assert read.notes["sessions.tsv rows without a scan that is taken"] == 1
    assert read.notes["scan without a row in its scans.tsv"] == 1


@pytest.mark.parametrize(("facts", "scanner", "strength", "note"), [
    ({"Manufacturer": {"a": 1}}, None, None, "Manufacturer is no text"),
    ({"Manufacturer": ["Acme"]}, "Acme", None, None), ({"Manufacturer": 7}, "7", None, None),
    ({"Manufacturer": "x" * 5000}, None, None, "Manufacturer is no text"),
    ({"manufacturer": "Acme", "MAGNETICFIELDSTRENGTH": "3"}, "Acme", 3,
     "MagneticFieldStrength, Manufacturer in other capitals: taken"),
    ({"manufacturer": "Other", "Manufacturer": "Acme"}, "Acme", None, None),
    ({"MagneticFieldStrength": [3, 1.5]}, None, None, "MagneticFieldStrength is no number")])
def test_values_of_sidecars(tmp_path: Path, facts: dict[str, object], scanner: str | None,
                            strength: float | None, note: str | None) -> None:
    read = Read(write(tmp_path, {
        "dataset_description.json": DESCRIPTION, "sub-1/anat/sub-1_T1w.nii": "x",
        "sub-1/anat/sub-1_T1w.json": json.dumps(facts)}))
    scan = read.scans["sub-1_T1w"]
    assert (scan.scanner, scan.field_strength) == (scanner, strength)
    said = [each for each in read.notes if "sidecar" in each]
    assert len(said) == (note is not None) and all(note in each for each in said if note)
