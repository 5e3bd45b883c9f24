"""What a batch says of its scans."""

from __future__ import annotations

from pathlib import Path

import pytest

from neurojepa.feed.format import FeedCode, open_feed
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
