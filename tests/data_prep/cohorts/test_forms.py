"""What lies below a source and is not one plain .nii.gz: other forms, hidden and ignored files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data_prep.cohorts.adni.reader import read_cohort as read_adni
from data_prep.cohorts.bids.forms import OTHER_FORM
from data_prep.cohorts.files import read_cohort as read_files
from data_prep.cohorts.left_out import HIDDEN
from data_prep.cohorts.source import Source
from neurojepa.errors import DataError
from tests.helpers.trees import DESCRIPTION, Read, write

DATASET: dict[str, str | bytes] = {"dataset_description.json": DESCRIPTION}
NOTE = "not taken: another form of a scan that is taken (other_form)"


def read(root: Path, files: dict[str, str | bytes]) -> tuple[dict[str, str | None], dict[str, int]]:
    """Reason of each scan by its file's name, and the notes, of a BIDS dataset of one person."""
    found = Read(write(root, DATASET | {f"sub-1/{name}": text for name, text in files.items()}))
    scans = [scan for one in found.found for scan in one.scans]
    found.notes.pop("people without a row in participants.tsv", None)
    return {scan.uri.rpartition("/")[2]: scan.reason for scan in scans}, found.notes


# ---- images in any form --------------------------------------------------------------------------

@pytest.mark.parametrize("ending", ["nii.gz", "NII.GZ", "Nii", "nii.bz2", "nii.zst", "mgh", "MGZ",
                                    "mgh.gz"])
def test_every_form_is_taken_in_any_case(tmp_path: Path, ending: str) -> None:
    name = f"sub-1_T1w.{ending}"
    reasons, notes = read(tmp_path, {f"anat/{name}": "x", "anat/sub-1_T1w.json":
                                     '{"MagneticFieldStrength": 3}'})
    assert reasons == {name: None} and not notes
    loose = Read(write(tmp_path / "loose", {f"p1_T1w.{ending}": "x", "p1_T1w.json":
                                            '{"MagneticFieldStrength": 3}'}))
    assert [scan.field_strength for one in loose.found for scan in one.scans] == [3]


@pytest.mark.parametrize(("header", "voxels"), [("hdr", "img"), ("HDR", "IMG"), ("hdr", "img.gz"),
                                                ("hdr.gz", "img.gz")])
def test_a_pair_is_one_file(tmp_path: Path, header: str, voxels: str) -> None:
    files = {f"anat/sub-1_T1w.{header}": "x", f"anat/sub-1_T1w.{voxels}": "xx"}
    reasons, notes = read(tmp_path, files)
    assert reasons == {f"sub-1_T1w.{header}": None} and not notes
    whole = Read(tmp_path).scans["sub-1_T1w"]
    assert whole.size_bytes == 3
    (tmp_path / "sub-1/anat" / f"sub-1_T1w.{header}").rename(tmp_path / "sub-1/anat/sub-1_T2w.hdr")
    reasons, notes = read(tmp_path, {})
    assert reasons == {"sub-1_T2w.hdr": None}  # prepare will say what is missing
    assert notes == {"not taken: .img without its .hdr": 1}


def test_a_pair_whose_voxels_are_not_downloaded(tmp_path: Path) -> None:
    write(tmp_path, DATASET | {"sub-1/anat/sub-1_T1w.hdr": "x"})
    (tmp_path / "sub-1/anat/sub-1_T1w.img").symlink_to("../../.git/annex/objects/a/b")
    assert Read(tmp_path).scans["sub-1_T1w"].reason == "not_downloaded"


def test_what_else_lies_below_a_person_is_counted_by_its_ending(tmp_path: Path) -> None:
    reasons, notes = read(tmp_path, {
        "anat/sub-1_T1w.nii.gz": "x", "anat/sub-1_T1w.nii.gz.part": "x", "anat/a.mnc": "x",
        "anat/b.MNC": "x", "dwi/sub-1_dwi.bval": "x", "dwi/sub-1_dwi.json": "{}",
        "func/sub-1_task-a_events.tsv": "x", "notes": "x", "anat/c.nii.xz": "x",
        "anat/scan.par": "x", "anat/scan.rec": "x", "anat/1.2.840.113": "x"})
    assert reasons == {"sub-1_T1w.nii.gz": None}
    assert notes == {
        "not taken: part file": 1, "not taken: mnc file": 2, "not taken: bval file": 1,
        "not used: json file": 1, "not used: tsv file": 1, "not taken: file without an ending": 2,
        "not taken: nii.xz file": 1, "not taken: par file": 1, "not taken: rec file": 1}


# ---- hidden and ignored --------------------------------------------------------------------------

HIDDEN_FILES: dict[str, str | bytes] = {
    "anat/._sub-1_T1w.nii.gz": "x", "anat/.DS_Store": "x", "__MACOSX/anat/._sub-1_T1w.nii.gz": "x",
    ".heudiconv/sub-1_T2w.nii.gz": "x"}


