"""Segmentation by atlas vote: labelled heads are laid over a scan, and their labels vote.

    labelled head --brain and labels, cut out--> kept in the model's folder; nothing is learnt
    scan: every head --register--> where its labels come to lie
          --shares of each label, interpolated, mean over heads--> the highest wins

Shares are interpolated, never labels, so the result has the scan's resolution.  The vote is that
of Heckemann et al., NeuroImage 2006.  Threads lay heads at once; their number changes nothing.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from neurojepa.downstream import register as registering
from neurojepa.downstream import warps
from neurojepa.downstream.images import Image, box_around, cut, encoded
from neurojepa.downstream.segment import KIND
from neurojepa.errors import ConfigError, DataError
from neurojepa.storage import exists, join, list_names, read_bytes, remove, sha256, write_bytes
from neurojepa.storage.conditional import create

HEADS = "heads"  # folder of a model
PARTS = ("labels", "mask", "brain")  # files of a head, in the order in which they are written
MARGIN_MM = 14.0  # around the brain, beyond which nothing is labelled
SMOOTHING_MM = 8.0  # around a kept brain; what register's smoothing reads
VOTES = 1 << 26  # shares in memory at once, 4 bytes each


# ---- heads ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Head:
    """A labelled head as the bytes of its files, which take a tenth of its arrays."""

    name: str
    files: dict[str, bytes]  # of PARTS

    def read(self) -> tuple[Image, Image]:
        """Its brain and its label map."""
        labels, mask, brain = (_decoded(self.files[part]) for part in PARTS)
        return (Image(self.name, *brain, brain=mask[0] > 0),
                Image(self.name, labels[0].astype(np.int32), labels[1]))


def head_of(scan: Image, labels: Image) -> Head:
    """What is kept of a scan and its label map, which may have any grid in the scan's space.

    Raises
    ------
    DataError
        No label lies in the scan's brain.
    """
    assert scan.brain is not None
    where = np.argwhere(scan.brain) @ scan.affine[:3, :3].T + scan.affine[:3, 3]
    back = np.linalg.inv(labels.affine)
    index = np.rint(where @ back[:3, :3].T + back[:3, 3]).astype(int)
    index = index[((index >= 0) & (index < labels.data.shape)).all(1)]
    if not labels.data[tuple(index.T)].any():
        raise DataError(f"--labels {labels.name}: no label lies in the brain of {scan.name}; it "
                        "must be in that scan's space")
    brain = cut(replace(scan, data=scan.data * scan.brain),
                box_around(scan, scan.brain, SMOOTHING_MM))
    labels = cut(labels, box_around(labels, labels.data > 0, 1.0))
    assert brain.brain is not None
    arrays = (labels.data, labels.affine), (brain.brain.astype(np.uint8), brain.affine), (
        brain.data.astype(np.float32), brain.affine)
    return Head(scan.name, {part: encoded(nib.Nifti1Image(*each), f"a labelled head: {part}")
                            for part, each in zip(PARTS, arrays, strict=True)})


def _decoded(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    image = nib.Nifti1Image.from_bytes(gzip.decompress(data))
    return np.asarray(image.dataobj), np.asarray(image.affine, np.float64)


def key_of(scan: Image, labels: Image) -> str:
    """What a head's files are named by: other voxels or another place give another key."""
    whole = hashlib.sha256()
    for image in (scan, labels):
        whole.update(image.affine.tobytes() + np.ascontiguousarray(image.data).tobytes())
    return whole.hexdigest()[:16]


def is_kept(out: str, key: str) -> bool:
    return all(exists(_file(out, key, part)) for part in PARTS)


def keep(out: str, key: str, head: Head) -> None:
    for part in PARTS:
        write_bytes(_file(out, key, part), head.files[part])


def _file(out: str, key: str, part: str) -> str:
    return join(out, HEADS, f"{key}_{part}.nii.gz")


# ---- model on disk -------------------------------------------------------------------------------

def save_atlas(out: str, heads: Sequence[tuple[str, str]], about: dict[str, Any]) -> None:
    """Write config.json over kept heads [(name, key)]; then heads of nobody in it go.

    Raises
    ------
    ConfigError
        Another fit has finished in this folder meanwhile; its model stays as it is, and these
        heads go.
    """
    keys, place = [key for _, key in heads], join(out, "config.json")
    try:
        listed = [{"name": name, "key": key, "sha256": {
            part: sha256(read_bytes(_file(out, key, part))) for part in PARTS}}
            for name, key in heads]
        first = create(place, json.dumps(
            {"schema": KIND, "method": "atlas", "heads": listed, **about}, indent=1).encode())
    except DataError:
        if not exists(place):  # else these heads were nobody's for the fit that finished
            raise
        first = False
    if not first:
        others = json.loads(read_bytes(place)).get("heads", [])
        _remove_heads(out, set(keys) - {each["key"] for each in others})
        raise ConfigError(f"--out {out}: another fit has finished there meanwhile; name another "
                          "folder")
    kept = {name.partition("_")[0] for name in list_names(join(out, HEADS))}
    _remove_heads(out, kept - set(keys))


def _remove_heads(out: str, keys: set[str]) -> None:
    for name in list_names(join(out, HEADS)):
        if name.partition("_")[0] in keys:
            remove(join(out, HEADS, name))


