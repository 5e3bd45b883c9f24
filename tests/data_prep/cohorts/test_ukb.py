"""UK Biobank: packages in the delivered names and layouts, and tables in both styles, to Scans."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.cohorts.source import Findings, Source
from data_prep.cohorts.ukb import packages
from data_prep.cohorts.ukb.reader import read_cohort
from data_prep.members import list_members, read_member
from data_prep.scan import Scan, split_member
from neurojepa.errors import DataError
from neurojepa.storage import write_bytes
from tests.helpers.trees import read_people, said_of, write

NIFTI = nib.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4)).to_bytes()
MATRIX = b"1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n"
T1 = {"T1/T1.nii.gz": NIFTI, "T1/T1_orig_defaced.nii.gz": NIFTI, "T1/T1_brain.nii.gz": NIFTI,
      "T1/T1_brain_mask.nii.gz": NIFTI, "T1/T1_brain_to_MNI.nii.gz": NIFTI, "T1/T1.json": b"{}",
      "T1/transforms/T1_to_MNI_linear.mat": MATRIX, "T1/T1_fast/T1_brain_seg.nii.gz": NIFTI}
FLAIR = {"T2_FLAIR/T2_FLAIR.nii.gz": NIFTI, "T2_FLAIR/T2_FLAIR_orig_defaced.nii.gz": NIFTI,
         "T2_FLAIR/T2_FLAIR_brain_to_MNI.nii.gz": NIFTI}
REST = {"fMRI/rfMRI.nii.gz": NIFTI, "fMRI/rfMRI_SBREF.nii.gz": NIFTI, "fMRI/rfMRI.json": b"{}"}
CLEAN = {**REST, "fMRI/rfMRI.ica/filtered_func_data_clean.nii.gz": NIFTI,
         "fMRI/rfMRI.ica/mask.nii.gz": NIFTI,
         "fMRI/rfMRI.ica/mc/prefiltered_func_data_mcf.par": b"0 0 0 0 0 0\n"}
CIFTI = {f"surf_fMRI/CIFTIs/bb.{kind}.MNI.MSMAll.dtseries.nii": NIFTI
         for kind in ("rfMRI", "tfMRI")}
read = partial(read_people, read_cohort, "ukb")
RAP = "Bulk/Brain MRI"


def package(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return buffer.getvalue()


def only(found: Findings) -> Scan:
    (scan,) = found.scans
    return scan


@pytest.fixture
def platform(tmp_path: Path) -> Path:
    """The layout of the research platform: kinds beside each other, two-digit folders."""
    return write(tmp_path / "ukb", {
        f"{RAP}/T1/10/1000001_20252_2_0.zip": package(T1),
        f"{RAP}/T1/10/1000001_20252_3_0.zip": package(T1),
        f"{RAP}/T1/23/2300002_20252_2_0.zip": package(T1),
        f"{RAP}/T2 FLAIR/10/1000001_20253_2_0.zip": package(FLAIR),
        f"{RAP}/rfMRI/10/1000001_20227_2_0.zip": package(CLEAN),
        f"{RAP}/rfMRI/23/2300002_20227_2_0.zip": package(REST),
        f"{RAP}/FreeSurfer/10/1000001_20263_2_0.zip": package(
            {"FreeSurfer/mri/aseg.mgz": b"x", "FreeSurfer/mri/aparc+aseg.mgz": b"x"}),
        f"{RAP}/dMRI/10/1000001_20250_2_0.zip": b"never opened",
        f"{RAP}/SWI/10/1000001_20251_2_0.zip": b"never opened",
        "tables/participant.csv":
            "\ufeffparticipant.eid,participant.p31,participant.p21003_i2,participant.p21003_i3,"
            "participant.p54_i2,participant.p54_i3,participant.p41270\n"
            '1000001,0,63,66,11025,-1,"[""G309"",""I10""]"\n'
            "2300002,Male,-3,,11027,,\n4000004,1,,,,,G20\n",
    })


def test_scans_of_the_platform_layout_with_companions(platform: Path):
    people, source = read(platform)
    assert list(people) == ["1000001", "2300002"]
    t1, flair, repeat = (next(scan for scan in people["1000001"].scans
                              if (scan.modality, scan.session) == key)
                         for key in (("T1w", "2"), ("FLAIR", "2"), ("T1w", "3")))
    rest = next(scan for scan in people["1000001"].scans if scan.modality == "BOLD")
    zip_uri = str(platform / RAP / "T1/10/1000001_20252_2_0.zip")
    assert (t1.uri, t1.member) == (zip_uri, "T1/T1.nii.gz")
    assert t1.mask_uri == f"{zip_uri}::T1/T1_brain_mask.nii.gz"
    assert t1.transform_uri == f"{zip_uri}::T1/transforms/T1_to_MNI_linear.mat"
    assert t1.label_uri and t1.label_uri.endswith("_20263_2_0.zip::FreeSurfer/mri/aseg.mgz")
    assert read_member(*split_member(t1.transform_uri), 1000) == MATRIX  # type: ignore[arg-type]
    # a FLAIR lies on the grid of its visit's T1
    assert flair.member == "T2_FLAIR/T2_FLAIR.nii.gz"
    assert (flair.mask_uri, flair.transform_uri) == (t1.mask_uri, t1.transform_uri)
    assert repeat.transform_uri and "_20252_3_0.zip" in repeat.transform_uri
    assert (rest.member, rest.processing) == (
        "fMRI/rfMRI.ica/filtered_func_data_clean.nii.gz", "fix")
    assert rest.confounds_uri and rest.confounds_uri.endswith("prefiltered_func_data_mcf.par")
    assert json.loads(rest.facts or "")["RepetitionTime"] == 0.735
    raw = next(scan for scan in people["2300002"].scans if scan.modality == "BOLD")
    assert (raw.member, raw.processing, raw.mask_uri) == ("fMRI/rfMRI.nii.gz", None, None)
    assert source.notes["not taken: field 20250 (dMRI)"] == 1
    assert source.notes["not taken: field 20251 (SWI)"] == 1
    assert {scan.reason for found in people.values() for scan in found.scans} == {None}


def test_ages_sexes_centres_and_diagnoses_by_visit(platform: Path):
    people, source = read(platform)
    first = {scan.session: scan for scan in people["1000001"].scans}
    assert (first["2"].age_at_scan, first["3"].age_at_scan, first["2"].sex) == (63.0, 66.0, "F")
    assert (first["2"].site, first["3"].site) == ("Cheadle", None)  # -1 is no centre
    other = people["2300002"].scans[0]
    assert (other.age_at_scan, other.sex, other.site) == (None, "M", "Newcastle")
    labels = {(session, name): value for session, name, value in people["1000001"].labels}
    assert (labels["2", "icd10_dementia"], labels["3", "icd10_parkinson"]) == ("1", "0")
    assert (labels["3", "age"], labels["2", "sex"]) == ("66.0", "F")
    assert ("2", "icd10_dementia", "0") in people["2300002"].labels
    assert source.notes["table rows without an imaging visit: not used"] == 1


def test_old_columns_parquet_pairs_and_contradictions(tmp_path: Path):
    root = write(tmp_path / "flat", {
        **{f"{eid}_20252_2_0.zip": package(T1) for eid in (1000001, 1000002, 1000003, 1000004)},
        # Latin-1, a column of text, a space as separator: as they come
        "ukb1.csv": 'eid,31-0.0,34-0.0,52-0.0,53-2.0,21003-2.0,41270-0.0,41270-0.1,20000-0.0\n'
                    '"1000001",1,1950,7,2016-01-20,,G20,I10,Käse\n'
                    "1000002,0,1951,1,2016-01-20,64,,,x\n-7,1,1950,1,2016-01-01,66,,,x\n"
                    "1000003,9,1951,1,,200,,,x\n".encode("latin-1"),
        "ukb_rel.dat": "ID1 ID2 HetHet IBS0 Kinship\n1000001 1000002 0.1 0.01 0.25\n",
        "w12345_20250101.csv": "1000009\n",
        "unrelated.tsv": "a\tb\n1\t2\n",
    })
    pq.write_table(pa.table({"eid": [1000001, 1000002], "p31": [1, 1], "p22021": [1, 1]}),
                   tmp_path / "more.parquet")
    people, source = read(root, tables=[str(tmp_path / "more.parquet")])
    one, two, three, four = people.values()
    assert only(one).age_at_scan == 65.5 and only(one).sex == "M"  # from month of birth and date
    assert {name: value for _, name, value in one.labels}["icd10_parkinson"] == "1"
    assert only(two).sex is None and only(two).age_at_scan == 64.0
    assert source.notes["sex differs between tables: unknown"] == 1
    assert set(one.ties) & set(two.ties) and not three.ties
    assert (only(three).sex, only(three).age_at_scan) == (None, None)
    assert source.notes["sex is neither of the known codes: unknown"] == 1
    assert source.notes["age is not a number of years: unknown"] == 1
    # without metadata: kept, everything unknown
    assert (only(four).age_at_scan, four.labels, only(four).reason) == (None, [], None)
    assert source.notes["people without a row in a table"] == 1
    assert source.notes["table rows of people who withdrew (negative eid): not used"] == 1
    assert source.notes["withdrawal list: not read here, give it to withdraw"] == 1
    assert source.notes["table without rows or without a column eid: not used"] == 1
    # dates and months of birth go nowhere
    assert "2016" not in said_of(people, root) and "1950" not in said_of(people, root)


@pytest.mark.parametrize("other", [
    "participant.eid,participant.p31,participant.p21003_i2,participant.p54_i2,participant.p52\n"
    "1000001,Female,61,Cheadle (imaging),July\n",
    "f.eid\tf.31.0.0\tf.21003.2.0\tf.54.2.0\tf.52.0.0\n1000001\tfemale\t61.0\t11025\t7\n",
    "n_eid,n_31_0_0,n_21003_2_0,n_54_2_0,n_52_0_0\n1000001.0,0.0,61.0,11025.0,7.0\n",
    "eid,sex_f31_0_0,age_when_attended_f21003_2_0,centre_f54_2_0\n1000001,Female,61,11025\n",
    "Participant ID,Sex,Age when attended assessment centre | Instance 2,Month of birth\n"
    "1000001,Female,61,July\n",
    'EID;P31;P21003_i2\n"1000001";"Female";"61"\n',
    "eid,p31,p21003_i2\n1000001,Prefer not to answer,-3\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_codes_and_words_of_all_programs_say_the_same(tmp_path: Path, other: str, encoding: str):
    root = write(tmp_path, {
        "1000001_20252_2_0.zip": package(T1), "other.csv": other.encode(encoding),
        "ukb1.csv": "eid,31-0.0,21003-2.0,54-2.0,52-0.0\n1000001,0,61,11025,7\n"})
    people, source = read(root)
    scan = only(people["1000001"])
    assert (scan.sex, scan.age_at_scan, scan.site) == ("F", 61, "Cheadle")
    assert not [note for note in source.notes if "differs" in note or "unknown" in note]
    assert set(source.columns) == {"ukb1.csv", "other.csv"}
    assert source.columns["ukb1.csv"]["31-0.0"] == "sex"


def test_ages_come_from_the_dates_of_a_stata_extract(tmp_path: Path):
    root = write(tmp_path, {"1000001_20252_2_0.zip": package(T1), "ukb.csv":
                            "n_eid,n_34_0_0,n_52_0_0,ts_53_2_0\n1000001,1955,7,2016-07-02\n"})
    people, source = read(root)
    assert only(people["1000001"]).age_at_scan == 61
    assert source.columns["ukb.csv"]["ts_53_2_0"] == "date at visit 2"


def test_words_that_differ_are_still_a_contradiction(tmp_path: Path):
    root = write(tmp_path, {"1000001_20252_2_0.zip": package(T1), "a.csv": "eid,p31\n1000001,0\n",
                            "b.csv": "eid,p31\n1000001,Male\n"})
    people, source = read(root)
    assert only(people["1000001"]).sex is None
    assert source.notes["sex differs between tables: unknown"] == 1


def test_a_table_given_without_eids_is_refused(tmp_path: Path):
    write(tmp_path, {"s/1000001_20252_2_0.zip": package(T1), "t.csv": "id,p31\n1000001,0\n"})
    with pytest.raises(DataError, match=r"--table .*t\.csv: has no row or lacks a column eid"):
        read(tmp_path / "s", tables=[str(tmp_path / "t.csv")])


def test_relatives_that_no_pairs_name_are_counted(tmp_path: Path):
    root = write(tmp_path, {"1000001_20252_2_0.zip": package(T1),
                            "t.csv": "eid,p22021\n1000001,10\n"})
    _, source = read(root)
    assert source.notes["people with relatives that no table of pairs names: not tied"] == 1


def test_a_damaged_table_stops_the_index(tmp_path: Path):
    root = write(tmp_path, {"1000001_20252_2_0.zip": package(T1),
                            "t.csv": "eid,p31\n1000001,1\n1000002,1,7,8\n"})
    with pytest.raises(DataError, match=r"t\.csv: not a table"):
        read(root)


@pytest.mark.parametrize("files, reason, member", [
    ({"T1/unusable/T1.nii.gz": NIFTI, "T1/T1.json": b"{}"}, "cohort_unusable",
     "T1/unusable/T1.nii.gz"),
    ({"T1/incompatible/T1.nii.gz": NIFTI}, "cohort_unusable", "T1/incompatible/T1.nii.gz"),
    ({"T1/T1_brain.nii.gz": NIFTI}, "missing_member", "T1/T1.nii.gz"),
    ({"../T1/T1.nii.gz": NIFTI}, "unsafe_archive", None),
], ids=["unusable", "incompatible", "missing", "zip-slip"])
def test_packages_that_cannot_be_used_become_rows_with_a_reason(tmp_path: Path, files, reason,
                                                               member):
    root = write(tmp_path, {"1000001_20252_2_0.zip": package(files),
                            "1000002_20252_2_0.zip": package(T1)})
    people, _ = read(root)
    scan = only(people["1000001"])
    assert (scan.uri, scan.member) == (str(root / "1000001_20252_2_0.zip"), member)
    assert (scan.reason, scan.modality, scan.session) == (reason, "T1w", "2")
    assert only(people["1000002"]).reason is None  # the neighbour is kept


@pytest.mark.parametrize("data, reason", [
    (package(T1)[:-60], "truncated"), (b"", "empty"), (b"<html>not found</html>", "not_archive"),
    (b"version https://git-lfs.github.com/spec/v1\n", "not_downloaded")])
def test_damaged_packages_become_rows_with_a_reason(tmp_path: Path, data: bytes, reason: str):
    root = write(tmp_path, {"1000001_20253_2_0.zip": data, "1000001_20252_2_0.zip": package(T1)})
    (tmp_path / "1000002_20252_2_0.zip").symlink_to("gone/away.zip")
    people, _ = read(root)
    t1, flair = people["1000001"].scans
    assert (flair.reason, flair.modality, t1.reason) == (reason, "FLAIR", None)
    assert only(people["1000002"]).reason == "not_downloaded"


def test_an_unusable_cleaned_series_is_not_replaced_by_the_raw_one(tmp_path: Path):
    clean = "fMRI/unusable/rfMRI.ica/filtered_func_data_clean.nii.gz"
    people, _ = read(write(tmp_path, {"1000001_20227_2_0.zip": package({**REST, clean: NIFTI})}))
    assert only(people["1000001"]).reason == "cohort_unusable"


def test_a_flair_without_its_t1_has_no_matrix_and_is_counted(tmp_path: Path):
    people, source = read(write(tmp_path, {
        "1000001_20253_2_0.zip": package(FLAIR), "1000001_20252_3_0.zip": package(T1)}))
    flair = people["1000001"].scans[0]
    assert flair.modality == "FLAIR" and flair.transform_uri is None and flair.reason is None
    assert source.notes["FLAIR without its transform"] == 1


def test_cifti_is_taken_where_the_volumes_are_absent(tmp_path: Path):
    people, source = read(write(tmp_path, {
        "1000001_32136_2_0.zip": package(CIFTI), "1000002_32136_2_0.zip": package(CIFTI),
        "1000002_20227_2_0.zip": package(CLEAN),
        "1000003_32136_2_0.zip": package(dict([*CIFTI.items()][:1]))}))
    assert [scan.member for scan in people["1000001"].scans] == list(CIFTI)
    assert [scan.member for scan in people["1000002"].scans] == [
        "fMRI/rfMRI.ica/filtered_func_data_clean.nii.gz",
        "surf_fMRI/CIFTIs/bb.tfMRI.MNI.MSMAll.dtseries.nii"]
    assert only(people["1000003"]).processing == "fix"
    assert source.notes["package without one of its images"] == 1


def test_dicom_serves_only_where_there_is_no_nifti(tmp_path: Path):
    series = package({f"1.2.{n}.dcm": b"x" for n in range(4)} | {"manifest.csv": b"x"})
    nested = package({f"series/1.2.{n}.dcm": b"x" for n in range(4)})
    people, source = read(write(tmp_path, {
        "1000001_20216_2_0.zip": series, "1000002_20216_2_0.zip": series,
        "1000002_20252_2_0.zip": package(T1), "1000003_20225_2_0.zip": nested,
        "1000004_20216_2_0.zip": package({"readme": b""}),
        **{f"1000005_20216_2_0/1.2.{n}.dcm": b"x" for n in range(3)}}))
    assert (only(people["1000001"]).member, only(people["1000001"]).modality) == ("/", "T1w")
    assert only(people["1000002"]).member == "T1/T1.nii.gz"
    assert (only(people["1000003"]).member, only(people["1000003"]).modality) == ("series/", "BOLD")
    assert only(people["1000004"]).reason == "missing_member"
    folder = only(people["1000005"])
    assert (folder.uri, folder.member) == (f"{tmp_path}/1000005_20216_2_0/", None)
    assert source.notes["not taken: DICOM of a scan that is there as NIfTI"] == 1


def test_unpacked_packages_and_second_copies(tmp_path: Path):
    unpacked = {f"by field/20252/1000001_20252_2_0/{name}": data for name, data in T1.items()}
    people, source = read(write(tmp_path, {
        **unpacked, "by field/20253/1000001_20253_2_0.zip": package(FLAIR),
        "1000002_20252_2_0.zip": package(T1), "copy/1000002_20252_2_0.zip": package(T1),
        "1000003_20252_2_0/T1/unusable/T1.nii.gz": NIFTI}))
    t1, flair = people["1000001"].scans
    folder = tmp_path / "by field/20252/1000001_20252_2_0/T1"
    assert (t1.uri, t1.member) == (str(folder / "T1.nii.gz"), None)
    assert t1.mask_uri == str(folder / "T1_brain_mask.nii.gz")
    assert flair.transform_uri == str(folder / "transforms/T1_to_MNI_linear.mat")
    assert only(people["1000002"]).uri == str(tmp_path / "1000002_20252_2_0.zip")
    assert source.notes["not taken: second copy of a package"] == 1
    assert only(people["1000003"]).reason == "cohort_unusable"


def test_what_is_not_taken_is_counted(tmp_path: Path):
    people, source = read(write(tmp_path, {
        "T1/10/1000001_20252_2_0.zip": package(T1), "T1/10/1000001_20252_0_0.zip": package(T1),
        "T1/10/2000002_20252_2_0.zip": package(T1), "T1/10/notes.bin": b"x",
        "T1/10/1000001_99999_2_0.zip": b"x", "readme.md": b"x"}))
    assert len(people["1000001"].scans) == 1 and list(people) == ["1000001"]
    assert source.notes["not taken: instance that is no imaging visit"] == 1
    assert source.notes["not taken: package in the folder of other participants"] == 1
    assert source.notes["not taken: neither a package nor a table"] == 2
    assert source.notes["not taken: field 99999 (unknown)"] == 1


def test_people_come_while_the_tree_is_walked(platform: Path):
    opened: list[str] = []

    class Watched(Source):
        def opened(self, found, make):
            opened.append(found.uri)
            return super().opened(found, make)

    people: Iterator[Findings] = read_cohort(Watched(str(platform)), "ukb")
    next(people)
    assert opened and not any("/23/" in uri.removeprefix(str(platform)) for uri in opened)


def test_indexing_again_opens_only_what_changed(platform: Path, monkeypatch: pytest.MonkeyPatch):
    before, source = read(platform)
    changed = platform / RAP / "T1/23/2300002_20252_2_0.zip"
    changed.write_bytes(package({"T1/T1.nii.gz": NIFTI}))
    opened = []
    monkeypatch.setattr(packages, "list_members",
                        lambda uri: opened.append(uri) or list_members(uri))
    remembered = {uri: (size, modified, json.loads(json.dumps(value)))
                  for uri, (size, modified, value) in source.seen.items()}
    after, _ = read(platform, remembered=remembered)
    assert opened == [str(changed)]
    assert after["1000001"] == before["1000001"]
    assert after["2300002"].scans[-1].mask_uri is None


def test_the_platform_layout_on_s3(platform: Path, s3):
    root = f"{s3.uri}/ukb"
    shutil.rmtree(platform / RAP / "dMRI")
    for path in platform.rglob("*.*"):
        if path.is_file():
            write_bytes(f"{root}/{path.relative_to(platform)}", path.read_bytes())
    remote, _ = read(root)
    local, _ = read(platform)
    for eid, found in local.items():
        assert remote[eid].labels == found.labels
        assert [(scan.member, scan.session, scan.age_at_scan) for scan in remote[eid].scans] == [
            (scan.member, scan.session, scan.age_at_scan) for scan in found.scans]
    flair = next(scan for scan in remote["1000001"].scans if scan.modality == "FLAIR")
    assert flair.uri.startswith(f"{root}/{RAP}") and flair.transform_uri
    uri, member = split_member(flair.transform_uri)
    assert read_member(uri, member or "", 1000) == MATRIX
