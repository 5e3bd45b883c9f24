"""Scans as people have them -> a feed: the index, prepare and pack that cohorts go through.

    a NIfTI or MGZ file, a folder of DICOM slices, several of them
    a folder of such files, a BIDS dataset, a table of files (data_prep/cohorts/files.py)

What is made lies below OUT/scans (manifest, archive, feed), so that the same command run again
goes on, and embeds at once where nothing has changed.  All of it happens in this process and a
watched child of it; with more workers than one it is done over Ray.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.filenames import image_ending, is_hidden, partners, stem
from neurojepa.downstream.unasked import manifest_of
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import Feed, Grid, open_feed
from neurojepa.storage import exists, join, local_path, sha256, write_bytes

if TYPE_CHECKING:
    from data_prep.volumes.reading.grid import OwnGrid

MODALITIES = ("T1w", "T2w", "FLAIR", "PET", "BOLD")  # a scan is of one of them
TABLES = (".csv", ".tsv")
SLICES = (".dcm", ".ima")  # endings
# words of a name that tell a modality; FLAIR comes first, as it is often called t2_flair
WORDS = {"FLAIR": {"flair"}, "T1w": {"t1", "t1w", "mprage", "mp2rage", "unit1"},
         "T2w": {"t2", "t2w"}, "PET": {"pet"}, "BOLD": {"bold"}}
COMMON = {"", "brain", "head", "anat", "mri", "orig", "dicom", "nifti", "scan", "image", "raw",
          "nu"}.union(*WORDS.values())
SHARD_BYTES = 256 << 20
DICOM_MARK = slice(128, 132), b"DICM"


@dataclass(frozen=True)
class Scans:
    """Prepared scans: a feed, and what became of every scan that was found."""

    feed: Feed
    about: pa.Table  # of the archive: one row for each scan, rejected ones too
    ids: dict[str, str]  # pseudonym -> the id that the user knows


def is_feed(uri: str) -> bool:
    return exists(join(uri, "feed.json"))


def prepare_scans(scans: Sequence[str], out: str, grid: Grid, *, key: str | None = None,
                  preset: str = "default", modality: str | None = None, workers: int = 1) -> Scans:
    """Index, prepare and pack scans below ``out``/scans.

    Parameters
    ----------
    scans : files and folders, or one folder or table; local, or the folder or table on a store
    key : file of the pseudonym key, as data_prep.identity.load_key finds it
    preset : of data_prep.volumes.preset
    modality : of files whose names do not say it; what it does not need is not prepared

    Raises
    ------
    ConfigError
        A modality is not told, or several tables or datasets were given at once.
    DataError
        Nothing is there, or no scan is usable.
    """
    from data_prep.archive import open_archive
    from data_prep.identity import load_key
    from data_prep.index import index
    from data_prep.pack import pack
    from data_prep.prepare.driver import prepare
    from data_prep.volumes.preset import PRESETS

    place = join(out, "scans")
    manifest, archive, feed = (join(place, name)
                               for name in ("manifest.parquet", "archive", "feed"))
    cohort, source, tables = _source(scans, place, modality)
    named = index(cohort, source, out=manifest, key=load_key(key), tables=tables,
                  name="scans" if source.startswith(place) else None)
    prepare([manifest_of(modality, manifest, archive)], out=archive, preset=PRESETS[preset],
            workers=workers)
    pack(archive, out=feed, grid=grid, shard_bytes=SHARD_BYTES)
    ids = {pseudonym: own for own, pseudonym in named.items()}
    about = open_archive(archive).scans
    # of an earlier run with other scans, rows may be there too
    about = about.filter(pc.is_in(about["participant"], pa.array(list(ids))))
    return Scans(open_feed(feed), about, ids)


def _source(scans: Sequence[str], place: str, modality: str | None) -> tuple[str, str, list[str]]:
    """Kind of cohort, source and tables for ``index``."""
    if not scans:
        raise ConfigError("no scan was named; name files, a folder, a table of files or a feed")
    first = scans[0]
    if len(scans) == 1:
        if first.lower().endswith(TABLES):
            return "files", os.path.dirname(first) or ".", [first]
        folder = local_path(first)
        if folder is None or exists(join(first, "dataset_description.json")):
            return "bids", first, []  # of a store folders alone are taken
        if os.path.isdir(folder):
            series = _series(folder)
            images = _images(folder)
            if images and modality is None:
                return "bids", first, []  # loose files, told by the ends of their names
            if not images and not series:
                raise DataError(f"{first}: no image there (NIfTI, MGH or DICOM slices)")
            scans = [*images, *series]
    return "files", *_linked(_checked(scans), place, modality)


def _checked(scans: Sequence[str]) -> list[str]:
    """Absolute paths of files and folders of slices."""
    paths = []
    for scan in scans:
        path = local_path(scan)
        if path is None:
            raise ConfigError(f"{scan}: of an object store name a folder or a table of files, not "
                              "single scans")
        if not os.path.exists(path):
            raise DataError(f"{scan}: no such file or folder")
        if scan.lower().endswith(TABLES) or is_feed(scan) or exists(
                join(scan, "dataset_description.json")):
            raise ConfigError(f"{scan}: a table, a dataset or a feed is embedded alone; name it in "
                              "a command of its own")
        if os.path.isdir(path) and _series(path) != [os.path.abspath(path)]:
            raise ConfigError(f"{scan}: among several scans a folder must hold the slices of one "
                              "DICOM series; name a folder of scans alone")
        paths.append(os.path.abspath(path))
    return sorted(set(paths))


def _linked(paths: list[str], place: str, modality: str | None) -> tuple[str, list[str]]:
    """A folder of links to scans, so that nothing beside them is walked, and its table of files."""
    local = local_path(place)
    if local is None:
        raise ConfigError(f"--out {place.removesuffix('/scans')}: scans that are named one by one "
                          "need a local folder; copy the result, or name a folder of scans")
    people = _people(paths)
    rows = [("file", "participant_id", "session_id", "modality")]
    for path in paths:
        folder = Path(local, "source", sha256(path.encode())[:12])
        folder.mkdir(parents=True, exist_ok=True)
        sidecar = os.path.join(os.path.dirname(path), f"{_stem(path)}.json")
        for each in (path, *partners(path), sidecar):
            link = folder / os.path.basename(each)
            if os.path.exists(each) and not link.is_symlink():
                link.symlink_to(each)
        end = "/" if os.path.isdir(path) else ""
        person, session = people[path]
        rows.append((f"{folder.name}/{os.path.basename(path)}{end}", person, session,
                     _modality(path, modality)))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    table = join(place, "files.csv")
    write_bytes(table, text.getvalue().encode(), private=True)  # names may hold ids
    return join(place, "source"), [table]


def _people(paths: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Id and session of whom each file shows: BIDS entities, else its name, else its folder's.

    t1.nii.gz says nothing of a person, so the first folder above with a name of its own does.

    Raises
    ------
    ConfigError
        Two files would be of one person and have one name.
    """
    found: dict[str, tuple[str, str]] = {}
    taken: dict[tuple[str, str], str] = {}
    for path in paths:
        entities = dict(re.findall(r"(?:^|[_/])(sub|ses)-([A-Za-z0-9]+)", path))
        if "sub" in entities:
            found[path] = entities["sub"], entities.get("ses", "1")
            continue
        name = _stem(path)
        end = re.fullmatch(r"([^_]+)_(?:T1w|T2w|FLAIR|pet|bold)", name)
        own = (each for each in (name, *reversed(path.split("/")[:-1])) if not _says_nothing(each))
        person = end[1] if end else re.sub(r"[^A-Za-z0-9]+", "-", next(own, name)).strip("-")
        if (other := taken.setdefault((person, name), path)) != path:
            raise ConfigError(f"{path}: would be of the same person as {other}, {person!r}; say "
                              "who is who in a table of files (columns file, participant_id, "
                              "modality)")
        found[path] = person, "1"
    return found


