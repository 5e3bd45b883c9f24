"""ABCD: the BIDS tree of releases 6 and 7, NDA packages and both kinds of tables, to Scans."""

from __future__ import annotations

import io
import json
import tarfile
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.cohorts.abcd.reader import read_cohort
from data_prep.cohorts.abcd.tables import participant_of
from data_prep.cohorts.source import Findings
from data_prep.members import read_member
from data_prep.scan import Scan
from data_prep.splits import group_people
from neurojepa.errors import DataError
from neurojepa.storage import write_bytes
from tests.helpers.trees import read_people, said_of, write

NIFTI = nib.Nifti1Image(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4)).to_bytes()
A, B, C = "0A1B2C3D", "0000ZZZ1", "00000002"
MPROC, XCP = "derivatives/mproc", "derivatives/abcc-xcp_d_v0.13.0"
read = partial(read_people, read_cohort, "abcd")
SIDECAR = json.dumps({"Manufacturer": "GE", "ManufacturersModelName": "MR750",
                      "MagneticFieldStrength": 3, "DeviceSerialNumber": "HASHraw",
                      "RepetitionTime": 0.8, "PatientName": "kept nowhere"})


def package(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def nda(participant: str, event: str, suffix: str, run: str = "01") -> dict[str, bytes]:
    """Members of an MPROC package: an uncompressed image and its sidecar."""
    name = f"sub-NDARINV{participant}_ses-{event}"
    folder = f"sub-NDARINV{participant}/ses-{event}/{'func' if suffix == 'bold' else 'anat'}"
    task = "_task-rest" if suffix == "bold" else ""
    return {f"{folder}/{name}{task}_run-{run}_{suffix}.json": b"{}",
            f"{folder}/{name}{task}_run-{run}_{suffix}.nii": NIFTI}


def files(found: Findings) -> list[str]:
    return [(scan.member or scan.uri).rsplit("/", 1)[-1] for scan in found.scans]


def raw(participant: str, session: str, ending: str) -> str:
    kind = "func" if "bold" in ending else "anat"
    name = f"sub-{participant}_ses-{session}_{ending}"
    return f"rawdata/sub-{participant}/ses-{session}/{kind}/{name}"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A tree as the current releases have it."""
    bold = f"{XCP}/sub-{A}/ses-00A/func/sub-{A}_ses-00A_task-rest_run-01"
    surface = f"{XCP}/sub-{A}/ses-00A/anat/sub-{A}_ses-00A_hemi"
    return write(tmp_path / "abcd", {
        "rawdata/dataset_description.json": "{}",
        f"rawdata/sub-{A}/sub-{A}_sessions.tsv": "session_id\tage\nses-00A\t9.5\nses-02A\tn/a\n",
        f"rawdata/sub-{A}/ses-00A/sub-{A}_ses-00A_scans.tsv":
            "filename\tacq_time\tusable\tquality\n"
            f"anat/sub-{A}_ses-00A_run-01_T2w.nii.gz\t2017-01-01T09:00:00\t0\tgood\n"
            f"anat/sub-{A}_ses-00A_run-01_T1w.nii.gz\t2017-01-01T09:00:00\t1\tgood\n",
        raw(A, "00A", "run-01_T1w.nii.gz"): NIFTI, raw(A, "00A", "run-01_T1w.json"): SIDECAR,
        raw(A, "00A", "rec-normalized_run-01_T1w.nii.gz"): NIFTI,
        raw(A, "00A", "run-01_T2w.nii.gz"): NIFTI,
        raw(A, "00A", "task-rest_run-01_bold.nii.gz"): NIFTI,
        raw(A, "00A", "task-rest_run-01_bold.json"): SIDECAR,
        raw(A, "00A", "task-nback_run-01_bold.nii.gz"): NIFTI,
        raw(A, "00A", "run-01_dwi.nii.gz"): NIFTI,
        raw(A, "02A", "rec-normalized_run-01_T1w.nii.gz"): NIFTI,
        raw(A, "02A", "run-01_T1w.nii.gz"): NIFTI,
        raw(B, "00A", "run-01_T1w.nii.gz"): NIFTI,
        f"{MPROC}/sub-{A}/ses-00A/anat/sub-{A}_ses-00A_run-01_T1w.nii.gz": NIFTI,
        f"derivatives/freesurfer/sub-{A}/ses-00A/mri/aseg.mgz": b"x",
        f"derivatives/freesurfer/sub-{A}/ses-00A/mri/orig.mgz": b"x",
        f"derivatives/freesurfer/sub-{A}/ses-02A/mri/aseg.mgz": b"x",
        f"{bold}_space-fsLR_den-91k_desc-denoised_bold.dtseries.nii": NIFTI,
        f"{bold}_motion.tsv": "framewise_displacement\n0.1\n",
        f"{surface}-L_space-fsLR_den-32k_midthickness.surf.gii": b"x",
        f"{surface}-R_space-fsLR_den-32k_midthickness.surf.gii": b"x",
        f"derivatives/qsiprep/sub-{A}/ses-00A/dwi/sub-{A}_ses-00A_dwi.nii.gz": NIFTI,
        "tables/ab_g_stc.tsv": "participant_id\tsession_id\tab_g_stc__cohort_sex\t"
                               "ab_g_stc__design_id__fam\n"
                               f"sub-{A}\t\t1\t77\nsub-{B}\t\t2\t77\n",
        "tables/mr.tsv": "participant_id\tsession_id\tmr_y_qc__incl__smri__t1_indicator\t"
                         "mr_y_adm__info__dev_serial\tab_g_dyn__design_site\n"
                         f"sub-{A}\tses-00A\t1\tHASHtab\tsite06\nsub-{B}\tses-00A\t0\t\tsite07\n",
    })


def scan_of(found: Findings, modality: str, session: str, task: str = "") -> Scan:
    (scan,) = [scan for scan in found.scans if (scan.modality, scan.session) == (modality, session)
               and f"task-{task}" * bool(task) in scan.uri]
    return scan


def test_each_scan_is_taken_once_in_its_preferred_form(release: Path):
    people, source = read(release)
    assert list(people) == [B, A]
    t1 = scan_of(people[A], "T1w", "00A")
    folder = release / MPROC / f"sub-{A}/ses-00A/anat"
    assert t1.uri == str(folder / f"sub-{A}_ses-00A_run-01_T1w.nii.gz")
    assert t1.processing == "mproc"
    assert t1.label_uri == str(release / f"derivatives/freesurfer/sub-{A}/ses-00A/mri/aseg.mgz")
    rest, nback = (scan_of(people[A], "BOLD", "00A", task) for task in ("rest", "nback"))
    assert rest.uri.endswith("dtseries.nii") and rest.processing == "xcp_d"
    assert rest.confounds_uri and rest.confounds_uri.endswith("_motion.tsv")
    assert rest.surface_uri and rest.surface_uri.count(".surf.gii") == 2
    assert nback.processing is None
    # where mproc is absent the normalised copy is taken, without labels of another space
    second = scan_of(people[A], "T1w", "02A")
    assert "rec-normalized" in second.uri and second.label_uri is None
    assert source.notes["not taken: the scan is taken in another form than raw"] == 3
    assert source.notes["not taken: the scan is taken in another form than normalised"] == 1
    assert source.notes["derivatives not used: qsiprep"] == 1
    assert source.notes["not taken: raw, suffix dwi"] == 1
    assert source.notes["derivative not used: file of FreeSurfer"] == 1
    assert source.notes["derivative not used: FreeSurfer labels without the one mproc T1w they "
                        "lie on"] == 1


def test_facts_from_tables_and_sidecars(release: Path):
    people, source = read(release)
    t1 = scan_of(people[A], "T1w", "00A")
    assert (t1.age_at_scan, t1.sex, t1.site, t1.field_strength) == (9.5, "M", "site06", 3.0)
    assert t1.scanner == "GE MR750 HASHtab"  # the serial of the table
    assert source.notes["scanner serial differs between sidecar and table: the table's"] == 2
    assert json.loads(scan_of(people[A], "BOLD", "00A", "rest").facts or "") == {
        "RepetitionTime": 0.8}
    assert scan_of(people[A], "T1w", "02A").age_at_scan is None
    assert people[A].ties == people[B].ties == ["family:77"]
    assert ("00A", "age", "9.5") in people[A].labels and ("00A", "sex", "F") in people[B].labels
    assert "2017" not in said_of(people, release) and "kept nowhere" not in repr(source.seen)


def test_what_the_cohort_rules_out_becomes_a_row_with_a_reason(release: Path):
    people, _ = read(release)
    assert scan_of(people[A], "T2w", "00A").reason == "cohort_unusable"  # scans.tsv
    assert scan_of(people[A], "T1w", "00A").reason is None
    assert scan_of(people[B], "T1w", "00A").reason == "cohort_excluded"  # inclusion flag 0


def test_a_verdict_on_the_raw_file_holds_for_what_was_made_of_it(tmp_path: Path):
    def tree(who: str, usable: str) -> dict[str, bytes | str]:
        return {raw(who, "00A", "run-01_T1w.nii.gz"): NIFTI,
                f"rawdata/sub-{who}/ses-00A/sub-{who}_ses-00A_scans.tsv":
                    f"filename\tusable\nanat/sub-{who}_ses-00A_run-01_T1w.nii.gz\t{usable}\n",
                f"{MPROC}/sub-{who}/ses-00A/anat/sub-{who}_ses-00A_run-01_T1w.nii.gz": NIFTI}

    people, _ = read(write(tmp_path, {**tree(A, "0"), **tree(B, "1")}))
    assert [(scan.processing, scan.reason) for who in (A, B) for scan in people[who].scans] == [
        ("mproc", "cohort_unusable"), ("mproc", None)]


def test_files_in_the_folder_of_another_are_not_taken(tmp_path: Path):
    people, source = read(write(tmp_path, {
        raw(A, "00A", "T1w.nii.gz"): NIFTI, raw(A, "00A", "T1w.json"): "[not a sidecar",
        f"rawdata/sub-{A}/ses-00A/anat/sub-{B}_ses-00A_T2w.nii.gz": NIFTI}))
    assert [scan.modality for scan in people[A].scans] == ["T1w"]
    assert source.notes["not taken: file name and folder name different people"] == 1
    assert source.notes["JSON sidecar unreadable, its facts are unknown"] == 1


def test_packages_of_nda_are_read_where_they_lie(tmp_path: Path):
    event = "baselineYear1Arm1"
    stem = f"NDARINV{A}_{event}_ABCD"
    t1 = package(nda(A, event, "T1w"))
    root = write(tmp_path / "nda", {
        f"{stem}-MPROC-T1_20170101090000.tgz": t1,
        f"{stem}-MPROC-rsfMRI_20170101091000.tgz": package(nda(A, event, "bold", "01")),
        f"{stem}-MPROC-rsfMRI_20170101092000.tgz": package(nda(A, event, "bold", "02")),
        f"{stem}-MPROC-DTI_20170101093000.tgz": b"never opened",
        f"{stem}-T1_20170101090000.tgz": package({"x/1.dcm": b"x"}),
        f"NDARINV{B}_{event}_ABCD-MPROC-T1_20170102090000.tgz": b"\x1f\x8b damaged",
        f"NDARINV{B}_{event}_ABCD-MPROC-T1_20170102093000.tgz": package(nda(B, event, "T1w")),
        f"NDARINV{C}_{event}_ABCD-MPROC-T2_20170102090000.tgz": package({"a.json": b"{}"}),
        "abcd_mri01.txt": '"subjectkey"\t"src_subject_id"\t"eventname"\t"interview_age"\t"sex"\t'
                          '"interview_date"\t"mri_info_deviceserialnumber"\n'
                          '"The GUID"\t"Subject ID"\t"The event"\t"Age in months"\t"Sex"\t"Date"\t'
                          '"Serial"\n'
                          f'"NDAR_INV{A}"\t"NDAR_INV{A}"\t"baseline_year_1_arm_1"\t"114"\t"F"\t'
                          '"01/01/2017"\t"HASH1"\n',
        "acspsw03.txt": "src_subject_id\teventname\trel_family_id\n"
                        f"NDAR_INV{A}\tbaseline_year_1_arm_1\t12\n"
                        f"NDAR_INV{A}\t1_year_follow_up_y_arm_1\t13.0\n",
        "freesqc01.txt": "src_subject_id\teventname\timgincl_rsfmri_include\tmrif_score\n"
                         f"NDAR_INV{A}\tbaseline_year_1_arm_1\t0\t1\n",
    })
    people, source = read(root)
    t1_scan = scan_of(people[A], "T1w", "00A")
    assert t1_scan.uri == str(root / f"{stem}-MPROC-T1_20170101090000.tgz")
    assert t1_scan.member == next(name for name in nda(A, event, "T1w") if name.endswith(".nii"))
    assert read_member(t1_scan.uri, t1_scan.member, 1 << 20) == NIFTI
    assert (t1_scan.age_at_scan, t1_scan.sex, t1_scan.scanner) == (9.5, "F", "HASH1")
    runs = [scan for scan in people[A].scans if scan.modality == "BOLD"]
    assert [scan.reason for scan in runs] == ["cohort_excluded"] * 2  # imgincl_rsfmri_include 0
    assert people[A].ties == ["family:12", "family:13"]  # ids drift between visits
    assert source.notes["not taken: package of MPROC-DTI"] == 1
    assert source.notes["not taken: DICOM of a scan that is there as NIfTI"] == 1
    (damaged, sound), (empty,) = people[B].scans, people[C].scans
    assert (sound.reason, sound.modality) == (None, "T1w")
    assert (damaged.reason, damaged.modality, damaged.session) == ("truncated", "T1w", "00A")
    assert (empty.reason, empty.modality) == ("missing_member", "T2w")
    assert damaged.age_at_scan is None and people[B].labels == []  # without metadata: unknown


def test_ids_and_events_in_two_spellings_are_one(tmp_path: Path):
    event = "2YearFollowUpYArm1"
    root = write(tmp_path, {
        raw(A, "02A", "run-01_T2w.nii.gz"): NIFTI,
        raw(f"NDARINV{A}", event, "run-01_T1w.nii.gz"): NIFTI,
        f"packages/NDARINV{A}_{event}_ABCD-MPROC-T1_20170101090000.tgz":
            package(nda(A, event, "T1w")),
        "t.csv": f"participant_id,session_id,age\nndar_inv{A},2_year_follow_up_y_arm_1,11.5\n",
    })
    people, source = read(root)
    assert list(people) == [A]
    t2, t1 = sorted(people[A].scans, key=lambda scan: scan.modality, reverse=True)
    assert t1.member and {t1.session, t2.session} == {"02A"}
    assert {t1.age_at_scan, t2.age_at_scan} == {11.5}
    assert source.notes["participants with ids in two spellings, taken as one"] == 1
    assert source.notes["not taken: the scan is taken in another form than raw"] == 1
    assert participant_of("sub-phantom01") is None


def test_dicom_serves_only_where_there_is_no_nifti(tmp_path: Path):
    event = "baselineYear1Arm1"
    dicom = package({"series.json": b"{}", "s/1.dcm": b"x", "s/2.dcm": b"x"})
    people, source = read(write(tmp_path, {
        f"NDARINV{A}_{event}_ABCD-T1_20170101090000.tgz": dicom,
        f"NDARINV{A}_{event}_ABCD-T1-NORM_20170101090000.tgz": dicom,
        f"sourcedata/sub-{B}/ses-00A/anat/sub-{B}_ses-00A_run-01_T1w.tgz": dicom,
        f"sourcedata/sub-{B}/ses-00A/anat/sub-{B}_ses-00A_run-01_T2w.tgz": dicom,
        raw(B, "00A", "run-01_T1w.nii.gz"): NIFTI}))
    (one,), (t1, t2) = people[A].scans, people[B].scans
    assert "T1-NORM" in one.uri and one.member == "s/"
    assert t1.member is None and (t2.modality, t2.member) == ("T2w", "s/")
    assert source.notes["not taken: DICOM of a scan that is there as NIfTI"] == 1
    assert source.notes["not taken: DICOM of another form of the scan"] == 1


def test_contradictions_become_unknown_and_are_counted(tmp_path: Path):
    pq.write_table(pa.table({
        "participant_id": [f"sub-{A}", f"sub-{B}"], "session_id": ["ses-00A"] * 2,
        "age": [12.0, 9.55], "sex": ["F", "F"]}), tmp_path / "more.parquet")
    root = write(tmp_path / "abcd", {
        raw(A, "00A", "T1w.nii.gz"): NIFTI, raw(B, "00A", "T1w.nii.gz"): NIFTI,
        "old.csv": "src_subject_id,eventname,interview_age,sex\n"
                   f"NDAR_INV{A},baseline_year_1_arm_1,114,M\n"
                   f"NDAR_INV{B},baseline_year_1_arm_1,114,F\n"})
    people, source = read(root, tables=[str(tmp_path / "more.parquet")])
    assert (people[A].scans[0].age_at_scan, people[A].scans[0].sex) == (None, None)
    assert (people[B].scans[0].sex, people[A].labels) == ("F", [])
    assert people[B].scans[0].age_at_scan == 9.55  # months and years agree
    assert source.notes["contradictory age: unknown"] == 1
    assert source.notes["contradictory sex: unknown"] == 1
    assert source.notes["people without a family id: each a group of their own"] == 2


def test_families_meet_over_drifting_ids(tmp_path: Path):
    root = write(tmp_path, {
        **{raw(who, "00A", "T1w.nii.gz"): NIFTI for who in (A, B, C)},
        "fam.csv": f"src_subject_id,rel_family_id\n{A},1\n{A},2\n{B},2\n{C},3\n"})
    people, _ = read(root)
    groups = group_people(list(people), [(who, tag) for who in people for tag in people[who].ties])
    assert groups[A] == groups[B] != groups[C]


def test_odd_text_and_damaged_tables(tmp_path: Path):
    root = write(tmp_path, {
        raw(A, "00A", "T1w.nii.gz"): NIFTI, "readme.txt": "no table, at all\nbut, a, text\n",
        "t.tsv": "\ufeffparticipant_id\tsession_id\tage\tsex\tsite\n"
                 f"sub-{A}\tses-00A\t\tn/a\tZ\xfcrich\n".encode().decode()})
    people, source = read(root)
    scan = people[A].scans[0]
    assert (scan.site, scan.age_at_scan, scan.sex) == ("Zürich", None, None)
    assert source.notes["table without participants: not used"] == 1
    write(root, {"t.tsv": f"participant_id\tage\nsub-{A}\t9\t8\t7\n"})
    with pytest.raises(DataError, match=r"t\.tsv: not a table"):
        read(root)


def test_what_had_to_be_mended_in_a_persons_table_is_said(tmp_path: Path):
    _, source = read(write(tmp_path, {
        raw(A, "00A", "T1w.nii.gz"): NIFTI, f"rawdata/sub-{A}/sub-{A}_sessions.tsv":
            "session_id\tage\nses-00A\t9.5\n".encode("utf-16")}))
    assert source.notes["sessions.tsv: is utf-16, not UTF-8: decoded"] == 1


def test_annexed_content_gives_way_or_is_named(tmp_path: Path):
    root = write(tmp_path, {raw(A, "00A", "run-01_T1w.nii.gz"): NIFTI})
    for place in (MPROC + f"/sub-{A}/ses-00A/anat", f"rawdata/sub-{A}/ses-02A/anat"):
        (root / place).mkdir(parents=True)
    (root / MPROC / f"sub-{A}/ses-00A/anat/sub-{A}_ses-00A_run-01_T1w.nii.gz").symlink_to("gone")
    (root / f"rawdata/sub-{A}/ses-02A/anat/sub-{A}_ses-02A_run-01_T1w.nii.gz").symlink_to("gone")
    people, _ = read(root)
    assert [(scan.session, scan.reason) for scan in people[A].scans] == [
        ("00A", None), ("02A", "not_downloaded")]
    assert "rawdata" in people[A].scans[0].uri


def test_both_layouts_on_s3_as_on_a_disk(release: Path, s3):
    write(release, {f"packages/NDARINV{C}_baselineYear1Arm1_ABCD-MPROC-T1_20170101090000.tgz":
                    package(nda(C, "baselineYear1Arm1", "T1w"))})
    for path in release.rglob("*"):
        if path.is_file():
            write_bytes(f"{s3.uri}/abcd/{path.relative_to(release)}", path.read_bytes())
    remote, source = read(f"{s3.uri}/abcd")
    local, same = read(release)
    assert list(remote) == list(local) and source.notes == same.notes
    for who, found in local.items():
        assert (files(remote[who]), remote[who].labels) == (files(found), found.labels)
    scan = remote[C].scans[0]
    assert read_member(scan.uri, scan.member or "", 1 << 20) == NIFTI
