"""How thoroughly scans are prepared: three named sets of parameters.

``default`` is the full recipe; ``quick`` serves demos and tests: a coarse affine, no bias field,
linear interpolation, and one brain mask per session, carried from the anchor to the other scans.
``paper`` keeps the order of the published code, see published.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Parameters of ``prepare_person``; recorded with every archive."""

    name: str
    # Voxels a side of deepbet's input: 192 takes a third of 256's time, at Dice 0.99 to it.
    mask_cube: int
    template_mm: int  # the template's voxel in registration, 1 or 2 mm
    shrink: tuple[int, ...]  # of the template, coarse to fine
    sampling: float  # share of the template's voxels the metric looks at
    rigid_mm: float  # grid of the rigid registrations within a person
    bias_field: bool  # N4 in native space
    share_mask: bool  # the session's other scans take the anchor's mask
    spline: bool  # cubic B-spline instead of linear interpolation onto the archive grid
    published: bool = False  # the published order, scan by scan
    mask_tool: str = "deepbet"  # or a key of brain_tools.COMMANDS, an external command
    min_dice: float = 0.85  # below: rejected
    flag_dice: float = 0.92  # below: flagged
    # Native to MNI; outside: rejected.  A brain of 700 ml, the least below, has 2.7: a small head
    # that lies well is no failed registration.
    volume_factor: tuple[float, float] = (0.7, 2.7)
    flag_ncc: float = 0.4  # T1w only: other contrasts do not correlate with a T1w template
    brain_ml: tuple[float, float] = (700.0, 2300.0)  # outside: rejected
    version: int = 6  # of the code behind it: raise it and archives prepare their scans anew


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("quick", mask_cube=192, template_mm=2, shrink=(4, 2), sampling=0.5,
               rigid_mm=4.0, bias_field=False, share_mask=True, spline=False),
        Preset("default", mask_cube=256, template_mm=1, shrink=(8, 4, 2), sampling=0.1,
               rigid_mm=2.0, bias_field=True, share_mask=False, spline=True),
        Preset("paper", mask_cube=256, template_mm=1, shrink=(8, 4, 2), sampling=0.1,
               rigid_mm=2.0, bias_field=True, share_mask=False, spline=True, published=True),
    )
}
