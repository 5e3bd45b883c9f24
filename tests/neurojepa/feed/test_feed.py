"""The feed: codec, commit record, order of samples, and the loader at every world size."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from neurojepa.config import DataConfig, RootConfig, validate
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import (
    ARCHIVE_GRID,
    INDEX_SCHEMA,
    LABELS_SCHEMA,
    TRAINING_GRIDS,
    Grid,
    commit_feed,
    decode_array,
    encode_array,
    open_feed,
    quantise,
)
from neurojepa.feed.loader import Batch, Loader, SampleReader
from neurojepa.feed.order import BLOCK, Order
from neurojepa.storage import sha256, write_bytes

GRID = Grid("toy", (6, 8, 10), 4.0)


def index_of(count: int, **columns: list[str]) -> pa.Table:
    rows = [{"scan_id": f"{n:024x}", "split": "train", "modality": "T1w", "cohort": "toy",
             **{name: values[n] for name, values in columns.items()}} for n in range(count)]
    return pa.Table.from_pylist(rows, schema=INDEX_SCHEMA)


def write_feed(root: Path, count: int = 11) -> str:
    """A committed feed whose sample n holds the value n + 1 everywhere."""
    rows, buffer = [], io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for n in range(count):
            data = encode_array(np.full(GRID.shape, n + 1, np.uint8))
            member = tarfile.TarInfo(f"{n:024x}.image.npy.zst")
            member.size = len(data)
            offset = buffer.tell() + 512
            tar.addfile(member, io.BytesIO(data))
            rows.append({"scan_id": f"{n:024x}", "split": "train", "modality": "T1w",
                         "cohort": "toy", "shard": "shards/toy-000000.tar", "offset": offset,
                         "length": len(data), "sha256": sha256(data)})
    write_bytes(f"{root}/shards/toy-000000.tar", buffer.getvalue())
    commit_feed(str(root), GRID, rows=pa.Table.from_pylist(rows, schema=INDEX_SCHEMA),
                labels=LABELS_SCHEMA.empty_table())
    return str(root)


def config_of(feed: str, **train: int) -> RootConfig:
    return validate({"data": {"feed": feed}, "run": {"dir": "unused"},
                     "train": {"steps": 4, "global_batch": 6, "micro_batch": 2, **train}}, "test")


# ---- grids and codec -----------------------------------------------------------------------------

@pytest.mark.parametrize("grid", [ARCHIVE_GRID, *TRAINING_GRIDS.values()], ids=lambda g: g.name)
def test_a_grid_is_centred_on_the_mni_brain_and_axes_point_to_ras(grid: Grid) -> None:
    middle = (np.array(grid.shape) - 1) / 2
    assert np.allclose(grid.affine @ [*middle, 1], [0, -17, 6, 1])
    assert np.allclose(grid.affine[:3, :3], grid.spacing_mm * np.eye(3))


def test_an_array_survives_its_codec_and_stock_numpy_can_read_it() -> None:
    import zstandard

    array = np.random.default_rng(0).integers(0, 255, GRID.shape).astype(np.uint8)
    data = encode_array(array)
    assert np.array_equal(decode_array(data, GRID.shape, "x"), array)
    stock = np.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(data)), allow_pickle=False)
    assert np.array_equal(stock, array)


@pytest.mark.parametrize("data", [
    b"not zstd", encode_array(np.zeros((6, 8, 11), np.uint8)),
    encode_array(np.zeros((400, 400, 10), np.uint8)),
    encode_array(np.zeros(GRID.shape, np.uint8))[:-3],
], ids=["rubbish", "other shape", "too large", "cut"])
def test_damaged_or_foreign_bytes_are_refused_by_name(data: bytes) -> None:
    with pytest.raises(DataError, match="sample-7"):
        decode_array(data, GRID.shape, "sample-7")


def test_quantise_keeps_air_brain_and_unscanned_apart() -> None:
    volume = np.array([0.0, 0.0, 0.5, 1.0, 1.7, 0.3])
    mask = np.array([0, 1, 1, 1, 1, 2])
    assert quantise(volume, mask).tolist() == [0, 1, 127, 254, 254, 255]


# ---- commit record -------------------------------------------------------------------------------

def test_a_feed_without_its_commit_record_or_with_a_changed_index_is_refused(
        tmp_path: Path) -> None:
    uri = write_feed(tmp_path / "feed")
    feed = open_feed(uri)
    assert feed.grid == GRID and feed.index.num_rows == 11
    record = json.loads((tmp_path / "feed/feed.json").read_text())
    assert record["num_samples"] == 11
    index = tmp_path / "feed/index.parquet"
    index.write_bytes(index.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"does not match feed\.json"):
        open_feed(uri)
    (tmp_path / "feed/feed.json").unlink()
    with pytest.raises(DataError, match="no committed feed here"):
        open_feed(uri)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "is-a-directory"
    (target / "child").mkdir(parents=True)
    with pytest.raises(DataError, match="cannot be written"):
        write_bytes(str(target), b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["is-a-directory"]


# ---- order ---------------------------------------------------------------------------------------

def test_each_epoch_is_a_permutation_and_epochs_differ() -> None:
    order = Order(index_of(37), DataConfig(feed="f"), seed=3)
    epochs = order.rows(np.arange(37 * 60)).reshape(60, 37)
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 60


def test_order_is_a_function_of_seed_and_position_only() -> None:
    index = index_of(37)
    order = Order(index, DataConfig(feed="f"), seed=3)
    straight = order.rows(np.arange(200))
    shuffled = np.random.default_rng(0).permutation(200)
    assert np.array_equal(order.rows(shuffled), straight[shuffled])
    assert not np.array_equal(Order(index, DataConfig(feed="f"), 4).rows(np.arange(200)), straight)


def test_order_does_not_depend_on_how_the_feed_was_packed() -> None:
    index = index_of(20)
    backwards = index.take(list(range(19, -1, -1)))
    first = Order(index, DataConfig(feed="f"), 0)
    second = Order(backwards, DataConfig(feed="f"), 0)
    positions = np.arange(50)
    assert first.fingerprint == second.fingerprint
    assert np.array_equal(first.rows(positions), 19 - second.rows(positions))


def test_weights_set_exact_shares_in_every_block_and_each_group_runs_its_own_epochs() -> None:
    modality = ["T1w"] * 30 + ["FLAIR"] * 5
    data = DataConfig(feed="f", weights={"toy/T1w": 2, "toy/FLAIR": 1})
    rows = Order(index_of(35, modality=modality), data, 0).rows(np.arange(3 * BLOCK))
    for block in rows.reshape(3, BLOCK):
        assert abs(int((block >= 30).sum()) - BLOCK / 3) <= 1
    counts = np.bincount(rows, minlength=35)
    assert np.ptp(counts[:30]) <= 1 and np.ptp(counts[30:]) <= 1
    runs = np.diff(np.flatnonzero(rows >= 30))
    assert len(set(runs.tolist())) > 3  # shuffled, not every third


@pytest.mark.parametrize(("balance", "expected"), [(0, 1 / 3), (0.5, 10 / 140), (1, 1 / 110)])
def test_balance_lies_between_equal_shares_and_shares_by_count(balance: float,
                                                               expected: float) -> None:
    """How often FLAIR comes up: 10,000 T1w, 900 T2w and 100 FLAIR scans."""
    modality = ["T1w"] * 10_000 + ["T2w"] * 900 + ["FLAIR"] * 100
    index = index_of(len(modality), modality=modality)
    rows = Order(index, DataConfig(feed="f", balance=balance), 0).rows(np.arange(11 * BLOCK))
    assert (rows >= 10_900).mean() == pytest.approx(expected, abs=0.001)
    fingerprints = {Order(index, DataConfig(feed="f", balance=share), 0).fingerprint
                    for share in (0, 0.5, 1)}
    assert len(fingerprints) == 3


def test_the_rarest_scan_of_a_cohort_comes_up_in_every_block() -> None:
    cohorts = ["large"] * 5000 + ["rare"]
    order = Order(index_of(5001, cohort=cohorts), DataConfig(feed="f", balance=0.99), 0)
    for block in range(3):
        rows = order.rows(np.arange(block * BLOCK, (block + 1) * BLOCK))
        assert (rows == 5000).sum() == 1


def test_a_feed_of_one_group_has_one_order_whatever_the_balance() -> None:
    orders = [Order(index_of(37), DataConfig(feed="f", balance=share), 0) for share in (0, 0.5, 1)]
    assert len({order.fingerprint for order in orders}) == 1
    assert len({tuple(order.rows(np.arange(100))) for order in orders}) == 1


def test_more_groups_than_slots_are_refused() -> None:
    index = index_of(BLOCK + 1, cohort=[f"site{n}" for n in range(BLOCK + 1)])
    with pytest.raises(ConfigError, match=r"data\.balance = 0\.5.*1001 groups.*set it to 1"):
        Order(index, DataConfig(feed="f"), 0)
    assert Order(index, DataConfig(feed="f", balance=1), 0).num_samples == BLOCK + 1


def test_filters_and_weights_that_fit_nothing_are_refused() -> None:
    index = index_of(4)
    with pytest.raises(ConfigError, match=r"data\.split = 'val'.*\['train'\]"):
        Order(index, DataConfig(feed="f", split="val"), 0)
    with pytest.raises(ConfigError, match="toy/PET"):
        Order(index, DataConfig(feed="f", weights={"toy/PET": 1.0}), 0)


# ---- loader --------------------------------------------------------------------------------------

def read_all(config: RootConfig, uri: str, world: int, first: int = 0) -> list[dict[int, str]]:
    """Per step: position -> scan id of the samples that count, over all ranks."""
    steps: list[dict[int, str]] = [{} for _ in range(first, config.train.steps)]
    feed = open_feed(uri)
    for rank in range(world):
        loader = Loader(feed, config, rank=rank, world=world, first_step=first)
        for number, batch in enumerate(loader):
            assert isinstance(batch, Batch) and batch.voxels.shape == (2, *GRID.shape)
            for n, scan_id in enumerate(batch.scan_ids):
                assert batch.voxels[n].unique().tolist() == [int(scan_id, 16) + 1]
                if batch.weight[n]:
                    seen = steps[number // loader.micro_steps]
                    assert int(batch.position[n]) not in seen
                    seen[int(batch.position[n])] = scan_id
        loader.close()
    return steps


def test_every_world_size_sees_the_same_samples_in_each_step(tmp_path: Path) -> None:
    uri = write_feed(tmp_path / "feed")
    config = config_of(uri)
    alone = read_all(config, uri, world=1)
    assert [sorted(step) for step in alone] == [
        list(range(6 * step, 6 * step + 6)) for step in range(4)]
    for world in (2, 3, 4, 5):
        assert read_all(config, uri, world) == alone
    assert read_all(config, uri, 2, first=2) == alone[2:]


def test_a_damaged_sample_is_named_and_never_replaced(tmp_path: Path) -> None:
    uri = write_feed(tmp_path / "feed")
    shard = tmp_path / "feed/shards/toy-000000.tar"
    feed = open_feed(uri)
    data = bytearray(shard.read_bytes())
    data[feed.index["offset"][4].as_py() + 20] ^= 1
    shard.write_bytes(data)
    reader = SampleReader(feed)
    assert reader.image(3).max() == 4
    with pytest.raises(DataError, match=r"toy-000000\.tar.*content differs"):
        reader.image(4)
    shard.unlink()
    with pytest.raises(DataError, match=r"toy-000000\.tar.*cannot be read"):
        reader.image(3)


def test_a_feed_reads_the_same_from_s3(tmp_path: Path, s3) -> None:
    local = write_feed(tmp_path / "feed")
    remote = f"{s3.uri}/feed"
    for name in ("shards/toy-000000.tar", "index.parquet", "labels.parquet", "feed.json"):
        write_bytes(f"{remote}/{name}", (tmp_path / "feed" / name).read_bytes())
    config = config_of(remote)
    assert read_all(config, remote, 2) == read_all(config, local, 2)
