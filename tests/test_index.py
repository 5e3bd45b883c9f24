"""Indexing: BIDS names, sidecars, tables and derivatives become Scans; loose files too."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep.cohorts.base import CohortTables
from data_prep.cohorts.bids import parse_name, read_cohort
from data_prep.index import build_manifest, index, read_manifest
from data_prep.scan import Scan
from neurojepa.errors import DataError

KEY = b"0123456789abcdef0123456789abcdef"


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    """Files of a tree; contents need not be images, for none is opened."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    description = json.dumps({"Name": "t", "BIDSVersion": "1.9.0"})
    return write(tmp_path / "cohort", {
        "dataset_description.json": description,
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
        "sub-007/ses-b/anat/sub-007_ses-b_T1w.nii": "x",
        "sub-007/ses-a/func/sub-007_ses-a_task-rest_bold.nii.gz": "x",
        "sub-8/anat/sub-8_T1w.nii.gz": "x",
        "sub-8/anat/sub-9_T1w.nii.gz": "x",
        "sub-10/anat/sub-10_run-1_T1w.nii.gz": "x",
        "sub-10/anat/sub-10_run-2_T1w.nii.gz": "x",
        "derivatives/labels/dataset_description.json": description,
        "derivatives/labels/sub-007/ses-a/anat/sub-007_ses-a_space-T1w_dseg.nii.gz": "x",
        "derivatives/labels/sub-8/anat/sub-8_space-orig_desc-brain_mask.nii.gz": "x",
        "derivatives/labels/sub-007/ses-b/anat/sub-007_ses-b_space-common_dseg.nii.gz": "x",
        "derivatives/labels/sub-10/anat/sub-10_space-T1w_dseg.nii.gz": "x",
    })


def by_name(tables: CohortTables) -> dict[str, Scan]:
    return {scan.uri.rsplit("/", 1)[-1].split(".")[0]: scan for scan in tables.scans}


def test_entities_may_come_in_any_order():
    name = parse_name("run-2_sub-01_acq-x-y_ses-b_T2w.nii.gz")
    assert name.entities == {"run": "2", "sub": "01", "acq": "x-y", "ses": "b"}
    assert name.suffix == "T2w"


def test_scans_with_inherited_facts_and_tables(tree: Path):
    scans = by_name(read_cohort(str(tree), "c"))
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
    assert first.size_bytes == 1 and first.modified


def test_derivatives_only_in_the_scans_own_space(tree: Path):
    tables = read_cohort(str(tree), "c")
    scans = by_name(tables)
    assert scans["ses-a_sub-007_run-1_T1w"].label_uri.endswith("space-T1w_dseg.nii.gz")
    assert scans["sub-8_T1w"].mask_uri.endswith("desc-brain_mask.nii.gz")
    assert scans["sub-007_ses-b_T1w"].label_uri is None  # space-common
    assert scans["sub-10_run-1_T1w"].label_uri is None  # which run?
    assert scans["sub-007_ses-a_FLAIR"].label_uri is None


def test_what_is_not_used_is_counted(tree: Path):
    notes = read_cohort(str(tree), "c").notes
    assert notes == {
        "not taken: suffix bold": 1,
        "not taken: phase, real or imaginary part": 1,
        "not taken: file name and folder name different people": 1,
        "derivative not used: in the space common, not in a scan's": 1,
        "derivative not used: fits several scans": 1,
        "age is not a number of years (such as 89+): unknown": 1,
        "people without a row in participants.tsv": 1,
        "participants.tsv rows without a scan that is taken": 1,
    }


def test_labels_of_each_session_without_free_text(tree: Path):
    labels = read_cohort(str(tree), "c").labels
    assert ("007", "a", "age", "62.0") in labels and ("007", "b", "age", "61.5") in labels
    assert ("8", "1", "diagnosis", "control") in labels and ("007", "a", "bmi", "21") in labels
    assert {name for _, _, name, _ in labels} == {"age", "sex", "diagnosis", "bmi"}
    assert len(labels) == len(set(labels))


def test_manifest_has_pseudonyms_families_and_splits(tree: Path, tmp_path: Path, capsys):
    out = str(tmp_path / "m.parquet")
    index("bids", str(tree), out, KEY)
    scans, labels = read_manifest(out)
    assert {scan.cohort for scan in scans} == {"cohort"}
    text = pq.read_table(out).drop(["uri", "label_uri", "mask_uri"]).to_pylist()
    assert "007" not in json.dumps(text) and all(len(s.participant) == 16 for s in scans)
    families = {scan.uri.split("/sub-")[1].split("/")[0]: scan.family for scan in scans}
    assert families["007"] == families["8"] != families["10"]  # f1 unites two people
    alone = next(scan for scan in scans if "/sub-10/" in scan.uri)
    assert alone.family == alone.participant
    assert set(labels["participant"].to_pylist()) == {
        scan.participant for scan in scans if "/sub-10/" not in scan.uri}
    printed = capsys.readouterr().out
    assert "6 scans" in printed and "1 x not taken: suffix bold" in printed
    first = Path(out).read_bytes()
    index("bids", str(tree), out, KEY)
    assert Path(out).read_bytes() == first


