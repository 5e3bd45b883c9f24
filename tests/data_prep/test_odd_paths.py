"""Folders and files with brackets, blanks, umlauts ...: found and read from every kind of store."""

from __future__ import annotations

import shutil
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import pytest

from data_prep.cohorts.bids.reader import read_cohort as read_bids
from data_prep.cohorts.files import read_cohort as read_files
from data_prep.cohorts.source import Source
from data_prep.members import list_members
from data_prep.prepare.person import input_sha256
from data_prep.scan import split_member
from data_prep.volumes.reading.decode import fetch
from data_prep.volumes.reading.dicom import to_nifti
from tests.helpers.dicom import write_series
from tests.helpers.odd_names import ODD_NAMES
from tests.helpers.trees import DESCRIPTION, write

PARENTS = ["local", "s3"]


def placed(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> str:
    """The tree at tmp_path/tree, there or in an object store under an odd prefix."""
    if kind == "local":
        return str(tmp_path / "tree")
    import s3fs

    uri = f"{request.getfixturevalue('s3').uri}/odd/{tmp_path.name} [x]"
    store = s3fs.S3FileSystem()
    for file in sorted((tmp_path / "tree").rglob("*")):
        if file.is_file():
            store.pipe_file(f"{uri}/{file.relative_to(tmp_path / 'tree')}", file.read_bytes())
    return uri


@pytest.mark.parametrize("kind", PARENTS)
def test_a_tree_of_odd_names_is_indexed_and_read(tmp_path: Path, kind: str,
                                                 request: pytest.FixtureRequest) -> None:
    files: dict[str, str | bytes] = {"dataset_description.json": DESCRIPTION}
    for number, name in enumerate(ODD_NAMES.values()):
        folder = f"sub-{number:02d}/{name}"
        files[f"{folder}/sub-{number:02d}_T1w.nii.gz"] = f"scan {number}"
        files[f"{folder}/sub-{number:02d}_T1w.json"] = f'{{"MagneticFieldStrength": {number + 1}}}'
    write(tmp_path / "tree", files)
    scans = {one.participant: one.scans for one in read_bids(
        Source(placed(tmp_path, kind, request)), "c")}
    assert len(scans) == len(ODD_NAMES)
    for number, name in enumerate(ODD_NAMES.values()):
        (scan,) = scans[f"{number:02d}"]
        assert f"/{name}/" in scan.uri and scan.field_strength == number + 1
        assert fetch(scan.uri, None) == f"scan {number}".encode() and input_sha256(scan)
        assert split_member(scan.uri) == (scan.uri, None)


@pytest.mark.parametrize("kind", PARENTS)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_table_may_spell_umlauts_otherwise(tmp_path: Path, kind: str, form: str,
                                             request: pytest.FixtureRequest) -> None:
    names = {name: unicodedata.normalize(form, name) for name in ("Zoë [1]/ä.nii", "ö/", "b.nii")}
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    write(tmp_path / "tree", {
        names["Zoë [1]/ä.nii"]: "1", unicodedata.normalize(form, "Zoë [1]/ä.json"):
        '{"MagneticFieldStrength": 3}', f"{names['ö/']}1.dcm": "22", "b.nii": "3"})
    table = tmp_path / "t.csv"
    table.write_text("file,participant_id,modality\n" + "".join(
        f"{unicodedata.normalize(other, name)},{number},T1w\n"
        for number, name in enumerate(names)), encoding="utf-8")
    source = Source(placed(tmp_path, kind, request), tables=[str(table)])
    scans = [scan for one in read_files(source, "c") for scan in one.scans]
    assert [scan.uri.removeprefix(f"{source.uri}/") for scan in scans] == list(names.values())
    assert scans[0].field_strength == 3 and scans[1].size_bytes == 2
    assert fetch(scans[0].uri, None) == b"1"


def test_a_series_in_odd_folders(tmp_path: Path, s3) -> None:
    import s3fs

    plain = write_series(tmp_path / "plain", [0, 2, 4, 6])
    expected, store = to_nifti(f"{plain}/"), s3fs.S3FileSystem()
    for name in ODD_NAMES.values():
        shutil.copytree(plain, tmp_path / "series" / name)
        assert to_nifti(f"{tmp_path}/series/{name}/") == expected
    for name in ("MPRAGE [ND]", "why?", ODD_NAMES["nfd"]):
        for file in plain.iterdir():
            store.pipe_file(f"{s3.uri}/series/{name}/{file.name} [1]", file.read_bytes())
        assert to_nifti(f"{s3.uri}/series/{name}/") == expected


@pytest.mark.parametrize("packed", ["zip", "tar", "tgz"])
def test_members_with_odd_names(tmp_path: Path, packed: str) -> None:
    plain = write_series(tmp_path / "plain", [0, 2, 4, 6])
    expected = to_nifti(f"{plain}/")
    archive = tmp_path / f"MPRAGE [ND] a::b.{packed}"
    names = {f"{name}/{file.name}": file for name in ODD_NAMES.values()
             for file in sorted(plain.iterdir())}
    if packed == "zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            for name, file in names.items():
                zipped.write(file, name)
    else:
        with tarfile.open(archive, "w:gz" if packed == "tgz" else "w") as tar:
            for name, file in names.items():
                tar.add(file, name)
    assert {member["name"] for member in list_members(str(archive))} == set(names)
    for name in ("brackets", "chain", "nfd", "long", "question"):
        assert to_nifti(str(archive), f"{ODD_NAMES[name]}/") == expected
    member = next(iter(names))
    assert split_member(f"{archive}::{member}") == (str(archive), member)


def test_names_of_a_tar_in_latin_1(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", encoding="latin-1",
                      format=tarfile.GNU_FORMAT) as tar:
        (tmp_path / "x").write_bytes(b"voxels")
        tar.add(tmp_path / "x", "Müller/T1w.nii")
    assert [member["name"] for member in list_members(str(tmp_path / "a.tar"))] == [
        "Müller/T1w.nii"]
    assert fetch(str(tmp_path / "a.tar"), "Müller/T1w.nii") == b"voxels"
