"""From positions to micro-batches: range reads, hash check, decoding, many samples ahead.

Step s covers G = train.global_batch positions from ``first_position(s)``.  A rank takes its
micro-batches from them as a fixed function of (rank, world), so every world size sees the same
samples in a step.  Where G does not divide by world x micro_batch, the last micro-step is filled up
with repeats of weight 0.  There is no state to save: a loader starts at any step.

A store that fails is asked again for ``data.retry_s``.  A sample whose bytes are wrong twice ends
the run or, with ``data.replace_damaged``, is replaced by the next good one of its group's epoch:
again a function of the position, so the same on every rank and after every restart.  A damaged
partner is replaced by the next partner and at last by the sample itself.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from neurojepa.config import RootConfig
from neurojepa.errors import DataError
from neurojepa.feed.format import MODALITIES, Feed, FeedCode, decode_array
from neurojepa.feed.order import Order, Window, first_position
from neurojepa.storage import Patience, join, open_store, sha256, store_errors

MAX_REPLACEMENTS = 10  # damaged samples in a row; more are no accident


class DamagedSample(DataError):
    """Stored bytes that are wrong, not merely out of reach."""


@dataclass(kw_only=True)
class Batch:
    """One micro-batch of a rank.  B scans on a grid of X, Y, Z voxels."""

    voxels: torch.Tensor  # uint8 [B, X, Y, Z]: FeedCode where not brain, 1..254 brain
    modality: torch.Tensor  # int64 [B], index into MODALITIES
    position: torch.Tensor  # int64 [B], the key of all randomness of the sample
    weight: torch.Tensor  # float32 [B], 0 for a fill-up repeat
    scan_ids: list[str]
    # What the targets come from: the scan itself or, with data.cross_modal, another of its session.
    # Both None where it is the scan itself throughout.
    target_voxels: torch.Tensor | None = None  # as voxels
    target_modality: torch.Tensor | None = None  # as modality
    all_scanned: bool = False  # no voxel is FeedCode.NOT_SCANNED; False says nothing

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; the copy does not block when memory is pinned."""
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True)
                                 for name, value in vars(self).items()
                                 if isinstance(value, torch.Tensor)}
        return replace(self, **moved)


class _Read(NamedTuple):
    """What became of a position."""

    row: int
    target_row: int
    all_scanned: bool