def test_split_group_and_family_act_together():
    scans = [Scan(f"{p}.nii", "c", p, "", "1", "T1w", "") for p in "abcd"]
    tables = CohortTables(scans, ties=[("a", "family_id:1"), ("b", "family_id:1"),
                                       ("b", "split_group:g"), ("c", "split_group:g")])
    rows = build_manifest(tables, "c", KEY)[0].to_pylist()
    families = {row["uri"][0]: row["family"] for row in rows}
    assert families["a"] == families["b"] == families["c"] != families["d"]


def test_loose_files(tmp_path: Path):
    root = write(tmp_path / "ixi", {
        "IXI012_T1w.nii.gz": "x", "sub/IXI012_ses-2_FLAIR.nii.gz": "x", "sub-3_T2w.nii": "x",
        "IXI012_desc-x_dseg.nii.gz": "x", "T1w.nii.gz": "x", "README.md": "x",
        "other/dataset_description.json": "{}", "other/sub-1/anat/sub-1_T1w.nii.gz": "x",
        "other/derivatives/y/dataset_description.json": "{}"})
    tables = read_cohort(str(root), "ixi")
    assert sorted((s.participant, s.session, s.modality) for s in tables.scans) == [
        ("3", "1", "T2w"), ("IXI012", "1", "T1w"), ("IXI012", "2", "FLAIR")]
    assert tables.notes == {"BIDS dataset inside, not entered: other": 1,
                            "not taken: file without a _T1w, _T2w or _FLAIR ending": 2}


def test_a_dangling_annex_link_is_passed_on(tree: Path):
    link = tree / "sub-8" / "anat" / "sub-8_T2w.nii.gz"
    link.symlink_to("../../.git/annex/objects/aa/bb/key")
    assert "sub-8_T2w" in by_name(read_cohort(str(tree), "c"))


def test_a_link_up_the_tree_ends(tree: Path):
    (tree / "sub-8" / "loop").symlink_to(tree)
    assert len(read_cohort(str(tree), "c").scans) == 6


def test_the_same_from_s3(tree: Path, s3):
    import s3fs

    s3fs.S3FileSystem().put(str(tree) + "/", f"{s3.uri}/bids/cohort/", recursive=True)
    there, here = (read_cohort(source, "c") for source in (f"{s3.uri}/bids/cohort", str(tree)))
    assert by_name(there).keys() == by_name(here).keys()
    assert there.labels == here.labels and there.notes == here.notes
    assert all(scan.uri.startswith("s3://") and scan.size_bytes for scan in there.scans)


@pytest.mark.parametrize("files, message", [
    ({}, "no such folder"),
    ({"x/readme.txt": "x"}, "no T1w, T2w, FLAIR scan found"),
    ({"dataset_description.json": "{}", "sub-1/anat/sub-1_T1w.nii.gz": "x",
      "participants.tsv": "id\tage\n1\t2\n"}, "no column participant_id"),
    ({"dataset_description.json": "{}", "sub-1/anat/sub-1_T1w.nii.gz": "x",
      "participants.tsv": "participant_id\nsub-1\t2\n"}, "line 2: more cells"),
])
def test_bad_sources_are_named(tmp_path: Path, files: dict, message: str):
    with pytest.raises(DataError, match=message) as error:
        read_cohort(str(write(tmp_path / "bad", files)), "c")
    assert "bad" in str(error.value)


def test_command_line_errors_are_one_line(run_cli, tmp_path: Path):
    key = tmp_path / "key"
    key.write_bytes(KEY)
    key.chmod(0o600)
    done = run_cli("-m", "data_prep", "index", "--cohort", "bids", "--source",
                   str(tmp_path / "nowhere"), "--out", str(tmp_path / "m.parquet"),
                   "--key", str(key))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr
    assert list(tmp_path.iterdir()) == [key]


def test_a_damaged_manifest_is_named(tmp_path: Path):
    write(tmp_path, {"m.parquet": "not parquet", "m.labels.parquet": ""})
    with pytest.raises(DataError, match=r"m\.parquet: not a Parquet table"):
        read_manifest(str(tmp_path / "m.parquet"))


def test_real_tree(shared_data: Path):
    tables = read_cohort(str(shared_data / "bids-ms"), "ms")
    assert len(tables.scans) == 10 and {scan.participant for scan in tables.scans} == {
        "ms01", "ms03", "ms04", "ms20"}
    assert all(scan.mask_uri is None for scan in tables.scans)  # theirs lie in space-common
    assert ("ms01", "2", "days_since_first", "203") in tables.labels
