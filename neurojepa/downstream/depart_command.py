"""``depart``: its arguments, and what it runs."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from neurojepa.errors import ConfigError, DataError

if TYPE_CHECKING:
    from neurojepa.downstream.scans import Scans
    from neurojepa.feed.format import Feed


def add_depart(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    command = commands.add_parser("depart", help="where a person's atoms depart from those of "
                                  "people of the same age")
    command.add_argument("scan", metavar="SCAN", help="one scan, as embed takes it; or a feed, "
                         "with --scan-id")
    command.add_argument("--scan-id", help="of the feed's scans, this one")
    command.add_argument("--weights", required=True, help="exported weights with a sparse code: "
                         "of a JEPA, or a session code")
    command.add_argument("--reference", required=True, metavar="FEED", help="people to compare "
                         "with, whose label age is known")
    command.add_argument("--split", help="of the reference, only this split")
    command.add_argument("--age", type=float, help="of the person in years (default: as the scan's "
                         "table, sidecar or feed tells it)")
    command.add_argument("--modality", help="of the scan, where its name does not say it")
    command.add_argument("--atlas", help="label map in MNI152 space (NIfTI; names in a .tsv "
                         "beside it); default: lobes by coordinates")
    command.add_argument("--out", required=True, help="folder for the map and the page")
    command.add_argument("--preset", default="default", choices=["quick", "default", "paper"],
                         help="as of embed")
    command.add_argument("--key", help="file of the pseudonym key")
    command.add_argument("--device", help="as of embed")


def run_depart(arguments: argparse.Namespace) -> int:
    from neurojepa.downstream import depart_page as pages
    from neurojepa.downstream.api import load_model
    from neurojepa.downstream.depart import departures, region_means
    from neurojepa.downstream.native import Maps, shown
    from neurojepa.downstream.output import write_task
    from neurojepa.downstream.regions import load_regions
    from neurojepa.feed.format import open_feed
    from neurojepa.feed.loader import SampleReader

    model = load_model(arguments.weights, arguments.device)
    reference = open_feed(arguments.reference)
    model.check_grid(reference)
    with model.found([arguments.scan], arguments.out, arguments.modality, None, arguments.preset,
                     arguments.key, 1) as (feed, rows, scans, _):
        row = _one(feed, rows, arguments.scan_id)
        who, codes = shown(feed, row, scans), SampleReader(feed).image(row)
        age = arguments.age if arguments.age is not None else _age(feed, row, scans)
        others, ages = _others(reference, who.modality, arguments.split, feed, row)
        regions = load_regions(feed.grid, model.weights.config.model.patch_voxels, arguments.atlas)
        own = region_means(model.weights, feed, np.array([row]), regions)[0]
        told = region_means(model.weights, reference, others, regions, lambda done: print(
            f"{done} of {len(others)} reference scans",
            end="\r" if done < len(others) else "\n", flush=True))
        found = departures(own, age, told, ages)
        path = Maps(arguments.out, feed.grid, scans).write(
            who, pages.painted(found, regions, codes, model.weights.config.model.patch_voxels),
            "departure", "atoms", {
                "Description": "root mean square of z over atoms in the voxel's region, against "
                               "people of the same age", "Units": "sd", "Age": age})
    record = {"weights": arguments.weights, "reference": reference.fingerprint, "map": path,
              "modality": who.modality, "age": age, "notes": [],
              "participant_id": who.participant, "session_id": who.session,
              **pages.record_of(found, regions)}
    for name, size, p in zip(regions.names, found.size_R, found.p_holm_R, strict=True):
        print(f"{name}: {size:.2f} sd, p {p:.3f} (Holm)" if np.isfinite(size)
              else f"{name}: nothing can be told")
    write_task(arguments.out, "depart/1", record, methods=partial(pages.methods, found),
               page=partial(pages.depart_page, found, regions, codes, feed.grid,
                            model.weights.config.model.patch_voxels),
               predictions=pages.rows_of(found, regions))
    return 0


def _one(feed: Feed, rows: np.ndarray, scan_id: str | None) -> int:
    """The row of the scan that is meant."""
    names = [feed.index["scan_id"][row].as_py() for row in rows.tolist()]
    if scan_id is not None:
        if scan_id not in names:
            raise ConfigError(f"--scan-id {scan_id}: {feed.uri} has no such scan of a modality "
                              "that the weights know")
        return int(rows[names.index(scan_id)])
    if len(names) != 1:
        raise ConfigError(f"{len(names)} scans are there, one is compared; name it by --scan-id "
                          f"(first: {names[0]})")
    return int(rows[0])


def _age(feed: Feed, row: int, scans: Scans | None) -> float:
    """The person's age, as the archive or the feed's labels tell it."""
    from neurojepa.feed.labels import as_numbers, scan_labels

    told = None
    if scans is not None:
        scan_id = feed.index["scan_id"][row].as_py()
        told = next(each["age_at_scan"] for each in scans.about.to_pylist()
                    if each["scan_id"] == scan_id)
    elif "age" in feed.labels()["name"].to_pylist():
        values = scan_labels(feed.labels(), "age", people=[feed.index["participant"][row].as_py()],
                             sessions=[feed.index["session"][row].as_py()])
        numbers = as_numbers(values) if values[0] else None
        told = None if numbers is None else float(numbers[0])
    if told is None:
        raise ConfigError("the age of the person is not known; add --age YEARS")
    return float(told)


def _others(reference: Feed, modality: str, split: str | None, feed: Feed,
            row: int) -> tuple[np.ndarray, np.ndarray]:
    """The first scan of each reference person of another family, and the ages.

    Raises
    ------
    DataError
        Nobody there has such a scan and an age.
    """
    from neurojepa.downstream.embed import select_rows
    from neurojepa.feed.labels import as_numbers, scan_labels

    rows = select_rows(reference, modality, None, split)
    column = {name: np.array(reference.index[name].to_pylist())[rows]
              for name in ("participant", "family", "session", "scan_id")}
    own = {name: feed.index[name][row].as_py() for name in column}
    apart = np.all([column[name] != own[name] for name in ("participant", "family", "scan_id")], 0)
    same = column["family"][column["scan_id"] == own["scan_id"]]  # known by the scan alone
    apart &= ~np.isin(column["family"], same)
    ages = scan_labels(reference.labels(), "age", people=column["participant"].tolist(),
                       sessions=column["session"].tolist())
    first = np.zeros(len(rows), bool)
    first[np.unique(np.where(ages != "", column["participant"], ""), return_index=True)[1]] = True
    chosen = apart & first & (ages != "")
    numbers = as_numbers(ages[chosen])
    if numbers is None or not len(numbers):
        raise DataError(f"--reference {reference.uri}: no {modality} scan of another person with a "
                        "number as label age")
    return rows[chosen], numbers
