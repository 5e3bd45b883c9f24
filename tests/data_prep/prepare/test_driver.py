"""prepare: records, restarts, quarantine, duplicates, adding; once over a real Ray, once on S3."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep import archive
from data_prep.archive import (
    IMAGE_SCALE,
    check_reachable,
    list_slots,
    open_archive,
    read_volume,
    slot,
    write_volume,
)
from data_prep.prepare import driver, person
from data_prep.scan import Scan, read_manifest
from data_prep.verify import verify
from data_prep.volumes.preset import PRESETS
from neurojepa.errors import ClusterError, DataError
from neurojepa.storage import write_bytes
from tests.helpers.fakes import QUICK, fake_prepare, make_manifest, volume
from tests.helpers.trees import tree_bytes

TWO = {"p1/1/T1w": "one", "p1/2/T1w": "two", "p2/1/T1w": "three", "p2/1/T2w": "flag"}


def prepare(manifest: str, out: object, **options):
    return driver.prepare([manifest], out=str(out), preset=QUICK, workers=2,
                          prepare_one=fake_prepare, **options)


def test_rows_figures_and_volumes(calls, tmp_path: Path):
    counts = prepare(make_manifest(tmp_path, TWO | {"p3/1/T1w": "bad"}), tmp_path / "a")
    assert counts == {"accepted": 3, "flagged": 1, "rejected": 1}
    archive = open_archive(str(tmp_path / "a"))
    rows = {row["uri"].rsplit("/", 1)[-1]: row for row in archive.rows}
    flagged, bad = rows["fake_p2_1_T2w.txt"], rows["fake_p3_1_T1w.txt"]
    assert (flagged["status"], flagged["reason"]) == ("flagged", "low_dice")
    assert (bad["status"], bad["reason"], bad["scan_id"]) == ("rejected", "truncated", None)
    assert "ends after 3 bytes" in bad["message"]
    assert flagged["figures"]["qc_snr"] == 10.0 and flagged["figures"]["qc_odd"] is None
    assert bad["figures"]["qc_snr"] is None
    provenance = json.loads(flagged["provenance"])
    assert provenance["parameters"]["name"] == "quick" and len(provenance["input_sha256"]) == 64
    arrays = read_volume(archive.uri, slot("p1", rows["fake_p1_1_T1w.txt"]["scan_id"]))
    image, mask = volume("one")
    assert np.abs(arrays["image"] * IMAGE_SCALE - image).max() <= IMAGE_SCALE / 2 + 1e-7
    assert (arrays["mask"] == mask).all() and (arrays["label"] == mask * 17).all()
    assert "label" not in read_volume(archive.uri, slot("p2", flagged["scan_id"]))
    assert archive.labels.num_rows == 5 and verify(archive.uri) == 0


def test_a_second_run_does_only_what_is_missing(calls, tmp_path: Path):
    manifest, out = make_manifest(tmp_path, TWO), tmp_path / "a"
    prepare(manifest, out)
    whole = tree_bytes(out)
    prepare(manifest, out)
    assert calls == ["p1", "p2"] and tree_bytes(out) == whole
    # a run killed before p2's record and the merge
    for name in ("archive.json", "scans.parquet", next(n for n in whole if "results/p2" in n)):
        (out / name).unlink()
    with pytest.raises(DataError, match="no finished archive"):
        open_archive(str(out))
    prepare(manifest, out)
    assert calls == ["p1", "p2", "p2"] and tree_bytes(out) == whole
    make_manifest(tmp_path, TWO | {"p1/1/T1w": "changed"})
    prepare(manifest, out)
    assert calls[3:] == ["p1"] and verify(str(out)) == 0  # the voxels of "one" are gone, too


def test_removed_voxels_are_made_again(calls, tmp_path: Path):
    import shutil

    manifest, out = make_manifest(tmp_path, TWO), tmp_path / "a"
    prepare(manifest, out)
    whole = tree_bytes(out)
    shutil.rmtree(out / "volumes.zarr" / "p2")
    prepare(manifest, out)
    assert calls[2:] == ["p2"] and tree_bytes(out) == whole


def test_another_manifest_adds(calls, tmp_path: Path):
    out = tmp_path / "a"
    prepare(make_manifest(tmp_path, TWO), out)
    counts = prepare(make_manifest(tmp_path, {"q1/1/T1w": "q"}, "other", "n"), out)
    assert counts == {"accepted": 4, "flagged": 1}
    archive = open_archive(str(out))
    assert {row["cohort"] for row in archive.rows} == {"fake", "other"}
    assert set(archive.labels["participant"].to_pylist()) == {"p1", "p2", "q1"}


def test_two_manifests_at_once_are_like_one_after_the_other(calls, tmp_path: Path):
    manifests = [make_manifest(tmp_path, TWO),
                 make_manifest(tmp_path, {"q1/1/T1w": "q"}, "other", "n")]
    driver.prepare(manifests, out=str(tmp_path / "a"), preset=QUICK, workers=1,
                   prepare_one=fake_prepare)
    for manifest in manifests:
        prepare(manifest, tmp_path / "b")
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


def test_a_failing_person_is_quarantined(calls, tmp_path: Path):
    manifest, out = make_manifest(tmp_path, TWO | {"p3/1/T1w": "crash"}), tmp_path / "a"
    counts = prepare(manifest, out)
    row = next(row for row in open_archive(str(out)).rows if row["participant"] == "p3")
    assert (row["status"], row["reason"]) == ("rejected", "worker_failed")
    assert row["message"].startswith("ZeroDivisionError: a fault in the code (fakes.py:")
    assert counts["rejected"] == 1
    prepare(manifest, out)
    assert calls == ["p1", "p2", "p3"]


def test_duplicates_never_take_two_slots(calls, tmp_path: Path):
    out = tmp_path / "a"
    manifest = make_manifest(tmp_path, TWO | {"p1/3/T1w": "one", "p3/1/T1w": "three"})
    prepare(manifest, out)
    rows = open_archive(str(out)).rows
    reasons = {(row["participant"], row["session"]): row["reason"] for row in rows
               if row["status"] == "rejected"}
    ids = {(row["participant"], row["session"], row["modality"]): row["scan_id"] for row in rows}
    assert reasons == {("p1", "3"): f"duplicate_of:p1/{ids['p1', '1', 'T1w']}",
                       ("p3", "1"): f"duplicate_of:p2/{ids['p2', '1', 'T1w']}"}
    said = {row["participant"]: row["message"] for row in rows if row["status"] == "rejected"}
    assert "the same person has this scan twice" in said["p1"] and "split_group" not in said["p1"]
    assert "if the two participants are one person, tie them by split_group" in said["p3"]
    assert len(list_slots(str(out))) == 4 and verify(str(out)) == 0
    prepare(manifest, out)
    assert calls == ["p1", "p2", "p3"]  # the duplicate's record still counts
    make_manifest(tmp_path, {"p2/1/T1w": "unlike", "p3/1/T1w": "three"})
    prepare(manifest, out)  # the original is gone: its duplicate takes the place
    row = next(row for row in open_archive(str(out)).rows if row["participant"] == "p3")
    assert row["status"] == "accepted" and verify(str(out)) == 0


def test_nothing_usable_is_an_error(calls, tmp_path: Path):
    with pytest.raises(DataError, match=r"none of 1 scans is usable.*ends after 3 bytes"):
        prepare(make_manifest(tmp_path, {"p1/1/T1w": "bad"}), tmp_path / "a")


def test_a_store_that_cannot_be_written_stops_the_run(calls, tmp_path: Path):
    out = tmp_path / "a"
    (out / "volumes.zarr").mkdir(parents=True)
    (out / "volumes.zarr" / "p1").write_text("a file where a folder must be")
    with pytest.raises(DataError, match=r"volumes\.zarr/p1/.*cannot be written"):
        prepare(make_manifest(tmp_path, TWO), out)
    assert not (out / "archive.json").exists()


@pytest.mark.parametrize("num_written", [3, 7])
def test_a_kill_while_a_slot_is_written_leaves_no_trace(calls, tmp_path: Path, monkeypatch,
                                                        num_written: int):
    """Seven objects make a slot of p1's first scan, the eighth is of the second."""
    manifest = make_manifest(tmp_path, TWO)
    prepare(manifest, tmp_path / "a")

    def cut_short(uri: str, data: bytes) -> None:
        if len(written) == num_written:
            Path(f"{uri}.0badcafe.tmp").parent.mkdir(parents=True, exist_ok=True)
            Path(f"{uri}.0badcafe.tmp").write_bytes(data[:9])
            raise KeyboardInterrupt
        written.append(uri)
        write_bytes(uri, data)

    written: list[str] = []
    scans = [Scan(**row) for row in read_manifest(manifest)[0].to_pylist()
             if row["participant"] == "p1"]
    task = person.PersonTask(out=str(tmp_path / "b"), scans=scans, record="p1-0.json", stale=[],
                             preset=QUICK, limits=person.Limits(), prepare_one=fake_prepare)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(archive, "write_bytes", cut_short)
        person._prepare_and_write(task, scans, [])
    (tmp_path / "b" / "results").mkdir(exist_ok=True)
    (tmp_path / "b" / "results" / "p2-0.json.0badcafe.tmp").write_bytes(b"[")
    prepare(manifest, tmp_path / "b")
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


