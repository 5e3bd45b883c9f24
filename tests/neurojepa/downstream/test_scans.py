"""Raw scans to embeddings in one call: what is taken, what is told, and the same numbers to the bit
as through index, prepare and pack."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import neurojepa
from data_prep.identity import load_key, pseudonym
from data_prep.index import index
from data_prep.pack import pack
from data_prep.prepare import driver
from data_prep.scan import read_manifest
from neurojepa.downstream import scans as raw
from neurojepa.downstream.api import Model
from neurojepa.downstream.embed import embed, fit_places, select_rows
from neurojepa.downstream.unasked import manifest_of
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import open_feed
from neurojepa.weights import Weights, untrained
from tests.helpers import ROOT
from tests.helpers.dicom import write_series
from tests.helpers.fakes import QUICK, fake_prepare, make_manifest
from tests.helpers.feeds import GRID, tiny_config, write_feed
from tests.helpers.trees import write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """An untrained model that knows T1w and T2w from a feed of blobs."""
    root = tmp_path_factory.mktemp("model")
    feed = open_feed(write_feed(str(root / "feed")))
    config = tiny_config(str(root / "feed"), root / "run")
    fresh = untrained(config, GRID)
    places = fit_places(fresh.model, config, feed, np.arange(24))
    return Model(Weights(fresh.model, config, GRID, 0, places), "W", "cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Preparation in milliseconds, and a key; returns the key's file."""
    monkeypatch.setattr(driver, "prepare", partial(driver.prepare, prepare_one=fake_prepare))
    key = tmp_path / "key"
    key.write_text("a public key for invented people")
    key.chmod(0o600)
    return key


def by_hand(model: Model, folder: Path, key: Path, cohort: str = "bids") -> dict[str, np.ndarray]:
    """Embeddings by scan through index, prepare and pack."""
    out = folder.parent / "by-hand"
    manifest, archive, feed = (str(out / name) for name in ("m.parquet", "archive", "feed"))
    index(cohort, str(folder), out=manifest, key=load_key(str(key)))
    driver.prepare([manifest], out=archive, preset=QUICK, workers=1)
    pack(archive, out=feed, grid=GRID, shard_bytes=1 << 20)
    opened = open_feed(feed)
    rows = select_rows(opened, None, None)
    found = embed(model.weights.model, model.weights.config, opened, rows, model.weights.places)
    return dict(zip(found.scan_id.tolist(), found.values, strict=True))


@pytest.mark.slow(5)
def test_a_folder_gives_the_same_numbers_as_the_steps_by_hand(model: Model, quick: Path,
                                                               tmp_path: Path) -> None:
    folder = write(tmp_path / "cohort", {
        "dataset_description.json": "{}",
        "sub-01/anat/sub-01_T1w.nii.gz": "1", "sub-01/anat/sub-01_T2w.nii.gz": "2",
        "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz": "flag",
        "sub-02/ses-b/anat/sub-02_ses-b_T1w.nii.gz": "3",
        "sub-03/anat/sub-03_T1w.nii.gz": "bad", "sub-03/anat/sub-03_FLAIR.nii.gz": "4"})
    out = tmp_path / "out"
    found = model.embed(folder, out=str(out), preset="quick", key=str(quick), regions=True)
    found.write(str(out))
    expected = by_hand(model, without_flair(folder), quick)
    table = pq.read_table(out / "embeddings.parquet")
    assert table["scan_id"].to_pylist() == found.table["scan_id"].to_pylist()
    assert set(table["scan_id"].to_pylist()) == set(expected) and len(expected) == 4
    for scan, row in zip(table["scan_id"].to_pylist(), found.values, strict=True):
        assert np.array_equal(row, expected[scan]), scan

    assert found.skipped == {"FLAIR": 1}  # the weights know none
    key = load_key(str(quick))
    people = {pseudonym(key, "cohort", each): each for each in ("01", "02", "03")}
    assert {people[each] for each in table["participant"].to_pylist()} == {"01", "02"}
    told = {row["file"].rsplit("/", 1)[-1]: row for row in csv.DictReader(
        (out / "scans.csv").read_text().splitlines())}
    assert len(told) == 6 and told["sub-03_T1w.nii.gz"]["status"] == "rejected"
    assert "ends after 3 bytes" in told["sub-03_T1w.nii.gz"]["message"]
    assert told["sub-03_FLAIR.nii.gz"]["embedded"] == "no"
    assert told["sub-02_ses-a_T1w.nii.gz"]["participant_id"] == "02"
    assert told["sub-02_ses-a_T1w.nii.gz"]["flags"] == "low_dice"
    assert (out / "scans.csv").stat().st_mode & 0o777 == 0o600
    flags = dict(zip(table["session"].to_pylist(), table["flags"].to_pylist(), strict=True))
    assert flags["a"] == "low_dice" and flags["b"] is None

    means = pq.read_table(out / "people.parquet").to_pylist()
    by_name = {(people[row["participant"]], row["modality"]): row for row in means}
    assert by_name["02", "T1w"]["scans"] == 2 and set(by_name) == {
        ("01", "T1w"), ("01", "T2w"), ("02", "T1w")}
    both = [row for row, person in zip(found.values, table["participant"].to_pylist(), strict=True)
            if people[person] == "02"]
    assert np.allclose(by_name["02", "T1w"]["embedding"], np.mean(both, 0), atol=1e-6)
    assert pq.read_table(out / "sessions.parquet").num_rows == 4
    regions = pq.read_table(out / "regions.parquet")
    assert "left frontal" in regions["region"].to_pylist()
    assert set(regions["scan_id"].to_pylist()) == set(expected)


