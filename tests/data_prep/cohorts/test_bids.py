"""BIDS names, sidecars, tables and derivatives become Scans; loose files too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.cohorts.bids.names import is_phantom, parse_name
from neurojepa.errors import DataError
from tests.helpers.trees import DESCRIPTION, Read, write

DATASET = {"dataset_description.json": DESCRIPTION}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write(tmp_path / "cohort", {
        "dataset_description.json": DESCRIPTION,
        "T1w.json": json.dumps({"MagneticFieldStrength": 1.5, "Manufacturer": "Acme"}),
        "participants.tsv": "\ufeffparticipant_id\tage\tsex\tdiagnosis\tsite\tfamily_id\t"
                            "note\tbmi\r\n"
                            "sub-007\t61.5\tF\tpatient\tA\tf1\tfree text\t21\r\n"
                            "sub-8\t89+\tmale\tcontrol\tn/a\tf1\tn/a\tn/a\r\n"
                            "sub-gone\t50\tM\tcontrol\tA\tn/a\tn/a\t30\r\n",
        "sub-007/sub-007_sessions.tsv": "session_id\tage\nses-a\t62\nses-b\tn/a\n",
        "sub-007/ses-a/anat/ses-a_sub-007_run-1_T1w.nii.gz": "x",
        "sub-007/ses-a/anat/sub-007_ses-a_run-1_T1w.json": json.dumps(
            {"MagneticFieldStrength": 3}),
        "sub-007/ses-a/anat/sub-007_ses-a_FLAIR.nii.gz": "x",
        "sub-007/ses-a/anat/sub-007_ses-a_part-phase_T1w.nii.gz": "x",
        "sub-007/ses-a/anat/sub-007_ses-a_T2star.nii.gz": "x",
        "sub-007/ses-b/anat/sub-007_ses-b_T1w.nii": "x",
        "sub-007/ses-a/func/sub-007_ses-a_task-rest_sbref.nii.gz": "x",
        "sub-8/anat/sub-8_T1w.nii.gz": "x",
        "sub-8/anat/sub-9_T1w.nii.gz": "x",
        "sub-10/anat/sub-10_run-1_T1w.nii.gz": "x",
        "sub-10/anat/sub-10_run-2_T1w.nii.gz": "x",
        "derivatives/labels/dataset_description.json": DESCRIPTION,
        "derivatives/labels/sub-007/ses-a/anat/sub-007_ses-a_space-T1w_dseg.nii.gz": "x",
        "derivatives/labels/sub-8/anat/sub-8_space-orig_desc-brain_mask.nii.gz": "x",
        "derivatives/labels/sub-007/ses-b/anat/sub-007_ses-b_space-common_dseg.nii.gz": "x",
        "derivatives/labels/sub-10/anat/sub-10_space-T1w_dseg.nii.gz": "x",
    })


# ---- names, sidecars, tables ---------------------------------------------------------------------

def test_entities_may_come_in_any_order():
    name = parse_name("run-2_sub-01_acq-x-y_ses-b_T2w.nii.gz")
    assert name.entities == {"run": "2", "sub": "01", "acq": "x-y", "ses": "b"}
    assert (name.suffix, name.extension) == ("T2w", "nii.gz")
    assert parse_name("sub-1_bold.dtseries.nii").extension == "dtseries.nii"


def test_scans_with_inherited_facts_and_tables(tree: Path):
    scans = Read(tree).scans
    assert set(scans) == {"ses-a_sub-007_run-1_T1w", "sub-007_ses-a_FLAIR", "sub-007_ses-b_T1w",
                          "sub-8_T1w", "sub-10_run-1_T1w", "sub-10_run-2_T1w"}
    first, second = scans["ses-a_sub-007_run-1_T1w"], scans["sub-007_ses-b_T1w"]
    assert (first.participant, first.session, first.modality) == ("007", "a", "T1w")
    assert (first.field_strength, second.field_strength) == (3.0, 1.5)  # the nearer sidecar wins
    assert first.scanner == "Acme" and scans["sub-007_ses-a_FLAIR"].scanner is None
    assert (first.age_at_scan, second.age_at_scan) == (62.0, 61.5)  # session, else person
    assert (first.sex, scans["sub-8_T1w"].sex) == ("F", "M")
    assert scans["sub-8_T1w"].age_at_scan is None and scans["sub-8_T1w"].session == "1"
    assert scans["sub-8_T1w"].site is None and first.site == "A"
    assert first.size_bytes == 1 and first.modified and first.processing is None


def test_derivatives_only_in_the_scans_own_space(tree: Path):
    scans = Read(tree).scans
    assert scans["ses-a_sub-007_run-1_T1w"].label_uri.endswith("space-T1w_dseg.nii.gz")
    assert scans["sub-8_T1w"].mask_uri.endswith("desc-brain_mask.nii.gz")
    assert scans["sub-007_ses-b_T1w"].label_uri is None  # space-common
    assert scans["sub-10_run-1_T1w"].label_uri is None  # which run?
    assert scans["sub-007_ses-a_FLAIR"].label_uri is None


def test_what_is_not_used_is_counted(tree: Path):
    assert Read(tree).notes == {
        "not taken: suffix sbref": 1,
        "not taken: suffix T2star": 1,
        "not taken: phase, real or imaginary part": 1,
        "not taken: file name and folder name different people": 1,
        "derivative not used: in the space common, not in a scan's": 1,
        "derivative not used: fits several scans": 1,
        "age is not a number of years (such as 89+): unknown": 1,
        "people without a row in participants.tsv": 1,
        "participants.tsv rows without a scan that is taken": 1,
    }


def test_labels_of_each_session_without_free_text(tree: Path):
    labels = Read(tree).labels
    assert ("007", "a", "age", "62.0") in labels and ("007", "b", "age", "61.5") in labels
    assert ("8", "1", "diagnosis", "control") in labels and ("007", "a", "bmi", "21") in labels
    assert {name for _, _, name, _ in labels} == {"age", "sex", "diagnosis", "bmi"}
    assert len(labels) == len(set(labels))


def test_inheritance_goes_down_only_to_names_without_further_entities(tmp_path: Path):
    def strength(value: float) -> str:
        return json.dumps({"MagneticFieldStrength": value})

    read = Read(write(tmp_path / "d", {
        **DATASET,
        "acq-a_T1w.json": strength(1), "sub-1/sub-1_T2w.json": strength(2),
        "sub-1/ses-1/anat/sub-1_ses-1_acq-a_T1w.json": json.dumps(
            {"MagneticFieldStrength": None, "SliceThickness": 2, "PatientName": "Jane"}),
        "sub-1/ses-1/anat/sub-1_ses-1_acq-a_T1w.nii.gz": "x",
        "sub-1/ses-1/anat/sub-1_ses-1_acq-b_T1w.nii.gz": "x",
        "sub-1/ses-2/anat/sub-1_ses-2_T2w.nii.gz": "x",
        "sub-1/ses-3/anat/sub-1_ses-3_T2w.json": strength(3),
        "sub-1/ses-3/anat/sub-1_ses-3_run-1_T2w.json": strength(4),
        "sub-1/ses-3/anat/sub-1_ses-3_run-1_T2w.nii.gz": "x",
        "sub-1/ses-3/anat/sub-1_ses-3_run-2_T2w.nii.gz": "x",
        "sub-1/ses-3/anat/sub-1_ses-3_run-2_T2w.json": "not JSON",
    }))
    strengths = {name: scan.field_strength for name, scan in read.scans.items()}
    assert strengths == {"sub-1_ses-1_acq-a_T1w": 1, "sub-1_ses-1_acq-b_T1w": None,
                         "sub-1_ses-2_T2w": 2, "sub-1_ses-3_run-1_T2w": 4,
                         "sub-1_ses-3_run-2_T2w": 3}
    assert read.scans["sub-1_ses-1_acq-a_T1w"].facts == '{"SliceThickness": 2}'
    assert read.notes["JSON sidecar unreadable, its facts are unknown"] == 1
    assert sum(count for note, count in read.notes.items() if "several sidecars" in note) == 2


def test_contradictory_age_and_sex_are_unknown_and_reported(tmp_path: Path):
    read = Read(write(tmp_path / "d", {
        **DATASET,
        "participants.tsv": "participant_id\tage\tsex\nsub-1\t60\tF\nsub-1\t60\tM\n"
                            "sub-2\t70\tM\nsub-3\t50\tF\n",
        "sub-2/sub-2_sessions.tsv": "session_id\tage\tsex\nses-1\t64\tM\nses-2\t71\tF\n",
        "sub-1/anat/sub-1_T1w.nii.gz": "x", "sub-3/anat/sub-3_T1w.nii.gz": "x",
        "sub-2/ses-1/anat/sub-2_ses-1_T1w.nii.gz": "x",
        "sub-2/ses-2/anat/sub-2_ses-2_T1w.nii.gz": "x"}))
    told = {name: (scan.age_at_scan, scan.sex) for name, scan in read.scans.items()}
    assert told == {"sub-1_T1w": (60, None), "sub-2_ses-1_T1w": (None, "M"),
                    "sub-2_ses-2_T1w": (71, None), "sub-3_T1w": (50, "F")}
    assert read.notes == {"contradictory sex: unknown": 2, "contradictory age: unknown": 1,
                          "participants.tsv: repeated row, the first is used": 1}


@pytest.mark.parametrize("age", ["-4", "n/a", "89+", "about 60", "nan", "1e9"])
def test_an_age_that_is_no_age_is_unknown(tmp_path: Path, age: str):
    read = Read(write(tmp_path / "d", {
        **DATASET, "participants.tsv": f"participant_id\tage\nsub-1\t{age}\n",
        "sub-1/anat/sub-1_T1w.nii.gz": "x"}))
    assert read.scans["sub-1_T1w"].age_at_scan is None and read.labels == []


def test_several_scans_of_a_visit_are_one_session(tmp_path: Path):
    anat = "sub-1/ses-a/anat/sub-1_ses-a"
    scans = Read(write(tmp_path / "d", {
        **DATASET, f"{anat}_run-1_T1w.nii.gz": "x", f"{anat}_run-2_T1w.nii.gz": "x",
        f"{anat}_T2w.nii.gz": "x"})).scans
    assert [scan.session for scan in scans.values()] == ["a"] * 3


def test_without_tables_nothing_is_known_and_nothing_made_up(tmp_path: Path):
    read = Read(write(tmp_path / "d", {**DATASET, "sub-1/anat/sub-1_T1w.nii.gz": "x"}))
    scan = read.scans["sub-1_T1w"]
    assert read.labels == [] and {scan.age_at_scan, scan.sex, scan.site, scan.facts} == {None}


@pytest.mark.parametrize("ids, matched", [("7\t30", 30), ("7\t30\n0007\t40", None)])
def test_an_id_that_lost_its_zeros_is_found_where_only_one_fits(tmp_path: Path, ids, matched):
    read = Read(write(tmp_path / "d", {
        **DATASET, "participants.tsv": f"participant_id\tage\n{ids}\n",
        "sub-007/anat/sub-007_T1w.nii.gz": "x"}))
    assert read.scans["sub-007_T1w"].age_at_scan == matched
    assert ("participants.tsv: id without its leading zeros, matched" in read.notes) is bool(
        matched)


def test_latin_1_tables_and_names_with_spaces(tmp_path: Path):
    read = Read(write(tmp_path / "my höhle", {
        **DATASET, "participants.tsv": "participant_id\tsite\nsub-1\tKöln\n".encode("latin-1"),
        "sub-1/anat/sub-1_acq-my scan_T1w.nii.gz": "x"}))
    assert read.scans["sub-1_acq-my scan_T1w"].site == "Köln"


def test_phenotypes_and_further_tables_give_numeric_labels(tmp_path: Path):
    further = write(tmp_path, {"moca.csv": "participant_id,session_id,total\nsub-1,ses-b,27\n"})
    read = Read(write(tmp_path / "d", {
        **DATASET, "sub-1/ses-a/anat/sub-1_ses-a_T1w.nii.gz": "x",
        "sub-1/ses-b/anat/sub-1_ses-b_T1w.nii.gz": "x",
        "phenotype/mmse.tsv": "participant_id\tscore\tremark\nsub-1\t29\tsaid n\nsub-2\t3\tx\n",
        "phenotype/other.tsv": "id\tx\n1\t2\n"}), tables=[str(further / "moca.csv")])
    assert read.labels == [("1", "a", "mmse.score", "29"), ("1", "b", "mmse.score", "29"),
                           ("1", "b", "moca.total", "27")]
    assert read.notes["mmse.tsv rows without a scan that is taken"] == 1
    assert read.notes["other.tsv: no column participant_id, not used"] == 1


# ---- kinds of scans ------------------------------------------------------------------------------

def test_pet_with_tracer_and_frames(tmp_path: Path):
    read = Read(write(tmp_path / "d", {
        **DATASET,
        "sub-1/ses-a/pet/sub-1_ses-a_trc-18FFDG_pet.nii.gz": "x",
        "sub-1/ses-b/pet/sub-1_ses-b_pet.nii.gz": "x",
        "sub-1/ses-c/pet/sub-1_ses-c_pet.nii.gz": "x",
        "sub-1/ses-c/pet/sub-1_ses-c_trc-new1_pet.nii.gz": "x",
        "sub-1/ses-b/pet/sub-1_ses-b_pet.json": json.dumps({
            "TracerName": "[18F]AV-45", "FrameTimesStart": [0, 300], "Units": "Bq/mL",
            "FrameDuration": [300, 300], "TimeZero": "10:00:00", "Manufacturer": "Acme"})}))
    first, second = read.scans["sub-1_ses-a_trc-18FFDG_pet"], read.scans["sub-1_ses-b_pet"]
    assert (first.modality, first.tracer, second.tracer) == ("PET", "FDG", "AV45")
    facts = json.loads(second.facts)
    assert facts["FrameDuration"] == [300, 300] and facts["Units"] == "Bq/mL"
    assert "Manufacturer" not in facts and second.scanner == "Acme"
    assert read.scans["sub-1_ses-c_pet"].tracer is None
    assert read.scans["sub-1_ses-c_trc-new1_pet"].tracer == "new1"


FMRIPREP, XCPD = "derivatives/fmriprep/sub-1/func/sub-1_task-rest", "derivatives/xcp/sub-1/func/"


def bold_tree(root: Path, *derived: str) -> Read:
    return Read(write(root / "d", {
        **DATASET, "task-rest_bold.json": json.dumps({"RepetitionTime": 2.0}),
        "sub-1/func/sub-1_task-rest_bold.nii.gz": "x",
        "sub-1/func/sub-1_task-tap_echo-2_bold.nii.gz": "x",
        "sub-1/func/sub-1_task-tap_echo-1_bold.nii.gz": "x", **dict.fromkeys(derived, "x")}))


def test_raw_bold_and_its_first_echo(tmp_path: Path):
    read = bold_tree(tmp_path)
    scans = read.scans
    assert set(scans) == {"sub-1_task-rest_bold", "sub-1_task-tap_echo-1_bold"}
    scan = scans["sub-1_task-rest_bold"]
    assert (scan.modality, scan.processing) == ("BOLD", None)
    assert json.loads(scan.facts) == {"RepetitionTime": 2.0}
    assert read.notes["not taken: further echo of a scan"] == 1


def test_cleaned_bold_first_with_mask_and_confounds(tmp_path: Path):
    read = bold_tree(
        tmp_path, f"{FMRIPREP}_space-T1w_desc-preproc_bold.nii.gz",
        f"{FMRIPREP}_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz",
        f"{FMRIPREP}_space-MNI152NLin2009cAsym_desc-brain_mask.nii.gz",
        f"{FMRIPREP}_space-T1w_desc-brain_mask.nii.gz",
        f"{FMRIPREP}_space-fsLR_den-91k_bold.dtseries.nii",
        f"{FMRIPREP}_desc-confounds_timeseries.tsv",
        XCPD + "sub-1_task-rest_motion.tsv",
        XCPD + "sub-1_task-rest_space-fsLR_seg-4S_stat-mean_timeseries.ptseries.nii",
        XCPD + "sub-1_task-rest_space-T1w_desc-denoisedSmoothed_bold.nii.gz")
    scan = read.scans.pop("sub-1_task-rest_space-T1w_desc-preproc_bold")
    assert set(read.scans) == {"sub-1_task-tap_echo-1_bold"}
    assert scan.processing == "fmriprep:T1w" and json.loads(scan.facts) == {"RepetitionTime": 2.0}
    assert scan.mask_uri.endswith("rest_space-T1w_desc-brain_mask.nii.gz")
    assert scan.confounds_uri.endswith("desc-confounds_timeseries.tsv")
    notes = {note: count for note, count in read.notes.items() if "people" not in note}
    assert notes == {
        "not taken: further echo of a scan": 1, "raw BOLD series not taken: a cleaned one is": 1,
        "derivative not used: the BOLD series in another space or form is": 2,
        "derivative not used: fits no scan": 1, "derivative not used: CIFTI ptseries": 1,
        "derivative not used: bold": 1}


def test_cifti_series_with_its_surfaces(tmp_path: Path):
    surface = "derivatives/xcp/sub-1/anat/sub-1_{}space-fsLR_den-32k_hemi-{}_midthickness.surf.gii"
    read = bold_tree(
        tmp_path, XCPD + "sub-1_task-rest_space-fsLR_den-91k_desc-denoised_bold.dtseries.nii",
        XCPD + "sub-1_task-rest_motion.tsv", *(surface.format("", side) for side in "LR"),
        surface.format("acq-other_", "L"),
        "derivatives/xcp/sub-1/anat/sub-1_hemi-L_midthickness.surf.gii",
        XCPD + "sub-1_task-rest_space-fsLR_den-91k_stat-alff_boldmap.dscalar.nii",
        XCPD + "sub-1_task-other_space-fsLR_den-91k_stat-alff_boldmap.dscalar.nii")
    scan = read.scans["sub-1_task-rest_space-fsLR_den-91k_desc-denoised_bold"]
    assert (scan.modality, scan.processing) == ("BOLD", "xcp_d:fsLR")
    left, right = scan.surface_uri.split(";")
    assert left.endswith(surface.format("", "L")) and right.endswith(surface.format("", "R"))
    assert scan.confounds_uri.endswith("_motion.tsv")
    maps = [one for one in read.scans.values() if one.modality == "ALFF"]
    assert [one.uri.rsplit("/")[-1].split("_")[1] for one in maps] == ["task-other"]
    assert maps[0].surface_uri == scan.surface_uri


def test_labels_of_freesurfer_and_fmriprep_at_any_depth(tmp_path: Path):
    read = Read(write(tmp_path / "d", {
        **DATASET, **{f"sub-{one}/ses-a/anat/sub-{one}_ses-a_T1w.nii.gz": "x" for one in "1234"},
        "derivatives/fmriprep/sourcedata/freesurfer/sub-1_ses-a/mri/aseg.mgz": "x",
        "derivatives/fmriprep/sourcedata/freesurfer/sub-1_ses-a/mri/orig.mgz": "x",
        "derivatives/fmriprep/sourcedata/freesurfer/sub-3/mri/aseg.mgz": "x",
        "derivatives/fmriprep/sourcedata/freesurfer/fsaverage/mri/aseg.mgz": "x",
        "derivatives/fmriprep/sub-1/anat/sub-1_dseg.nii.gz": "x",
        "derivatives/fmriprep/sub-2/anat/sub-2_desc-aparcaseg_dseg.nii.gz": "x",
        "derivatives/fmriprep/sub-2/anat/sub-2_desc-aseg_dseg.nii.gz": "x",
        "derivatives/fmriprep/sub-2/anat/sub-2_desc-preproc_T1w.nii.gz": "x",
        "derivatives/fmriprep/sub-3/anat/sub-3_desc-brain_mask.nii.gz": "x",
        "derivatives/fmriprep/sub-4/anat/sub-4_dseg.nii.gz": "version https://git-lfs.github.com",
        "derivatives/fmriprep/sub-9/anat/sub-9_dseg.nii.gz": "x"}))
    label = {one: read.scans[f"sub-{one}_ses-a_T1w"].label_uri for one in "1234"}
    assert label["1"].endswith("freesurfer/sub-1_ses-a/mri/aseg.mgz")
    assert label["2"].endswith("sub-2_desc-aseg_dseg.nii.gz")
    assert label["3"].endswith("freesurfer/sub-3/mri/aseg.mgz") and label["4"] is None
    assert read.scans["sub-3_ses-a_T1w"].mask_uri.endswith("sub-3_desc-brain_mask.nii.gz")
    assert read.notes == {  # nothing of a participants.tsv, for there is none
        "people with derivatives but no raw folder": 1,
        "derivative not used: not downloaded": 1, "derivative not used: T1w": 1,
        "derivative not used: the scan has another dseg": 2,
        "derivative not used: a file of FreeSurfer or without a name of BIDS": 1}


def test_a_dataset_of_derivatives_alone(tmp_path: Path):
    read = Read(write(tmp_path / "d", {
        **DATASET, "sub-1/anat/sub-1_desc-preproc_T1w.nii.gz": "x",
        "sub-1/anat/sub-1_space-MNI152NLin2009cAsym_desc-preproc_T1w.nii.gz": "x",
        "sub-1/anat/sub-1_desc-brain_mask.nii.gz": "x",
        "sub-1/func/sub-1_task-rest_desc-preproc_bold.nii.gz": "x"}))
    scan = read.scans["sub-1_desc-preproc_T1w"]
    assert scan.processing == "fmriprep" and scan.mask_uri.endswith("brain_mask.nii.gz")
    assert read.scans["sub-1_task-rest_desc-preproc_bold"].processing == "fmriprep"
    assert len(read.scans) == 2


def test_contents_that_were_not_downloaded(tree: Path):
    anat = tree / "sub-8" / "anat"
    (anat / "sub-8_T2w.nii.gz").symlink_to("../../.git/annex/objects/aa/bb/key")
    (anat / "sub-8_T2w.json").symlink_to("../../.git/annex/objects/aa/bb/other")
    (anat / "sub-8_FLAIR.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    (anat / "sub-8_acq-x_FLAIR.nii.gz").write_text("/annex/objects/MD5E-s3--0123.nii.gz\n")
    (anat / "sub-8_acq-y_FLAIR.nii.gz").write_text("a short but real file")
    reasons = {name: scan.reason for name, scan in Read(tree).scans.items() if "sub-8" in name}
    assert reasons == {"sub-8_T1w": None, "sub-8_T2w": "not_downloaded",
                       "sub-8_FLAIR": "not_downloaded", "sub-8_acq-x_FLAIR": "not_downloaded",
                       "sub-8_acq-y_FLAIR": None}


def test_exclusions_of_scans_tsv_and_phantoms(tmp_path: Path):
    read = Read(write(tmp_path / "d", {
        **DATASET,
        "sub-1/ses-a/sub-1_ses-a_scans.tsv": "filename\tusable\tacq_time\n"
                                             "anat/sub-1_ses-a_run-1_T1w.nii.gz\t0\t2001-02-03\n"
                                             "anat/sub-1_ses-a_run-2_T1w.nii.gz\t1\t2001-02-03\n"
                                             "anat/sub-1_ses-a_run-3_T1w.nii.gz\t1\tn/a\n",
        "sub-1/ses-a/anat/sub-1_ses-a_run-1_T1w.nii.gz": "x",
        "sub-1/ses-a/anat/sub-1_ses-a_run-2_T1w.nii.gz": "x",
        "sub-2/sub-2_scans.tsv": "filename\texclude\nfunc/sub-2_task-a_bold.nii.gz\tyes\n",
        "sub-2/func/sub-2_task-a_bold.nii.gz": "x",
        "derivatives/f/sub-2/func/sub-2_task-a_desc-preproc_bold.nii.gz": "x",
        "sub-Phantom02/anat/sub-Phantom02_T1w.nii.gz": "x"}))
    reasons = {name: scan.reason for name, scan in read.scans.items()}
    assert reasons == {"sub-1_ses-a_run-1_T1w": "cohort_unusable", "sub-1_ses-a_run-2_T1w": None,
                       "sub-2_task-a_desc-preproc_bold": "cohort_unusable",
                       "sub-Phantom02_T1w": "phantom"}
    assert read.notes["scans.tsv names a file that is not there"] == 1
    assert "scans.tsv names a file that is not there, and rules it out" not in read.notes
    assert "2001" not in json.dumps([value for *_, value in read.source.seen.values()])
    labels = ("qa01", "ACR", "012", "tester", "quality")
    assert [label for label in labels if is_phantom(label)] == ["qa01", "ACR"]


@pytest.mark.parametrize("path, named", [
    ("anat/sub-1_ses-a_run-1_T1w.nii", "anat/sub-1_ses-a_run-1_T1w.nii.gz"),
    ("anat/sub-1_ses-a_run-1_T1w.nii.gz", "anat/sub-1_ses-a_run-1_T1w.nii"),
    ("anat/sub-1_ses-a_run-1_T1w.nii.gz", "sub-1/ses-a/anat/sub-1_ses-a_run-1_T1w.nii.gz"),
    ("anat/sub-1_ses-a_run-1_T1w.nii.gz", "anat\\sub-1_ses-a_run-1_T1w.nii.gz"),
    ("anat/sub-1_ses-a_run-1_T1w.nii.gz", "./anat/sub-1_ses-a_run-01_T1w.nii.gz"),
    ("anat/sub-1_ses-a_run-1_T1w.nii.gz", "bids::sub-1/ses-a/anat/sub-1_ses-a_run-1_T1w.nii.gz"),
    ("anat/sub-1_ses-a_run-1_T1w.nii.gz", "/old/place/sub-1_run-1_ses-a_T1w.nii.gz"),
    ("anat/sub-1_ses-a_run-1_T1w.nii.gz", "anat/run-1_T1w.nii.gz"),
    ("anat/sub-1_ses-a_run-1_T1w.mgz", "anat/sub-1_ses-a_run-1_T1w")])
@pytest.mark.parametrize("header, value", [
    ("filename\tquality", "fail"), ("Filename\tQuality", "Bad"), ("filename\tqc_status", "exclude"),
    ("FileName\tInclude", "0"), ("filename\tusable", "0.0"), ("filename\tqc", "3")])
def test_scans_tsv_is_matched_by_entities(tmp_path: Path, path: str, named: str, header: str,
                                          value: str):
    read = Read(write(tmp_path / "d", {
        **DATASET, "sub-1/ses-a/" + path: "x", "sub-1/ses-a/anat/sub-1_ses-a_run-2_T1w.nii.gz": "x",
        "sub-1/ses-a/anat/sub-1_ses-a_run-1_T2w.nii.gz": "x",
        "scans.json": json.dumps({"QC": {"Levels": {"1": "good", "3": "unusable"}}}),
        "sub-1/ses-a/sub-1_ses-a_scans.tsv": f"{header}\n{named}\t{value}\n"
                                             "anat/sub-1_ses-a_run-9_T1w.nii\t" + value + "\n"}))
    assert {name[12:] for name, scan in read.scans.items() if scan.reason} == {"run-1_T1w"}
    assert read.notes["scans.tsv names a file that is not there, and rules it out"] == 1


def test_odd_sidecars_are_read_and_said(tmp_path: Path):
    bold, odd = "sub-{0}/func/sub-{0}_task-rest_bold.{1}", {
        "a": '{"RepetitionTime": "2.0", "InstitutionName": "Köln"}'.encode("latin-1"),
        "b": b'{"RepetitionTime": [2.0], "ProtocolName": "rest\x01"}',
        "c": '\ufeff{"RepetitionTime": 2}'.encode("utf-16"),
        "d": b'{"RepetitionTime": "2000 ms", "EchoTime": "short"}', "e": b"no JSON"}
    files = {bold.format(one, "nii"): "x" for one in odd} | {
        bold.format(one, "json"): data for one, data in odd.items()}
    read = Read(write(tmp_path / "d", {**DATASET, **files}))
    facts = [json.loads(scan.facts or "{}") for scan in read.scans.values()]
    assert facts == [{"RepetitionTime": 2}] * 4 + [{}]
    assert read.scans["sub-a_task-rest_bold"].site == "Köln"
    assert read.notes == {
        "JSON sidecar: is windows-1252, not UTF-8: decoded": 1,
        "JSON sidecar: is utf-16, not UTF-8: decoded": 1,
        "JSON sidecar: is not strict JSON (control characters, backslashes or commas): mended": 1,
        "JSON sidecar: EchoTime is no number: unknown": 1,
        "JSON sidecar unreadable, its facts are unknown": 1}
    remembered = {uri: (size, modified, json.loads(json.dumps(value)))
                  for uri, (size, modified, value) in read.source.seen.items()}
    assert Read(tmp_path / "d", remembered=remembered).notes == read.notes  # said again


def test_a_contrast_agent_in_the_name_alone(tmp_path: Path):
    anat = "sub-1/anat/sub-1"
    read = Read(write(tmp_path / "d", {
        **DATASET, f"{anat}_ce-gad_T1w.nii.gz": "x", f"{anat}_ce-x_run-2_T1w.nii.gz": "x",
        f"{anat}_ce-x_run-2_T1w.json": '{"ContrastBolusIngredient": "IODINE"}'}))
    assert [json.loads(scan.facts)["ContrastBolusIngredient"] for scan in read.scans.values()] == [
        "GADOLINIUM", "IODINE"]


def test_a_uniform_image_is_a_t1w_that_says_so(tmp_path: Path):
    anat = "sub-1/anat/sub-1"
    read = Read(write(tmp_path / "d", {
        **DATASET, f"{anat}_UNIT1.nii.gz": "x", f"{anat}_acq-x_T1w.nii.gz": "x",
        f"{anat}_acq-x_T1w.json": '{"ImageType": ["DERIVED", "UNI"]}'}))
    assert [(scan.modality, json.loads(scan.facts)["ImageType"][-1])
            for scan in read.scans.values()] == [("T1w", "UNI")] * 2


def test_an_unknown_entity_is_taken_and_noted(tmp_path: Path):
    read = Read(write(tmp_path / "d", {**DATASET, "sub-1/anat/sub-1_site-x_T1w.nii.gz": "x"}))
    assert set(read.scans) == {"sub-1_site-x_T1w"}
    assert read.notes["taken, with an entity that BIDS does not know: site"] == 1


# ---- places --------------------------------------------------------------------------------------

def test_loose_files(tmp_path: Path):
    read = Read(write(tmp_path / "ixi", {
        "IXI012_T1w.nii.gz": "x", "sub/IXI012_ses-2_FLAIR.nii.gz": "x", "sub-3_T2w.nii": "x",
        "sub-3_bold.nii": "x", "sub-3_bold.json": '{"RepetitionTime": 3}', "IXI9_T1w.mgz": "x",
        "IXI012_desc-x_dseg.nii.gz": "x", "T1w.nii.gz": "x", "README.md": "x",
        "other/dataset_description.json": "{}", "other/sub-1/anat/sub-1_T1w.nii.gz": "x",
        "other/derivatives/y/dataset_description.json": "{}"}))
    assert sorted((s.participant, s.session, s.modality) for s in read.scans.values()) == [
        ("3", "1", "BOLD"), ("3", "1", "T2w"), ("IXI012", "1", "T1w"), ("IXI012", "2", "FLAIR"),
        ("IXI9", "1", "T1w")]
    assert read.scans["sub-3_bold"].facts == '{"RepetitionTime": 3}'
    assert read.notes == {
        "BIDS dataset inside, not entered: other": 1, "not taken: md file": 1,
        "not taken: file without a _T1w, _T2w, _FLAIR, _pet or _bold ending": 2}


def test_a_link_up_the_tree_ends(tree: Path):
    (tree / "sub-8" / "loop").symlink_to(tree)
    assert len(Read(tree).scans) == 6


def test_the_same_from_s3(tree: Path, s3):
    import s3fs

    write(tree, {"sub-8/anat/sub-8_FLAIR.nii.gz": "version https://git-lfs.github.com/spec/v1",
                 "phenotype/mmse.tsv": "participant_id\tscore\nsub-8\t29\n"})
    s3fs.S3FileSystem().put(str(tree) + "/", f"{s3.uri}/bids/cohort/", recursive=True)
    there, here = Read(f"{s3.uri}/bids/cohort"), Read(tree)
    assert list(there.scans) == list(here.scans)
    for name, scan in there.scans.items():
        assert scan.uri.startswith("s3://") and scan.size_bytes and scan.modified
        assert (scan.facts, scan.field_strength, scan.reason, bool(scan.label_uri)) == (
            here.scans[name].facts, here.scans[name].field_strength, here.scans[name].reason,
            bool(here.scans[name].label_uri))
    assert there.labels == here.labels and there.notes == here.notes


@pytest.mark.parametrize("files, message", [
    ({}, "no such folder"),
    ({"dataset_description.json": "{}", "sub-1/anat/sub-1_T1w.nii.gz": "x",
      "participants.tsv": "id\tage\n1\t2\n"}, "no column participant_id"),
    ({"dataset_description.json": "{}", "sub-1/anat/sub-1_T1w.nii.gz": "x",
      "participants.tsv": "participant_id\nsub-1\t2\n"}, "line 2: more cells"),
])
def test_bad_sources_are_named(tmp_path: Path, files: dict, message: str):
    with pytest.raises(DataError, match=message) as error:
        Read(write(tmp_path / "bad", files))
    assert "bad" in str(error.value)


def test_another_indexer_finds_the_same_images(tree: Path):
    bids2table = pytest.importorskip("bids2table", exc_type=ImportError)
    table = bids2table.index_dataset(str(tree)).to_pylist()
    images = {row["path"].rsplit("/", 1)[-1] for row in table
              if row["suffix"] in ("T1w", "T2w", "FLAIR") and row["part"] != "phase"
              and row["ext"] in (".nii", ".nii.gz")}
    ours = {scan.uri.rsplit("/", 1)[-1] for scan in Read(tree).scans.values()}
    # it knows entities in the standard's order alone, and does not look at the folder's name
    assert images - {"sub-9_T1w.nii.gz"} == ours - {"ses-a_sub-007_run-1_T1w.nii.gz"}


@pytest.fixture(params=["made", "real"])
def visits(request, tmp_path: Path) -> Path:
    """A longitudinal dataset whose masks lie in a space common to the visits."""
    if request.param == "real":
        return request.getfixturevalue("shared_data") / "bids-ms"
    taken = {"ms01": {"1": "T1w FLAIR", "2": "T1w FLAIR"}, "ms03": {"2": "T1w T2w FLAIR"},
             "ms04": {"1": "T1w"}, "ms20": {"2": "T1w FLAIR"}}
    days = {"ms01": ["0", "203"], "ms03": ["671"], "ms04": ["0"], "ms20": ["454"]}
    files = {"dataset_description.json": DESCRIPTION, "participants.tsv":
             "participant_id\tage\tsex\n" + "".join(f"sub-{who}\t40\tF\n" for who in taken)}
    for who, visited in taken.items():
        files |= {f"sub-{who}/ses-{visit}/anat/sub-{who}_ses-{visit}_{suffix}.nii.gz": "x"
                  for visit, suffixes in visited.items() for suffix in suffixes.split()}
        files[f"sub-{who}/sub-{who}_sessions.tsv"] = "session_id\tdays_since_first\n" + "".join(
            f"ses-{visit}\t{day}\n" for visit, day in zip(visited, days[who], strict=True))
        files |= {f"derivatives/lesionchange/sub-{who}/sub-{who}_space-common_{end}.nii.gz": "x"
                  for end in ("desc-brain_mask", "label-lesionchange_mask")}
    return write(tmp_path / "visits", files)


def test_masks_in_a_common_space_are_left_and_days_are_labels(visits: Path):
    read = Read(visits)
    assert len(read.scans) == 10 and {one.participant for one in read.found} == {
        "ms01", "ms03", "ms04", "ms20"}
    # their masks lie in space-common
    assert all(scan.mask_uri is None for scan in read.scans.values())
    assert ("ms01", "2", "days_since_first", "203") in read.labels
