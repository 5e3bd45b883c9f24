"""Embeddings of invented people, in memory and as ``embed`` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.identity import pseudonym
from neurojepa.downstream.labels import People

KEY = b"a public key for invented people"


def people(values: np.ndarray, seen: np.ndarray | None = None, **columns: np.ndarray) -> People:
    """People p000, p001, ... with these features [n, D] and columns, each a family of its own."""
    names = np.array([f"p{number:03d}" for number in range(len(values))])
    brain = np.random.default_rng(9).normal(1400, 100, len(values)).round(1)
    return People(values.astype(np.float32), names, names, names,
                  np.zeros(len(values), bool) if seen is None else seen,
                  {"brain_ml": brain.astype(str),
                   **{name: np.asarray(column).astype(str) for name, column in columns.items()}})


def cohort(number: int = 90, signal: float = 3.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, 8] of which the first shows the truth [n] of 0 and 1."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(number) % 2)
    values = rng.normal(size=(number, 8))
    values[:, 0] += signal * truth
    return values, truth


def write_embedded(folder: Path, values: np.ndarray, ids: Sequence[str], **columns: Any) -> None:
    """embeddings.parquet of scans with these features [n, D] of these people, and the key.

    Parameters
    ----------
    columns : a value each, or one a scan, in place of the usual ones
    """
    who = [pseudonym(KEY, "clinic", str(name)) for name in ids]
    usual = {"scan_id": [f"s{number}" for number in range(len(values))], "participant": who,
             "family": who, "session": "1", "cohort": "clinic", "modality": "T1w", "site": "a",
             "split": "test", "brain_ml": 1400.0, "seen": False}
    pq.write_table(pa.table({
        **{name: [column] * len(values) if isinstance(column, str | float | bool) else list(column)
           for name, column in (usual | columns).items()},
        "embedding": pa.array(list(np.asarray(values, np.float32)), pa.list_(pa.float32()))}),
        folder / "embeddings.parquet")
    (folder / "key").write_bytes(KEY)
    (folder / "key").chmod(0o600)
