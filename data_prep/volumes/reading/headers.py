"""NIfTI headers: each field checked against the others before any of them is believed.

A field that cannot be (a quaternion of norm 2, a voxel of -1 mm) is put aside where another says
the same thing, with a flag; where none does, the scan is refused.  Fields that are possible and
contradict each other about sizes are settled by what a head can be and by the sidecar's slice
thickness, or the scan is refused: half of a brain's volume hangs on it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data_prep.flags import Flag
from data_prep.scan import ScanError

MIN_EXTENT_MM, MAX_EXTENT_MM = 60.0, 400.0  # of a head's longest axis
SIZE_TOLERANCE = 0.02  # between voxel sizes that shall be the same
NORM_TOLERANCE = 0.01  # by which a quaternion is scaled down; single precision gives 1 + 1e-6
TEMPLATE_CODES = (3, 4)  # sforms that lead into Talairach or MNI space may stretch
MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # by the code of xyzt_units
MIN_SLICES = 20


def mend_header(header: Any, name: str) -> list[str]:
    """Put impossible fields aside, in place; returns flags.

    Raises
    ------
    ScanError
        not_3d, unknown_orientation, bad_pixdim: no other field says it.
    """
    flags = _mend_dim(header, name)
    scaling = [float(header["scl_slope"]), float(header["scl_inter"])]
    if not np.isfinite(scaling).all():
        flags.append(Flag.SLOPE_NOT_FINITE)
        header["scl_inter"] = scaling[1] if np.isfinite(scaling[1]) else 0
    rows = np.array([header[f"srow_{axis}"] for axis in "xyz"], float)
    sizes = np.array(header["pixdim"][1:4], float)
    wrong = _wrong_qform(header, sizes)
    if int(header["sform_code"]) and int(header["qform_code"]) and not wrong and _flat(rows):
        header["sform_code"] = 0
        flags.append(Flag.SFORM_INVALID)
    if wrong and int(header["qform_code"]):
        if not int(header["sform_code"]) or _flat(rows):
            code = "bad_pixdim" if "pixdim" in wrong else "unknown_orientation"
            raise ScanError(code, f"{name}: {wrong}, and no sform says how the head lies; restore "
                            "the header from its source")
        header["qform_code"] = 0
        flags.append(Flag.QFORM_INVALID)
    if wrong:  # nibabel stumbles over fields that it does not need
        header["quatern_b"] = header["quatern_c"] = header["quatern_d"] = 0
        own = np.linalg.norm(rows[:, :3], axis=0)
        header["pixdim"][:4] = [1, *np.where(_usable(sizes), sizes, own)]
    return flags


def _mend_dim(header: Any, name: str) -> list[str]:
    dim = [int(n) for n in header["dim"]]
    count, flags = dim[0], list[str]()
    if not 1 <= count <= 7:
        return flags  # refused where the shape is read
    for axis in range(4, count + 1):
        if dim[axis] == 0:
            header["dim"][axis] = dim[axis] = 1
            flags = [Flag.DIM_MENDED]
    shape = dim[1:count + 1]
    if min(shape) < 1 and shape != [-1, 1, 1]:
        raise ScanError("not_3d", f"{name}: dim is {dim}, and every axis needs at least one voxel; "
                        "restore the header from its source")
    if count == 4 and shape[2] == 1 and shape[3] >= MIN_SLICES:
        raise ScanError("not_3d", f"{name}: shape {tuple(shape)}: one slice, {shape[3]} times. If "
                        "these are the slices of one volume, write them along the third axis")
    return flags


def _wrong_qform(header: Any, sizes: np.ndarray) -> str:
    """Why the qform cannot be used; empty where it can.  Rounded quaternions are scaled down."""
    parts = np.array([header[f"quatern_{axis}"] for axis in "bcd"], float)
    norm = float(np.linalg.norm(parts))
    if 1 < norm <= 1 + NORM_TOLERANCE:
        for axis, part in zip("bcd", parts / norm, strict=True):
            header[f"quatern_{axis}"] = part
    if float(header["pixdim"][0]) == 0:  # the standard: 0 counts as 1
        header["pixdim"][0] = 1
    offset = [float(header[f"qoffset_{axis}"]) for axis in "xyz"]
    if not _usable(sizes).all():
        return f"pixdim {sizes.tolist()} is no voxel size"
    if float(header["pixdim"][0]) not in (-1, 1):
        return f"qfac (pixdim[0]) is {float(header['pixdim'][0]):g}, neither 1 nor -1"
    if not norm <= 1 + NORM_TOLERANCE:
        return f"the quaternion {parts.tolist()} has norm {norm:.4g}, more than 1"
    return "" if np.isfinite(offset).all() else f"qoffset is {offset}"


def _usable(sizes: np.ndarray) -> np.ndarray:
    return np.isfinite(sizes) & (sizes > 0)


def _flat(rows: np.ndarray) -> bool:
    """Whether an sform maps voxels onto a plane, or nowhere."""
    size = float(np.prod(np.linalg.norm(rows[:, :3], axis=0)))
    return not (np.isfinite(rows).all() and abs(np.linalg.det(rows[:, :3])) > 1e-6 * size)


# ---- which affine --------------------------------------------------------------------------------

def choose_affine(header: Any, shape: tuple[int, ...], name: str, thickness_mm: float | None
                  ) -> tuple[np.ndarray, list[str]]:
    """Voxel index to world in the header's unit, [4, 4], and flags.

    The sform, as nibabel and FSL have it, unless its voxels have another size than pixdim says.

    Raises
    ------
    ScanError
        voxel_size_disagrees: nothing tells which size is right.
    """
    if not int(header["sform_code"]):
        return np.asarray(header.get_qform(), float), []
    sform, qform = np.asarray(header.get_sform(), float), int(header["qform_code"])
    stated = np.array(header["pixdim"][1:4], float)
    own = np.linalg.norm(sform[:3, :3], axis=0)
    if np.allclose(own, stated, rtol=SIZE_TOLERANCE, atol=0) or _flat(sform[:3]):
        return sform, []
    if not qform and (np.allclose(stated, 1) or (stated <= 0).any()):
        return sform, []  # never filled in
    by_pixdim = (np.asarray(header.get_qform(), float) if qform else
                 np.c_[sform[:, :3] * (stated / own), sform[:, 3]])
    if qform and int(header["sform_code"]) in TEMPLATE_CODES and qform not in TEMPLATE_CODES:
        return by_pixdim, [Flag.SFORM_STRETCHES]
    fits = [_head_sized(size * shape) and _slices_fit(size, other, thickness_mm)
            for size, other in ((own, stated), (stated, own))]
    if fits[0] == fits[1]:
        raise ScanError(
            "voxel_size_disagrees", f"{name}: voxels of {_sizes(own)} mm by the sform and of "
            f"{_sizes(stated)} by pixdim{' and the qform' if qform else ''}, and brain volumes "
            f"that differ by a factor of {own.prod() / stated.prod():.2f}. Look it up in the "
            "source, then correct the wrong one: set sform_code to 0 where the sform is wrong, "
            "or pixdim and qform where they are; or name SliceThickness in the sidecar")
    return (sform if fits[0] else by_pixdim), [Flag.VOXEL_SIZE_SETTLED]


def _head_sized(extent: np.ndarray) -> bool:
    return bool(MIN_EXTENT_MM <= extent.max() <= MAX_EXTENT_MM and extent.min() >= MIN_EXTENT_MM)


def _slices_fit(sizes: np.ndarray, other: np.ndarray, thickness_mm: float | None) -> bool:
    """Whether the sidecar's thickness is a size of these voxels, or says nothing of either."""
    differ = ~np.isclose(sizes, other, rtol=SIZE_TOLERANCE)
    near = [bool(np.isclose(one[differ], thickness_mm or 0, rtol=SIZE_TOLERANCE).any())
            for one in (sizes, other)]
    return near[0] or not near[1]


