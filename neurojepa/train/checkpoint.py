"""Checkpoints as they lie in a run directory, and how they are read.

    checkpoints/step-N/rank-R-A.master.safetensors   fragments of rank R; likewise exp_avg,
                       rank-R-A.exp_avg.safetensors  exp_avg_sq, ema; A names the attempt
                       buffers-A.safetensors         router bias, atom usage (rank 0)
                       manifest.json                 the commit: sizes, sha256, fragments, config
    latest                                           "step-N" or "none", after the manifest

A directory without its manifest does not count, so a kill at any instant leaves the last committed
checkpoint good.  Reading goes by parameter name and range, so the number of ranks and the ZeRO
stage may change.  Operators may write an older committed step into ``latest`` to go back; later
ones are then dropped at the next save.  ``saver.py`` writes them.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from neurojepa import storage
from neurojepa.errors import CheckpointError, DataError
from neurojepa.storage import (
    is_outage,
    join,
    read_bytes,
    read_if_there,
    sha256,
)
from neurojepa.train.engine import SOURCE, STATE_KEYS, Fragment

FORMAT_VERSION = 3


def step_uri(run_dir: str, step: int) -> str:
    """Where the checkpoint of a step lies."""
    return join(run_dir, "checkpoints", f"step-{step}")


def remove(run_dir: str, step: int) -> None:
    """Delete a checkpoint, its manifest first, so that what is half gone does not count."""
    storage.remove(join(step_uri(run_dir, step), "manifest.json"))
    storage.remove(step_uri(run_dir, step))


def all_steps(run_dir: str) -> list[int]:
    """Steps that have a directory, committed or not, in ascending order."""
    found = (name.partition("step-") for name in storage.list_names(join(run_dir, "checkpoints")))
    return sorted(int(number) for start, _, number in found if not start and number.isdigit())


def committed_steps(run_dir: str) -> list[int]:
    """Steps that have a manifest, in ascending order; the run may be removing old ones just now."""
    # by name: a listing of both levels fails on S3 if a directory goes meanwhile
    return [step for step in all_steps(run_dir)
            if storage.exists(join(step_uri(run_dir, step), "manifest.json"))]


def latest_step(run_dir: str) -> int | None:
    """The step to continue from: what ``latest`` says, else the newest committed one.

    Raises
    ------
    CheckpointError
        ``latest`` names a step that is not committed.
    """
    where = join(run_dir, "latest")
    if (data := read_if_there(where)) is None:  # killed between the first manifest and it
        return max(committed_steps(run_dir), default=None)
    # in an object store a second line names the token of the owner that wrote it
    text = next(iter(data.decode(errors="replace").split()), "")
    if text == "none":
        return None
    steps = committed_steps(run_dir)  # after it: a live run commits, then writes ``latest``
    number = text.removeprefix("step-")
    if not number.isdigit() or int(number) not in steps:
        raise CheckpointError(f"{where}: says {text!r}, committed here are {_listed(steps)}; write "
                              "one of them into it to continue from there")
    return int(number)


@dataclass
class Checkpoint:
    """A committed checkpoint; files are read when needed and checked against their hash."""

    run_dir: str
    step: int
    manifest: dict[str, Any]
    _files: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def read(self, fragment: Fragment, key: str) -> Tensor:
        """Values of a fragment's master, exp_avg, exp_avg_sq or ema, from whoever wrote them."""
        end = fragment.start + fragment.length
        parts = []
        for start, length, owner in self._table.get(fragment.name, []):
            low, high = max(start, fragment.start), min(start + length, end)
            if low < high:
                stored = self._file(f"{owner}.{key}.safetensors")[f"{fragment.name}|{start}"]
                parts.append(stored[low - start:high - start])
        values = torch.cat(parts) if parts else torch.empty(0)
        if len(values) != fragment.length:
            raise CheckpointError(f"{self._where}: holds {len(values)} of {fragment.length} values "
                                  f"of {fragment.name}; it is of another model")
        return values

    def parameters(self, key: str) -> dict[str, Tensor]:
        """Whole parameters, in their shapes, of ``key``: "master", or "ema" (the encoder's)."""
        shapes = {name: tuple(shape) for name, shape, *_ in self.manifest["fragments"]}
        if key == "ema":
            shapes = {name: shape for name, shape in shapes.items() if name.startswith(SOURCE)}
        whole = [Fragment(name=name, shape=shape, start=0, length=math.prod(shape), flat=0,
                          offset=0) for name, shape in shapes.items()]
        return {part.name: self.read(part, key).view(part.shape) for part in whole}

    def buffers(self) -> dict[str, Tensor]:
        """Router bias and other persistent buffers by name."""
        return self._file(next(name for name in self.manifest["files"]
                               if name.startswith("buffers-")))

    def problems(self) -> list[str]:
        """What is wrong with the files: each is read and compared with its hash."""
        found = []
        for name in self.manifest["files"]:
            try:
                self._file(name)
            except CheckpointError as error:
                found.append(str(error))
            self._files.pop(name, None)
        return found

    def state_sha256(self) -> str:
        """A hash of masters, moments, EMA and buffers that does not depend on the sharding."""
        digest = hashlib.sha256(str(self.manifest["adam_step"]).encode())
        for key in STATE_KEYS:
            for name, tensor in sorted(self.parameters(key).items()):
                digest.update(f"{name}|{key}".encode() + tensor.numpy().tobytes())
        for name, tensor in sorted(self.buffers().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    @property
    def _where(self) -> str:
        return step_uri(self.run_dir, self.step)

    @cached_property
    def _table(self) -> dict[str, list[tuple[int, int, str]]]:
        table: dict[str, list[tuple[int, int, str]]] = {}
        for name, _, start, length, owner in self.manifest["fragments"]:
            table.setdefault(name, []).append((start, length, owner))
        return {name: sorted(rows) for name, rows in table.items()}

    def _file(self, name: str) -> dict[str, Tensor]:
        if name not in self._files:
            where = join(self._where, name)
            try:
                data = read_bytes(where)
                if sha256(data) != self.manifest["files"][name]["sha256"]:
                    raise DataError(f"{where}: does not match the sha256 in its manifest")
                self._files[name] = load_tensors(data)
            except (DataError, SafetensorError) as error:
                if is_outage(error):
                    raise
                others = [s for s in committed_steps(self.run_dir) if s != self.step]
                raise CheckpointError(
                    f"{error}; step-{self.step} is damaged; also committed: {_listed(others)}; "
                    f"write one into {join(self.run_dir, 'latest')} to continue from there"
                ) from error
        return self._files[name]


def open_checkpoint(run_dir: str, step: int) -> Checkpoint:
    """Open a committed checkpoint by its manifest; tensors are read later.

    Raises
    ------
    CheckpointError
        There is no manifest, or not one of this version.
    """
    where = join(step_uri(run_dir, step), "manifest.json")
    try:
        manifest = json.loads(read_bytes(where))
    except (DataError, ValueError) as error:
        raise CheckpointError(f"{where}: cannot be read ({error})") from error
    if manifest.get("format") != FORMAT_VERSION:
        raise CheckpointError(f"{where}: format {manifest.get('format')}, this version reads "
                              f"{FORMAT_VERSION}")
    return Checkpoint(run_dir, step, manifest)


def _listed(steps: list[int]) -> str:
    return ", ".join(f"step-{step}" for step in steps) or "none"
