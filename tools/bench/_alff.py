"""How much the lobes of a made-up person fluctuate at rest, read from a BOLD series.

    head -> series of 6 mm (data_prep/synth/series.py) -> ALFF over its brain mean, as
    preparation has it -> mean of each lobe

Twice: once of people in whom grey matter and its contrast say most of it (``linked``), and once of
the same people without that link, in whom age alone says something.
"""

from __future__ import annotations

import gzip
from dataclasses import replace
from functools import lru_cache

import nibabel as nib
import numpy as np

from data_prep.synth import codes, scanner, series
from data_prep.synth.cohort import SyntheticPerson, Visit, truths
from data_prep.synth.scanner import Head, Pose, View
from data_prep.volumes.functional.temporal import make_plan, normalise, temporal_maps
from neurojepa.downstream.regions import Regions, load_regions
from neurojepa.feed.format import Grid

GRID = Grid("", (28, 34, 28), 6.0)
AS_IT_IS = np.array([[0, 1], [1, 1], [2, 1]])  # the order of axes
LINKS = {"alff": True, "alff, no link": False}  # before the names of lobes


@lru_cache(maxsize=1)
def lobes() -> Regions:
    return load_regions(GRID, 1)


def alff(head: Head, pose: Pose, person: SyntheticPerson, visit: Visit,
         seed: int) -> dict[str, float]:
    """ALFF of each lobe, with the link and without it; the noise of both is the same."""
    view = View(head, pose, scanner.Grid(GRID.shape, GRID.affine), AS_IT_IS)
    brain = codes.inside(view.labels) & (view.labels != codes.FLUID)
    found = {}
    for name, linked in LINKS.items():
        rng = np.random.default_rng([seed, 11, person.index, int(visit.session)])
        stored, _ = series.bold(view, rng, person.site,
                                truths(replace(person, linked=linked), visit.age))
        image = nib.Nifti1Image.from_bytes(gzip.decompress(stored))
        values = np.asarray(image.dataobj, np.float32)[brain]
        plan = make_plan(values.shape[1], tr_s=series.TR_S, whole=values.mean(0), motion=None,
                         remove_motion=False)
        found |= {f"{name}: {lobe}": value for lobe, value in by_lobe(normalise(
            temporal_maps(values, plan), np.ones(len(values), bool), plan)["ALFF"], brain).items()}
    return found


def by_lobe(values: np.ndarray, brain: np.ndarray) -> dict[str, float]:
    """Means of values [n] of the voxels of ``brain``, over each lobe."""
    share_nR = lobes().share_nR[brain.ravel()]
    return dict(zip(lobes().names, (values @ share_nR / share_nR.sum(0)).round(5).tolist(),
                    strict=True))
