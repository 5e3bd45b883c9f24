"""Checkpoints: every rank writes the fragments it owns; a manifest written last commits them.

    checkpoints/step-N/rank-R.safetensors   fragments of rank R: master, exp_avg, exp_avg_sq, ema
                       buffers.safetensors  router bias, atom usage (rank 0)
                       manifest.json        the commit: sizes, sha256, fragment table, config, step
    latest                                  "step-N", written after the manifest

A directory without its manifest does not count, so a kill at any instant leaves the last committed
checkpoint good.  Reading goes by parameter name and range, so the number of ranks and the ZeRO
stage may change.  Operators may write an older committed step into ``latest`` to go back; later
ones are then dropped at the next save.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from neurojepa.errors import CheckpointError, DataError, NeurojepaError
from neurojepa.feed.format import (
    is_local,
    join,
    open_store,
    read_bytes,
    sha256,
    store_errors,
    write_bytes,
)
from neurojepa.train.engine import SOURCE, STATE_KEYS, Engine, Fragment
from neurojepa.train.world import World

FORMAT_VERSION = 1
BUFFERS = "buffers.safetensors"
T = TypeVar("T")


# ---- writing -------------------------------------------------------------------------------------

def save(run_dir: str, engine: Engine, world: World, step: int, record: dict[str, Any],
         keep_last: int) -> None:
    """Write and commit the checkpoint of ``step``, then drop old ones.  Collective.

    Parameters
    ----------
    record : dict
        What else the manifest says: config, feed and order fingerprints, counters.
    keep_last : int
        Committed checkpoints to keep.

    Raises
    ------
    CheckpointError
        On every rank, where any rank could not write; the earlier checkpoints stay.
    """
    uri = _step_uri(run_dir, step)
    # an older manifest of this step must not vouch for the files to come
    _together(world, lambda: remove(run_dir, step) if world.rank == 0 else None)
    written = _together(world, lambda: _write_rank(uri, engine, world.rank))
    manifest = {
        "format": FORMAT_VERSION, "step": step, "adam_step": engine.adam_step,
        "world": world.size, **record,
        "files": {name: entry for files, _ in written for name, entry in files.items()},
        "fragments": [row for _, rows in written for row in rows],
    }

    def commit() -> None:
        if world.rank == 0:
            write_bytes(join(uri, "manifest.json"), json.dumps(manifest).encode())
            write_bytes(join(run_dir, "latest"), f"step-{step}".encode())
            kept = [s for s in committed_steps(run_dir) if s <= step][-keep_last:]
            for other in set(_steps(run_dir, "step-*")) - set(kept):
                remove(run_dir, other)

    _together(world, commit)


def _write_rank(uri: str, engine: Engine, rank: int) -> tuple[dict[str, Any], list[list[Any]]]:
    name = f"rank-{rank:05d}.safetensors"
    contents = {name: {f"{f.name}|{f.start}|{key}": tensor.to("cpu", copy=True)
                       for f in engine.fragments for key, tensor in engine.tensors(f).items()}}
    if rank == 0:
        contents[BUFFERS] = {key: t.to("cpu", copy=True) for key, t in engine.buffers().items()}
    _check_space(uri, sum(t.nbytes for part in contents.values() for t in part.values()))
    files = {}
    for file, tensors in contents.items():
        data = save_tensors(tensors)
        write_bytes(join(uri, file), data)
        files[file] = {"size": len(data), "sha256": sha256(data)}
    rows = [[f.name, list(f.shape), f.start, f.length, name] for f in engine.fragments]
    return files, rows


def _check_space(uri: str, num_bytes: int) -> None:
    fs, path = open_store(uri)
    if is_local(fs):
        fs.makedirs(path, exist_ok=True)
        free = shutil.disk_usage(path).free
        if free < num_bytes * 1.05 + 2**20:
            raise CheckpointError(f"{path}: {free / 2**20:.0f} MiB free, this rank's checkpoint "
                                  f"needs {num_bytes / 2**20:.0f} MiB; free space or lower "
                                  "train.keep_last")


def _together(world: World, action: Callable[[], T]) -> list[T]:
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


def remove(run_dir: str, step: int) -> None:
    """Delete a checkpoint, its manifest first, so that what is half gone does not count."""
    fs, path = open_store(_step_uri(run_dir, step))
    if fs.exists(join(path, "manifest.json")):
        fs.rm_file(join(path, "manifest.json"))
    if fs.exists(path):
        fs.rm(path, recursive=True)


# ---- reading -------------------------------------------------------------------------------------

def committed_steps(run_dir: str) -> list[int]:
    """Steps that have a manifest, in ascending order."""
    return _steps(run_dir, "step-*/manifest.json")


def latest_step(run_dir: str) -> int | None:
    """The step to continue from: what ``latest`` says, else the newest committed one.

    Raises
    ------
    CheckpointError
        ``latest`` names a step that is not committed.
    """
    steps = committed_steps(run_dir)
    fs, path = open_store(join(run_dir, "latest"))
    if not fs.exists(path):  # killed between the first manifest and it
        return steps[-1] if steps else None
    text = read_bytes(join(run_dir, "latest")).decode(errors="replace").strip()
    number = text.removeprefix("step-")
    if not number.isdigit() or int(number) not in steps:
        raise CheckpointError(f"{path}: says {text!r}, committed here are {_listed(steps)}; write "
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
        for start, length, file in self._table.get(fragment.name, []):
            low, high = max(start, fragment.start), min(start + length, end)
            if low < high:
                stored = self._file(file)[f"{fragment.name}|{start}|{key}"]
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
        return {name: self.read(Fragment(name, shape, 0, math.prod(shape), 0, 0), key).view(shape)
                for name, shape in shapes.items()}

    def buffers(self) -> dict[str, Tensor]:
        """Router bias and other persistent buffers by name."""
        return self._file(BUFFERS)

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
        return _step_uri(self.run_dir, self.step)

    @cached_property
    def _table(self) -> dict[str, list[tuple[int, int, str]]]:
        table: dict[str, list[tuple[int, int, str]]] = {}
        for name, _, start, length, file in self.manifest["fragments"]:
            table.setdefault(name, []).append((start, length, file))
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
    where = join(_step_uri(run_dir, step), "manifest.json")
    try:
        manifest = json.loads(read_bytes(where))
    except (DataError, ValueError) as error:
        raise CheckpointError(f"{where}: cannot be read ({error})") from error
    if manifest.get("format") != FORMAT_VERSION:
        raise CheckpointError(f"{where}: format {manifest.get('format')}, this version reads "
                              f"{FORMAT_VERSION}")
    return Checkpoint(run_dir, step, manifest)


def _step_uri(run_dir: str, step: int) -> str:
    return join(run_dir, "checkpoints", f"step-{step}")


def _steps(run_dir: str, pattern: str) -> list[int]:
    fs, path = open_store(join(run_dir, "checkpoints"))
    try:
        found = fs.glob(join(path, pattern))
    except store_errors() as error:
        raise CheckpointError(f"{run_dir}: cannot be listed ({error}); check the store") from error
    names = [name.removeprefix(path).split("/")[1].removeprefix("step-") for name in found]
    return sorted(int(name) for name in names if name.isdigit())


def _listed(steps: list[int]) -> str:
    return ", ".join(f"step-{step}" for step in steps) or "none"
