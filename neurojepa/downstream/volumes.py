"""Automatic volumes of fluid, grey and white matter by region: what embeddings must be better than.

Each scan's intensities decide between the tissues, with the template as prior
(objective/anatomy.py, expectation-maximisation with one Gaussian a tissue), and patches hand their
tissue to the regions in which they lie.  A scan costs some milliseconds.  It is the plainest
measurement that a scan allows, at the scale of lobes; not a segmentation.

    volumes.csv     a scan: pseudonyms, millilitres of each tissue in each region
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping

import numpy as np
import torch

from neurojepa.downstream.regions import Regions
from neurojepa.errors import DataError
from neurojepa.feed.format import Feed
from neurojepa.feed.loader import SampleReader
from neurojepa.objective.anatomy import TISSUES, by_patch, priors_on, tissue_shares
from neurojepa.storage import exists, join, read_bytes

STRUCTURAL = ("T1w", "T2w", "FLAIR")  # whose intensities tell tissues apart
FILE = "volumes.csv"
ABOUT = ("scan_id", "participant", "session", "modality")


def tissue_volumes(feed: Feed, rows: np.ndarray, regions: Regions,
                   patch: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of structural scans [m] among ``rows``, and float64 [m, R, 3] ml of fluid, grey and
    white matter in each region of theirs.

    Parameters
    ----------
    patch : edge of a patch in voxels, as ``regions`` has them
    """
    modality = np.array(feed.index["modality"].to_pylist())[rows]
    chosen = rows[np.isin(modality, STRUCTURAL)]
    reader, device = SampleReader(feed), torch.device("cpu")
    priors = priors_on(device, feed.grid, patch)
    patch_ml = (patch * feed.grid.spacing_mm) ** 3 / 1000
    found = np.zeros((len(chosen), len(regions.names), len(TISSUES)))
    for number, row in enumerate(chosen.tolist()):
        codes_nP = by_patch(reader.image(row), patch)
        keep_n = np.flatnonzero((codes_nP != 0).any(1))
        shares_NK = tissue_shares(torch.from_numpy(codes_nP[keep_n])[None],
                                  torch.from_numpy(keep_n)[None], priors)[0]
        found[number] = patch_ml * regions.share_nR[keep_n].T @ shares_NK.numpy()[:, 1:]
    return chosen, found


def volumes_csv(feed: Feed, rows: np.ndarray, found: np.ndarray, regions: Regions) -> bytes:
    """volumes.csv of what ``tissue_volumes`` found."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*ABOUT, *(f"{region} {tissue} ml" for region in regions.names
                               for tissue in TISSUES)])
    columns = [feed.index[name].take(rows).to_pylist() for name in ABOUT]
    for about, volumes in zip(zip(*columns, strict=True), found, strict=True):
        writer.writerow([*about, *(f"{value:.3f}" for value in volumes.ravel())])
    return text.getvalue().encode()


def read_volumes(out: str) -> Mapping[str, np.ndarray] | None:
    """Volumes [V] of scans by id, of a folder that ``embed`` wrote; None where it has none.

    Raises
    ------
    DataError
        A cell is no number.
    """
    uri = join(out, FILE)
    if not exists(uri):
        return None
    found = {}
    for line, row in enumerate(csv.DictReader(io.StringIO(read_bytes(uri).decode())), 2):
        cells = {name: value for name, value in row.items() if name not in ABOUT}
        for name, value in cells.items():
            try:
                cells[name] = float(value)
            except ValueError as error:
                raise DataError(f"{uri}, line {line}: {name} is {value!r}, not a number; embed "
                                "again") from error
        found[row["scan_id"]] = np.array(list(cells.values()), dtype=float)
    return found