def _stem(path: str) -> str:
    name = os.path.basename(path)
    return stem(name) if image_ending(name) else name  # a folder's name may have dots


def _says_nothing(name: str) -> bool:
    """Whether a name has only words that many people's files share."""
    return not set(re.split(r"[^a-z0-9]+", name.lower())) - COMMON


def _modality(path: str, otherwise: str | None = None) -> str:
    """What a file's name, or the name of its DICOM series, says; ``otherwise`` where it says none,
    or several.

    Raises
    ------
    ConfigError
        Nothing says it.
    """
    told = [os.path.basename(path)]
    if os.path.isdir(path):
        told.append(_description(path))
    for text in told:
        words = set(re.split(r"[^a-z0-9]+", text.lower()))
        found = [name for name, known in WORDS.items() if words & known]
        if found and (len(found) == 1 or found == ["FLAIR", "T2w"]):
            return found[0]
    if otherwise:
        return otherwise
    raise ConfigError(f"{path}: its name does not tell its modality; add --modality, one of "
                      + ", ".join(MODALITIES))


def _description(folder: str) -> str:
    """How the scanner calls a series; empty where it does not."""
    import pydicom

    header = pydicom.dcmread(_first(folder, os.listdir(folder)), stop_before_pixels=True,
                             force=True)
    return f"{header.get('SeriesDescription', '')} {header.get('ProtocolName', '')}"


def _images(folder: str) -> list[str]:
    return [os.path.join(top, name) for top, _, names in os.walk(folder) for name in sorted(names)
            if image_ending(name) and not is_hidden(name)]


def _series(folder: str) -> list[str]:
    """The folders, this one or below, that hold DICOM slices."""
    return [os.path.abspath(top) for top, _, names in os.walk(folder)
            if _is_slice(_first(top, names))]


def _first(folder: str, names: Sequence[str]) -> str:
    """The first file that is no left-over of an operating system; empty where there is none."""
    paths = (os.path.join(folder, name) for name in sorted(names) if not is_hidden(name))
    return next(filter(os.path.isfile, paths), "")


def _is_slice(path: str) -> bool:
    if not path:
        return False
    if path.lower().endswith(SLICES):
        return True
    place, mark = DICOM_MARK
    with open(path, "rb") as file:
        return file.read(place.stop)[place] == mark


def told(scans: Scans) -> str:
    """What became of the scans, for the screen."""
    counts = Counter(scans.about["status"].to_pylist())
    return ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))


def own_grid_of(scans: Scans, scan_id: str) -> tuple[OwnGrid, np.ndarray]:
    """The grid of a scan's file, and the matrix [4, 4] from the archive's mm to the scan's.

    Raises
    ------
    DataError
        The file is gone or has changed, or preparation kept no matrix.
    """
    from data_prep.scan import ScanError
    from data_prep.volumes.reading.grid import own_grid

    row = scans.about.filter(pc.equal(scans.about["scan_id"], scan_id)).to_pylist()[0]
    if not row.get("archive_to_scan"):
        raise DataError(f"{row['uri']}: preparation kept no matrix for it, so no map can be laid "
                        "on its grid; remove the folder scans below --out and run again")
    try:
        own = own_grid(row["uri"], row["member"], json.loads(row["facts"] or "{}"))
    except ScanError as error:
        raise DataError(f"{row['uri']}: cannot be read any more ({error}); was it moved?"
                        ) from error
    return own, np.array(json.loads(row["archive_to_scan"]))
