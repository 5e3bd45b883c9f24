"""Where grayordinates lie: voxels of a grid, vertices of two surfaces, and parcels of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np

from data_prep.scan import ScanError, split_member
from data_prep.volumes.reading.decode import fetch
from data_prep.volumes.reading.volume import Volume

REACH_MM = 3.0  # of a vertex: half the cortex's thickness and half a voxel's diagonal
PARCELS_PER_HEMISPHERE = 100
SEED, ITERATIONS = 20240, 10
CORTEX = {"CIFTI_STRUCTURE_CORTEX_LEFT": "CortexLeft",
          "CIFTI_STRUCTURE_CORTEX_RIGHT": "CortexRight"}  # as GIFTI spells them
# MNI152 at 2 mm, the grid of HCP, ABCD and UK Biobank files; for files that hold no voxels.
GRID_SHAPE = (91, 109, 91)
GRID_AFFINE = np.array([[-2.0, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])


@dataclass
class Layout:
    """A table from voxels of a canonical grid to rows of grayordinates."""

    affine: np.ndarray  # float64 [4, 4]
    covered: np.ndarray  # bool [x, y, z]
    rows: np.ndarray  # int [covered.sum()], in the order of covered
    painted: int  # voxels whose value comes from a vertex
    cortex: str  # what became of it, in words

    def volume(self, values: np.ndarray, name: str) -> Volume:
        """Values of all grayordinates [n] as a Volume, 0 where nothing is covered."""
        data = np.zeros(self.covered.shape, np.float32)
        data[self.covered] = values[self.rows]
        spacing = tuple(float(s) for s in np.linalg.norm(self.affine[:3, :3], axis=0).round(4))
        return Volume(name, data, self.affine, spacing=spacing)


@dataclass
class Groups:
    """Parcels: rows of grayordinates by name, and how the cortex was divided, in words."""

    rows: dict[str, np.ndarray]
    scheme: str


def lay_out(axis: Any, surfaces: dict[str, np.ndarray], name: str) -> Layout:
    """Voxels of a brain model axis by their indices, its vertices by the voxels near them.

    ScanError: no_voxels (no voxels and no surface), singular_affine.
    """
    voxel_rows = np.flatnonzero(axis.volume_mask)
    if not voxel_rows.size and not surfaces:
        raise ScanError("no_voxels", f"{name}: cortex alone; give the midthickness surfaces of its "
                                     "vertices to place it")
    shape = tuple(axis.volume_shape or GRID_SHAPE)
    affine = np.asarray(GRID_AFFINE if axis.affine is None else axis.affine, float)
    if abs(np.linalg.det(affine[:3, :3])) < 1e-6 or np.prod(shape, dtype=float) > 1 << 28:
        raise ScanError("singular_affine", f"{name}: grid of {shape} voxels by "
                                           f"{affine[:3].tolist()} is no image; restore the header")
    table = np.full(shape, -1)
    if voxel_rows.size:
        voxels = axis.voxel[voxel_rows]
        if (voxels < 0).any() or (voxels >= shape).any():
            raise ScanError("not_cifti", f"{name}: voxel indices outside its grid of {shape}")
        table[tuple(voxels.T)] = voxel_rows
    axes = nib.io_orientation(affine)
    table = nib.apply_orientation(table, axes)
    affine = affine @ nib.orientations.inv_ornt_aff(axes, shape)
    painted = _paint(table, affine, axis, surfaces) if surfaces else 0
    covered = table >= 0
    words = f"nearest voxels within {REACH_MM:g} mm of the midthickness"
    return Layout(affine, covered, table[covered], painted,
                  words if painted else "not on the grid: no midthickness surface")


def _paint(table: np.ndarray, affine: np.ndarray, axis: Any, surfaces: dict[str, np.ndarray]
           ) -> int:
    """Give voxels near the cortex the row of their nearest vertex; returns how many."""
    from scipy.spatial import cKDTree

    points, rows = [], []
    for structure, part, model in axis.iter_structures():
        if str(structure) in surfaces:
            points.append(surfaces[str(structure)][model.vertex])
            rows.append(np.arange(len(axis))[part])
    free = np.argwhere(table < 0)
    centres = free @ affine[:3, :3].T + affine[:3, 3]
    distance, nearest = cKDTree(np.concatenate(points)).query(
        centres, distance_upper_bound=REACH_MM)
    near = np.isfinite(distance)
    table[tuple(free[near].T)] = np.concatenate(rows)[nearest[near]]
    return int(near.sum())


def read_surfaces(uris: str, axis: Any, name: str) -> dict[str, np.ndarray]:
    """Vertices in mm [n, 3] by CIFTI structure, from LEFT.surf.gii;RIGHT.surf.gii.

    ScanError: not_gifti, surface_mismatch (another number of vertices than the CIFTI file's).
    """
    surfaces: dict[str, np.ndarray] = {}
    for uri, structure in zip(uris.split(";"), CORTEX, strict=False):
        try:
            arrays = nib.GiftiImage.from_bytes(fetch(*split_member(uri))).get_arrays_from_intent(
                "NIFTI_INTENT_POINTSET")
            points = np.asarray(arrays[0].data, float)
            said = arrays[0].meta.get("AnatomicalStructurePrimary", CORTEX[structure])
        except ScanError:
            raise
        except Exception as error:  # nibabel raises many kinds on damaged XML
            raise ScanError("not_gifti", f"{uri}: no GIFTI surface ({error})") from error
        wanted = axis.nvertices.get(structure)
        if said != CORTEX[structure] or (wanted is not None and points.shape != (wanted, 3)):
            raise ScanError("surface_mismatch", f"{uri}: {said} with {len(points)} vertices, "
                            f"{name} needs {CORTEX[structure]} with {wanted}")
        if wanted is not None:
            surfaces[structure] = points
    return surfaces


# ---- parcels -------------------------------------------------------------------------------------

def parcel_groups(axis: Any, surfaces: dict[str, np.ndarray],
                  parcellation: tuple[Any, np.ndarray, dict[int, str]] | None) -> Groups:
    """Subcortical structures as they are; the cortex by a parcellation, by place, or by side."""
    rows: dict[str, np.ndarray] = {}
    schemes = set()
    for structure, part, model in axis.iter_structures():
        own = np.arange(len(axis))[part]
        short = str(structure).removeprefix("CIFTI_STRUCTURE_")
        if str(structure) not in CORTEX:
            rows[short] = own
            continue
        if parcellation is not None:
            codes, scheme = _given(str(structure), model.vertex, parcellation), "given parcellation"
        elif str(structure) in surfaces:
            codes = _by_place(surfaces[str(structure)], model.vertex)
            scheme = f"{PARCELS_PER_HEMISPHERE} parcels a hemisphere by place, seed {SEED}"
        else:
            codes, scheme = np.full(len(own), "whole"), "whole hemispheres: no surface given"
        schemes.add(scheme)
        for code in np.unique(codes):
            if code:
                rows[f"{short}:{code}"] = own[codes == code]
    return Groups(rows, "; ".join(sorted(schemes)) or "no cortex in the file")


def _given(structure: str, vertices: np.ndarray,
           parcellation: tuple[Any, np.ndarray, dict[int, str]]) -> np.ndarray:
    """Names of the parcels of vertices; empty where the parcellation has none."""
    axis, codes, names = parcellation
    by_vertex = np.zeros(1 + max(vertices.max(), axis.vertex.max()), int)
    for other, part, model in axis.iter_structures():
        if str(other) == structure:
            by_vertex[model.vertex] = codes[part]
    return np.array([names.get(code, str(code)) if code else "" for code in by_vertex[vertices]])


def _by_place(points: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """k-means of the vertices' places, begun at the same vertices in everyone.

    Vertices of a standard mesh correspond between people, so parcels of one name do too.
    """
    from scipy.spatial import cKDTree

    start = np.random.default_rng(SEED).permutation(len(points))
    start = start[np.isin(start, vertices)][:PARCELS_PER_HEMISPHERE]
    places, centres = points[vertices], points[start]
    for _ in range(ITERATIONS):
        nearest = cKDTree(centres).query(places)[1]
        count = np.bincount(nearest, minlength=len(centres))
        sums = np.stack([np.bincount(nearest, places[:, k], len(centres)) for k in range(3)], 1)
        centres = np.where(count[:, None] > 0, sums / np.maximum(count, 1)[:, None], centres)
    return np.array([f"{k:03d}" for k in range(len(centres))])[nearest]
