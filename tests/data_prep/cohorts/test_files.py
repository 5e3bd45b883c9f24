"""index --cohort files: scans that a table lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.cohorts.files import read_cohort
from data_prep.cohorts.source import Findings, Source
from neurojepa.errors import ConfigError, DataError
from tests.helpers.trees import write

HEADER = "file,participant_id,session_id,modality,age,sex,diagnosis,mask,labels,tracer\n"


def read(root: Path, rows: str, header: str = HEADER) -> tuple[list[Findings], Source]:
    table = root.parent / "table.csv"
    table.write_text(header + rows)
    source = Source(str(root), tables=[str(table)])
    return list(read_cohort(source, "c")), source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "scans", {
        "a/x.nii.gz": "x", "a/x.json": '{"MagneticFieldStrength": 3, "RepetitionTime": 2}',
        "a/mask.nii.gz": "x", "a/seg.mgz": "x", "b.nii": "x", "c/1.dcm": "xx", "c/2.dcm": "xxx",
        "d.dscalar.nii": "x", "left.nii": "x"})


def test_every_row_is_a_scan_of_its_person(folder: Path) -> None:
    people, source = read(folder, "a/x.nii.gz,sub-02,1,T1w,63,F,AD,a/mask.nii.gz,a/seg.mgz,\n"
                                  "c/,02,2,T2w,65,F,AD,,,\n"
                                  "b.nii,10,,PET,,,,,,fdg\nd.dscalar.nii,10,,BOLD,,,,,,\n")
    by_file = {scan.uri.removeprefix(f"{folder}/"): scan for one in people for scan in one.scans}
    assert [one.participant for one in people] == ["02", "10"]
    first, series = by_file["a/x.nii.gz"], by_file["c/"]
    assert first.mask_uri == f"{folder}/a/mask.nii.gz" and first.label_uri == f"{folder}/a/seg.mgz"
    assert (first.age_at_scan, first.sex, first.field_strength) == (63, "F", 3)
    assert first.facts == '{"RepetitionTime": 2}'
    assert (series.session, series.modality, series.size_bytes) == ("2", "T2w", 5)
    assert by_file["b.nii"].tracer == "FDG" and by_file["b.nii"].session == "1"
    assert by_file["d.dscalar.nii"].modality == "BOLD"
    assert ("1", "diagnosis", "AD") in people[0].labels and ("2", "age", "65.0") in people[0].labels
    assert source.notes == {"not taken: file that no table lists": 1}  # left.nii


def test_the_column_of_participants_may_be_called_id(folder: Path) -> None:
    people, _ = read(folder, "b.nii,007,T1w\n", "File,ID,Modality\n")
    assert [one.participant for one in people] == ["007"]


@pytest.mark.parametrize(("row", "says"), [
    ("gone.nii,1,,T1w,,,,,,", r"table.csv row 1: file 'gone.nii' is not below"),
    ("../table.csv,1,,T1w,,,,,,", r"row 1: file '../table.csv' is not below"),
    ("c,1,,T1w,,,,,,", r"a folder of slices is written c/"),
    ("b.nii,1,,T1w,,,,no.nii,,", r"row 1: mask 'no.nii' is not below"),
    ("b.nii,1,,t1,,,,,,", r"row 1: modality 't1' is none of T1w, T2w"),
    ("b.nii,1,,T1w,,,,,,\nb.nii,2,,T1w,,,,,,", r"row 2: file 'b.nii' stands in .*table.csv row 1"),
    ("b.nii,,,T1w,,,,,,", r"row 1: participant_id is empty"),
])
def test_a_row_that_names_nothing_is_refused(folder: Path, row: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read(folder, row + "\n")


def test_a_table_is_needed_with_its_columns(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--table"):
        list(read_cohort(Source(str(folder)), "c"))
    with pytest.raises(DataError, match=r"table.csv: has no column modality"):
        read(folder, "b.nii,1\n", "file,participant_id\n")
