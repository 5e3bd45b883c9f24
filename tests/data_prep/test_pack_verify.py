"""pack and verify: exact resampling, tars that stock webdataset reads, damage that is found."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from data_prep import pack as packing
from data_prep.archive import IMAGE_SCALE, commit_tables, open_archive, read_volume, slot
from data_prep.pack import coarsen, pack, pack_shard
from data_prep.prepare import driver
from data_prep.report.report import report
from data_prep.verify import verify
from neurojepa.errors import DataError
from neurojepa.feed.format import (
    ARCHIVE_GRID,
    TRAINING_GRIDS,
    Grid,
    commit_feed,
    decode_array,
    open_feed,
    quantise,
)
from neurojepa.feed.loader import SampleReader
from tests.helpers.fakes import QUICK, fake_prepare, make_manifest, run_here
from tests.helpers.texts import without_hashes

THREE, FINE = TRAINING_GRIDS["3mm"], TRAINING_GRIDS["1.5mm"]
MIB = 1 << 20


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two cohorts: 5 usable scans and a rejected one."""
    root = tmp_path_factory.mktemp("archive")
    out = str(root / "a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "run_tasks", run_here)
        for cohort, contents in (
                ("fake", {"p1/1/T1w": "one", "p1/2/T1w": "two", "p2/1/T2w": "flag",
                          "p3/1/T1w": "bad"}),
                ("other", {"q1/1/T1w": "four", "q2/1/FLAIR": "five"})):
            driver.prepare([make_manifest(root, contents, cohort, cohort)], out=out, preset=QUICK,
                           workers=1,
                         prepare_one=fake_prepare)
    return out


@pytest.fixture
def feed(archive: str, tmp_path: Path) -> Path:
    pack(archive, out=str(tmp_path / "f"), grid=THREE, shard_bytes=256 * MIB)
    return tmp_path / "f"


# ---- resampling ----------------------------------------------------------------------------------

@pytest.mark.parametrize("grid", [THREE, FINE], ids=lambda grid: grid.name)
def test_a_constant_brain_stays_constant_to_its_edge(grid: Grid):
    mask = np.zeros(ARCHIVE_GRID.shape, np.uint8)
    mask[31:150, 41:170, 35:140] = 1
    image, codes, label = coarsen(np.where(mask == 1, 0.7, 0.0), mask=mask, label=None, grid=grid)
    assert label is None and image.shape == codes.shape == grid.shape
    assert np.allclose(image[codes == 1], 0.7, atol=1e-6)
    volume = (codes == 1).sum() * grid.spacing_mm**3
    assert volume == pytest.approx((mask == 1).sum(), rel=0.02)


@pytest.mark.parametrize("grid", [THREE, FINE], ids=lambda grid: grid.name)
def test_places_are_kept_on_each_axis(grid: Grid):
    """A ramp along an axis, in millimetres, is that axis's millimetres on the new grid."""
    mask = np.ones(ARCHIVE_GRID.shape, np.uint8)
    for axis in range(3):
        def ramp(grid: Grid, axis: int = axis) -> np.ndarray:
            line = grid.affine[axis, 3] + grid.spacing_mm * np.arange(grid.shape[axis])
            return np.broadcast_to(np.expand_dims(line, [a for a in range(3) if a != axis]),
                                   grid.shape)
        image, _, label = coarsen(ramp(ARCHIVE_GRID), mask=mask,
                                   label=np.rint(ramp(ARCHIVE_GRID)).astype(np.int16), grid=grid)
        # two voxels of which one counts half: their centre is a twelfth of a voxel off
        assert np.abs(image - ramp(grid)).max() < (1e-3 if grid == THREE else 0.09)
        assert label is not None
        assert np.abs(label - ramp(grid)).max() <= 1.0  # the nearest voxel of 1 mm


def test_codes_go_by_majority_and_3mm_is_a_block_mean():
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 3, ARCHIVE_GRID.shape).astype(np.uint8)
    image = rng.random(ARCHIVE_GRID.shape, dtype=np.float32)
    mean, codes, _ = coarsen(image, mask=mask, label=None, grid=THREE)
    inside = tuple(slice(9, -9) for _ in range(3))  # 162 of 180 mm, and 198 of 216

    def blocks(volume: np.ndarray) -> np.ndarray:
        return volume[inside].reshape(54, 3, 66, 3, 54, 3).transpose(0, 2, 4, 1, 3, 5).reshape(
            54, 66, 54, 27)
    counts = np.stack([(blocks(mask) == code).sum(-1) for code in range(3)])
    clear = np.sort(counts, 0)[-1] > np.sort(counts, 0)[-2]
    assert (codes == counts.argmax(0))[clear].all() and clear.mean() > 0.7
    expected = (blocks(image) * (blocks(mask) == 1)).sum(-1) / np.maximum(counts[1], 1)
    assert np.allclose(mean, expected, atol=1e-5)


