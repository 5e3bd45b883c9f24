"""Slices of an image through a point, for pages: left and right marked, true proportions."""

from __future__ import annotations

from typing import Any

import numpy as np

ROOM = 4  # voxels shown around the brain
COLOURS = 20  # of matplotlib's tab20
PLANES = ("axial", "coronal", "sagittal")


def show_slices(data: np.ndarray, spacing: np.ndarray, brain: np.ndarray, *, cmap: Any = "gray",
                low: float = 0.0, high: float = 1.0, over: np.ndarray | None = None) -> Any:
    """A figure of three slices of [x, y, z] in RAS order through the middle of a brain, cut to it;
    the person's left is on the left side.

    Parameters
    ----------
    spacing : [3] mm
    brain : bool [x, y, z]
    low, high : shown black and white, or as the ends of ``cmap``
    over : numbers of ``COLOURS`` colours [x, y, z], from 1 on, laid over where it is not 0
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    inside = np.argwhere(brain)
    low_corner = np.maximum(inside.min(0) - ROOM, 0)
    box = tuple(slice(a, b + ROOM + 1) for a, b in zip(low_corner, inside.max(0), strict=True))
    at = np.rint(inside.mean(0)).astype(int) - low_corner
    data, over = data[box], None if over is None else over[box]
    plot, axes = plt.subplots(1, 3, figsize=(7.2, 2.7), layout="constrained", facecolor="white")
    for plane, axis in zip(PLANES, axes, strict=True):
        across = 2 - PLANES.index(plane)  # the axis that the plane cuts
        rest = [k for k in range(3) if k != across]
        shape = spacing[rest[1]] / spacing[rest[0]]
        axis.imshow(np.take(data, at[across], across).T, origin="lower", cmap=cmap, vmin=low,
                    vmax=high, aspect=shape, interpolation="nearest")
        if over is not None:
            flat = np.take(over, at[across], across).T
            axis.imshow(np.ma.masked_equal(flat, 0), origin="lower", cmap="tab20", alpha=0.55,
                        vmin=1, vmax=COLOURS, aspect=shape, interpolation="nearest")
        left, right = ("P", "A") if plane == "sagittal" else ("L", "R")
        for text, x, side in ((left, 0.02, "left"), (right, 0.98, "right")):
            axis.text(x, 0.98, text, transform=axis.transAxes, ha=side, va="top", fontsize=9,
                      color="#1b2430", bbox={"facecolor": "white", "edgecolor": "none",
                                             "alpha": 0.75, "pad": 1})
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.set_xlabel(plane, fontsize=9, color="#566274")
    return plot
