"""Frozen embeddings of a feed's scans, one row a scan: the target encoder's tokens, pooled, or h of
the session code in them, where the weights have one.

pooling.py says how.  A CNN has no tokens; its pooled features are taken as they are.

Scans go through the encoder one at a time, each with all the patches that have brain in them: the
token budget of training would leave out part of large heads alone.  So an embedding does not depend
on what is embedded beside it.  Only training's own probes keep its budget and its batches, whose
shapes are compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from neurojepa.config import AugmentConfig, RootConfig
from neurojepa.downstream.pooling import LEAST_SCANS, Places, Tokens
from neurojepa.downstream.regions import Regions
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import MODALITIES, Feed
from neurojepa.feed.labels import scan_labels
from neurojepa.feed.loader import Batch, SampleReader
from neurojepa.model.averaged import Averaged
from neurojepa.model.jepa import SparseJEPA
from neurojepa.objective.views import (
    Views,
    count_brain,
    make_views,
    patch_centres_mm,
    patch_numbers,
)

READ_AHEAD = 8  # scans
MAX_REFERENCE = 256  # scans of a modality that say what a place is like


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
    regions: np.ndarray | None = None  # float32 [n, R, D], where they were asked for
    region_patches: np.ndarray | None = None  # float32 [n, R], how many patches tell of each

    def labels(self, table: pa.Table, name: str) -> np.ndarray:
        """[n] array of str: the label of each scan's session, else of its person, else "".

        Raises
        ------
        DataError
            No one has a label of this name.
        """
        return scan_labels(table, name, people=self.participant.tolist(),
                           sessions=self.session.tolist())


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
          places: Places | None = None, *, batch_size: int | None = None,
          regions: Regions | None = None, progress: Callable[[int], None] = lambda done: None,
          atoms: bool = False) -> Embeddings:
    """Embed scans of a feed without augmentation or masks.

    Parameters
    ----------
    rows : [n] row numbers of ``feed.index``
    places : what to compare tokens with; None: those of ``reference_rows``
    batch_size : None: one scan at a time, with all its brain; a number: as many as in training,
        with training's token budget
    regions : of the feed's grid; their rows come beside those of scans
    progress : called with the number of scans done
    atoms : pool the atoms of the sparse code in place of latents, by the same rule; ``places``
        then have to be of atoms too

    Raises
    ------
    ConfigError
        Regions of a CNN, which has no tokens; atoms of a model whose code reads predictions alone,
        or whose latents are atoms of a session code.
    DataError
        A scan's modality is none of those to compare with, or a sample cannot be read.
    """
    pooled, parts = [], []
    if atoms and model.session_code is not None:
        raise ConfigError("these weights have a session code: what they embed by are its atoms "
                          "already; leave --atoms out")
    if atoms and (config.objective.method != "jepa" or not config.objective.sparse.visible):
        raise ConfigError(f"objective.method = {config.objective.method}, objective.sparse.visible "
                          f"= {config.objective.sparse.visible:g}: no atoms can be read from the "
                          "tokens of a scan; train a jepa with objective.sparse.visible=1")
    if config.objective.method == "cnn":
        if regions is not None:
            raise ConfigError("objective.method = cnn: it has no tokens, so nothing can be told of "
                              "regions; leave --regions out")
        for views in views_of(model, config, feed, rows, batch_size=batch_size):
            pooled.append(model.embed(views))
            progress(len(pooled))
        return describe(feed, rows, torch.cat(pooled).cpu().numpy())
    device = next(model.parameters()).device
    places = (places.to(device) if places else
              fit_places(model, config, feed, reference_rows(feed, rows), batch_size=batch_size,
                         atoms=atoms))
    for each in tokens_of(model, config, feed, rows, batch_size=batch_size, atoms=atoms):
        pooled.append(places.pool(each))
        if regions is not None:
            share_nR = torch.from_numpy(regions.share_nR).to(device)
            parts.append(places.pool_regions(each, share_nR))
        progress(len(pooled))
    found = describe(feed, rows, torch.cat(pooled).cpu().numpy())
    if regions is None:
        return found
    of_regions, seen = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    return replace(found, regions=of_regions, region_patches=seen)


def describe(feed: Feed, rows: np.ndarray, values: np.ndarray) -> Embeddings:
    """Embeddings of the feed's ``rows``, whose ``values`` [n, D] are known."""
    column = {name: np.array(feed.index[name].to_pylist())[rows]
              for name in ("scan_id", "participant", "family", "session", "modality", "split")}
    return Embeddings(values=values, **column)


