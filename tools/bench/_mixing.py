"""Anatomies between people: source heads placed in MNI space, registered once, and mixed.

    label map -> where it lies in MNI space, by the placement of preparation
    pair a, b of one split -> velocity whose flow makes a look like b (log-domain demons)
    person -> label map of a source, read through a mixture of its velocities to other sources

The label map stays one person's, so topology stays human; the shape is that of nobody.  Sources are
split first, so nothing of a source that is tested is in anyone who is learnt from.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy import ndimage

from data_prep.synth import codes, warp
from data_prep.synth.anatomy import FOLDER_PATTERN, Anatomy, anatomy_names, load_anatomy
from data_prep.synth.contrast import tissue_table
from data_prep.volumes.placing.align import place
from data_prep.volumes.preset import PRESETS
from data_prep.volumes.reading.volume import Volume
from neurojepa.storage import write_bytes
from tools.bench.common import ROOT

STRIDE = 2  # nodes of warp.COARSE_MM between those that a registration works on
ITERATIONS, UPDATE_SD, FIELD_SD = 60, 1.0, 1.0  # widths in such nodes
STEP = 0.5  # of a node: the longest update
MIXED = (0.6, 0.4)  # largest shares of the way to each of two other sources
WARP = (4.0, 30.0)  # rms and width of a warp on top, mm
CLOSED_MM, SMOOTHED_MM = 9.0, 2.5  # of a brain mask


def label_folder() -> Path | None:
    """Real label maps in $NEUROJEPA_SCANS or ../shared/data; None where there are none."""
    folder = Path(os.environ.get("NEUROJEPA_SCANS", ROOT.parent / "shared" / "data")) / "labels"
    return folder if any(folder.glob(FOLDER_PATTERN)) else None


def split_sources(folder: Path | None, fold: int) -> dict[str, list[str]]:
    """Sources of each split: of twelve 7, 2 and 3, of sixteen 10, 2 and 4; folds rotate them."""
    names = anatomy_names(folder)
    num_test, num_val = len(names) // 4, len(names) // 6
    first = fold * num_test % len(names)
    names = names[first:] + names[:first]
    return {"test": names[:num_test], "val": names[num_test:num_test + num_val],
            "train": names[num_test + num_val:]}


@dataclass(frozen=True)
class Mixer:
    """The sources of a split, with what a registration of each to the others found."""

    anatomy: Anatomy
    to_anatomy: np.ndarray  # [4, 4]: MNI mm to voxels of the label map
    velocities: list[np.ndarray]  # [3, a, b, c] to each other source, on nodes STRIDE apart

    def velocity(self, key: int) -> np.ndarray:
        """[3, a, b, c] on the anatomy's nodes: part of the way to two sources, and a warp."""
        rng = np.random.default_rng([key, 17])
        shape = self.anatomy.shaper.full_shape
        coarse = tuple(-(-n // STRIDE) for n in shape)
        velocity = warp.random_velocity(rng, coarse, rms_mm=WARP[0], smooth_mm=WARP[1] / STRIDE)
        others = rng.permutation(len(self.velocities))[:len(MIXED)]
        for share, other in zip(MIXED, others, strict=False):
            velocity += np.float32(rng.uniform(0, share)) * self.velocities[other]
        return warp.upsample(velocity, shape, 1 / STRIDE)


@lru_cache(maxsize=1)
def mixer(name: str, others: tuple[str, ...], folder: Path | None, cache: Path) -> Mixer:
    """The mixer of a source; what takes long is kept in ``cache``."""
    anatomy = load_anatomy(name, folder)
    matrix = placed(name, folder, cache)
    found = []
    for other in others:
        file = cache / f"{name}-to-{other}.npy"
        if not file.exists():
            write_array(file, registered(anatomy, matrix, load_anatomy(other, folder),
                                         placed(other, folder, cache)).astype(np.float16))
        found.append(np.load(file, allow_pickle=False).astype(np.float32))
    return Mixer(anatomy, matrix, found)


def placed(name: str, folder: Path | None, cache: Path) -> np.ndarray:
    """[4, 4]: the rotation and translation from MNI mm to voxels (1 mm) of a source."""
    file = cache / f"{name}.json"
    if not file.exists():
        labels = load_anatomy(name, folder).labels
        mask = brain_of((codes.inside(labels) & (labels != codes.FLUID)).astype(np.float32), 1.0)
        head = Volume(name, tissue_table("T1w")[labels], np.eye(4))
        found = place(head, mask, "T1w", PRESETS["quick"])
        write_bytes(str(file), json.dumps(found.rigid.tolist()).encode())
    return np.array(json.loads(file.read_text()))


def brain_of(share: np.ndarray, voxel_mm: float) -> np.ndarray:
    """Bool mask of a brain with its sulci, as tools draw it, from the share of tissue in voxels."""
    closed = ndimage.binary_closing(share > 0.5, iterations=round(CLOSED_MM / voxel_mm))
    return ndimage.binary_fill_holes(ndimage.gaussian_filter(closed.astype(np.float32),
                                                             SMOOTHED_MM / voxel_mm) > 0.5)


def registered(anatomy: Anatomy, to_anatomy: np.ndarray, other: Anatomy,
               to_other: np.ndarray) -> np.ndarray:
    """Velocity [3, a, b, c] on every STRIDE-th node of an anatomy, mm, whose flow makes its head
    look like the other one's.

    Symmetric forces of demons in the log-domain (Vercauteren et al., NeuroImage 2009), on soft maps
    of signal, fluid and ventricles, the other head laid rigidly over this one.
    """
    step_mm = warp.COARSE_MM * STRIDE
    moving = _soft_maps(anatomy, step_mm)
    points = np.indices(moving.shape[1:], dtype=np.float32).reshape(3, -1) * step_mm
    across = to_other @ np.linalg.inv(to_anatomy)
    points = (across[:3, :3] @ points + across[:3, 3:]).astype(np.float32)
    fixed = warp.sample(_soft_maps(other, warp.COARSE_MM), points).reshape(moving.shape)
    velocity = np.zeros((3, *moving.shape[1:]), np.float32)  # in units of warp's nodes
    nodes = warp.nodes_mm(moving.shape[1:])
    for _ in range(ITERATIONS):
        warped = warp.sample(moving, nodes + warp.flow(velocity))
        missing = fixed - warped
        slopes = np.stack([(np.stack(np.gradient(w)) + np.stack(np.gradient(f))) / 2
                           for w, f in zip(warped, fixed, strict=True)])  # [channel, 3, ...]
        force = (missing[:, None] * slopes).sum(0)
        force /= (slopes**2).sum((0, 1)) + (missing**2).sum(0) / (4 * STEP**2) + 1e-6
        update = ndimage.gaussian_filter(force, (0, *[UPDATE_SD] * 3))
        velocity = ndimage.gaussian_filter(velocity + update * warp.COARSE_MM,
                                           (0, *[FIELD_SD] * 3), mode="nearest")
    return velocity * STRIDE


def _soft_maps(anatomy: Anatomy, step_mm: int) -> np.ndarray:
    """float32 [3, a, b, c]: signal of the brain, fluid, ventricles, on nodes ``step_mm`` apart."""
    labels = anatomy.labels
    inside = codes.inside(labels)
    maps = (tissue_table("T1w")[labels] * inside, inside & (labels == codes.FLUID),
            np.isin(labels, codes.VENTRICLES))
    stride = step_mm // warp.COARSE_MM
    soft = np.zeros((3, *(-(-n // stride) for n in warp.coarse_shape(labels.shape))), np.float32)
    for channel, values in zip(soft, maps, strict=True):
        part = ndimage.uniform_filter(values.astype(np.float32),
                                      step_mm)[(slice(None, None, step_mm),) * 3]
        channel[tuple(slice(n) for n in part.shape)] = part
    return soft


def write_array(file: Path, array: np.ndarray) -> None:
    """An array as .npy, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(str(file), buffer.getvalue())
