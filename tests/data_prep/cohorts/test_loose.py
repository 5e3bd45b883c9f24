"""Loose files: whose they are by their names, which are never cut, and tables given for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.cohorts.bids.loose import participant_of
from data_prep.cohorts.bids.reader import read_cohort
from data_prep.cohorts.source import Source
from tests.helpers.trees import Read, write

BEGIN_ALIKE = ("people whose names begin alike, taken as different people: where they are visits "
               "of one, name the files sub-X_ses-Y")


@pytest.mark.parametrize(("name", "participant"), [
    ("002_S_0295_T1w.nii.gz", "002_S_0295"), ("sub-002_S_0295_T1w.nii", "002_S_0295"),
    ("OAS30001_MR_d0129_T1w.nii.gz", "OAS30001_MR_d0129"), ("sub-07_ses-2_run-1_T1w.nii", "07"),
    ("IXI012-HH-1211_T1w.nii.gz", "IXI012-HH-1211"), ("p07_baseline_T1w.mgz", "p07_baseline"),
    ("NDAR_INV0A1B2C3D_ses-1_T1w.nii", "NDAR_INV0A1B2C3D"), ("ses-2_IXI012_FLAIR.nii", "IXI012"),
    ("subj-07_ses-1_T1w.nii", "subj-07"), ("a_acq-x_b_T1w.nii", "a_b"), ("ses-1_T1w.nii", ""),
    ("Müller 3 (copy)_T1w.nii", "Müller 3 (copy)")])
def test_a_name_is_never_cut(name: str, participant: str) -> None:
    assert participant_of(name) == participant


@pytest.mark.parametrize(("names", "people"), [
    (["002_S_0295_T1w.nii.gz", "002_S_0413_T1w.nii.gz"], ["002_S_0295", "002_S_0413"]),
    (["OAS1_0001_MR1_T1w.nii", "OAS1_0002_MR1_T1w.nii"], ["OAS1_0001_MR1", "OAS1_0002_MR1"]),
    (["site-a_p1_T1w.nii", "site-b_p1_T1w.nii"], ["site-a_p1", "site-b_p1"]),
    (["A_1_T1w.nii", "A_1_ses-2_T1w.nii"], ["A_1", "A_1"])])
def test_people_of_one_beginning_stay_apart(tmp_path: Path, names: list, people: list) -> None:
    read = Read(write(tmp_path / "d", dict.fromkeys(names, "x")))
    assert sorted(scan.participant for scan in read.scans.values()) == people
    assert not any(scan.reason for scan in read.scans.values())
    alike = len(set(people)) > 1 and not names[0].startswith("site")
    assert read.notes.get(BEGIN_ALIKE, 0) == (2 if alike else 0)


def test_one_name_in_two_folders_is_refused_and_sessions_may_be_folders(tmp_path: Path) -> None:
    read = Read(write(tmp_path / "d", {
        "a/MPRAGE_T1w.nii": "x", "b/MPRAGE_x_T1w.nii": "x",
        "p/ses-1/p1_T1w.nii": "x", "p/ses-2/p1_T2w.nii": "x", "ses-1_T1w.nii": "x"}))
    assert {name: (scan.session, scan.reason) for name, scan in read.scans.items()} == {
        "MPRAGE_T1w": ("1", None), "MPRAGE_x_T1w": ("1", None), "p1_T1w": ("1", None),
        "p1_T2w": ("2", None)}
    assert read.notes["not taken: name without a participant"] == 1
    write(tmp_path / "d", {"c/MPRAGE_T1w.nii.gz": "y"})
    source = Source(str(tmp_path / "d"))
    reasons = {scan.uri.removeprefix(f"{tmp_path}/d/"): scan.reason
               for one in read_cohort(source, "c") for scan in one.scans}
    assert {path for path, reason in reasons.items() if reason} == {
        "a/MPRAGE_T1w.nii", "c/MPRAGE_T1w.nii.gz"}
    assert set(reasons.values()) == {None, "ambiguous_name"}
    assert sum("one name in two folders" in note for note in source.notes) == 1


def test_a_table_is_used_for_loose_files(tmp_path: Path) -> None:
    write(tmp_path, {"labels.csv": "PTID,Age,PTGENDER,DX,APOE,site\n"
                                   "002_S_0295,71,Female,AD,e3e4,A\n002_S_0413,66,Male,CN,e3e3,A\n"
                                   "002_S_0500,66,Male,MCI,e3e3,A\n",
                     "loose/002_S_0295_T1w.nii.gz": "x", "loose/002_S_0413_T1w.nii.gz": "x",
                     "loose/002_S_0600_T1w.nii.gz": "x"})
    read = Read(tmp_path / "loose", tables=[str(tmp_path / "labels.csv")])
    first = read.scans["002_S_0295_T1w"]
    assert (first.age_at_scan, first.sex, first.site) == (71, "F", "A")
    assert {(person, name, value) for person, _, name, value in read.labels
            if name not in ("age", "sex")} == {
        ("002_S_0295", "dx", "AD"), ("002_S_0413", "dx", "CN"),
        ("002_S_0295", "APOE", "e3e4"), ("002_S_0413", "APOE", "e3e3")}
    assert read.notes == {"people without a row in labels.csv": 1, BEGIN_ALIKE: 3,
                          "labels.csv rows without a scan that is taken": 1}
    assert read.source.columns["labels.csv"]["DX"] == "label, words (3 classes)"


def test_participants_tsv_of_a_loose_folder_and_two_tables_that_differ(tmp_path: Path) -> None:
    write(tmp_path, {"more.tsv": "participant_id\tscore\tage\np1\t3\t61\np2\t4\t62\n",
                     "loose/participants.tsv": "participant_id\tscore\tsex\np1\t3\tF\np2\t5\tM\n",
                     "loose/p1_T1w.nii": "x", "loose/p2_T1w.nii": "x"})
    read = Read(tmp_path / "loose", tables=[str(tmp_path / "more.tsv")])
    assert [(scan.age_at_scan, scan.sex) for scan in read.scans.values()] == [(61, "F"), (62, "M")]
    assert [label for label in read.labels if label[2] == "score"] == [("p1", "1", "score", "3")]
    assert read.notes["label that two tables tell differently: left out"] == 1


def test_without_a_table_nothing_is_said_of_one(tmp_path: Path) -> None:
    assert Read(write(tmp_path / "d", {"p1_T1w.nii": "x"})).notes == {}
