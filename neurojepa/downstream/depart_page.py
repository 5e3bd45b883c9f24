"""The page of one person's departures: regions, their atoms, and a map over the scan."""

from __future__ import annotations

from typing import Any

import numpy as np

from neurojepa.downstream.depart import ACTIVE, WIDTH_YEARS, Departures
from neurojepa.downstream.output import Figures, how_done
from neurojepa.downstream.planes import planes
from neurojepa.downstream.regions import Regions
from neurojepa.feed.format import Grid, is_brain
from neurojepa.report import page, paragraph, section, table, tiles

BEST = 5  # atoms told of each region


def painted(found: Departures, regions: Regions, codes: np.ndarray, patch: int) -> np.ndarray:
    """float32 [X, Y, Z]: the size of the departure of each brain voxel's region, mixed by the
    patch's shares; 0 elsewhere."""
    size_R = np.nan_to_num(found.size_R)
    share_nR = regions.share_nR * np.isfinite(found.size_R)
    value_n = share_nR @ size_R / np.maximum(share_nR.sum(1), 1e-9)
    counts = [size // patch for size in codes.shape]
    volume = value_n.reshape(counts)
    for axis in range(3):
        volume = volume.repeat(patch, axis)
    return (volume * is_brain(codes)).astype(np.float32)


def depart_page(found: Departures, regions: Regions, codes: np.ndarray, grid: Grid, patch: int,
                record: dict[str, Any], figures: Figures) -> str:
    """results.json's content as a page that needs no network."""
    lead = (f"{record['participant_id']}, visit {record['session_id']}, {record['modality']}, "
            f"{record['age']:g} years; against {found.people} people of feed {record['reference']}")
    least = np.nanmin(found.p_holm_R) if np.isfinite(found.p_holm_R).any() else np.nan
    order = np.argsort(-np.nan_to_num(found.size_R, nan=-1))
    rows = [[regions.names[k], f"{found.size_R[k]:.2f}", f"{found.p_R[k]:.3f}",
             f"{found.p_holm_R[k]:.3f}", _best(found.z_RA[k])]
            if np.isfinite(found.size_R[k]) else [regions.names[k], "not told", "", "", ""]
            for k in order]
    spots = figures.show("map", planes(codes, painted(found, regions, codes, patch), grid), (
        "Size of the departure of each region, in sd, over the scan: planes through the region "
        "that departs most. L is the person's left, R the right, A the front."))
    return page("Departures from people of the same age", lead, [
        tiles([(f"{least:.3f}", "least p over regions (Holm)", ""),
               (str(found.people), "people compared with", "")]),
        section("Map", spots),
        section("Regions", table(
            ["region", "size, sd", "p", "p, all regions (Holm)", "atoms that depart most (z)"],
            rows), paragraph(
            "Size: root mean square of z over the atoms of a region; 1 is usual. p: share of the "
            "reference people whose own size, against the others, is as large; with "
            f"{found.people} of them none is below {1 / (1 + found.people):.3f}. A departure may "
            "be the scanner's, or the preparation's: compare with people of the same scanner. "
            f"Regions: {regions.source}.")), how_done(record)])


def _best(z_A: np.ndarray) -> str:
    order = np.argsort(-np.abs(np.nan_to_num(z_A)))[:BEST]
    return ", ".join(f"{number} ({z_A[number]:+.1f})" for number in order
                     if np.isfinite(z_A[number]))


def record_of(found: Departures, regions: Regions) -> dict[str, Any]:
    """What results.json says of it."""
    return {"people": found.people,
            "regions": [{"region": name, "size": float(size), "p": float(p), "p_holm": float(holm)}
                        for name, size, p, holm in zip(regions.names, found.size_R, found.p_R,
                                                       found.p_holm_R, strict=True)]}


def rows_of(found: Departures, regions: Regions) -> list[list[str]]:
    """Rows of predictions.csv, with a header: a region and atom each, of which z is told."""
    return [["region", "atom", "activation", "expected", "z"], *(
        [regions.names[k], str(atom), f"{found.own_RA[k, atom]:.5g}",
         f"{found.expected_RA[k, atom]:.5g}", f"{found.z_RA[k, atom]:.4g}"]
        for k, atom in np.argwhere(np.isfinite(found.z_RA)).tolist())]


def methods(found: Departures, record: dict[str, Any]) -> str:
    """A paragraph for the methods section."""
    return (
        f"Activations of the atoms of a sparse code (neurojepa {record['version']}) were averaged "
        f"by region and compared with those of {found.people} other people, by a line in age "
        f"weighted around the person's age (Gaussian, sd {WIDTH_YEARS:g} years); z is the distance "
        "from the line over the spread of a new person, which counts in how unsure the line is. "
        f"Atoms active in at least {ACTIVE:.0%} of those in whom the region was seen counted. The "
        "root mean square of z over atoms was compared with that of each reference person against "
        "the others; p values were adjusted for all regions by Holm's method.")
