"""Whether the disk of a local run directory has room for another checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass

from cluster.rundir import RunDir

LEAST_ROOM = 16 << 20  # bytes, for logs, events and rows


@dataclass(frozen=True)
class Room:
    """What is free and what is needed, in bytes."""

    path: str
    free: int
    need: int

    @property
    def enough(self) -> bool:
        return self.free >= self.need

    def __str__(self) -> str:
        return (f"{self.path}: {self.free >> 20} MiB free, {self.need >> 20} MiB needed for a "
                "checkpoint")


def room(run_dir: RunDir) -> Room | None:
    """The room of a run directory that need not be there yet; None in an object store."""
    if (path := run_dir.local_path) is None:
        return None
    return Room(path, free_bytes(path),
                max(LEAST_ROOM, _last_checkpoint_bytes(run_dir) * 21 // 20))


def free_bytes(path: str) -> int:
    """Room on the disk of a directory that need not be there yet."""
    while not os.path.isdir(path):
        path = os.path.dirname(path.rstrip("/")) or "."
    return shutil.disk_usage(path).free


def _last_checkpoint_bytes(run_dir: RunDir) -> int:
    step = run_dir.committed_step()
    if step is None:
        return 0
    manifest = json.loads(run_dir.read(f"checkpoints/step-{step}/manifest.json") or b"{}")
    if "bytes" in manifest:
        return int(manifest["bytes"])
    return sum(int(entry.get("size", 0)) for entry in manifest.get("files", {}).values())
