"""What a registration leaves: images in their own grids, results.json, and a page to look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from neurojepa.downstream import warps
from neurojepa.downstream.images import Image, stripped, write_field, write_image
from neurojepa.downstream.output import Figures, how_done, write_task
from neurojepa.downstream.register import LEVELS, SMOOTH, Registration
from neurojepa.downstream.slices import show_slices
from neurojepa.errors import DataError
from neurojepa.report import grid, page, section, table, tiles
from neurojepa.storage import join


def write_registration(out: str, found: Registration, labels: Image | None = None,
                       names: Mapping[int, str] | None = None) -> dict[str, Any]:
    """Write everything into a folder; returns the record of results.json.

    ``labels`` is a label map in the moving scan's space, on any grid; ``names`` are of its codes.

    Raises
    ------
    DataError
        No label comes to lie in the fixed scan.
    """
    warp = found.warp()
    fixed, moving = found.fixed, found.moving
    carried = None if labels is None else _carried(labels, warp, found)
    write_field(join(out, "warp.nii.gz"), warp, fixed)
    write_field(join(out, "inverse_warp.nii.gz"), found.inverse_warp(), moving)
    moved = warps.read_through(moving, warp, fixed.affine)
    write_image(join(out, "moved.nii.gz"), moved, fixed, "moving scan on the fixed scan's grid")
    growth = warps.jacobian(warp, fixed.affine)
    write_image(join(out, "jacobian.nii.gz"), growth, fixed, "Jacobian determinant of warp.nii.gz")
    record = {"fixed": fixed.name, "moving": moving.name,
              "notes": [*fixed.notes, *moving.notes], **_figures_of(found, growth)}
    if labels is not None and carried is not None:
        write_image(join(out, "moved_labels.nii.gz"), carried, fixed, "carried labels")
        record["labels"] = _volumes(labels, carried, fixed, names or {})
        record["moving_labels"] = labels.name
    write_task(out, "register/1", record, methods=methods,
               page=lambda record, figures: _page(found, warp, growth, record, figures))
    return record


def _carried(labels: Image, warp: np.ndarray, found: Registration) -> np.ndarray:
    carried = warps.labels_through(labels, warp, found.fixed.affine)
    if not carried.any():
        raise DataError(f"--moving-labels {labels.name}: no label comes to lie in "
                        f"{found.fixed.name}; it must be in the space of {found.moving.name}")
    return carried


def _figures_of(found: Registration, growth: np.ndarray) -> dict[str, Any]:
    brain, errors = found.fixed.brain, found.inverse_error_mm()
    assert brain is not None
    within = growth[brain]
    return {
        "brain_dice": dict(zip(("affine", "deformed"), found.dice, strict=True)),
        "correlation": dict(zip(("affine", "deformed"), found.correlation, strict=True)),
        "working_mm": found.grid.mm, "affine_ras_mm": found.matrix.tolist(),
        "folds": int((growth <= 0).sum()), "folds_in_brain": int((within <= 0).sum()),
        "jacobian": {"min": float(within.min()), "max": float(within.max()),
                     "mean": float(within.mean()), "sd_log": float(np.log(np.maximum(
                         within, 1e-3)).std())},
        "inverse_error_mm": {"mean": float(errors.mean()),
                             "p99": float(np.percentile(errors, 99)), "max": float(errors.max())},
        "displacement": "RAS in memory, LPS mm in files; the moving scan is read at x + d(x)"}


def _volumes(labels: Image, carried: np.ndarray, fixed: Image,
             names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Millilitres of each label before and after."""
    before, after = (abs(np.linalg.det(each.affine[:3, :3])) / 1000 for each in (labels, fixed))
    top = int(labels.data.max()) + 1
    counts = [np.bincount(each.ravel(), minlength=top) for each in (labels.data, carried)]
    return [{"label": int(code), "name": names.get(int(code), str(code)),
             "moving_ml": float(counts[0][code] * before),
             "moved_ml": float(counts[1][code] * after)}
            for code in np.flatnonzero(counts[0]) if code]


def _page(found: Registration, warp: np.ndarray, growth: np.ndarray, record: dict[str, Any],
          figures: Figures) -> str:
    dice, alike = record["brain_dice"], record["correlation"]
    folds, error = record["folds"], record["inverse_error_mm"]
    parts = [tiles([
        (f"{alike['affine']:.3f} → {alike['deformed']:.3f}",
         "correlation within the brain, affine → deformed", ""),
        (f"{dice['affine']:.3f} → {dice['deformed']:.3f}", "Dice of the brains", ""),
        (f"{folds:,}", "voxels where the warp folds", "bad" if folds else "good"),
        (f"{error['mean']:.2f} mm", f"there and back, in the brain; 99 % below {error['p99']:.2f}",
         "")])]
    parts.append(section("Before and after", grid(_pictures(found, warp, growth, figures))))
    if "labels" in record:
        rows = [[each["name"], f"{each['moving_ml']:.2f}", f"{each['moved_ml']:.2f}"]
                for each in record["labels"]]
        parts.append(section("Carried labels", table(["label", "ml in the moving scan",
                                                      "ml in the fixed scan's space"], rows)))
    parts.append(how_done(record))
    return page("Registration", f"{record['moving']} laid over {record['fixed']}", parts)


def _pictures(found: Registration, warp: np.ndarray, growth: np.ndarray,
              figures: Figures) -> list[str]:
    fixed = found.fixed
    assert fixed.brain is not None
    brain = Image("", stripped(found.moving), found.moving.affine)
    plain = warps.total(np.zeros_like(found.field), found.grid.affine, fixed, found.matrix)
    shown = [("fixed", stripped(fixed), "The fixed brain."),
             ("affine", warps.read_through(brain, plain, fixed.affine),
              "The moving brain after the affine alone."),
             ("moved", warps.read_through(brain, warp, fixed.affine),
              "The moving brain after the deformation.")]
    drawn = [figures.show(name, show_slices(data, fixed.spacing, fixed.brain),
                          f"{caption} L and R are the person's left and right.")
             for name, data, caption in shown]
    change = np.where(fixed.brain, np.log2(np.maximum(growth, 1e-3)), 0)
    drawn.append(figures.show("jacobian", show_slices(
        change, fixed.spacing, fixed.brain, cmap="RdBu_r", low=-1, high=1),
        "log2 of the Jacobian determinant within the fixed brain, from -1 (blue: half the volume "
        "in the moving scan) to 1 (red: twice the volume)."))
    return drawn


def methods(record: dict[str, Any]) -> str:
    """A paragraph for the methods section."""
    levels = ", ".join(f"{factor * record['working_mm']:.3g}" for factor, _ in LEVELS)
    return ("Brains were extracted with deepbet where scans came with a skull. The moving brain "
            "was laid over the fixed one by an affine transform with 12 degrees of freedom that "
            "maximised correlation, then deformed by diffeomorphic demons (SimpleITK; Vercauteren "
            "et al., 2009) on locally normalised intensities after histogram matching, at "
            f"{levels} mm with {LEVELS[0][1]} iterations each; the displacement was smoothed by a "
            f"Gaussian of {SMOOTH:g} voxel after each (neurojepa {record['version']}). Scans were "
            "interpolated linearly, and of labels the one with the highest linearly interpolated "
            "share was taken.")
