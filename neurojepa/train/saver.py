"""Saving while training goes on: a copy to the host, then a thread that writes, then a commit.

    start     every rank copies its fragments into host memory (pinned, reused): training waits
              for this copy and no longer
    thread    hashes and writes this rank's files, straight from that copy, and a manifest of them
    advance   at a later step boundary, once every rank has written: rank 0 hears the hash of each
              rank's manifest, and its thread commits (commit.py)

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
    sha256,
    store_errors,
    write_bytes,
    write_parts,
)
from neurojepa.train.checkpoint import FORMAT_VERSION, step_uri
from neurojepa.train.commit import Commits
from neurojepa.train.engine import Engine
from neurojepa.train.layout import Layout, Part, layout_of
from neurojepa.train.ownership import Ownership
from neurojepa.train.world import World

SHOWN = 4  # ranks whose problems an error tells
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
        self._layout: Layout = {}  # on rank 0, for the manifest
        self.attempt: str = world.settle(self._parts(), self._begin)
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
                  "world": self.world.size, "attempt": self.attempt, **record}
        self._pending = _Pending(step, record, self._pool.submit(
            _write_rank, uri, self._owner, contents, self._patience))

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
            _together(self.world, pending.job.result,
                      _nothing if pending.committing else self._commit)
        except CheckpointError:
            self._pending = None
            raise
        if pending.committing:
            self._pending = None
            return pending.step
        pending.committing = True
        if self.world.rank:
            pending.job = _done()
        return None

    def _commit(self, written: list[tuple[dict[str, Any], int]]) -> None:
        """On rank 0, when all have written: commit in the thread."""
        pending = self._pending
        assert pending is not None
        manifest = {**pending.record, "bytes": sum(size for _, size in written),
                    "files": {name: entry for part, _ in written for name, entry in part.items()},
                    "parameters": self._layout}
        pending.job = self._pool.submit(
            self._patience, lambda: self._commits.commit(pending.step, manifest))

    def _begin(self, parts: list[list[int]]) -> str:
        """On rank 0: keep which rank holds what; names the attempt."""
        names = list(self.engine.shapes)
        found: dict[str, list[Part]] = {}
        for rank, flat in enumerate(parts):
            for number, start, length in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
                found.setdefault(names[number], []).append((start, length, rank))
        self._layout = layout_of(self.engine.shapes, found)
        return uuid.uuid4().hex[:8]

    def _parts(self) -> list[int]:
        """Number of the parameter, start and length of each fragment, one after the other."""
        numbers = {name: number for number, name in enumerate(self.engine.shapes)}
        return [value for fragment in self.engine.fragments
                for value in (numbers[fragment.name], fragment.start, fragment.length)]

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


def _write_rank(uri: str, owner: str, contents: dict[str, dict[str, Tensor]],
                patience: Patience) -> tuple[dict[str, Any], int]:
    """Write a rank's tensors and their manifest; returns what the root says of it, and all bytes.

    The buffers are no rank's, so the root has them.
    """
    files = _write_files(uri, contents, patience)
    own = {name: entry for name, entry in files.items() if name.startswith(owner)}
    data = json.dumps({"files": own}).encode()
    patience(lambda: write_bytes(join(uri, f"{owner}.json"), data))
    root = {name: entry for name, entry in files.items() if name not in own}
    root[f"{owner}.json"] = {"size": len(data), "sha256": sha256(data)}
    return root, sum(entry["size"] for entry in [*root.values(), *own.values()])


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


def _together(world: World, action: Callable[[], Any],
              verdict: Callable[[list[Any]], None]) -> None:
    """Do something on each rank, then ``verdict`` of all results on rank 0.

    If anything fails on any rank, the same error is raised on all.
    """
    result: Any = None
    problem = None
    try:
        result = action()
    except NeurojepaError as error:
        problem = f"rank {world.rank}: {error}"
    except store_errors() as error:
        problem = f"rank {world.rank}: the store failed ({error})"

    def judge(answers: list[Any]) -> None:
        problems = [problem for problem, _ in answers if problem]
        if problems:
            more = f" and {len(problems) - SHOWN} more ranks" if len(problems) > SHOWN else ""
            raise CheckpointError(f"checkpoint not written: {'; '.join(problems[:SHOWN])}{more}; "
                                  "earlier checkpoints are untouched")
        verdict([result for _, result in answers])

    world.settle((problem, result), judge)


def _nothing(_: list[Any]) -> None:
    """All are through; no more is to be done."""


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future
