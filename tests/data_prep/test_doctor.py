"""doctor: one person or one file, on one screen."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.doctor import doctor
from neurojepa.errors import DataError
from tests.helpers.trees import DESCRIPTION, tree_bytes, write


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    data = np.zeros((30, 32, 34), np.int16)
    data[10:20, 10:20, 10:20] = 9
    good = nib.Nifti1Image(data, np.diag([4.0, 4, 4, 1])).to_bytes()
    return write(tmp_path / "cohort", {
        "dataset_description.json": DESCRIPTION, "participants.tsv":
        "participant_id\tage\tsex\tfamily_id\nsub-1\t62\tF\tf7\nsub-10\t50\tM\tf8\n",
        "sub-1/anat/sub-1_T1w.nii.gz": good, "sub-1/anat/sub-1_T1w.nii": good,
        "sub-1/anat/sub-1_T1w.json": '{"MagneticFieldStrength": 3}',
        "sub-1/anat/sub-1_T2w.nii.gz": b"<html>", "sub-1/dwi/sub-1_dwi.nii.gz": good,
        "sub-1/dwi/sub-1_dwi.bval": "0", "sub-1/anat/._sub-1_T1w.nii": "x",
        "derivatives/f/sub-1/anat/sub-1_desc-brain_mask.nii.gz": good,
        "sub-10/anat/sub-10_T1w.nii.gz": good, "sub-10/anat/sub-10_PDw.nii.gz": good})


def test_a_person_on_one_screen(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree_bytes(cohort)
    assert main(["doctor", str(cohort), "sub-1"]) == 0
    page = capsys.readouterr().out
    assert len(page.splitlines()) < 40 and "sub-10" not in page and "PDw" not in page
    for said in ("participant 1: 3 scans in 1 sessions", "age 62.0", "sex F", "f7",
                 "30 x 32 x 34 voxels of 4.00 x 4.00 x 4.00 mm, axes RAS, int16", "tesla 3",
                 "with derivatives/f/sub-1/anat/sub-1_desc-brain_mask.nii.gz",
                 "1 T1w sub-1/anat/sub-1_T1w.nii: other_form (another form",
                 "prepare will refuse it, not_nifti",
                 "sub-1/dwi/sub-1_dwi.nii.gz: suffix dwi is none of",
                 "sub-1/dwi/sub-1_dwi.bval: bval file, no image",
                 "  sub-1/anat/sub-1_T1w.json\n", "1 x hidden file", "1 x not taken: suffix dwi"):
        assert said in page, said
    assert tree_bytes(cohort) == before


@pytest.mark.parametrize(("who", "says"), [
    ("sub-1/anat/sub-1_T1w.nii.gz", "of participant 1\ntaken:\n  1 T1w sub-1/anat"),
    ("sub-1_T1w.nii", "taken of the same person:\n  1 T1w sub-1/anat/sub-1_T1w.nii.gz"),
    ("sub-1_T2w.nii.gz", "prepare will refuse it, not_nifti"),
    ("sub-10_PDw.nii.gz", "suffix PDw is none of"),
    ("10", "participant 10: 1 scans"), ("SUB-10", "participant 10: 1 scans")])
def test_files_and_other_spellings(cohort: Path, who: str, says: str,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    doctor(str(cohort), who)
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("who", ["sub-2", "sub-1_T1w.nii.bz2", "*", "sub-[1]"])
def test_nobody_of_that_name(cohort: Path, who: str) -> None:
    with pytest.raises(DataError, match="holds nobody and no file called"):
        doctor(str(cohort), who)


def test_other_cohorts(cohort: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = cohort.parent / "t.csv"
    table.write_text("file,participant_id,modality\nsub-1/anat/sub-1_T1w.nii,p7,T1w\n")
    doctor(str(cohort), "p7", cohort="files", tables=[str(table)])
    page = capsys.readouterr().out
    assert "participant p7: 1 scans" in page and "T1w sub-1/anat/sub-1_T1w.nii\n" in page
