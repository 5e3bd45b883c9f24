"""What a batch says of its scans, and batches that are fetched before they are needed."""

from __future__ import annotations

from concurrent.futures import wait
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from neurojepa.errors import DataError
from neurojepa.feed.ahead import Ahead
from neurojepa.feed.format import FeedCode, open_feed
from neurojepa.feed.loader import Loader
from tests.helpers.feeds import feed_config, read_batches, write_feed


@pytest.mark.parametrize("unscanned", [[], [0], [5, 6]])
def test_a_batch_says_whether_its_scans_are_whole(tmp_path: Path, unscanned: list[int]) -> None:
    feed = write_feed(str(tmp_path / "feed"), num_samples=8, unscanned=unscanned)
    ids = open_feed(feed).index["scan_id"].to_pylist()
    named = {ids[number] for number in unscanned}
    for batch in read_batches(feed_config(feed)):
        assert batch.all_scanned == (not named & set(batch.scan_ids))
        assert batch.all_scanned == bool((batch.voxels != FeedCode.NOT_SCANNED).all())


def test_a_partner_that_is_not_whole_counts_too(tmp_path: Path) -> None:
    feed = write_feed(str(tmp_path / "feed"), num_samples=8, per_session=2, unscanned=[1])
    seen = set()
    for batch in read_batches(feed_config(feed, cross_modal=1.0)):
        assert batch.target_voxels is not None
        whole = [bool((voxels != FeedCode.NOT_SCANNED).all())
                 for voxels in (batch.voxels, batch.target_voxels)]
        assert batch.all_scanned == all(whole)
        seen.add(tuple(whole))
    assert len(seen) > 1


CPU = torch.device("cpu")


def loader_of(feed: str, first_step: int = 0) -> Loader:
    return Loader(open_feed(feed), feed_config(feed), rank=0, world=1, first_step=first_step)


@pytest.mark.parametrize("fetches", [0, 1, 3])
def test_fetching_ahead_loses_nothing(tmp_path: Path, fetches: int) -> None:
    """All batches in their order, and from a later step on what comes from there."""
    feed = write_feed(str(tmp_path / "feed"), num_samples=8)
    expected = read_batches(feed_config(feed))
    loader = loader_of(feed)
    for first_step in (0, 5, 2):  # as when a run goes back, with a batch on the device
        loader.seek(first_step, ())
        ahead, rest = Ahead(loader, CPU), expected[first_step * loader.micro_steps:]
        taken = []
        for _ in rest[:-1] if first_step else rest:
            taken.append(next(ahead))
            for _ in range(fetches):
                ahead.fetch()
        for batch, plain in zip(taken, rest, strict=False):
            assert batch.scan_ids == plain.scan_ids
            assert torch.equal(batch.voxels, plain.voxels)
            assert torch.equal(batch.position, plain.position)
    loader.close()


def test_fetching_ahead_never_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, allowed = loader_of(write_feed(str(tmp_path / "feed"), num_samples=8)), Event()
    read = loader._read

    def held(position: int, *rest: Any) -> Any:
        if position >= 2:  # behind the first batch
            allowed.wait()
        return read(position, *rest)

    monkeypatch.setattr(loader, "_read", held)
    ahead = Ahead(loader, CPU)
    first = next(ahead)
    ahead.fetch()
    assert ahead._next is None and not loader.has_next_ready
    allowed.set()
    second = next(ahead)
    assert [*first.position.tolist(), *second.position.tolist()] == [0, 1, 2, 3]
    loader.close()


def test_what_is_wrong_with_the_next_batch_is_raised_where_it_is_needed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop may end the run first, with its checkpoint."""
    loader = loader_of(write_feed(str(tmp_path / "feed"), num_samples=8))
    read = loader._read

    def failing(position: int, *rest: Any) -> Any:
        if position >= 2:  # behind the first batch
            raise DataError("damaged")
        return read(position, *rest)

    monkeypatch.setattr(loader, "_read", failing)
    ahead = Ahead(loader, CPU)
    next(ahead)
    for _, reads in loader._ahead:
        wait(reads)
    ahead.fetch()
    with pytest.raises(DataError, match="damaged"):
        next(ahead)
    loader.close()
