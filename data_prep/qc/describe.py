"""What a scan is, from its header, its sidecar's facts and, for defacing, its voxels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from data_prep.qc.face import face_is_gone
from data_prep.volumes.reading.volume import Volume

ANISOTROPY_2D = 2.0  # slices this much thicker than the pixels: acquired slice by slice
# DICOM (0018,1048); other words are free text and are not passed on
CONTRAST_AGENTS = ("GADOLINIUM", "IODINE", "CARBON DIOXIDE", "BARIUM", "XENON")


def describe(volume: Volume, facts: Mapping[str, Any] | None,
             mask: np.ndarray | None = None) -> dict[str, float | str | None]:
    """Columns that say what kind of scan this is; None where it is not known.

    Parameters
    ----------
    volume : the scan as read
    facts : the FACTS of its sidecar
    mask : bool [x, y, z], the brain: needed to see whether the face was removed

    Returns
    -------
    dict
        voxel_x_mm, voxel_y_mm, voxel_z_mm : native spacing along right, anterior, superior.
        acquisition : "2D" or "3D"; acquisition_source : "header" or "spacing".
        slice_thickness_mm : of the sidecar, else the coarsest spacing of a 2D scan.
        contrast_agent : of CONTRAST_AGENTS, "other", or "none" where the sidecar says so.
        defaced : "yes" or "no"; defaced_source : "header" or "voxels" (face.py).
    """
    facts = facts or {}
    spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
    stated = str(facts.get("MRAcquisitionType") or "").upper()
    by_header = stated in ("2D", "3D")
    acquisition = stated if by_header else (
        "2D" if spacing.max() >= ANISOTROPY_2D * spacing.min() else "3D")
    thickness = _number(facts.get("SliceThickness"))
    if thickness is None and acquisition == "2D":
        thickness = float(spacing.max().round(4))
    defaced, source = _defaced(volume, spacing, facts.get("Defaced"), mask)
    return {
        **{f"voxel_{axis}_mm": float(s)
           for axis, s in zip("xyz", spacing.round(4), strict=True)},
        "acquisition": acquisition,
        "acquisition_source": "header" if by_header else "spacing",
        "slice_thickness_mm": thickness,
        "contrast_agent": _contrast(facts.get("ContrastBolusIngredient")),
        "defaced": defaced,
        "defaced_source": source,
    }


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) and number > 0 else None


def _contrast(value: Any) -> str | None:
    if value is None or not str(value).strip():
        return None
    word = str(value).strip().upper()
    if word in ("NONE", "NO"):
        return "none"
    return word.lower() if word in CONTRAST_AGENTS else "other"


def _defaced(volume: Volume, spacing: np.ndarray, stated: Any, mask: np.ndarray | None
             ) -> tuple[str | None, str | None]:
    if isinstance(stated, bool):
        return ("yes" if stated else "no"), "header"
    found = None
    if mask is not None and mask.any():
        # An intercept may put the air below zero; signal is counted from there.
        found = face_is_gone(volume.data - min(0.0, float(volume.data.min())), mask, spacing)
    return (None, None) if found is None else (("yes" if found else "no"), "voxels")