def _sizes(sizes: np.ndarray) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes)


# ---- which unit, and whether there is a header at all --------------------------------------------

def in_mm(affine: np.ndarray, header: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, list[str]]:
    """An affine in mm: by the header's unit, or by the one that gives the size of a head."""
    stated = MM.get(int(header["xyzt_units"]) & 7)
    extent = float((np.linalg.norm(affine[:3, :3], axis=0) * shape).max())
    factors = dict.fromkeys([stated or 1.0, 1.0, 1000.0, 0.001])
    fitting = [factor for factor in factors
               if MIN_EXTENT_MM <= factor * extent <= 4 * MAX_EXTENT_MM]
    factor = fitting[0] if fitting else 1.0
    scaled = np.diag([factor, factor, factor, 1.0]) @ affine
    if factor != 1:
        return scaled, [Flag.SPACE_UNIT_CONVERTED]
    return scaled, [] if stated == 1 else [Flag.SPACE_UNIT_IGNORED]


def refuse_made_up(affine: np.ndarray, name: str) -> None:
    """Raise ScanError unknown_orientation for an affine that a program wrote in want of one.

    Voxels of exactly 1 mm along the axes with the first at the scanner's centre: that is the
    default of nibabel (identity) and of ITK (x and y reversed), not a measurement.
    """
    linear = affine[:3, :3]
    if np.array_equal(np.abs(linear), np.eye(3)) and not affine[:3, 3].any():
        raise ScanError("unknown_orientation", f"{name}: the affine is "
                        f"{np.diag(linear).astype(int).tolist()} on its diagonal and 0 elsewhere, "
                        "the default of a program that lost the header: left, right and voxel size "
                        "are unknown. Restore it from the source; where it is right by chance, "
                        "say so in the table of prepare --turn, with turn RAS")


def mirrored_forms(header: Any) -> bool:
    """Whether sform and qform disagree about left and right."""
    if not (int(header["sform_code"]) and int(header["qform_code"])):
        return False
    forms = (np.asarray(form, float)[:3, :3] for form in (header.get_sform(), header.get_qform()))
    signs = [np.sign(np.linalg.det(form)) for form in forms]
    return bool(signs[0] * signs[1] < 0)
