"""Whether a head lies the way its header says: the same head, turned, against the template.

An affine in the wrong convention (LPS for RAS, swapped or flipped axes) leaves a head that looks
like a head.  So each scan is compared with the template as it was placed and in the other 23
turns by right angles.  The score is the Dice of the masks plus the share of the image's variance
inside the brain that the template's grey and white matter explain, beside a smooth field: it needs
no contrast in particular, so it serves every modality.

    24 turns, brain on brain (0.1 s) -- as it is, clearly best --> nothing to say
        -- else as it is, refined (1 s) -- clearly best --> nothing to say
        -- else the three best turns, refined too --> turned, unsure, or as it is

Left and right cannot be told so: the template is symmetric.  See ``mirrored`` in within.py for
what another scan of the same person tells.

Measured on 17 real heads (T1w, T2w, FLAIR, PET, BOLD; whole, stripped, defaced): refined, they
score 0.99 to 1.46 as they are, and the best wrong turn is at least 0.12 below (BOLD; 0.20 and more
for the others).  Four of them with the chin 30 degrees higher or lower were not doubted either;
with 40 degrees higher, two were.  It adds 0.5 s a scan to the quick preset's 2.1.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np
import SimpleITK as sitk
from scipy import optimize
from scipy.spatial.transform import Rotation

from data_prep.flags import Flag
from data_prep.scan import ScanError
from data_prep.volumes.placing.align import template
from data_prep.volumes.placing.geometry import centre_of, resample
from data_prep.volumes.placing.matching import shrunk, stripped
from data_prep.volumes.reading.turn import AS_STATED, WORDS, turn_of
from data_prep.volumes.reading.volume import Volume

GRID_MM = 6  # of the comparison
HEAD_MM = 3.0  # of the scan behind it
CLEAR = 0.2  # above every turn that is not refined: no more to ask
MARGIN = 0.05  # between two refined turns, or nothing is said about which is right
REFINED = 3  # turns, the best of the others
MIN_SCORE = 0.95  # of a turn that is claimed; noise in a box fits no better than 0.9
MIN_VOXELS = 200  # of the grid, where the two brains overlap
REACH_RAD, REACH_MM, REACH_SIZE = 0.8, 50.0, 0.3  # of a refinement; of the size its logarithm
NODS_RAD = (-0.5, 0.0, 0.5)  # about the axis through the ears, where a refinement may begin


@dataclass(frozen=True)
class Verdict:
    """Which turn fits; ``turn`` is what a user may pass to ``prepare --turn``."""

    turn: str  # the best turn: AS_STATED where the header's own
    sure: bool  # False: another fits about as well


# ---- what is compared ----------------------------------------------------------------------------

@dataclass(frozen=True)
class _Target:
    """The template on the coarse grid."""

    shape: tuple[int, ...]
    affine: np.ndarray
    points: np.ndarray  # [n, 3] mm
    brain: np.ndarray  # [n] share
    tissue: np.ndarray  # [n, 2] grey, white
    field: np.ndarray  # [n, 10], a smooth field's terms
    centre: np.ndarray  # [3] mm
    brain_ml: float


@cache
def _target() -> _Target:
    from nilearn.datasets import load_mni152_gm_template, load_mni152_wm_template

    fine = template(2)
    maps = [fine.mask, *(np.asarray(load(resolution=2).dataobj) for load in (
        load_mni152_gm_template, load_mni152_wm_template))]
    images = [shrunk(data, fine.affine, GRID_MM) for data in maps]
    brain, grey, white = (sitk.GetArrayFromImage(image).transpose(2, 1, 0) for image in images)
    affine = np.diag([float(GRID_MM)] * 3 + [1.0])
    affine[:3, 3] = images[0].GetOrigin()
    voxels = np.stack(np.meshgrid(*map(np.arange, brain.shape), indexing="ij"), -1).reshape(-1, 3)
    points = voxels @ affine[:3, :3].T + affine[:3, 3]
    centre = centre_of(fine.mask, fine.affine)
    x, y, z = ((points - centre) / 70).T
    field = np.stack([np.ones_like(x), x, y, z, x * x, y * y, z * z, x * y, y * z, x * z], axis=1)
    return _Target(brain.shape, affine, points, brain.ravel(),
                   np.stack([grey.ravel(), white.ravel()], axis=1), field, centre, fine.brain_ml)


class _Head:
    """A scan's brain, coarse, to be sampled many times."""

    def __init__(self, volume: Volume, mask: np.ndarray) -> None:
        data = stripped(volume.data, mask)
        self.image = shrunk(data, volume.affine, HEAD_MM)
        self.mask = shrunk(mask, volume.affine, HEAD_MM)
        self.to_voxel, self.shape = np.linalg.inv(volume.affine), np.array(mask.shape)
        self.centre = centre_of(mask, volume.affine)
        self.size = (mask.sum() * volume.voxel_ml / _target().brain_ml) ** (1 / 3)

    def score(self, matrix: np.ndarray) -> float:
        """Of one pose; ``matrix``: template mm to the scan's mm."""
        target = _target()
        image, mask = (resample(one, matrix, shape=target.shape, affine=target.affine).ravel()
                       for one in (self.image, self.mask))
        to_voxel = self.to_voxel @ matrix
        voxels = target.points @ to_voxel[:3, :3].T + to_voxel[:3, 3]
        seen = ((voxels > -0.5) & (voxels < self.shape - 0.5)).all(axis=1)
        both = seen & (target.brain > 0.5) & (mask > 0.5)
        if both.sum() < MIN_VOXELS:
            return 0.0
        total = mask[seen].sum() + target.brain[seen].sum()
        overlap = 2 * float(np.minimum(mask, target.brain)[seen].sum() / total)
        return overlap + _explained(image[both] / mask[both], target.tissue[both],
                                    target.field[both])

    def posed(self, turn: np.ndarray, change: np.ndarray | None = None) -> np.ndarray:
        """Template mm to the scan's mm: centres together, turned, ``change`` from there."""
        angles, shift, size = ((change[:3], REACH_MM * change[3:6], np.exp(change[6]))
                               if change is not None else (np.zeros(3), np.zeros(3), 1.0))
        matrix = np.eye(4)
        matrix[:3, :3] = self.size * size * turn @ Rotation.from_rotvec(angles).as_matrix()
        matrix[:3, 3] = self.centre + shift - matrix[:3, :3] @ _target().centre
        return matrix

    def refined(self, turn: np.ndarray) -> float:
        """The best score near one turn; heads nod far more than they lean or look aside."""
        starts = [np.array([nod, 0, 0, 0, 0, 0, 0]) for nod in NODS_RAD]
        start = max(starts, key=lambda change: self.score(self.posed(turn, change)))
        bounds = [(-REACH_RAD, REACH_RAD)] * 3 + [(-1, 1)] * 3 + [(-REACH_SIZE, REACH_SIZE)]
        found = optimize.minimize(
            lambda change: -self.score(self.posed(turn, change)), start, method="Powell",
            bounds=bounds, options={"maxiter": 3, "xtol": 0.02, "ftol": 0.002})
        return -float(found.fun)