def test_hidden_files_are_skipped_and_counted(tmp_path: Path) -> None:
    reasons, notes = read(tmp_path, {"anat/sub-1_T1w.nii.gz": "x", **HIDDEN_FILES})
    assert reasons == {"sub-1_T1w.nii.gz": None}
    assert notes == {HIDDEN: 2, HIDDEN.replace("file", "folder", 1): 2}
    loose = Read(write(tmp_path / "loose", {"p1_T1w.nii": "x", "._p1_T1w.nii": "x",
                                            "in/._p2_T1w.nii": "x", "in/p2_T1w.nii": "x"}))
    assert set(loose.scans) == {"p1_T1w", "p2_T1w"} and loose.notes == {HIDDEN: 2}


def test_hidden_files_in_a_store_are_counted_alike(tmp_path: Path, s3) -> None:
    import s3fs

    read(tmp_path / "d", {"anat/sub-1_T1w.nii.gz": "x", **HIDDEN_FILES,
                          "anat/sub-1_T1w.nii": "x", "a.mnc": "x"})
    write(tmp_path / "d", {".bidsignore": "*_T2w*\n", "sub-1/anat/sub-1_T2w.nii": "x"})
    s3fs.S3FileSystem().put(f"{tmp_path}/d/", f"{s3.uri}/hidden/", recursive=True)
    here, there = Read(tmp_path / "d"), Read(f"{s3.uri}/hidden")
    assert here.notes == there.notes and len(here.notes) == 5
    assert {one.reason for found in there.found for one in found.scans} == {OTHER_FORM, None}


@pytest.mark.parametrize(("patterns", "left", "count"), [
    ("extra/\n", {"sub-1_T1w", "sub-1_acq-x_T1w", "sub-1_T2w", "sub-2_T1w"}, 1),
    ("# note\n\n*_acq-x_*\n", {"sub-1_T1w", "sub-1_T2w", "sub-2_T1w", "sub-1_run-2_T1w"}, 1),
    ("/sub-1/\n", {"sub-2_T1w"}, 4),
    ("*_T1w*\n!sub-2_T1w*\n", {"sub-1_T2w", "sub-2_T1w"}, 3),
    ("sub-1/**/*T2w*\r\n", {"sub-1_T1w", "sub-1_acq-x_T1w", "sub-2_T1w", "sub-1_run-2_T1w"}, 1),
    ("nothing\n", {"sub-1_T1w", "sub-1_acq-x_T1w", "sub-1_T2w", "sub-2_T1w", "sub-1_run-2_T1w"},
     0)])
def test_bidsignore_is_obeyed(tmp_path: Path, patterns: str, left: set[str], count: int) -> None:
    found = Read(write(tmp_path, DATASET | {
        ".bidsignore": patterns, "sub-1/anat/sub-1_T1w.nii.gz": "x",
        "sub-1/anat/sub-1_acq-x_T1w.nii.gz": "x", "sub-1/anat/sub-1_T2w.nii.gz": "x",
        "sub-1/extra/sub-1_run-2_T1w.nii.gz": "x", "sub-2/anat/sub-2_T1w.nii.gz": "x"}))
    assert set(found.scans) == left
    assert found.notes.get("file that .bidsignore names: left out", 0) == count


def test_a_bidsignore_that_cannot_be_understood_is_an_error(tmp_path: Path) -> None:
    for text in (b"sub-1/\n!\n", b"\xff\xfe\x00"):
        write(tmp_path, DATASET | {".bidsignore": text, "sub-1/anat/sub-1_T1w.nii": "x"})
        with pytest.raises(DataError, match=r"\.bidsignore: cannot be understood"):
            Read(tmp_path)


def test_a_name_that_is_no_text_is_counted(tmp_path: Path) -> None:
    write(tmp_path, DATASET | {"sub-1/anat/sub-1_T1w.nii": "x"})
    (tmp_path / "sub-1/anat" / os.fsdecode(b"sub-1_acq-M\xfcller_T1w.nii")).write_text("x")
    found = Read(tmp_path)
    assert set(found.scans) == {"sub-1_T1w"}
    assert found.notes["file whose name is not UTF-8: not taken; rename it"] == 1


# ---- one acquisition, several forms --------------------------------------------------------------

def sidecar(**facts: object) -> str:
    return json.dumps(facts)