def test_other_parameters_take_the_place_of_the_earlier_ones(calls, tmp_path: Path):
    """The record of parameters whose voxels were replaced must not come back to life."""
    manifest, out = make_manifest(tmp_path, TWO), tmp_path / "a"
    for preset in (QUICK, PRESETS["default"], QUICK):
        driver.prepare([manifest], out=str(out), preset=preset, workers=1, prepare_one=fake_prepare)
        assert len(list((out / "results").iterdir())) == 2 and verify(str(out)) == 0
    assert calls == ["p1", "p2"] * 3


def test_a_full_disk_stops_the_run_and_the_next_one_goes_on(calls, tmp_path: Path):
    out = tmp_path / "a"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", out],
                      capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here; run as root")
    try:
        with pytest.raises(DataError, match=r"No space left on device.*free space"):
            prepare(make_manifest(tmp_path, TWO), out)
        assert not (out / "archive.json").exists()
        subprocess.run(["mount", "-o", "remount,size=50m", out], check=True)
        prepare(make_manifest(tmp_path, TWO), out)
        prepare(make_manifest(tmp_path, TWO), tmp_path / "b")
        assert tree_bytes(out) == tree_bytes(tmp_path / "b")
    finally:
        subprocess.run(["umount", out], check=True)


@pytest.mark.slow(14)
def test_archive_on_s3(calls, tmp_path: Path, s3):
    manifest, out = make_manifest(tmp_path, TWO | {"p3/1/T1w": "three"}), f"{s3.uri}/archive"
    person._child().end()  # one from before the server knows no address of it
    prepare(manifest, tmp_path / "a")
    prepare(manifest, out)
    there, here = open_archive(out), open_archive(str(tmp_path / "a"))
    assert there.rows == here.rows and there.fingerprint == here.fingerprint
    assert list_slots(out) == list_slots(here.uri)
    assert verify(out) == 0
    prepare(manifest, out)
    assert calls == ["p1", "p2", "p3"] * 2