class SampleReader:
    """Random access to the images (and label maps) of a feed by row of its index.

    Parameters
    ----------
    feed : Feed
    retry_s : float
        How long a store that fails is asked again.
    """

    def __init__(self, feed: Feed, retry_s: float = 60) -> None:
        self.feed, self.patience = feed, Patience(retry_s)
        self.fs, self.root = open_store(feed.uri, own_retries=False)

    def value(self, name: str, row: int) -> Any:
        """A cell of the index, which stays in Arrow: lists of a million rows take 0.8 GB a rank."""
        return self.feed.index[name][row].as_py()

    def image(self, row: int, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 codes [X, Y, Z] of a sample, in ``out`` if it is given.

        Raises
        ------
        DamagedSample
            Its bytes do not match the index, or cannot be decoded.
        DataError
            The store cannot be read.
        """
        return self._array(row, "", out)

    def label(self, row: int) -> np.ndarray:
        """Label map [X, Y, Z] of a sample.  Raises DataError where the scan has none."""
        if self.value("label_length", row) is None:
            raise DataError(f"{self.feed.uri}: scan {self.value('scan_id', row)} has no label "
                            "map; choose scans whose label_length is set")
        return self._array(row, "label_")

    def close(self) -> None:
        """Ask the store no more: reads that wait to try again fail at once."""
        self.patience.close()

    def _array(self, row: int, kind: str, out: np.ndarray | None = None) -> np.ndarray:
        shard = self.value("shard", row)
        start = self.value(kind + "offset", row)
        end = start + self.value(kind + "length", row)
        name = f"{join(self.feed.uri, shard)} bytes {start}-{end} ({self.value('scan_id', row)})"
        for attempt in ("first", "last"):  # the way here may have spoilt it: ask once more
            data = self._bytes(name, join(self.root, shard), start, end)
            try:
                if sha256(data) != self.value(kind + "sha256", row):
                    raise DataError(f"{name}: content differs from its hash in the index; the "
                                    "shard is damaged; run: python -m data_prep verify FEED")
                return decode_array(data, self.feed.grid.shape, name, out)
            except DataError as error:
                if attempt == "last":
                    raise DamagedSample(str(error)) from error
        raise AssertionError("unreachable")

    def _bytes(self, name: str, path: str, start: int, end: int) -> bytes:
        try:
            return self.patience(lambda: self.fs.cat_file(path, start=start, end=end))
        except store_errors() as error:
            raise DataError(f"{name}: cannot be read ({error or type(error).__name__}); check the "
                            "store, then run: python -m data_prep verify FEED") from error


class Loader:
    """Micro-batches of one rank from ``first_step`` to the end of training.

    ``micro_steps`` micro-batches make one step; ``wait_s`` is the time the trainer has waited.
    """

    def __init__(self, feed: Feed, config: RootConfig, *, rank: int, world: int,
                 first_step: int, windows: Iterable[Window] = ()) -> None:
        train = config.train
        self.order = Order(feed.index, config.data, train.seed)
        self.reader = SampleReader(feed, config.data.retry_s)
        self.rank, self.world = rank, world
        self.global_batch, self.micro_batch = train.global_batch, train.micro_batch
        self.last_step = train.steps
        self.seek(first_step, windows)
        self.replace_damaged = config.data.replace_damaged
        self.cross_modal = config.data.cross_modal > 0
        self._damaged: deque[dict[str, Any]] = deque()
        self.micro_steps = -(-self.global_batch // (world * self.micro_batch))
        self.prefetch = config.data.prefetch_batches
        self.wait_s = 0.0
        self._ahead: deque[tuple[Batch, list[Future[_Read]]]] = deque()
        self._pool = ThreadPoolExecutor(config.data.read_threads, thread_name_prefix="feed")

    def __iter__(self) -> Iterator[Batch]:
        ahead = self._ahead = deque()
        for positions, weights in self._plan():
            ahead.append(self._begin(positions, weights))
            if len(ahead) > self.prefetch:
                yield self._finish(*ahead.popleft())
        while ahead:
            yield self._finish(*ahead.popleft())

    def seek(self, first_step: int, windows: Iterable[Window]) -> None:
        """Let the next iteration begin at another step, with other windows stepped over."""
        self.steps, self.windows = range(first_step, self.last_step), tuple(windows)

    @property
    def has_next_ready(self) -> bool:
        """Whether the iteration begun last has a next batch, and it has been read without error."""
        return bool(self._ahead) and all(read.done() and read.exception() is None
                                         for read in self._ahead[0][1])

    @property
    def has_reports(self) -> bool:
        """Whether ``take_reports`` has something to tell."""
        return bool(self._damaged or self.reader.patience.retries)

    def take_reports(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Damaged samples {scan_id, shard, position, problem} and the store's errors, since then.

        The samples were replaced, the errors went away.
        """
        return _drain(self._damaged), self.reader.patience.take()

    def close(self) -> None:
        """Stop reading ahead."""
        self.reader.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _plan(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions and weights, each [micro_batch], of this rank's micro-batches."""
        for step in self.steps:
            begin = first_position(step, self.global_batch, self.windows)
            for micro_step in range(self.micro_steps):
                first = (micro_step * self.world + self.rank) * self.micro_batch
                place = np.arange(first, first + self.micro_batch)
                real = place < self.global_batch
                place = np.where(real, place, place % self.global_batch)
                yield begin + place, real.astype(np.float32)

    def _begin(self, positions: np.ndarray,
               weights: np.ndarray) -> tuple[Batch, list[Future[_Read]]]:
        """A batch whose voxels are being read, straight into (pinned) memory of its own."""
        pinned = torch.cuda.is_available()

        def voxels() -> torch.Tensor:
            return torch.empty(len(positions), *self.reader.feed.grid.shape, dtype=torch.uint8,
                               pin_memory=pinned)

        def modality() -> torch.Tensor:
            return torch.empty(len(positions), dtype=torch.int64, pin_memory=pinned)

        batch = Batch(
            voxels=voxels(), modality=modality(),
            position=torch.tensor(positions, dtype=torch.int64, pin_memory=pinned),
            weight=torch.tensor(weights, pin_memory=pinned),
            scan_ids=[],
            target_voxels=voxels() if self.cross_modal else None,
            target_modality=modality() if self.cross_modal else None,
        )
        out = batch.voxels.numpy()
        target = [None] * len(out) if batch.target_voxels is None else batch.target_voxels.numpy()
        return batch, [self._pool.submit(self._read, int(position), out[place], target[place])
                       for place, position in enumerate(positions)]

    def _read(self, position: int, out: np.ndarray, target: np.ndarray | None) -> _Read:
        """Read the sample of a position, or who stands in for it, and what its targets come from.

        The rows are one without ``target``.
        """
        sample = self._first_whole(position, (self.order.row(position, ahead)
                                              for ahead in range(MAX_REPLACEMENTS + 1)), out)
        if sample is None:
            raise DataError(f"{self.reader.feed.uri}: position {position}: its sample and the "
                            f"{MAX_REPLACEMENTS} after it are damaged; run: python -m data_prep "
                            f"verify {self.reader.feed.uri}")
        if target is None:
            return _Read(sample, sample, _is_scanned(out))
        partner = self._first_whole(position, self.order.partners(sample, position), target)
        if partner is None:
            target[...] = out
        return _Read(sample, sample if partner is None else partner,
                     _is_scanned(out) and _is_scanned(target))

    def _first_whole(self, position: int, rows: Iterable[int], out: np.ndarray) -> int | None:
        """Read the first of ``rows`` that is not damaged; None where there is none."""
        value = self.reader.value
        for row in rows:
            try:
                self.reader.image(row, out)
            except DamagedSample as error:
                if not self.replace_damaged:
                    raise DataError(f"{error}; or set data.replace_damaged=true") from error
                self._damaged.append({"scan_id": value("scan_id", row),
                                     "shard": value("shard", row), "position": position,
                                     "problem": str(error)})
            else:
                return row
        return None

    def _finish(self, batch: Batch, reads: list[Future[_Read]]) -> Batch:
        begin = time.perf_counter()
        found = [read.result() for read in reads]
        self.wait_s += time.perf_counter() - begin
        value = self.reader.value
        batch.all_scanned = all(read.all_scanned for read in found)
        batch.scan_ids = [value("scan_id", read.row) for read in found]
        for place, read in enumerate(found):
            for modality, row in ((batch.modality, read.row),
                                  (batch.target_modality, read.target_row)):
                if modality is not None:
                    modality[place] = MODALITIES.index(value("modality", row))
        return batch


def _is_scanned(codes: np.ndarray) -> bool:
    return bool(codes.max() != FeedCode.NOT_SCANNED)  # the largest code: one pass in the cache


def _drain(items: deque[Any]) -> list[Any]:
    return [items.popleft() for _ in range(len(items))]  # threads may append meanwhile