# ---- the feed ------------------------------------------------------------------------------------

def test_samples_are_those_of_the_archive(archive: str, feed: Path):
    opened = open_feed(str(feed))
    rows = opened.index.to_pylist()
    usable = [row for row in open_archive(archive).rows if row["status"] != "rejected"]
    assert sorted(row["scan_id"] for row in rows) == sorted(row["scan_id"] for row in usable)
    assert len(rows) == 5 and opened.grid == THREE
    reader = SampleReader(opened)
    for number, row in enumerate(rows):
        arrays = read_volume(archive, slot(row["participant"], row["scan_id"]))
        image, mask, label = coarsen(arrays["image"] * np.float32(IMAGE_SCALE), mask=arrays["mask"],
                                      label=arrays.get("label"), grid=THREE)
        codes = reader.image(number)
        assert (codes == quantise(image, mask)).all()
        assert row["num_foreground"] == ((codes > 0) & (codes < 255)).sum() == (mask == 1).sum()
        if label is None:
            assert row["label_offset"] is None and row["modality"] != "T1w"
        else:
            assert (reader.label(number) == label).all() and label.any()
    assert {row["participant"] for row in opened.labels().to_pylist()} == {
        row["participant"] for row in rows}


@pytest.mark.slow(10)
def test_a_killed_pack_goes_on_and_any_number_of_workers_makes_the_same_bytes(
        archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pack(archive, out=str(whole), grid=THREE, shard_bytes=1, workers=2)  # on Ray
    made: list[str] = []

    def three_then_none(shard: packing.Shard) -> int:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(shard.name)
        return pack_shard(shard)
    monkeypatch.setattr(packing, "pack_shard", three_then_none)
    with pytest.raises(KeyboardInterrupt):
        pack(archive, out=str(parts), grid=THREE, shard_bytes=1)
    with pytest.raises(DataError, match="no committed feed"):
        open_feed(str(parts))
    before = [(parts / name).stat().st_mtime_ns for name in made]
    monkeypatch.undo()
    pack(archive, out=str(parts), grid=THREE, shard_bytes=1)
    assert "3 of 5 shards are there already" in capsys.readouterr().out
    assert [(parts / name).stat().st_mtime_ns for name in made] == before
    assert contents(whole) == contents(parts) and len(contents(whole)) == 5 + 3


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*") if path.is_file()}


def test_shards_are_small_and_of_one_cohort(archive: str, tmp_path: Path):
    pack(archive, out=str(tmp_path), grid=THREE, shard_bytes=1)  # a shard holds at least one scan
    rows = open_feed(str(tmp_path)).index.to_pylist()
    assert len({row["shard"] for row in rows}) == 5
    assert all(Path(row["shard"]).name.startswith(row["cohort"] + "-") for row in rows)
    assert verify(str(tmp_path)) == 0


@pytest.mark.slow(6)
def test_packing_again_only_when_the_archive_changed(archive: str, feed: Path, capsys):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes())
              for path in feed.rglob("*") if path.is_file()}
    pack(archive, out=str(feed), grid=THREE, shard_bytes=256 * MIB)
    assert "already packed" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, (time, _) in before.items())
    pack(archive, out=str(feed), grid=FINE, shard_bytes=256 * MIB)  # another grid replaces it
    assert open_feed(str(feed)).grid == FINE and len(list(feed.glob("shards/*"))) == 2
    pack(archive, out=str(feed), grid=THREE, shard_bytes=256 * MIB)
    assert {path: path.read_bytes() for path in before} == {
        path: content for path, (_, content) in before.items()}
    next(feed.glob("shards/*")).unlink()
    pack(archive, out=str(feed), grid=THREE, shard_bytes=256 * MIB)  # a lost shard is made again
    assert verify(str(feed)) == 0