@pytest.mark.slow(13)
def test_stock_zarr_opens_the_archive_over_s3(calls, tmp_path: Path, s3):
    import zarr

    person._child().end()
    out = f"{s3.uri}/stock"
    prepare(make_manifest(tmp_path, {"p1/1/T1w": "one"}), out)
    group = zarr.open_group(f"{out}/volumes.zarr/{next(iter(list_slots(out)))}", mode="r")
    image, mask = volume("one")
    assert np.abs(group["image"][:] * group["image"].attrs["scale"] - image).max() < 1e-4
    crop = np.s_[60:120, 72:144, 60:120]  # one inner chunk of the shard
    assert (group["mask"][crop] == mask[crop]).all()
    assert group["image"].metadata.dimension_names == ("x", "y", "z")


def test_no_s3_is_one_clear_line_in_seconds(monkeypatch, run_cli, tmp_path: Path):
    manifest = make_manifest(tmp_path, TWO)
    done = run_cli("-m", "data_prep", "prepare", "--manifest", manifest, "--out", "s3://b/a",
                   env={"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x",
                        "AWS_SECRET_ACCESS_KEY": "y"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "http://127.0.0.1:9 does not answer" in done.stderr
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    begin = time.monotonic()
    with pytest.raises(DataError, match="does not answer"):
        check_reachable("s3://b/a")
    assert time.monotonic() - begin < 20
    check_reachable(str(tmp_path))  # a local path needs nothing


def test_no_ray_at_the_address_is_said_at_once(tmp_path: Path):
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1:9: no Ray answers there"):
        prepare(make_manifest(tmp_path, TWO), tmp_path / "a", ray_address="127.0.0.1:9")


def test_missing_manifest(tmp_path: Path):
    with pytest.raises(DataError, match=r"m\.parquet: not found"):
        prepare(str(tmp_path / "m.parquet"), tmp_path / "a")


def test_damaged_slots_are_named(tmp_path: Path):
    out = str(tmp_path)
    image, mask = volume("x")
    write_volume(out, "p/s", image=image, mask=mask, label=None)
    shard = tmp_path / "volumes.zarr/p/s/image/c/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(DataError, match="p/s: cannot be read"):
        read_volume(out, "p/s")
    with pytest.raises(DataError, match="p/none: cannot be read"):
        read_volume(out, "p/none")