@pytest.mark.parametrize(("chosen", "others"), [
    ("anat/sub-1_T1w.nii.gz", ["anat/sub-1_T1w.nii", "anat/sub-1_T1w.mgz"]),
    ("anat/sub-1_T1w.NII.GZ", ["anat/sub-1_T1w.nii"]),
    ("anat/sub-1_T1w.nii", ["anat/sub-1_T1w.nii.bz2", "anat/sub-1_T1w.hdr"]),
    ("anat/sub-1_T1w.nii", ["old/sub-1_T1w.nii.gz"]),
    ("anat/sub-1_rec-norm_T1w.nii.gz", ["anat/sub-1_T1w.nii.gz"]),
    ("anat/sub-1_rec-NORM_run-1_T2w.nii", ["anat/sub-1_run-1_T2w.nii"]),
    ("anat/sub-1_T1w.nii.gz", ["anat/sub-1_rec-foo_T1w.nii.gz", "anat/sub-1_rec-nd_T1w.nii.gz"]),
    ("anat/sub-1_acq-mprageNORM_T1w.nii.gz", ["anat/sub-1_acq-mprage_T1w.nii.gz"]),
    ("anat/sub-1_acq-mprage_T1w.nii.gz", ["anat/sub-1_acq-mprageND_T1w.nii.gz"]),
    ("anat/sub-1_acq-norm_FLAIR.nii.gz", ["anat/sub-1_FLAIR.nii.gz"]),
    ("pet/sub-1_trc-FDG_rec-acdyn_pet.nii.gz", ["pet/sub-1_trc-FDG_rec-nacdyn_pet.nii.gz"]),
    ("func/sub-1_task-a_bold.nii.gz", ["func/sub-1_task-a_bold.nii"]),
])
def test_names_tell_of_one_acquisition(tmp_path: Path, chosen: str, others: list[str]) -> None:
    reasons, notes = read(tmp_path, {name: "x" for name in [*others, chosen]})
    shown = {name: reason for name, reason in reasons.items()}
    if "bold" in chosen:  # of a run one series is taken anyway
        assert shown == {Path(chosen).name: None}
        return
    assert shown == {Path(chosen).name: None} | {Path(name).name: OTHER_FORM for name in others}
    assert notes[NOTE] == len(others)


@pytest.mark.parametrize("names", [
    ["sub-1_run-1_T1w", "sub-1_run-2_T1w"], ["sub-1_acq-a_T1w", "sub-1_acq-b_T1w"],
    ["sub-1_acq-land_T1w", "sub-1_acq-la_T1w"], ["sub-1_T1w", "sub-1_T2w"],
    ["sub-1_ses-1_rec-norm_T1w", "sub-1_ses-2_T1w"], ["sub-1_ce-gad_T1w", "sub-1_T1w"]])
def test_other_acquisitions_are_all_taken(tmp_path: Path, names: list[str]) -> None:
    reasons, notes = read(tmp_path, {f"anat/{name}.nii.gz": "x" for name in names})
    assert set(reasons.values()) == {None} and len(reasons) == len(names) and not notes


NORM, PLAIN, ND = (["ORIGINAL", "PRIMARY", "M", *words] for words in (["NORM", "DIS2D"],
                                                                      ["DIS2D"], ["ND"]))


@pytest.mark.parametrize(("first", "second", "chosen"), [
    ({"AcquisitionTime": "10:11:12.5", "ImageType": ND},
     {"AcquisitionTime": "10:11:12.5", "ImageType": NORM}, 2),
    ({"AcquisitionTime": "10:11:12.5", "EchoTime": 0.003},
     {"AcquisitionTime": "10:11:12.5", "EchoTime": 0.003}, 1),
    ({"AcquisitionTime": "10:11:12.5", "EchoTime": 0.003},
     {"AcquisitionTime": "10:11:12.5", "EchoTime": 0.005}, None),
    ({"AcquisitionTime": "10:11:12.5", "ImageType": NORM},
     {"AcquisitionTime": "10:19:12.5", "ImageType": NORM}, None),
    ({"SeriesInstanceUID": "1.2.3"}, {"SeriesInstanceUID": "1.2.3"}, 1),
    ({"SeriesInstanceUID": "1.2.3"}, {"SeriesInstanceUID": "1.2.4"}, None),
    ({"SeriesNumber": 4, "ImageType": NORM}, {"SeriesNumber": 3, "ImageType": PLAIN}, 1),
    ({"SeriesNumber": 4, "ImageType": NORM}, {"SeriesNumber": 6, "ImageType": PLAIN}, None),
    ({"SeriesNumber": 3, "ImageType": NORM}, {"SeriesNumber": 4, "ImageType": NORM}, None),
])
def test_sidecars_tell_of_one_acquisition(tmp_path: Path, first: dict[str, object],
                                          second: dict[str, object], chosen: int | None) -> None:
    reasons, _ = read(tmp_path, {
        "anat/sub-1_run-1_T1w.nii.gz": "x", "anat/sub-1_run-1_T1w.json": sidecar(**first),
        "anat/sub-1_run-2_T1w.nii.gz": "x", "anat/sub-1_run-2_T1w.json": sidecar(**second)})
    assert reasons == {f"sub-1_run-{run}_T1w.nii.gz": None if chosen in (None, run) else OTHER_FORM
                       for run in (1, 2)}
    assert "1.2.3" not in str(Read(tmp_path).source.seen)  # identifiers are kept as hashes


