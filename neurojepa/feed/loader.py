"""From positions to micro-batches: range reads, hash check, decoding, many samples ahead.

Step s covers positions [s*G, (s+1)*G) with G = train.global_batch.  A rank takes its micro-batches
from them as a fixed function of (rank, world), so every world size sees the same samples in a
step.  Where G does not divide by world x micro_batch, the last micro-step is filled up with
repeats of weight 0.  There is no state to save: a loader starts at any step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from neurojepa.config import RootConfig
from neurojepa.errors import DataError
from neurojepa.feed.format import (
    MODALITIES,
    Feed,
    decode_array,
    join,
    open_store,
    sha256,
    store_errors,
)
from neurojepa.feed.order import Order


@dataclass
class Batch:
    """One micro-batch of a rank.  B scans on a grid of X, Y, Z voxels."""

    voxels: torch.Tensor  # uint8 [B, X, Y, Z]: 0 air, 255 not scanned, 1..254 brain
    modality: torch.Tensor  # int64 [B], index into MODALITIES
    position: torch.Tensor  # int64 [B], the key of all randomness of the sample
    weight: torch.Tensor  # float32 [B], 0 for a fill-up repeat
    scan_ids: list[str]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; the copy does not block when memory is pinned."""
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True)
                                for name in ("voxels", "modality", "position", "weight")})


class SampleReader:
    """Random access to the images (and label maps) of a feed by row of its index."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self.fs, self.root = open_store(feed.uri)
        self.columns = {name: feed.index[name].to_pylist() for name in feed.index.column_names}

    def image(self, row: int, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 codes [X, Y, Z] of a sample, in ``out`` if it is given."""
        return self._array(row, "", out)

    def label(self, row: int) -> np.ndarray:
        """Label map [X, Y, Z] of a sample.  Raises DataError where the scan has none."""
        if self.columns["label_length"][row] is None:
            raise DataError(f"{self.feed.uri}: scan {self.columns['scan_id'][row]} has no label "
                            "map; choose scans whose label_length is set")
        return self._array(row, "label_")

    def _array(self, row: int, kind: str, out: np.ndarray | None = None) -> np.ndarray:
        shard = self.columns["shard"][row]
        start = self.columns[kind + "offset"][row]
        end = start + self.columns[kind + "length"][row]
        name = f"{join(self.feed.uri, shard)} bytes {start}-{end} ({self.columns['scan_id'][row]})"
        try:
            data = self.fs.cat_file(join(self.root, shard), start=start, end=end)
        except store_errors() as error:
            raise DataError(f"{name}: cannot be read ({error or type(error).__name__}); check the "
                            "store, then run: python -m data_prep verify FEED") from error
        if sha256(data) != self.columns[kind + "sha256"][row]:
            raise DataError(f"{name}: content differs from its hash in the index; the shard is "
                            "damaged; run: python -m data_prep verify FEED")
        return decode_array(data, self.feed.grid.shape, name, out)


class Loader:
    """Micro-batches of one rank from ``first_step`` to the end of training.

    ``micro_steps`` micro-batches make one step; ``wait_s`` is the time the trainer has waited.
    """

    def __init__(self, feed: Feed, config: RootConfig, rank: int, world: int,
                 first_step: int) -> None:
        train = config.train
        self.order = Order(feed.index, config.data, train.seed)
        self.reader = SampleReader(feed)
        self.rank, self.world = rank, world
        self.global_batch, self.micro_batch = train.global_batch, train.micro_batch
        self.steps = range(first_step, train.steps)
        self.micro_steps = -(-self.global_batch // (world * self.micro_batch))
        self.prefetch = config.data.prefetch_batches
        self.wait_s = 0.0
        self._pool = ThreadPoolExecutor(config.data.read_threads, thread_name_prefix="feed")

    def __iter__(self) -> Iterator[Batch]:
        ahead: deque[tuple[Batch, list[Future[np.ndarray]]]] = deque()
        for positions, weights in self._plan():
            ahead.append(self._begin(positions, weights))
            if len(ahead) > self.prefetch:
                yield self._finish(*ahead.popleft())
        while ahead:
            yield self._finish(*ahead.popleft())

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _plan(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions and weights, each [micro_batch], of this rank's micro-batches."""
        for step in self.steps:
            for micro_step in range(self.micro_steps):
                first = (micro_step * self.world + self.rank) * self.micro_batch
                place = np.arange(first, first + self.micro_batch)
                real = place < self.global_batch
                place = np.where(real, place, place % self.global_batch)
                yield step * self.global_batch + place, real.astype(np.float32)

    def _begin(self, positions: np.ndarray,
               weights: np.ndarray) -> tuple[Batch, list[Future[np.ndarray]]]:
        """A batch whose voxels are being read, straight into (pinned) memory of its own."""
        pinned = torch.cuda.is_available()
        rows = self.order.rows(positions)
        columns = self.reader.columns
        batch = Batch(
            voxels=torch.empty(len(rows), *self.reader.feed.grid.shape, dtype=torch.uint8,
                               pin_memory=pinned),
            modality=torch.tensor([MODALITIES.index(columns["modality"][row]) for row in rows],
                                  pin_memory=pinned),
            position=torch.tensor(positions, dtype=torch.int64, pin_memory=pinned),
            weight=torch.tensor(weights, pin_memory=pinned),
            scan_ids=[columns["scan_id"][row] for row in rows],
        )
        voxels = batch.voxels.numpy()
        return batch, [self._pool.submit(self.reader.image, int(row), voxels[place])
                       for place, row in enumerate(rows)]

    def _finish(self, batch: Batch, images: list[Future[np.ndarray]]) -> Batch:
        begin = time.perf_counter()
        for image in images:
            image.result()
        self.wait_s += time.perf_counter() - begin
        return batch
