"""Commits checkpoints as the owner of a run directory, and drops those that nobody needs.

A checkpoint is committed when its manifest stands and ``latest`` names it.  An owner drops only
what its own line of checkpoints has left behind, never a newer owner's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from neurojepa import storage
from neurojepa.storage import join, read_if_there
from neurojepa.train.checkpoint import (
    all_steps,
    committed_steps,
    latest_step,
    remove,
    step_uri,
)
from neurojepa.train.ownership import Ownership


class Commits:
    """The line of committed checkpoints that one owner continues; on rank 0.

    Parameters
    ----------
    keep_last : int
        Committed checkpoints to keep.
    milestone_every : int
        Steps whose checkpoints are kept for good and exported to weights/step-N; 0 for none.
    """

    def __init__(self, run_dir: str, owner: Ownership, *, keep_last: int,
                 milestone_every: int) -> None:
        self.run_dir, self.owner = run_dir, owner
        self.keep_last, self.milestone_every = keep_last, milestone_every
        self._line: list[int] | None = None

    def commit(self, step: int, manifest: dict[str, Any]) -> None:
        """Commit a checkpoint whose files are written; may be done again.

        Raises
        ------
        LeaseLost
            Another owner has taken over; its checkpoints are untouched.
        """
        if self._line is None:  # what there was before the first of ours
            base = latest_step(self.run_dir)
            self._line = [s for s in committed_steps(self.run_dir)
                          if base is not None and s <= base and s < step]
        uri, manifest = step_uri(self.run_dir, step), {**manifest, "token": self.owner.token}
        self.owner.replace(join(uri, "manifest.json"), json.dumps(manifest).encode(),
                           _token_of_manifest)
        self.owner.point_to(f"step-{step}")
        if step not in self._line:
            self._line.append(step)
        self._prune(step)
        _remove_strangers(uri, manifest["files"], self.owner)
        if self._is_milestone(step):
            from neurojepa.weights import export

            self.owner.check()  # no lock: large weights would hold up all other writes
            export(self.run_dir, join(self.run_dir, "weights", f"step-{step}"), step)

    def _prune(self, step: int) -> None:
        assert self._line is not None
        kept = {s for s in self._line if self._is_milestone(s)} | set(self._line[-self.keep_last:])
        # later ones: their line was left when ``latest`` was set back, or never committed
        for other in set(all_steps(self.run_dir)) - kept:
            if other < step or _token_of(self.run_dir, other) <= self.owner.token:
                with self.owner.writing():
                    remove(self.run_dir, other)
        self._line = sorted(kept)

    def _is_milestone(self, step: int) -> bool:
        return self.milestone_every > 0 and step % self.milestone_every == 0


def _token_of_manifest(data: bytes) -> int:
    try:
        return int(json.loads(data).get("token", 0))
    except (ValueError, AttributeError):  # damaged: it protects nothing
        return 0


def _token_of(run_dir: str, step: int) -> int:
    data = read_if_there(join(step_uri(run_dir, step), "manifest.json"))
    return 0 if data is None else _token_of_manifest(data)


def _remove_strangers(uri: str, known: Mapping[str, Any], owner: Ownership) -> None:
    """Delete what an attempt that was killed left in a checkpoint's directory.

    Parameters
    ----------
    known
        Files in the manifest, among them those of ranks (rank-R-A.json), which vouch for theirs.
    """
    ranks = {name.removesuffix(".json") for name in known if name.endswith(".json")}
    for name in storage.list_names(uri):
        of_rank = name.endswith(".safetensors") and name.split(".")[0] in ranks
        if name != "manifest.json" and name not in known and not of_rank:
            with owner.writing():
                storage.remove(join(uri, name))