def test_stock_webdataset_reads_the_tars_from_s3(archive: str, feed: Path, s3):
    out = f"{s3.uri}/feed"
    pack(archive, out=out, grid=THREE, shard_bytes=256 * MIB)
    opened = open_feed(out)
    assert opened.fingerprint == open_feed(str(feed)).fingerprint and verify(out) == 0
    rows = {row["scan_id"]: row for row in opened.index.to_pylist()}
    shards = [f"{out}/{shard}" for shard in sorted({row["shard"] for row in rows.values()})]
    wds.gopen_schemes["s3"] = lambda url, mode="rb", bufsize=0, **_: fsspec.open(url, mode).open()
    reader = SampleReader(opened)
    seen = set()
    for sample in wds.WebDataset(shards, shardshuffle=False):
        row = rows[sample["__key__"]]
        image = decode_array(sample["image.npy.zst"], THREE.shape, "image")
        number = opened.index["scan_id"].to_pylist().index(sample["__key__"])
        assert (image == reader.image(number)).all()
        assert ("label.npy.zst" in sample) == (row["label_length"] is not None)
        seen.add(sample["__key__"])
    assert seen == set(rows)


def test_unfinished_archives_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no finished archive here"):
        pack(str(tmp_path), out=str(tmp_path / "f"), grid=THREE, shard_bytes=MIB)
    assert not (tmp_path / "f").exists()


# ---- verify --------------------------------------------------------------------------------------

def wrong(target: object, capsys) -> str:
    """What verify says; it must fail."""
    capsys.readouterr()
    assert verify(str(target)) == 1
    return capsys.readouterr().out


