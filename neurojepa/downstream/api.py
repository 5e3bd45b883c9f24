"""Weights in use: ``neurojepa.load(W).embed(scans)``, and what the command ``embed`` does.

    model = neurojepa.load("weights")
    e = model.embed("t1.nii.gz")        # a file, files, a folder, BIDS, a table of files, a feed
    e.values                            # float32 [scans, features]
    e.table                             # the same with pseudonym, session, modality, flags, ...
    neurojepa.load("finetuned").predict("t1.nii.gz").rows    # what fine-tuned weights tell
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike, fspath

import numpy as np
import pyarrow as pa
import torch

from neurojepa.downstream import table as tables
from neurojepa.downstream import volumes
from neurojepa.downstream.embed import embed, select_rows
from neurojepa.downstream.finetuned import read_head
from neurojepa.downstream.predicted import Predicted, predict
from neurojepa.downstream.regions import Regions, load_regions
from neurojepa.downstream.scans import Scans, is_feed, prepare_scans, told
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import MODALITIES, Feed, open_feed
from neurojepa.storage import join, parquet_bytes, write_bytes
from neurojepa.weights import Weights, hashed, load

Path = str | PathLike[str]


@dataclass(frozen=True)
class Embedded:
    """Embeddings of scans; ``table`` and ``values`` have a row for each, in the same order."""

    table: pa.Table  # as downstream/table.py describes embeddings.parquet
    regions: pa.Table | None  # as regions.parquet, where regions were asked for
    scans: Scans | None  # what became of raw scans; None of a feed
    feed: str  # fingerprint
    skipped: dict[str, int]  # scans of modalities that the weights do not know, by modality
    volumes: bytes  # volumes.csv

    @property
    def values(self) -> np.ndarray:
        """float32 [scans, features]."""
        return tables.vectors(self.table)

    def write(self, out: str) -> None:
        """Write all tables into a folder."""
        if self.regions is not None:
            write_bytes(join(out, "regions.parquet"), parquet_bytes(self.regions))
        if self.scans is not None:
            tables.write_scans_csv(out, self.scans, self.table["scan_id"].to_pylist())
        write_bytes(join(out, volumes.FILE), self.volumes)
        tables.write_tables(out, self.table)


class Model:
    """Weights on a device.

    Parameters
    ----------
    weights : as ``neurojepa.weights.load`` gives them
    name : where they come from, for messages
    device : of torch; None: the first GPU, or the CPU where there is none
    """

    def __init__(self, weights: Weights, name: str, device: str | None = None) -> None:
        self.weights, self.name = weights, name
        self.device = device_named(device)
        weights.model.to(self.device)

    def embed(self, scans: Path | Sequence[Path], *, out: str | None = None,
              modality: str | None = None, cohort: str | None = None, regions: bool = False,
              atlas: str | None = None, atoms: bool = False, preset: str = "default",
              key: str | None = None, workers: int = 1,
              progress: Callable[[int, int], None] = lambda done, of: None) -> Embedded:
        """Embed scans as they are, or those of a feed.

        Parameters
        ----------
        scans
            NIfTI or MGZ files, folders of DICOM slices; or one folder of scans, BIDS dataset, table
            of files (.csv, .tsv) or feed.
        out
            Folder where preparation keeps its work, to go on from there; None: it is not kept.
        modality
            Only these scans are embedded; files whose names do not say what they are are taken for
            it.
        cohort
            Of a feed, only the scans of this cohort.
        regions, atlas
            Rows of regions too: of lobes by coordinates, or of this label map in MNI152 space.
        atoms
            Atoms of the sparse code in place of latents.  Exported weights say what is usual of
            latents alone, so atoms are compared with those of the scans embedded (of split train,
            where a feed has one).
        preset
            How thoroughly scans are prepared: quick, default or paper.
        key
            File of the pseudonym key; None: $NEUROJEPA_KEY_FILE, or the one at its usual place.
        workers
            People prepared at once; more than one needs Ray.
        progress
            Called with the number of scans embedded, and of all.

        Raises
        ------
        ConfigError
            Scans that cannot be told apart or whose modality is not known, another grid.
        DataError
            No scan is there, or none is usable.
        """
        with self.found(scans, out, modality, cohort, preset, key, workers) as (
                feed, rows, prepared, skipped):
            where = load_regions(feed.grid, self.weights.config.model.patch_voxels, atlas)
            return self._embed(feed, rows, prepared, where, skipped, progress,
                               regions=regions or atlas is not None, atoms=atoms)

    def predict(self, scans: Path | Sequence[Path], *, out: str | None = None,
                modality: str | None = None, cohort: str | None = None, preset: str = "default",
                key: str | None = None, workers: int = 1) -> Predicted:
        """What a fine-tuned model tells of people, or of their visits, from scans.

        A person's scans of several modalities are read together; any of them may be missing.

        Parameters
        ----------
        scans, out, modality, cohort, preset, key, workers
            As of ``embed``.

        Raises
        ------
        ConfigError
            The weights were not fine-tuned; or as ``embed``.
        DataError
            No scan of a modality that the label was learnt from; or as ``embed``.
        """
        head, task = read_head(self.name, self.weights)
        with self.found(scans, out, modality, cohort, preset, key, workers) as (
                feed, rows, prepared, skipped):
            return predict(self.weights, head, task, feed, rows, skipped, prepared)

    @contextmanager
    def found(self, scans: Path | Sequence[Path], out: str | None, modality: str | None,
              cohort: str | None, preset: str, key: str | None, workers: int
              ) -> Iterator[tuple[Feed, np.ndarray, Scans | None, dict[str, int]]]:
        """The feed of scans, its rows that are asked for, what became of raw scans, and how many of
        each modality are left out; without ``out`` the feed of raw scans is gone afterwards."""
        named = [fspath(scans)] if isinstance(scans, str | PathLike) else [fspath(s) for s in scans]
        with tempfile.TemporaryDirectory(prefix="neurojepa-") as folder:
            prepared = None
            if len(named) == 1 and is_feed(named[0]):
                feed = open_feed(named[0])
                self.check_grid(feed)
                rows = select_rows(feed, modality, cohort)
            else:
                if cohort:
                    raise ConfigError(f"--cohort {cohort}: only a feed has cohorts to choose from; "
                                      "name the scans that are wanted")
                prepared = self._prepare(named, out or folder, modality, preset, key, workers)
                feed = prepared.feed
                rows = select_rows(feed, modality, None)
                people = feed.index["participant"].take(rows).to_pylist()
                rows = rows[[person in prepared.ids for person in people]]
            rows, skipped = self.known(feed, rows)
            yield feed, rows, prepared, skipped

    def _prepare(self, named: list[str], out: str, modality: str | None, preset: str,
                 key: str | None, workers: int) -> Scans:
        if self.weights.places is None:
            print(f"{self.name}: exported without what embeddings are compared with, so these "
                  "scans are compared with one another; export or convert the weights again, "
                  "with --feed FEED")
        found = prepare_scans(named, out, self.weights.grid, key=key, preset=preset,
                              modality=modality, workers=workers)
        print(f"scans: {told(found)}", flush=True)
        return found

    def known(self, feed: Feed, rows: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
        """Rows of modalities that the weights know, and how many there are of each other one."""
        if self.weights.places is None:
            return rows, {}
        names = np.array(feed.index["modality"].to_pylist())[rows]
        known = [MODALITIES[number] for number in sorted(self.weights.places.sums)]
        skipped = dict(Counter(names[~np.isin(names, known)].tolist()))
        for name, number in sorted(skipped.items()):
            print(f"not embedded: {number} {name} scans; {self.name} knows "
                  f"{', '.join(known)} alone")
        if len(rows) == sum(skipped.values()):
            raise DataError(f"{feed.uri}: no scan of a modality that {self.name} knows "
                            f"({', '.join(known)})")
        return rows[np.isin(names, known)], skipped

    def _embed(self, feed: Feed, rows: np.ndarray, scans: Scans | None, where: Regions,
               skipped: dict[str, int], progress: Callable[[int, int], None], *,
               regions: bool, atoms: bool) -> Embedded:
        config = self.weights.config
        found = embed(self.weights.model, config, feed, rows,
                      None if atoms else self.weights.places, regions=where if regions else None,
                      progress=lambda done: progress(done, len(rows)), atoms=atoms)
        seen = seen_of(self.weights.seen, found.participant.tolist(), found.scan_id.tolist())
        measured = volumes.tissue_volumes(feed, rows, where, config.model.patch_voxels)
        return Embedded(tables.embedding_table(found, feed, rows, seen, scans),
                        tables.region_table(found, where) if regions else None,
                        scans, feed.fingerprint, skipped,
                        volumes.volumes_csv(feed, *measured, where))

    def check_grid(self, feed: Feed) -> None:
        """Raise ConfigError where a feed is packed at another grid than the weights know."""
        grid = self.weights.grid
        if not np.array_equal(grid.affine, feed.grid.affine) or grid.shape != feed.grid.shape:
            raise ConfigError(f"--feed {feed.uri} is packed at grid {feed.grid.name}, the weights "
                              f"were trained at {grid.name}; pack the archive with --grid "
                              f"{grid.name}")


def load_model(weights: Path, device: str | None = None) -> Model:
    """Exported weights from a folder or an object store; also ``neurojepa.load``.

    Raises
    ------
    DataError
        Not an export, or a damaged one.
    ConfigError
        There is no such device.
    """
    return Model(load(fspath(weights)), fspath(weights), device)


def seen_of(taught: AbstractSet[str] | None, people: Sequence[str],
          scans: Sequence[str]) -> list[bool | None]:
    """Whether each scan's person was in the pretraining, itself or by any of its scans; None where
    it is not known who was."""
    if taught is None:
        return [None] * len(people)
    known = {person for person, scan in zip(people, scans, strict=True)
             if not taught.isdisjoint((hashed(person), hashed(scan)))}
    return [person in known for person in people]


def device_named(name: str | None) -> torch.device:
    """The device of this name; None: the first GPU, or the CPU where there is none.

    Raises
    ------
    ConfigError
        It cannot be used here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: cannot be used here "
                          f"({str(error).splitlines()[0]}); cpu always can") from error
