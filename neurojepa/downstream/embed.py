"""Frozen embeddings of a feed's scans: the mean of the target encoder's tokens, one row a scan."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from neurojepa.config import AugmentConfig, RootConfig
from neurojepa.errors import DataError
from neurojepa.feed.format import MODALITIES, Feed
from neurojepa.feed.labels import scan_labels
from neurojepa.feed.loader import Batch, SampleReader
from neurojepa.model.averaged import Averaged
from neurojepa.objective.views import make_views


@dataclass(frozen=True)
class Embeddings:
    """n scans by D features, with what a probe needs to know of each scan."""

    values: np.ndarray  # float32 [n, D]
    scan_id: np.ndarray  # str [n], as all below
    participant: np.ndarray
    family: np.ndarray
    session: np.ndarray
    modality: np.ndarray
    split: np.ndarray

    def labels(self, table: pa.Table, name: str) -> np.ndarray:
        """[n] array of str: the label of each scan's session, else of its person, else "".

        Raises
        ------
        DataError
            No one has a label of this name.
        """
        return scan_labels(table, name, self.participant.tolist(), self.session.tolist())


def select_rows(feed: Feed, modality: str | None, cohort: str | None,
                split: str | None = None) -> np.ndarray:
    """Row numbers of the feed's scans of a modality, cohort and split (None: any).

    Raises
    ------
    DataError
        Nothing is left; the message says what the feed has.
    """
    wanted = {"modality": modality, "cohort": cohort, "split": split}
    columns = {name: np.array(feed.index[name].to_pylist()) for name in wanted}
    chosen = np.ones(feed.index.num_rows, dtype=bool)
    for name, value in wanted.items():
        chosen &= np.isin(columns[name], columns[name] if value is None else value)
    if not chosen.any():
        raise DataError(f"{feed.uri}: no scan with " + ", ".join(
            f"{name} {value}" for name, value in wanted.items() if value is not None)
            + "; it has " + ", ".join(f"{name} {sorted(set(column.tolist()))}"
                                      for name, column in columns.items()))
    return np.flatnonzero(chosen)


@torch.no_grad()
def embed(model: Averaged, config: RootConfig, feed: Feed, rows: np.ndarray,
          batch_size: int = 8) -> Embeddings:
    """Embed scans of a feed without augmentation or masks.

    Parameters
    ----------
    rows : [n] row numbers of ``feed.index``
    """
    device = next(model.parameters()).device
    model.eval()
    config = without_augmentation(config)
    values = []
    for batch in batches(feed, rows, batch_size):
        views = make_views(batch.to(device), config, feed.grid, config.train.seed)
        values.append(model.embed(views).cpu().numpy())
    column = {name: np.array(feed.index[name].to_pylist())[rows]
              for name in ("scan_id", "participant", "family", "session", "modality", "split")}
    return Embeddings(values=np.concatenate(values), **column)


def without_augmentation(config: RootConfig) -> RootConfig:
    """The same config without augmentation and what only training draws, as evaluation wants it."""
    masks = config.objective.masks.model_copy(update={"region_share": 0.0})  # reads no atlas
    objective = config.objective.model_copy(update={
        "augment": AugmentConfig(gamma=0, noise=0, bias_field=0), "masks": masks,
        "tissue_weight": 0.0})
    return config.model_copy(update={"objective": objective})


def batches(feed: Feed, rows: np.ndarray, batch_size: int) -> Iterator[Batch]:
    """Scans in order, ``batch_size`` at a time, at position 0: nothing of them is drawn."""
    reader = SampleReader(feed)
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(rows), batch_size):
            part = rows[start:start + batch_size]
            voxels = np.stack(list(pool.map(reader.image, part.tolist())))
            yield Batch(
                voxels=torch.from_numpy(voxels),
                modality=torch.tensor([MODALITIES.index(reader.value("modality", row))
                                       for row in part]),
                position=torch.zeros(len(part), dtype=torch.int64),
                weight=torch.ones(len(part)),
                scan_ids=[reader.value("scan_id", row) for row in part],
            )
