"""Head motion of a series: from a table that came with it, else estimated from coarse volumes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from data_prep.scan import ScanError
from data_prep.volumes.reading.volume import Series

HEAD_RADIUS_MM = 50.0  # Power et al. 2012: where a rotation counts as a shift on the cortex
HIGH_FD_MM = 0.5  # Power et al. 2012
ESTIMATE_MM = 8.0
MAX_ITERATIONS = 12
TOLERANCE_MM = 1e-3
AXES = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")  # fMRIPrep's names


@dataclass
class Motion:
    """One row per volume."""

    displacement: np.ndarray  # float64 [t], mm from the volume before; the first is nan
    parameters: np.ndarray | None = None  # float64 [t, 6]: translations in mm, rotations in radians
    unsteady: int = 0  # leading volumes that the table marks as not in steady state


def framewise_displacement(parameters: np.ndarray) -> np.ndarray:
    """Power's FD in mm from translations (mm) and rotations (radians), [t, 6] to [t]."""
    steps = np.abs(np.diff(parameters, axis=0))
    return np.concatenate([[np.nan], steps[:, :3].sum(1) + HEAD_RADIUS_MM * steps[:, 3:].sum(1)])


def parse_motion(content: bytes, count: int, name: str) -> Motion:
    """A table of motion for a series of ``count`` volumes.

    Understood: fMRIPrep and XCP-D confounds (named columns), FSL's mcf.par (three rotations in
    radians, three translations in mm, no header), one column of framewise displacement.

    Raises
    ------
    ScanError
        bad_confounds: another form, or another number of rows.
    """
    lines = [line for line in content.decode("utf-8-sig", "replace").splitlines() if line.strip()]
    rows = [re.split(r"[\t,]" if re.search(r"[\t,]", line) else r"\s+", line.strip())
            for line in lines]
    named = bool(rows) and any(_number(cell) is None for cell in rows[0])
    head = [cell.strip() for cell in rows[0]] if named else []
    cells = [[_number(cell) for cell in row] for row in rows[named:]]
    if len(cells) == count - 1 and not named:  # displacements between volumes
        cells.insert(0, [np.nan] * len(cells[0]))
    if len(cells) != count or len({len(row) for row in cells}) != 1:
        raise ScanError("bad_confounds", f"{name}: motion table has {len(cells)} rows, the series "
                                         f"{count} volumes")
    table = np.array([[np.nan if c is None else c for c in row] for row in cells], float)
    if named:
        return _named(dict(zip(head, table.T, strict=False)), name)
    if table.shape[1] == 6:
        parameters = table[:, [3, 4, 5, 0, 1, 2]]
        return Motion(framewise_displacement(parameters), parameters)
    if table.shape[1] == 1:
        return Motion(np.concatenate([[np.nan], table[1:, 0]]))
    raise ScanError("bad_confounds", f"{name}: motion table has {table.shape[1]} columns without "
                                     "names; known are 6 (mcf.par) and 1 (displacement)")


def _number(cell: str) -> float | None:
    """A number, nan where the cell is empty; None for text."""
    if cell.strip().lower() in ("", "n/a", "nan"):
        return np.nan
    try:
        return float(cell)
    except ValueError:
        return None


def _named(columns: dict[str, np.ndarray], name: str) -> Motion:
    parameters = None
    if set(AXES) <= set(columns):
        parameters = np.nan_to_num(np.stack([columns[axis] for axis in AXES], axis=1))
    displacement = columns.get("framewise_displacement")
    if displacement is None and parameters is not None:
        displacement = framewise_displacement(parameters)
    if displacement is None:
        raise ScanError("bad_confounds", f"{name}: motion table has neither framewise_displacement "
                                         f"nor {', '.join(AXES)}")
    # fMRIPrep writes one column per volume, 1 at that volume.
    marked = np.zeros(len(displacement) + 1, bool)
    for key, column in columns.items():
        if key.startswith("non_steady_state"):
            marked[:-1] |= column == 1
    return Motion(displacement, parameters, int(np.argmin(marked)))


# ---- estimate ------------------------------------------------------------------------------------

def estimate_motion(series: Series) -> Motion:
    """Rigid motion of every volume against the middle one, on voxels of about 8 mm.

    Inverse compositional Gauss-Newton on squared differences (Baker & Matthews, IJCV 2004): the
    derivatives are those of the reference, so each volume costs a few interpolations.
    """
    factors = np.clip(np.round(ESTIMATE_MM / np.linalg.norm(series.affine[:3, :3], axis=0)), 1, None
                      ).astype(int)
    coarse = _block_mean(series.data, factors)
    # Points are in mm about the middle of the grid, along its own axes.
    step = np.linalg.norm(series.affine[:3, :3], axis=0) * factors
    middle = (np.array(coarse.shape[:3]) - 1) / 2
    points = ((np.indices(coarse.shape[:3]).reshape(3, -1).T - middle) * step)
    reference = coarse[..., coarse.shape[3] // 2]
    slope = np.stack([g.ravel() / s for g, s in zip(np.gradient(reference), step, strict=True)], 1)
    solve = np.linalg.pinv(np.hstack([slope, np.cross(points, slope)]))  # [6, voxels]
    parameters, pose = np.zeros((coarse.shape[3], 6)), np.zeros(6)
    for t in range(coarse.shape[3]):
        smooth = ndimage.spline_filter(coarse[..., t], output=np.float64, mode="nearest")
        for _ in range(MAX_ITERATIONS):
            rotation = Rotation.from_rotvec(pose[3:])
            voxels = (rotation.apply(points) + pose[:3]) / step + middle
            seen = ndimage.map_coordinates(smooth, voxels.T, prefilter=False, mode="nearest")
            change = solve @ (seen - reference.ravel())
            inverse = Rotation.from_rotvec(-change[3:])
            turned = rotation * inverse
            pose = np.concatenate([pose[:3] - turned.apply(change[:3]), turned.as_rotvec()])
            if np.abs(change[:3]).sum() + HEAD_RADIUS_MM * np.abs(change[3:]).sum() < TOLERANCE_MM:
                break
        parameters[t] = pose
    return Motion(framewise_displacement(parameters), parameters)


def _block_mean(data: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Means of blocks of voxels, float64 [x, y, z, t]; what is left at the far end is cut off."""
    size = [n // f for n, f in zip(data.shape[:3], factors.tolist(), strict=True)]
    out = np.empty((*size, data.shape[3]))
    for t in range(data.shape[3]):
        part = data[..., t][tuple(slice(0, n * f) for n, f in zip(size, factors, strict=True))]
        blocks = part.reshape([v for n, f in zip(size, factors.tolist(), strict=True)
                               for v in (n, f)])
        out[..., t] = blocks.mean(axis=(1, 3, 5))
    return out
