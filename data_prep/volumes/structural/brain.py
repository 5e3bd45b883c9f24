"""Where the brain is in a volume, from the first source that knows.

    1. a mask that came with the scan, carried over by world coordinates
    2. the scan itself, when it is already stripped (zero outside a brain-sized region)
    3. the preset's tool: deepbet (Fisch et al., Artif. Intell. Med. 2024), whose weights come
       inside its wheel, or an external command (brain_tools.py)

The result is checked: an implausible volume means that stripping failed or that this is no head.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from data_prep.flags import of_companion
from data_prep.qc.air import MIN_SCALP_SHARE
from data_prep.scan import ScanError, split_member
from data_prep.volumes.placing.geometry import resample, to_itk
from data_prep.volumes.preset import Preset
from data_prep.volumes.reading.volume import Volume, read_scan
from data_prep.volumes.structural.brain_tools import external_mask

# A head is at least twice a brain; slabs of small heads come near, and deepbet decides on those.
MAX_STRIPPED_ML = 2000.0
BRIGHT_SMOOTH_MM, OTSU_BORDERS = 2.0, 3
MAX_INVALID_SHARE = 0.01  # of the brain's voxels that hold no measurement


def brain_mask(volume: Volume, preset: Preset, mask_uri: str | None = None
               ) -> tuple[np.ndarray, str]:
    """Brain mask of a volume and its source: "given", "stripped" or the preset's ``mask_tool``.

    Returns
    -------
    mask : bool [x, y, z]
    source : str

    Raises
    ------
    ScanError
        implausible_mask, non_finite, no_brain_found, mask_tool_failed, or what reading the given
        mask raised.
    ConfigError
        The preset's external command is not installed.
    """
    if mask_uri:
        source, mask = "given", given_mask(volume, mask_uri)
    elif (stripped := _stripped(volume, preset)) is not None:
        source, mask = "stripped", stripped
    elif preset.mask_tool == "deepbet":
        source, mask = "deepbet", _deepbet_mask(volume, preset.mask_cube)
    else:
        source, mask = preset.mask_tool, carried(external_mask(volume, preset.mask_tool), volume)
    if volume.outside is not None:
        if (volume.seen & ~mask).sum() < MIN_SCALP_SHARE * mask.sum():
            volume.outside = None  # a stripped brain: what is around it was seen and taken away
        else:
            mask &= volume.seen
    check_mask(mask, volume, preset, source)
    return mask, source


def given_mask(volume: Volume, mask_uri: str) -> np.ndarray:
    """The mask that came with a volume, on its grid; the mask's flags go to the volume."""
    given = read_scan(*split_member(mask_uri), label=True, turn=volume.turn)
    volume.flags += of_companion("mask", given.flags)
    return carried(given, volume)


def check_mask(mask: np.ndarray, volume: Volume, preset: Preset, source: str) -> None:
    """Raise ScanError when the mask's volume or what lies under it cannot be a brain."""
    brain_ml = mask.sum() * volume.voxel_ml
    low, high = preset.brain_ml
    if not low <= brain_ml <= high:
        raise ScanError("implausible_mask", f"{volume.name}: brain mask ({source}) has "
                                            f"{brain_ml:.0f} ml, expected {low:.0f} to {high:.0f}")
    if volume.invalid is not None:
        share = float((volume.invalid & volume.seen)[mask].mean())
        if share > MAX_INVALID_SHARE:
            raise ScanError("non_finite", f"{volume.name}: {share:.1%} of the brain is NaN, Inf or "
                            f"padding (limit {MAX_INVALID_SHARE:.0%}); convert it again from its "
                            "source")


def carried(source: Volume, target: Volume) -> np.ndarray:
    """A mask on another grid, nearest neighbour by world coordinates; bool on target's grid."""
    image = to_itk((source.data > 0).astype(np.uint8), source.affine)
    return resample(image, np.eye(4), shape=target.data.shape, affine=target.affine,
                    interpolator=sitk.sitkNearestNeighbor).astype(bool)


def largest_component(mask: np.ndarray) -> np.ndarray:
    labels, count = ndimage.label(mask)
    if count <= 1:
        return mask
    return labels == 1 + np.bincount(labels.ravel())[1:].argmax()


def _stripped(volume: Volume, preset: Preset) -> np.ndarray | None:
    """The non-zero voxels, if they are one brain-sized piece."""
    inside = volume.data != 0
    if not preset.brain_ml[0] <= inside.sum() * volume.voxel_ml <= MAX_STRIPPED_ML:
        return None
    piece = largest_component(inside)
    if piece.sum() < 0.98 * inside.sum():
        return None
    return ndimage.binary_fill_holes(piece)


def silhouettes(volume: Volume, mask_uri: str | None, preset: Preset) -> list[np.ndarray]:
    """What may be the brain of a PET or EPI image, bool [x, y, z], likeliest first.

    A given mask or the non-zero voxels alone; else what is brighter than each of Otsu's thresholds
    for two, three and four classes, in one piece and without holes: scalp and muscle take up some
    of a tracer and white matter may outshine grey, so that one threshold finds the brain, another
    the head or less than the brain.  Those of a brain's volume come first.

    Raises
    ------
    ScanError
        What reading the given mask raised.
    """
    if mask_uri:
        return [given_mask(volume, mask_uri)]
    stripped = _stripped(volume, preset)
    if stripped is not None:
        return [stripped]
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    smooth = ndimage.gaussian_filter(volume.data, BRIGHT_SMOOTH_MM / spacing)
    pieces = []
    for borders in range(1, OTSU_BORDERS + 1):
        classes = sitk.GetArrayFromImage(sitk.OtsuMultipleThresholds(
            sitk.GetImageFromArray(smooth), borders))
        for border in range(1, borders + 1):
            opened = ndimage.binary_opening(classes >= border, iterations=2)
            pieces.append(ndimage.binary_fill_holes(largest_component(opened)))
    low, high = preset.brain_ml
    return sorted(pieces, key=lambda piece: not low <= piece.sum() * volume.voxel_ml <= high)


@cache
def _deepbet() -> Any:
    """deepbet's two networks, loaded once per process."""
    from deepbet.bet import BrainExtraction

    # Threads: torch follows OMP_NUM_THREADS, which Ray sets to a task's share of the machine.
    return BrainExtraction(no_gpu=True)


def _deepbet_mask(volume: Volume, cube: int) -> np.ndarray:
    network = _deepbet()
    try:
        # A copy, since deepbet normalises in place.
        probability = network.run_model(volume.data.copy(), shape=(cube, cube, cube))
        mask = network.postprocess(probability > 0.5)
    except (AssertionError, ValueError) as error:
        raise ScanError("no_brain_found", f"{volume.name}: deepbet finds no brain ({error}); is it "
                                          "a head?") from error
    return np.asarray(mask, bool)