def test_verify_finds_a_flipped_byte(feed: Path, capsys):
    row = open_feed(str(feed)).index.to_pylist()[0]
    shard = feed / row["shard"]
    data = bytearray(shard.read_bytes())
    data[row["offset"] + row["length"] // 2] ^= 1
    shard.write_bytes(data)
    said = wrong(feed, capsys)
    assert f"{row['scan_id']}.image.npy.zst: content differs" in said and "1 problems" in said


def test_verify_finds_missing_cut_and_foreign_shards(feed: Path, capsys):
    first, second = sorted(feed.glob("shards/*"))
    (feed / "shards" / "extra.tar").write_bytes(first.read_bytes())
    second.unlink()
    first.write_bytes(first.read_bytes()[:700])
    said = wrong(feed, capsys)
    assert "extra.tar: a shard that the index does not know" in said
    assert f"{second.name}: not found" in said
    assert first.name in said


def test_verify_finds_members_the_index_does_not_know(feed: Path, capsys):
    shard = sorted(feed.glob("shards/*"))[0]
    with tarfile.open(shard, "a") as tar:
        member = tarfile.TarInfo("stranger.image.npy.zst")
        tar.addfile(member, io.BytesIO())
    assert "stranger.image.npy.zst is not in the index" in wrong(feed, capsys)


def test_verify_finds_a_person_or_family_in_two_splits(feed: Path, capsys):
    opened = open_feed(str(feed))
    rows = opened.index.to_pylist()
    rows[0]["split"] = "test"  # p1's other visit stays in train
    commit_feed(str(feed), THREE, rows=opened.index.from_pylist(rows, opened.index.schema),
                labels=opened.labels())
    said = wrong(feed, capsys)
    assert "participant p1 is in the splits test, train" in said
    assert "family p1 is in the splits test, train" in said


def test_verify_finds_a_changed_index(feed: Path):
    (feed / "index.parquet").write_bytes((feed / "index.parquet").read_bytes() + b" ")
    with pytest.raises(DataError, match=r"does not match feed\.json"):
        verify(str(feed))


def test_verify_finds_damage_in_an_archive(archive: str, tmp_path: Path, capsys):
    import zarr

    out = tmp_path / "a"
    shutil.copytree(archive, out)
    assert verify(str(out)) == 0
    usable = [row for row in open_archive(str(out)).rows if row["status"] != "rejected"]
    changed, gone, cut = (slot(row["participant"], row["scan_id"]) for row in usable[:3])
    zarr.open_group(str(out / "volumes.zarr" / changed))["image"][90, 90, 90] = 5
    shutil.move(out / "volumes.zarr" / gone, out / "volumes.zarr" / "p9" / "stray")
    (out / "volumes.zarr" / cut / "mask" / "c/0/0/0").write_bytes(b"")
    said = wrong(out, capsys)
    assert f"{changed}: voxels differ from their hash" in said
    assert f"{gone}: accepted, but its voxels are not in the archive" in said
    assert "p9/stray: voxels without an accepted row" in said
    assert f"{cut}: cannot be read" in said or f"{cut}: voxels differ" in said
    table = pq.read_table(out / "scans.parquet")
    pq.write_table(table.slice(1), out / "scans.parquet")
    with pytest.raises(DataError, match=r"does not match archive\.json"):
        verify(str(out))


def test_verify_finds_a_review_of_scans_that_are_not_there(archive: str, tmp_path: Path, capsys):
    out = tmp_path / "a"
    shutil.copytree(archive, out)
    opened = open_archive(str(out))
    known = next(row["scan_id"] for row in opened.rows if row["status"] != "rejected")
    commit_tables(str(out), scans=opened.scans, labels=opened.labels,
                  review=pa.table({"scan_id_a": [known], "scan_id_b": ["gone"]}))
    assert "review.parquet: scan gone is no usable row" in wrong(out, capsys)
    (out / "review.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"review\.parquet: does not match archive\.json"):
        verify(str(out))


def test_verify_names_what_is_neither(tmp_path: Path):
    with pytest.raises(DataError, match=r"neither feed\.json nor archive\.json"):
        verify(str(tmp_path))


# ---- report --------------------------------------------------------------------------------------

def test_report_counts_and_shows_without_names(archive: str, tmp_path: Path):
    report(archive, str(tmp_path / "r.html"))
    page = (tmp_path / "r.html").read_text()
    assert "6 scans of 5 people: 4 accepted, 1 flagged, 1 rejected" in page
    assert page.count("<img ") == 5 and "truncated" in page and "low dice" in page
    assert "http" not in without_hashes(page) and ".txt" not in page


# ---- the whole way -------------------------------------------------------------------------------

@pytest.mark.slow(40)
@pytest.mark.cluster
def test_the_commands_on_a_synthetic_cohort(run_cli, tmp_path: Path, s3):
    """synth, index, prepare, pack and verify, with the real preparation; the feed lies on S3."""
    key = tmp_path / "key"
    key.write_text("0123456789abcdef")
    key.chmod(0o600)
    cohort, manifest, archive = (str(tmp_path / name) for name in ("cohort", "m.parquet", "a"))
    feed = f"{s3.uri}/synthetic"
    for command in (
            ["synth", "--out", cohort, "--participants", "1", "--spacing-mm", "3",
             "--workers", "1"],
            ["index", "--cohort", "bids", "--source", cohort, "--out", manifest,
             "--key", str(key)],
            ["prepare", "--manifest", manifest, "--out", archive, "--preset", "quick",
             "--workers", "1"],
            ["pack", "--archive", archive, "--out", feed, "--grid", "3mm"],
            ["verify", archive], ["verify", feed]):
        done = run_cli("-m", "data_prep", *command)
        assert done.returncode == 0, done.stderr
    rows = open_archive(archive).rows
    assert len(rows) >= 2 and all(row["status"] != "rejected" for row in rows)
    opened = open_feed(feed)
    assert opened.index.num_rows == len(rows)
    labels = {row["name"] for row in opened.labels().to_pylist()}
    assert {"age", "sex", "diagnosis", "ventricle_ml"} <= labels
    assert json.loads(rows[0]["provenance"])["parameters"]["name"] == "quick"


def test_pack_offers_every_training_grid():
    from data_prep.__main__ import GRIDS

    assert list(TRAINING_GRIDS) == GRIDS
