"""The batches of a loader on the device, each on its way before the step that needs it.

The next batch crosses from pinned memory on a stream of its own, as codes of one byte a voxel,
while the device still works on the step before.  On a CPU nothing crosses, and nothing else
differs.  What was fetched ahead and is never used does not count: a run's position is its step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from neurojepa.feed.loader import Batch, Loader


class Ahead(Iterator[Batch]):
    """Iterates over ``loader`` from where it stands; ``fetch`` begins with the next batch early."""

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self._loader, self._device = loader, device
        self._batches = iter(loader)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: Batch | None = None

    def fetch(self) -> None:
        """Let the next batch cross, if it has been read; never waits.

        What went wrong with it is raised where it is needed: the step before is none of its.
        """
        if self._next is None and self._loader.has_next_ready:
            self._next = self._cross()

    def __next__(self) -> Batch:
        """The next batch, on the device; waits until it has been read."""
        batch, self._next = self._next or self._cross(), None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for value in vars(batch).values():
                if isinstance(value, torch.Tensor):
                    value.record_stream(current)  # its memory belongs to the other stream
        return batch

    def _cross(self) -> Batch:
        batch = next(self._batches)
        if self._stream is None:
            return batch.to(self._device)
        with torch.cuda.stream(self._stream):
            return batch.to(self._device)
