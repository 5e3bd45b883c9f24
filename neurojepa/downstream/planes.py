"""Three planes of a scan with a map over it; left and right are marked."""

from __future__ import annotations

from typing import Any

import numpy as np

from neurojepa.feed.format import FeedCode, Grid

PLANES = (("sagittal", "P", "A"), ("coronal", "L", "R"), ("axial", "L", "R"))  # left, right edge


def planes(codes: np.ndarray, effect: np.ndarray, grid: Grid) -> Any:
    """A figure of planes through the place where a map [X, Y, Z] is largest, in either direction.

    Parameters
    ----------
    codes : uint8 [X, Y, Z], the scan
    grid : of both
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list(
        "effect", ["#56b4e9", "#0072b2", "#202020", "#d55e00", "#ffb000"])
    place = np.unravel_index(np.abs(effect).argmax(), effect.shape)
    limit = float(np.abs(effect).max()) or 1.0
    scan = np.where(codes == FeedCode.NOT_SCANNED, 0, codes).astype(float)
    plot, axes = plt.subplots(1, 3, figsize=(5.6, 2.4), layout="constrained")
    for axis, (number, (name, low, high)) in zip(axes, enumerate(PLANES), strict=True):
        back, front = (np.take(volume, place[number], number).T for volume in (scan, effect))
        axis.imshow(back, cmap="gray", origin="lower", vmin=0, vmax=254)
        shown = axis.imshow(front, cmap=colours, origin="lower", vmin=-limit, vmax=limit,
                            alpha=np.clip(np.abs(front) / (0.5 * limit), 0, 0.85))
        mm = grid.affine[number, 3] + grid.spacing_mm * place[number]
        axis.set_title(f"{name}, {'xyz'[number]} = {mm:.0f} mm", fontsize=9)
        axis.set_axis_off()
        for x, letter in ((0.02, low), (0.98, high)):
            axis.text(x, 0.5, letter, color="white", fontsize=11, fontweight="bold",
                      ha="left" if x < 0.5 else "right", va="center", transform=axis.transAxes)
    plot.colorbar(shown, ax=axes, shrink=0.7, format="%.2g")
    return plot
