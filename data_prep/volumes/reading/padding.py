"""Voxels that were never measured, filled with one value that the image does not have.

Scanners, resampling and distortion correction fill what they did not see with a constant: -32768,
-2000, -1, 32767, NaN, or whatever the corner held.  Such a constant is a spike away from the range
of all other values, or a ring on the faces of the field of view.  It is no intensity: taken as one
it stretches the range that masks and scales are made from.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage

SAMPLES = 1 << 20  # voxels that the image's range is taken from
AWAY = 0.25  # of the range of the others: farther from it, a constant is no intensity
AROUND = 1.0  # the same of what lies all around, which may be a background below an intercept
MIN_SPIKE_VOXELS = 8  # at the border, unless the value is the end of a type
TYPE_ENDS = (-32768.0, 32767.0, 65535.0, -2147483648.0, 2147483648.0)  # the last rounded, float32
MAX_CONSTANTS = 4  # padding of several kinds in one image
RING_SHARE = 0.95  # of a face of the field of view that one value fills


class Padding(NamedTuple):
    """What to leave out of an image."""

    where: np.ndarray  # bool [x, y, z]
    values: tuple[float, ...]
    fill: float  # what to put there: 0, or the least of an image that goes below it


def find_padding(data: np.ndarray) -> Padding | None:
    """Constants of an image that are no intensities, or None.

    Parameters
    ----------
    data : [x, y, z], finite
    """
    where, values = np.zeros(data.shape, bool), list[float]()
    for _ in range(MAX_CONSTANTS):
        found = _spike(data, where)
        if found is None:
            break
        values.append(found[0])
        where |= found[1]
    for value in _rings(data, where):
        values.append(value)
        where |= at_border(data == value)
    if not values:
        return None
    low, high = np.percentile(_sample(data, where), (1, 99))
    fill = 0.0 if low >= -0.05 * (high - low) else float(data[~where].min())
    return Padding(where, tuple(values), fill)


def at_border(region: np.ndarray) -> np.ndarray:
    """The pieces of a region that reach a face of the field of view."""
    pieces, _ = ndimage.label(region)
    faces = [pieces.take(end, axis).ravel() for axis in range(3) for end in (0, -1)]
    return np.isin(pieces, np.setdiff1d(np.concatenate(faces), [0]))


def _spike(data: np.ndarray, known: np.ndarray) -> tuple[float, np.ndarray] | None:
    """The least or largest value, where it is a constant away from the rest; and what is beyond.

    Interpolation smears padding: what lies nearer to it than to the image goes with it.
    """
    rest = data if not known.any() else data[~known]
    for value in (float(rest.min()), float(rest.max())):
        if value == 0:  # a background
            continue
        sample = _sample(data, known | (data == value))
        if not sample.size:
            continue
        low, high = (float(p) for p in np.percentile(sample, (2, 98)))
        # Values that were clipped follow upon others; what interpolation smeared is below.
        gap = max(low - value, value - float(rest[rest != value].max(initial=low)))
        away = (high - low) * (AROUND if _around(data, value) else AWAY)
        # One negative constant below an image without negative values is no intensity, either.
        signed = (value < 0 and value.is_integer() and float(sample.min()) >= 0
                  and float(rest[rest != value].min()) >= 0)
        if not (gap > away > 0 or (signed and high > low)):
            continue
        spike = data == value
        if value not in TYPE_ENDS and at_border(spike).sum() < MIN_SPIKE_VOXELS:
            continue  # inside a head it may be tissue
        if gap > away:
            edge = (value + (low if value < low else high)) / 2
            spike = (data < edge) if value < low else (data > edge)
        return value, spike & ~known
    return None


def _around(data: np.ndarray, value: float) -> bool:
    return all(np.median(data.take(end, axis)) == value for axis in range(3) for end in (0, -1))


def _rings(data: np.ndarray, known: np.ndarray) -> list[float]:
    """Values other than 0 and the least that fill whole faces of the field of view."""
    least, found = float(data[~known].min()), list[float]()
    for axis in range(3):
        for end in (0, -1):
            face = data.take(end, axis)
            value = float(np.median(face))
            if (value not in (0, least, *found) and (face == value).mean() >= RING_SHARE
                    and not known.take(end, axis).all()):
                found.append(value)
    return found


def _sample(data: np.ndarray, without: np.ndarray) -> np.ndarray:
    step = max(1, data.size // SAMPLES)
    return data.ravel()[::step][~without.ravel()[::step]]