def load_atlas(uri: str, config: dict[str, Any], workers: int) -> Atlas:
    """The model that ``save_atlas`` wrote.

    Raises
    ------
    DataError
        A head's file is gone or damaged.
    """
    heads = []
    for each in config["heads"]:
        files = {part: read_bytes(_file(uri, each["key"], part)) for part in PARTS}
        for part, data in files.items():
            if sha256(data) != each["sha256"][part]:
                raise DataError(f"{_file(uri, each['key'], part)}: does not match the sha256 in "
                                "config.json; fit again")
        heads.append(Head(each["name"], files))
    return Atlas(heads, config["codes"], config["names"], workers)


# ---- vote ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Laid:
    """A head over a scan: ranks of its labels, and the deformation that leads to them."""

    ranks: np.ndarray  # int32 [x, y, z] on its own grid, 0 for none
    even: np.ndarray  # bool [x, y, z], whether a voxel and its neighbours behind have one rank
    affine: np.ndarray  # [4, 4] of that grid
    field: np.ndarray  # float32 [x, y, z, 3], on the registration's grid
    grid: np.ndarray  # [4, 4] of that one
    matrix: np.ndarray  # [4, 4], then


@dataclass(frozen=True)
class Atlas:
    """Labelled heads that vote."""

    heads: list[Head]
    codes: list[int]  # of ranks 1, 2, ...
    names: list[str]
    workers: int = 1  # heads laid at once

    def segment(self, scan: Image) -> tuple[np.ndarray, list[str]]:
        """int32 [x, y, z], codes on the scan's grid; and which heads have no vote, and why.

        Raises
        ------
        DataError
            No head can be laid over the scan.
        """
        assert scan.brain is not None
        fixed = cut(scan, box_around(scan, scan.brain, SMOOTHING_MM))
        laid, failed = list[Laid](), list[str]()
        for number, each in enumerate(self._all_laid(fixed)):
            if isinstance(each, Laid):
                laid.append(each)
            else:
                failed.append(each)
            print(f"{number + 1} of {len(self.heads)} labelled heads laid over {scan.name}",
                  end="\r" if number + 1 < len(self.heads) else "\n", flush=True)
        if not laid:
            raise DataError(f"{scan.name}: none of {len(self.heads)} labelled heads can be laid "
                            f"over it: {failed[0]}")
        ranks = vote(scan, laid, len(self.codes))
        return np.array([0, *self.codes], np.int32)[ranks], [
            f"{len(failed)} of {len(self.heads)} labelled heads have no vote in {scan.name}: "
            f"{'; '.join(failed)}"] if failed else []

    def _all_laid(self, scan: Image) -> Iterator[Laid | str]:
        """Each head laid over a scan, or why it cannot be, in their order."""
        if self.workers == 1:
            yield from (self._laid(head, scan) for head in self.heads)
            return
        with ThreadPoolExecutor(self.workers) as pool:  # SimpleITK gives Python's lock away
            yield from pool.map(lambda head: self._laid(head, scan), self.heads)

    def _laid(self, head: Head, scan: Image) -> Laid | str:
        image, labels = head.read()
        try:
            found = registering.register(image, scan)
        except DataError as error:
            return str(error)
        known = np.isin(labels.data, self.codes)
        ranks = np.where(known, np.searchsorted(self.codes, labels.data) + 1, 0).astype(np.int32)
        return Laid(ranks, even(ranks), labels.affine, found.field, found.grid.affine, found.matrix)


def even(ranks: np.ndarray) -> np.ndarray:
    least, most = (kind(ranks, size=2, origin=-1, mode="nearest")
                   for kind in (ndimage.minimum_filter, ndimage.maximum_filter))
    return np.asarray(least == most)


def vote(scan: Image, laid: Sequence[Laid], num_labels: int) -> np.ndarray:
    """int64 [x, y, z] on the scan's grid: the rank of the highest mean share, the lowest of
    equals; 0 far from the brain."""
    assert scan.brain is not None
    found = np.zeros(scan.data.shape, np.int64)
    x, *sides = box_around(scan, scan.brain, MARGIN_MM)
    plane = found[(slice(1), *sides)].size
    step = max(VOTES // ((num_labels + 1) * plane), 1)
    for start in range(x.start, min(x.stop, len(found)), step):
        box = (slice(start, min(start + step, x.stop)), *sides)
        part = cut(scan, box)
        shares = np.zeros((part.data.size, num_labels + 1), np.float32)
        here = warps.points_of(part.data.shape, part.affine)
        for each in laid:
            warp = warps.total(each.field, each.grid, part, each.matrix)
            _add_shares(shares, each, (here + warp).reshape(-1, 3))
        found[box] = shares.argmax(1).reshape(part.data.shape)
    return found


def _add_shares(shares: np.ndarray, head: Laid, points: np.ndarray) -> None:
    """Add to ``shares`` [n, labels + 1] the weights of the eight neighbours of points [n, 3], mm;
    beyond the label map all weight is on none."""
    back = np.linalg.inv(head.affine)
    where = points @ back[:3, :3].T + back[:3, 3]
    size = np.array(head.ranks.shape)
    inside = ((where > -0.5) & (where < size - 0.5)).all(1)
    shares[~inside, 0] += 1
    low = np.clip(np.floor(where[inside]).astype(np.int64), 0, size - 1)
    row, at = np.flatnonzero(inside), np.ravel_multi_index(tuple(low.T), head.ranks.shape)
    within = head.even.ravel()[at]  # most places lie within one region
    shares[row[within], head.ranks.ravel()[at[within]]] += 1
    row, low, where = row[~within], low[~within], where[inside][~within]
    share = np.clip(where - low, 0, 1).astype(np.float32)
    for corner in np.ndindex(2, 2, 2):
        rank = head.ranks[tuple(np.minimum(low + corner, size - 1).T)]
        shares[row, rank] += np.prod(np.where(corner, share, 1 - share), axis=1)
