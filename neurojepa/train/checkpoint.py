"""Checkpoints as they lie in a run directory, and how they are read.

    checkpoints/step-N/rank-R-A.master.safetensors   fragments of rank R; likewise exp_avg,
                       rank-R-A.exp_avg.safetensors  exp_avg_sq, ema; A names the attempt
                       rank-R-A.json                 sizes and sha256 of these
                       buffers-A.safetensors         router bias, atom usage (rank 0)
                       manifest.json                 the commit: sizes and sha256 of the last two
                                                     kinds, which rank holds what, config
    latest                                           "step-N" or "none", after the manifest

A directory without its manifest does not count, so a kill at any instant leaves the last committed
checkpoint good.  Reading goes by parameter name and range, so the number of ranks and the ZeRO
stage may change; whoever reads opens only the files of ranks that hold what it needs.  Operators
may write an older committed step into ``latest`` to go back; later ones are then dropped at the
next save.  ``saver.py`` writes them.  Format 3, which had all files and fragments in manifest.json,
is still read.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
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
from neurojepa.train.layout import Layout, Part, layout_of, overlapping

FORMAT_VERSION = 4


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
    manifest: dict[str, Any]  # the root's, as ``open_checkpoint`` gives it
    _files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _known: dict[str, dict[str, Any]] = field(default_factory=dict)  # files of ranks that were read

    def read(self, fragment: Fragment, key: str) -> Tensor:
        """Values of a fragment's master, exp_avg, exp_avg_sq or ema, from whoever wrote them."""
        begin, end = fragment.start, fragment.start + fragment.length
        parts = []
        for start, length, rank in overlapping(self._layout, fragment.name, begin, end):
            file, tensor = f"{self._owner(rank)}.{key}.safetensors", f"{fragment.name}|{start}"
            stored = self._file(file).get(tensor)
            if stored is None or len(stored) != length:
                raise self._damaged(f"{join(self._where, file)}: has no {tensor} of {length} "
                                    "elements, which the manifest puts there")
            parts.append(stored[max(begin - start, 0):end - start])
        values = torch.cat(parts) if parts else torch.empty(0)
        if len(values) != fragment.length:
            raise CheckpointError(f"{self._where}: holds {len(values)} of {fragment.length} values "
                                  f"of {fragment.name}; it is of another model")
        return values

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the trained parameters."""
        return {name: tuple(entry["shape"]) for name, entry in self._layout.items()}

    def parameters(self, key: str) -> dict[str, Tensor]:
        """Whole parameters, in their shapes, of ``key``: "master", or "ema" (the encoder's)."""
        whole = [Fragment(name=name, shape=shape, start=0, length=math.prod(shape), flat=0,
                          offset=0) for name, shape in self.shapes.items()
                 if key != "ema" or name.startswith(SOURCE)]
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
                files = self._files_of(name) if name.endswith(".json") else [name]
            except CheckpointError as error:
                found.append(str(error))
                continue
            for file in files:
                try:
                    self._file(file)
                except CheckpointError as error:
                    found.append(str(error))
                self._files.pop(file, None)
        return found

    def state_sha256(self) -> str:
        """A hash of masters, moments, EMA and buffers that does not depend on the sharding."""
        digest = hashlib.sha256(str(self.manifest["adam_step"]).encode())
        for key in STATE_KEYS:
            for name, tensor in sorted(self.parameters(key).items()):
                digest.update(f"{name}|{key}".encode() + tensor.numpy().tobytes())
            self._files.clear()  # no more than one key's in memory
        for name, tensor in sorted(self.buffers().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    @property
    def _where(self) -> str:
        return step_uri(self.run_dir, self.step)

    @property
    def _layout(self) -> Layout:
        return self.manifest["parameters"]  # type: ignore[no-any-return]

    def _owner(self, rank: int) -> str:
        return f"rank-{rank:05d}-{self.manifest['attempt']}"

    def _file(self, name: str) -> dict[str, Tensor]:
        if name not in self._files:
            if name in self.manifest["files"]:
                entry = self.manifest["files"][name]
            else:
                manifest = name.split(".")[0] + ".json"
                entry = self._files_of(manifest).get(name)
                if entry is None:
                    raise self._damaged(f"{join(self._where, manifest)}: does not list {name}")
            try:
                self._files[name] = load_tensors(self._bytes(name, entry["sha256"]))
            except SafetensorError as error:
                raise self._damaged(f"{join(self._where, name)}: {error}") from error
        return self._files[name]

    def _files_of(self, name: str) -> dict[str, Any]:
        """The files that a rank's manifest lists."""
        if name not in self._known:
            entry = self.manifest["files"].get(name)
            if entry is None:
                raise self._damaged(f"{join(self._where, 'manifest.json')}: does not list {name}")
            self._known[name] = json.loads(self._bytes(name, entry["sha256"]))["files"]
        return self._known[name]

    def _bytes(self, name: str, digest: str) -> bytes:
        where = join(self._where, name)
        try:
            data = read_bytes(where)
        except DataError as error:
            if is_outage(error):
                raise
            raise self._damaged(str(error)) from error
        if sha256(data) != digest:
            raise self._damaged(f"{where}: does not match the sha256 in its manifest")
        return data

    def _damaged(self, says: str) -> CheckpointError:
        others = [s for s in committed_steps(self.run_dir) if s != self.step]
        return CheckpointError(
            f"{says}; step-{self.step} is damaged; also committed: {_listed(others)}; "
            f"write one into {join(self.run_dir, 'latest')} to continue from there")


def open_checkpoint(run_dir: str, step: int) -> Checkpoint:
    """Open a committed checkpoint by its manifest; tensors are read later.

    Raises
    ------
    CheckpointError
        There is no manifest, or not one that this version reads.
    """
    where = join(step_uri(run_dir, step), "manifest.json")
    try:
        manifest = json.loads(read_bytes(where))
    except (DataError, ValueError) as error:
        raise CheckpointError(f"{where}: cannot be read ({error})") from error
    if manifest.get("format") == 3:
        manifest = _from_format_3(manifest)
    elif manifest.get("format") != FORMAT_VERSION:
        raise CheckpointError(f"{where}: format {manifest.get('format')}, this version reads 3 and "
                              f"{FORMAT_VERSION}")
    return Checkpoint(run_dir, step, manifest)


def _from_format_3(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest that lists all fragments (name, shape, start, length, owner), as one of today."""
    shapes: dict[str, list[int]] = {}
    parts: dict[str, list[Part]] = {}
    attempt = ""
    for name, shape, start, length, owner in manifest["fragments"]:
        _, rank, attempt = owner.split("-")
        shapes[name] = shape
        parts.setdefault(name, []).append((start, length, int(rank)))
    rest = {key: value for key, value in manifest.items() if key != "fragments"}
    return {**rest, "attempt": attempt, "parameters": layout_of(shapes, parts)}


def _listed(steps: list[int]) -> str:
    return ", ".join(f"step-{step}" for step in steps) or "none"