def without_flair(folder: Path) -> Path:
    """A copy of the dataset that has only what the weights know; its name is that of the cohort."""
    copy = folder.parent / "copy" / folder.name
    write(copy, {path.relative_to(folder).as_posix(): path.read_text()
                 for path in folder.rglob("*") if path.is_file() and "FLAIR" not in path.name})
    return copy


@pytest.mark.slow(3)
def test_single_files_are_told_apart_and_a_second_run_prepares_nothing(
        model: Model, quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, {"a/t1.nii.gz": "1", "b/t1.nii.gz": "2", "c/t2.nii.gz": "3"})
    named = [tmp_path / "a/t1.nii.gz", tmp_path / "b/t1.nii.gz"]
    out = tmp_path / "out"
    first = model.embed(named, out=str(out), preset="quick", key=str(quick))
    assert first.scans is not None and set(first.scans.ids.values()) == {"a", "b"}
    assert "2 scans to prepare" in capsys.readouterr().out
    again = model.embed(named, out=str(out), preset="quick", key=str(quick))
    said = capsys.readouterr().out
    assert "to prepare" not in said and "already packed" in said
    assert np.array_equal(first.values, again.values)
    # one more: the others are not prepared again, and only those named are embedded
    more = model.embed([*named, tmp_path / "c/t2.nii.gz"], out=str(out), preset="quick",
                       key=str(quick))
    assert more.table.num_rows == 3 and "1 scans to prepare" in capsys.readouterr().out
    one = model.embed(named[1], out=str(out), preset="quick", key=str(quick))
    assert one.table.num_rows == 1


def test_of_a_dataset_one_modality_is_embedded(model: Model, quick: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "cohort", {
        "dataset_description.json": "{}", "sub-01/anat/sub-01_T1w.nii.gz": "1",
        "sub-01/anat/sub-01_T2w.nii.gz": "2"})
    found = model.embed(folder, modality="T2w", preset="quick", key=str(quick))
    assert found.table["modality"].to_pylist() == ["T2w"]
    with pytest.raises(DataError, match=r"no scan with modality FLAIR; it has modality \['T1w'"):
        model.embed(folder, modality="FLAIR", preset="quick", key=str(quick))
    with pytest.raises(ConfigError, match="--cohort x: only a feed has cohorts"):
        model.embed(folder, cohort="x", preset="quick", key=str(quick))


@pytest.mark.parametrize(("modality", "left"), [
    ("T1w", {"T1w", "FLAIR"}), ("PET", {"T1w", "FLAIR", "PET"}),
    ("tSNR", {"T1w", "FLAIR", "BOLD"}), (None, {"T1w", "FLAIR", "PET", "BOLD"})])
def test_what_a_modality_needs(tmp_path: Path, modality: str | None, left: set[str]) -> None:
    manifest = make_manifest(tmp_path, {f"p{n}/1/{name}": "1" for n in range(2)
                                        for name in ("T1w", "FLAIR", "PET", "BOLD")})
    wanted = manifest_of(modality, manifest, str(tmp_path / "archive"))
    scans, labels = read_manifest(wanted)
    assert set(scans["modality"].to_pylist()) == left and len(scans) == 2 * len(left)
    assert labels.equals(read_manifest(manifest)[1])  # and the whole manifest stays
    assert len(read_manifest(manifest)[0]) == 8