def reference_rows(feed: Feed, rows: np.ndarray) -> np.ndarray:
    """Scans to compare those of ``rows`` with: of split train and of their modalities, at most
    ``MAX_REFERENCE`` of each, spread over the feed.

    Of a modality that split train lacks, all scans of the feed are taken, and that is printed: no
    probe can be fitted on such scans, so nothing leaks.

    Raises
    ------
    DataError
        There are fewer than ``LEAST_SCANS`` of a modality: nothing could be told of them.
    """
    modality, split = (np.array(feed.index[name].to_pylist()) for name in ("modality", "split"))
    chosen = []
    for wanted in np.unique(modality[rows]):
        found = np.flatnonzero((modality == wanted) & (split == "train"))
        if not len(found):
            found = np.flatnonzero(modality == wanted)
            print(f"{feed.uri}: no {wanted} scan in split train; embeddings of {wanted} are "
                  f"compared with all {len(found)} of them")
        if len(found) < LEAST_SCANS:
            raise DataError(f"{feed.uri}: {len(found)} {wanted} scan to compare with, embeddings "
                            f"need {LEAST_SCANS}; embed other modalities (--modality), pack more "
                            "such scans, or take weights that were exported with their feed")
        chosen.append(spread(found))
    return np.concatenate(chosen)


def spread(rows: np.ndarray) -> np.ndarray:
    """At most ``MAX_REFERENCE`` of these rows, evenly spread."""
    return rows[::-(-len(rows) // MAX_REFERENCE)]


def teaching_rows(feed: Feed) -> np.ndarray:
    """Scans that say, with a run's weights, what is usual at each place: as ``reference_rows``, of
    every modality that split train has enough of.

    Raises
    ------
    DataError
        There is no such modality.
    """
    modality, split = (np.array(feed.index[name].to_pylist()) for name in ("modality", "split"))
    names, counts = np.unique(modality[split == "train"], return_counts=True)
    rows = np.flatnonzero(np.isin(modality, names[counts >= LEAST_SCANS]))
    if not len(rows):
        raise DataError(f"{feed.uri}: split train has {dict(zip(names, counts, strict=True))} "
                        f"scans, embeddings need {LEAST_SCANS} of a modality to compare with")
    return reference_rows(feed, rows)


@torch.no_grad()
def fit_places(model: Averaged, config: RootConfig, feed: Feed, rows: np.ndarray,
               *, batch_size: int | None = None, atoms: bool = False) -> Places:
    """What tokens are at each place in the scans of ``rows``, as ``reference_rows`` has them."""
    num_patches = len(patch_centres_mm(feed.grid, config.model.patch_voxels))
    return Places.fit(lambda: tokens_of(model, config, feed, rows, batch_size=batch_size,
                                        atoms=atoms), num_patches)


def tokens_of(model: Averaged, config: RootConfig, feed: Feed, rows: np.ndarray,
              *, batch_size: int | None = None, atoms: bool = False) -> Iterator[Tokens]:
    """The target encoder's tokens of scans, batch by batch, without augmentation."""
    for views in views_of(model, config, feed, rows, batch_size=batch_size):
        yield tokens_in(model, config, feed, views, atoms=atoms)


def tokens_in(model: Averaged, config: RootConfig, feed: Feed, views: Views,
              *, atoms: bool = False) -> Tokens:
    """The target encoder's tokens of views of this feed, or the atoms of a JEPA's code in them."""
    patch_BN = patch_numbers(views.coords_BN3, feed.grid, config.model.patch_voxels)
    if atoms:
        assert isinstance(model, SparseJEPA)
        z_BND = model.atoms(views)
    else:
        z_BND = model.latents(views)
    return Tokens(z_BND, patch_BN, views.foreground_BN, views.modality_B)


def views_of(model: Averaged, config: RootConfig, feed: Feed, rows: np.ndarray,
             *, batch_size: int | None = None) -> Iterator[Views]:
    """Views of scans in order, without augmentation, on the model's device.

    Without ``batch_size`` each scan comes alone, with all its brain.
    """
    device = next(model.parameters()).device
    model.eval()
    config = without_augmentation(config)
    for batch in batches(feed, rows, batch_size or READ_AHEAD):
        batch = batch.to(device)
        if batch_size is not None:
            yield make_views(batch, config, feed.grid, config.train.seed)
            continue
        for b in range(len(batch.scan_ids)):
            alone = _alone(batch, b)
            yield make_views(alone, with_all_brain(config, alone.voxels), feed.grid,
                             config.train.seed)


def _alone(batch: Batch, b: int) -> Batch:
    """Scan b of a batch as a batch of its own."""
    return Batch(voxels=batch.voxels[b:b + 1], modality=batch.modality[b:b + 1],
                 position=batch.position[b:b + 1], weight=batch.weight[b:b + 1],
                 scan_ids=batch.scan_ids[b:b + 1])


def with_all_brain(config: RootConfig, voxels: torch.Tensor) -> RootConfig:
    """The same config with a token budget that leaves out no patch of a scan with brain in it."""
    budget = config.model.token_budget
    if budget is None:
        return config
    brain_Bn, _ = count_brain(voxels, config.model.patch_voxels)
    budget = max(budget, int((brain_Bn > 0).sum(1).max()))
    return config.model_copy(update={
        "model": config.model.model_copy(update={"token_budget": budget})})


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
