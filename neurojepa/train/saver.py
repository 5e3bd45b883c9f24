"""Saving while training goes on: a copy to the host, then a thread that writes, then a commit.

    start     every rank copies its fragments into host memory (pinned, reused): training waits
              for this copy and no longer
    thread    hashes and writes this rank's files, straight from that copy
    advance   at a later step boundary, once every rank has written: rank 0's thread commits
              (commit.py)

File names carry the attempt, so what a killed attempt left can never be taken for this one's.
While the store fails, the threads try again and training goes on until the next checkpoint is due.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from neurojepa.errors import CheckpointError, NeurojepaError
from neurojepa.storage import (
    Patience,
    join,
    local_path,
    store_errors,
    write_parts,
)
from neurojepa.train.checkpoint import FORMAT_VERSION, step_uri
from neurojepa.train.commit import Commits
from neurojepa.train.engine import Engine
from neurojepa.train.ownership import Ownership
from neurojepa.train.world import World

Rows = list[list[Any]]
_TYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.uint8: "U8"}


@dataclass
class _Pending:
    """A checkpoint on its way."""

    step: int
    record: dict[str, Any]  # the manifest, but for files and fragments
    job: Future[Any]  # this rank's writing, then rank 0's committing
    committing: bool = False


class Saver:
    """Background checkpoints of one rank; ``start``, ``advance`` and ``finish`` are collective.

    Parameters
    ----------
    owner : Ownership
        Of the run directory, local or URI.
    keep_last, milestone_every : int
        See ``Commits``.
    patience : Patience
        With a store that fails.

    Attributes
    ----------
    attempt : str
        Names this world; the same on all ranks.
    """

    def __init__(self, owner: Ownership, engine: Engine, world: World, *, keep_last: int,
                 milestone_every: int, patience: Patience) -> None:
        self.run_dir, self.engine, self.world = owner.run_dir, engine, world
        self._patience = patience
        self._commits = Commits(owner.run_dir, owner, keep_last=keep_last,
                                milestone_every=milestone_every)
        self.attempt = world.gather(uuid.uuid4().hex[:8])[0]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._host: dict[str, dict[str, Tensor]] = {}
        self._pending: _Pending | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint has been started and not committed; the same on all ranks."""
        return self._pending is not None

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._pending is not None and not self._pending.job.done()

    def start(self, step: int, record: dict[str, Any]) -> None:
        """Begin the checkpoint of ``step``; waits for an earlier one that is still being written.

        Parameters
        ----------
        record : dict
            What else the manifest says: config, feed and order fingerprints, counters.

        Raises
        ------
        CheckpointError
            The earlier one could not be written, on any rank.
        """
        self.finish()
        contents = self._snapshot()
        uri = step_uri(self.run_dir, step)
        record = {"format": FORMAT_VERSION, "step": step, "adam_step": self.engine.adam_step,
                  "world": self.world.size, **record}
        self._pending = _Pending(step, record, self._pool.submit(_write_files, uri, contents,
                                                                 self._patience))

    def advance(self) -> int | None:
        """Take a pending checkpoint one stage further; waits for the threads of all ranks.

        Returns
        -------
        int or None
            The step that is committed now.

        Raises
        ------
        CheckpointError
            On every rank, where any rank could not write; earlier checkpoints are untouched.
        """
        pending = self._pending
        assert pending is not None
        try:
            results = _together(self.world, pending.job.result)
        except CheckpointError:
            self._pending = None
            raise
        if pending.committing:
            self._pending = None
            return pending.step
        rows = self.world.gather(self._rows()) if self.world.size > 1 else [self._rows()]
        manifest = {**pending.record, "fragments": [row for part in rows for row in part],
                    "files": {name: entry for part in results for name, entry in part.items()}}
        pending.committing = True
        pending.job = (self._pool.submit(
            self._patience, lambda: self._commits.commit(pending.step, manifest))
            if self.world.rank == 0 else _done())
        return None

    def finish(self) -> int | None:
        """Wait until nothing is pending; returns the step that was committed, if one was."""
        committed = None
        while self.pending:
            committed = self.advance()
        return committed

    def close(self) -> None:
        """Let go of the thread; what it is writing is finished, but not committed."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    # ---- pieces ----------------------------------------------------------------------------------

    def _snapshot(self) -> dict[str, dict[str, Tensor]]:
        """This rank's state by file, copied into host memory that is reused."""
        sources: dict[str, dict[str, Tensor]] = {}
        for fragment in self.engine.fragments:
            for key, tensor in self.engine.tensors(fragment).items():
                file = f"{self._owner}.{key}.safetensors"
                sources.setdefault(file, {})[f"{fragment.name}|{fragment.start}"] = tensor
        if self.world.rank == 0:
            sources[f"buffers-{self.attempt}.safetensors"] = self.engine.buffers()
        for file, tensors in sources.items():
            host = self._host.setdefault(file, {})
            for name, tensor in tensors.items():
                if name not in host:
                    host[name] = torch.empty_like(tensor, device="cpu",
                                                  memory_format=torch.contiguous_format,
                                                  pin_memory=tensor.is_cuda)
                host[name].copy_(tensor, non_blocking=True)
        if self.world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return self._host

    @property
    def _owner(self) -> str:
        return f"rank-{self.world.rank:05d}-{self.attempt}"

    def _rows(self) -> Rows:
        return [[f.name, list(f.shape), f.start, f.length, self._owner]
                for f in self.engine.fragments]


def _write_files(uri: str, contents: dict[str, dict[str, Tensor]],
                 patience: Patience) -> dict[str, Any]:
    """Write tensors by file; returns size and sha256 of each."""
    _check_space(uri, sum(t.nbytes for part in contents.values() for t in part.values()))
    return {file: patience(partial(_write_file, join(uri, file), tensors))
            for file, tensors in contents.items()}


def _write_file(uri: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0

    def counted() -> Iterator[memoryview]:
        nonlocal size
        for part in _safetensors(tensors):
            digest.update(part)
            size += len(part)
            yield part

    write_parts(uri, counted())
    return {"size": size, "sha256": digest.hexdigest()}


def _safetensors(tensors: dict[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of a safetensors file, without a copy of the tensors.

    https://github.com/huggingface/safetensors#format: length of the header, header, tensors.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        if tensor.nbytes:
            yield tensor.reshape(-1).view(torch.uint8).numpy().data


def _check_space(uri: str, num_bytes: int) -> None:
    if (path := local_path(uri)) is not None:
        os.makedirs(path, exist_ok=True)
        free = shutil.disk_usage(path).free
        if free < num_bytes * 1.05 + 2**20:
            raise CheckpointError(f"{path}: {free / 2**20:.0f} MiB free, this rank's checkpoint "
                                  f"needs {num_bytes / 2**20:.0f} MiB; free space or lower "
                                  "train.keep_last")


def _together(world: World, action: Callable[[], Any]) -> list[Any]:
    """Do something on each rank; if it fails on any, raise the same error on all."""
    result: Any = None
    problem = None
    try:
        result = action()
    except NeurojepaError as error:
        problem = f"rank {world.rank}: {error}"
    except store_errors() as error:
        problem = f"rank {world.rank}: the store failed ({error})"
    answers = world.gather((problem, result))
    problems = [problem for problem, _ in answers if problem]
    if problems:
        raise CheckpointError(f"checkpoint not written: {'; '.join(problems)}; earlier "
                              "checkpoints are untouched")
    return [result for _, result in answers]


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future