@pytest.mark.slow(4)
def test_pet_and_bold_are_prepared_only_where_they_are_asked_for(
        model: Model, quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "cohort", {
        "dataset_description.json": "{}", "sub-01/anat/sub-01_T1w.nii.gz": "1",
        "sub-01/anat/sub-01_T2w.nii.gz": "2", "sub-01/pet/sub-01_pet.nii.gz": "3",
        "sub-01/func/sub-01_task-rest_bold.nii.gz": "4"})
    out = str(tmp_path / "out")

    def prepared(modality: str) -> list[str]:
        found = raw.prepare_scans([str(folder)], out, GRID, key=str(quick), preset="quick",
                                  modality=modality)
        return sorted(found.about["modality"].to_pylist())

    assert prepared("T1w") == ["T1w", "T2w"]  # left and right are checked across these
    assert "not prepared, as --modality T1w needs none of them: 1 BOLD, 1 PET" in (
        capsys.readouterr().out)
    assert prepared("PET") == ["PET", "T1w", "T2w"]
    capsys.readouterr()
    assert prepared("T1w") == ["PET", "T1w", "T2w"]  # what is there already stays
    assert "to prepare" not in capsys.readouterr().out


def test_of_a_folder_a_modality_names_only_files_that_do_not_say_theirs(
        model: Model, quick: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "some", {"a_T1w.nii.gz": "1", "b.nii.gz": "2", "c_T2w.nii.gz": "3"})
    found = model.embed(folder, modality="T1w", preset="quick", key=str(quick))
    assert found.scans is not None
    people = [found.scans.ids[name] for name in found.table["participant"].to_pylist()]
    assert sorted(people) == ["a", "b"]
    assert found.table["modality"].to_pylist() == ["T1w", "T1w"]


def test_a_table_of_files_brings_ids_and_modalities(model: Model, quick: Path,
                                                    tmp_path: Path) -> None:
    write(tmp_path / "scans", {"x.nii.gz": "1", "y.mgz": "2", "files.csv":
                               "file,participant_id,modality,age\nx.nii.gz,p1,T1w,60\n"
                               "y.mgz,p2,T2w,61\n"})
    found = model.embed(tmp_path / "scans" / "files.csv", preset="quick", key=str(quick))
    assert found.scans is not None and set(found.scans.ids.values()) == {"p1", "p2"}
    assert sorted(found.table["age"].to_pylist()) == [60, 61]
    assert set(found.table["status"].to_pylist()) == {"accepted"}


@pytest.mark.parametrize(("paths", "expected"), [
    (["/d/sub-7/ses-2/anat/sub-7_ses-2_T1w.nii.gz"], [("7", "2")]),
    (["/d/p07/t1.nii.gz"], [("p07", "1")]),
    (["/d/p07.nii.gz"], [("p07", "1")]),
    (["/d/bert/mri/orig.mgz", "/d/ernie/mri/orig.mgz"], [("bert", "1"), ("ernie", "1")]),
    (["/t1.nii.gz"], [("t1", "1")]),
    (["/d/p3_T1w.nii", "/d/p3_T2w.nii"], [("p3", "1"), ("p3", "1")]),
    (["/d/dicom/41/", "/d/dicom/42/"], [("41", "1"), ("42", "1")]),
])
def test_who_a_file_shows(paths: list[str], expected: list[tuple[str, str]]) -> None:
    paths = [path.rstrip("/") for path in paths]
    found = raw._people(paths)
    assert [found[path] for path in paths] == expected


def test_every_form_that_preparation_reads_is_found(tmp_path: Path) -> None:
    names = ("a_T1w.NII.GZ", "b_T1w.nii.zst", "c_T1w.nii.bz2", "d_T1w.hdr", "d_T1w.img",
             "e_T1w.MGH", "._a_T1w.NII.GZ", "notes.txt")
    for name in names:
        (tmp_path / name).write_bytes(b"-" * 200)
    assert [os.path.basename(path) for path in raw._images(str(tmp_path))] == \
        ["a_T1w.NII.GZ", "b_T1w.nii.zst", "c_T1w.nii.bz2", "d_T1w.hdr", "e_T1w.MGH"]
    who = raw._people(raw._images(str(tmp_path)))
    assert sorted(who.values()) == [(name, "1") for name in "abcde"]