def _explained(values: np.ndarray, tissue: np.ndarray, field: np.ndarray) -> float:
    """Share of the variance beside a smooth field that grey and white matter explain."""
    basis = np.linalg.qr(field)[0]
    rest = values - basis @ (basis.T @ values)
    columns = np.linalg.qr(tissue - basis @ (basis.T @ tissue))[0]
    total = float(rest @ rest)
    return float(np.square(columns.T @ rest).sum()) / total if total > 0 else 0.0


# ---- the judgement -------------------------------------------------------------------------------

@cache
def _turns() -> dict[str, np.ndarray]:
    """The 24 rotations by right angles, template directions to the scan's, by their name."""
    found = {}
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            turn = np.zeros((3, 3))
            turn[range(3), order] = signs
            if np.linalg.det(turn) > 0:
                found[turn_of(turn.T)] = turn
    return found


def check_turn(volume: Volume, mask: np.ndarray, matrix: np.ndarray | None = None) -> Verdict:
    """Which way round a scan lies.

    Parameters
    ----------
    volume : the scan
    mask : bool [x, y, z], its brain
    matrix : [4, 4], template mm to the scan's mm as it was placed; by default centre on centre
    """
    head, turns = _Head(volume, mask), _turns()
    base = head.posed(turns[AS_STATED]) if matrix is None else matrix
    start = {name: head.score(base @ _about(_target().centre, turn))
             for name, turn in turns.items()}
    stated = start.pop(AS_STATED)
    if stated >= max(start.values()) + CLEAR:
        return Verdict(AS_STATED, True)
    stated = max(stated, head.refined(turns[AS_STATED]))
    if stated >= max(start.values()) + CLEAR:
        return Verdict(AS_STATED, True)
    if matrix is not None:  # where a turned scan was placed is no start for its right turn
        start = {name: head.score(head.posed(turns[name])) for name in start}
    best = sorted(start, key=lambda name: -start[name])[:REFINED]
    scores = {name: head.refined(turns[name]) for name in best}
    name = max(scores, key=lambda one: scores[one])
    if scores[name] > max(stated + MARGIN, MIN_SCORE):
        return Verdict(name, True)
    return Verdict(AS_STATED, scores[name] < stated - MARGIN)


def fits_as_stated(volume: Volume, mask: np.ndarray, matrix: np.ndarray | None = None) -> bool:
    """Whether a scan lies as its header says, beyond doubt; as ``check_turn``."""
    return volume.turn is not None or check_turn(volume, mask, matrix) == Verdict(AS_STATED, True)


def refuse_turned(volume: Volume, mask: np.ndarray, matrix: np.ndarray | None = None) -> None:
    """Refuse a scan that fits better turned; flag one that fits two ways; as ``check_turn``.

    A scan whose axes the user named is believed.

    Raises
    ------
    ScanError
        orientation_doubtful, with the better turn.
    """
    if volume.turn is not None:
        return
    verdict = check_turn(volume, mask, matrix)
    if not verdict.sure:
        volume.flags.append(Flag.ORIENTATION_UNSURE)
    if verdict.turn != AS_STATED:
        raise ScanError("orientation_doubtful", f"{volume.name}: the head fits the template better "
                        f"turned {verdict.turn}: what the header calls right, anterior, superior "
                        f"is {', '.join(WORDS[letter] for letter in verdict.turn)} (or the mirror "
                        "image of that, which looks alike). Correct the affine; or look at the "
                        "scan and name it in the table of prepare --turn, with turn "
                        f"{verdict.turn}, or with {AS_STATED} if the header is right")


def _about(centre: np.ndarray, turn: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = turn
    matrix[:3, 3] = centre - turn @ centre
    return matrix