def test_pairs_of_repeats_are_told_apart_by_series_numbers(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {}
    for number, types in enumerate([PLAIN, NORM, PLAIN, NORM], 1):
        files[f"anat/sub-1_run-{number}_T1w.nii.gz"] = "x"
        files[f"anat/sub-1_run-{number}_T1w.json"] = sidecar(SeriesNumber=number, ImageType=types)
    assert list(read(tmp_path, files)[0].values()) == [OTHER_FORM, None, OTHER_FORM, None]


def test_what_the_cohort_rules_out_is_not_replaced_by_another_form(tmp_path: Path) -> None:
    reasons, _ = read(tmp_path, {
        "anat/sub-1_T1w.nii.gz": "x", "anat/sub-1_T1w.nii": "x",
        "sub-1_scans.tsv": "filename\tusable\nanat/sub-1_T1w.nii\t0\n"})
    assert reasons == {"sub-1_T1w.nii.gz": "cohort_unusable", "sub-1_T1w.nii": OTHER_FORM}


def test_a_mask_goes_to_the_form_that_is_taken(tmp_path: Path) -> None:
    read(tmp_path, {"anat/sub-1_T1w.nii.gz": "x", "anat/sub-1_T1w.nii": "x"})
    write(tmp_path, {"derivatives/f/sub-1/anat/sub-1_desc-brain_mask.nii.gz": "x"})
    masks = {scan.uri[-6:]: bool(scan.mask_uri) for one in Read(tmp_path).found
             for scan in one.scans}
    assert masks == {"nii.gz": True, "1w.nii": False}


def test_loose_files_in_two_forms(tmp_path: Path) -> None:
    found = Read(write(tmp_path, {"p1_T1w.nii": "x", "a/p2_T1w.nii": "x"}))
    write(tmp_path, {"p1_T1w.nii.gz": "x"})
    scans = [scan for one in list(Read(write(tmp_path / "b", {
        "p1_T1w.nii": "x", "p1_T1w.nii.gz": "x"})).found) for scan in one.scans]
    assert len(found.scans) == 2
    assert {scan.uri[-3:]: scan.reason for scan in scans} == {"nii": OTHER_FORM, ".gz": None}


# ---- other readers -------------------------------------------------------------------------------

def test_adni_takes_any_case_and_skips_what_is_hidden(tmp_path: Path) -> None:
    folder = "002_S_0295/MP-RAGE/2006-04-18_08_20_30.0"
    source = Source(str(write(tmp_path, {
        f"{folder}/I101/ADNI_002_S_0295_MR_MP-RAGE_S1_I101.NII.GZ": "x",
        f"{folder}/I101/._ADNI_002_S_0295_MR_MP-RAGE_S1_I101.NII.GZ": "x",
        f"{folder}/I102/ADNI_002_S_0295_MR_MP-RAGE_1_S2_I102.dcm.gz": "x",
        f"{folder}/I102/ADNI_002_S_0295_MR_MP-RAGE_2_S2_I102.DCM.GZ": "x"})))
    scans = [scan for one in read_adni(source, "adni") for scan in one.scans]
    assert sorted(scan.uri.rpartition("/")[2] for scan in scans) == [
        "", "ADNI_002_S_0295_MR_MP-RAGE_S1_I101.NII.GZ"]
    assert source.notes[HIDDEN] == 1


def test_a_table_may_list_any_form(tmp_path: Path) -> None:
    root = write(tmp_path / "scans", {
        "a.b.c_T1w.NII.GZ": "x", "a.b.c_T1w.json": '{"RepetitionTime": 2}', "p/x.hdr": "x",
        "p/x.img": "xx", "y.img": "x", "y.hdr": "x", "s.mgh": "x", "c.dtseries.nii": "x"})
    table = tmp_path / "t.csv"
    table.write_text("file,participant_id,modality\na.b.c_T1w.NII.GZ,1,T1w\np/x.hdr,2,T1w\n"
                     "y.img,3,T1w\ns.mgh,4,T2w\nc.dtseries.nii,5,BOLD\n")
    source = Source(str(root), tables=[str(table)])
    scans = {scan.uri.rpartition("/")[2]: scan for one in read_files(source, "c")
             for scan in one.scans}
    assert set(scans) == {"a.b.c_T1w.NII.GZ", "x.hdr", "y.img", "s.mgh", "c.dtseries.nii"}
    assert scans["a.b.c_T1w.NII.GZ"].facts == '{"RepetitionTime": 2}'
    assert scans["x.hdr"].size_bytes == 3
    assert source.notes == {"not taken: file that no table lists": 1}  # y.hdr