def test_the_voxels_of_a_pair_come_with_their_header(tmp_path: Path) -> None:
    for name in ("x_T1w.hdr", "x_T1w.img"):
        (tmp_path / name).write_bytes(b"-" * 200)
    source, _ = raw._linked([str(tmp_path / "x_T1w.hdr")], str(tmp_path / "out"), None)
    assert sorted(path.name for path in Path(source).glob("*/*")) == ["x_T1w.hdr", "x_T1w.img"]


def test_two_files_that_would_be_one_person_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"/d/b/x.nii.gz: .* same person as /d/a/x.nii.gz, 'x'"):
        raw._people(["/d/a/x.nii.gz", "/d/b/x.nii.gz"])


@pytest.mark.parametrize(("name", "modality"), [
    ("t1.nii.gz", "T1w"), ("x_T2_FLAIR.nii", "FLAIR"), ("IXI012-Guys-MPRAGE.nii.gz", "T1w"),
    ("sub-1_bold.nii.gz", "BOLD"), ("a.T2w.mgz", "T2w"), ("x_pet.nii.gz", "PET")])
def test_the_modality_of_a_name(name: str, modality: str) -> None:
    assert raw._modality(f"/nowhere/{name}") == modality


@pytest.mark.parametrize("name", ["brain.nii.gz", "t1_and_t2.nii.gz", "art1.nii.gz"])
def test_a_modality_that_is_not_told_is_asked_for(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: its name does not tell .* --modality"):
        raw._modality(f"/nowhere/{name}")


def test_dicom_folders_are_series_and_may_be_named_by_the_scanner(tmp_path: Path) -> None:
    for name, told in (("one", "MPRAGE sag"), ("two", "T2 tse")):
        write_series(tmp_path / name, [0.0, 1.0, 2.0], SeriesDescription=told)
        (tmp_path / name / ".DS_Store").write_bytes(b"left by macOS")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/notes.txt").symlink_to(tmp_path / "gone")  # as git-annex leaves files
    kind, source, tables = raw._source([str(tmp_path)], str(tmp_path / "out/scans"), None)
    rows = list(csv.DictReader(Path(tables[0]).read_text().splitlines()))
    assert kind == "files" and [row["modality"] for row in rows] == ["T1w", "T2w"]
    assert all(row["file"].endswith("/") and Path(source, row["file"]).is_dir() for row in rows)
    assert [row["participant_id"] for row in rows] == ["one", "two"]


@pytest.mark.parametrize(("names", "error", "words"), [
    (["missing.nii.gz"], DataError, r"missing.nii.gz: no such file"),
    (["empty"], DataError, r"empty: no image there"),
    (["s3://bucket/t1.nii.gz", "s3://bucket/t2.nii.gz"], ConfigError, "name a folder or a table"),
    (["there_T1w.nii.gz", "files.csv"], ConfigError, "files.csv: .* embedded alone"),
    (["there_T1w.nii.gz", "empty"], ConfigError, "must hold the slices of one"),
    ([], ConfigError, "no scan was named"),
])
def test_what_cannot_be_embedded_is_said(tmp_path: Path, names: list[str],
                                         error: type[Exception], words: str) -> None:
    write(tmp_path, {"there_T1w.nii.gz": "1", "files.csv": "file\n"})
    (tmp_path / "empty").mkdir()
    named = [name if "://" in name else str(tmp_path / name) for name in names]
    with pytest.raises(error, match=words):
        raw._source(named, str(tmp_path / "out/scans"), None)


def test_weights_that_know_none_of_the_scans_say_so(model: Model, quick: Path,
                                                    tmp_path: Path) -> None:
    write(tmp_path, {"x_FLAIR.nii.gz": "1"})
    with pytest.raises(DataError, match=r"no scan of a modality that W knows \(T1w, T2w\)"):
        model.embed(tmp_path / "x_FLAIR.nii.gz", preset="quick", key=str(quick))


def test_a_device_that_is_not_there(model: Model) -> None:
    with pytest.raises(ConfigError, match="--device nothing"):
        Model(model.weights, "W", "nothing")


@pytest.mark.slow(5)
def test_embedding_loads_no_cluster_and_no_trainer() -> None:
    code = ("import sys, neurojepa.downstream.api, data_prep.index, data_prep.pack, "
            "data_prep.prepare.driver, data_prep.volumes.pipeline; print(*sys.modules)")
    loaded = set(subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, text=True,
                                capture_output=True).stdout.split())
    assert not loaded & {"ray", "deepspeed", "webdataset", "tensorboard", "s3fs"}
    assert callable(neurojepa.load)
