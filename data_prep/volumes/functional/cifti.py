"""CIFTI-2 files (grayordinates) -> volumes in MNI space, and the cortex as series of parcels.

    voxels --by the file's own affine--> a volume
    cortical vertices --midthickness surface, voxels within 3 mm--> painted (note synthetic_grid)
    dtseries --> the maps of bold.py, computed on the grayordinates, then put on the grid

Voxels and surfaces of a CIFTI file are in MNI mm, so nothing is registered.  A surface is a sheet:
what is painted is its neighbourhood, no measurement, hence the note; where a volume of the same
run exists it is to be preferred.  Kinds without samples in space (parcels, connectomes) are
refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from data_prep.flags import Flag, Note
from data_prep.qc import Figures
from data_prep.scan import ScanError, split_member
from data_prep.volumes.functional.bold import RANGES, plan_for, scale_map
from data_prep.volumes.functional.grayordinates import (
    Groups,
    Layout,
    lay_out,
    parcel_groups,
    read_surfaces,
)
from data_prep.volumes.functional.temporal import displacement_figures, normalise, temporal_maps
from data_prep.volumes.output import mask_codes, to_archive
from data_prep.volumes.placing.align import template
from data_prep.volumes.placing.geometry import on_grid, to_itk
from data_prep.volumes.reading.decode import CIFTI_INTENTS, MAX_UNPACKED_BYTES, fetch
from data_prep.volumes.reading.packed import unpack
from data_prep.volumes.reading.sniff import Kind, sniff
from data_prep.volumes.reading.timing import choose_time
from data_prep.volumes.reading.volume import MAX_SERIES_VOXELS, Volume, content_id
from neurojepa.feed.format import ARCHIVE_GRID

DENSE = ("dtseries", "dscalar", "dlabel")
CONNECTOMES = {3001: "dconn", 3003: "pconn", 3009: "pdconn", 3010: "dpconn"}  # by intent code
KINDS = {("Series", "BrainModel"): "dtseries", ("Scalar", "BrainModel"): "dscalar",
         ("Label", "BrainModel"): "dlabel", ("Series", "Parcels"): "ptseries",
         ("Scalar", "Parcels"): "pscalar", ("Label", "Parcels"): "plabel",
         ("BrainModel", "BrainModel"): "dconn", ("Parcels", "Parcels"): "pconn",
         ("Parcels", "BrainModel"): "pdconn", ("BrainModel", "Parcels"): "dpconn"}
MAX_INVALID_SHARE = 0.01


@dataclass
class Cifti:
    """A dense CIFTI file.

    ``maps``: of a dtseries by modality (BOLD, tSNR, ALFF, fALFF), else by the file's own names; of
    a dlabel they hold codes.  All are Volumes in MNI mm on one grid, which ``covered`` describes.
    """

    kind: str  # dtseries, dscalar, dlabel
    scan_id: str  # of values and grid, as Volume.scan_id
    maps: dict[str, Volume]
    covered: np.ndarray  # bool [x, y, z]: voxels that hold a value
    parcels: np.ndarray | None  # float32 [parcels, time or maps]; None for labels
    names: list[str]  # of the parcels
    figures: Figures = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_cifti(uri: str, member: str | None = None, surface_uri: str | None = None, *,
               processing: str | None = None, confounds: bytes | None = None,
               facts: Mapping[str, object] | None = None,
               parcellation_uri: str | None = None) -> Cifti:
    """Read a dense CIFTI-2 file from any store.

    Parameters
    ----------
    surface_uri : midthickness surfaces of the same vertices in MNI mm, LEFT.surf.gii;RIGHT.surf.gii
    processing, confounds, facts : of a dtseries, as ``bold_maps`` and ``read_series`` take them
    parcellation_uri : a dlabel whose first map divides the cortex; without one, parcels of about
        equal size are made from the surface, else each hemisphere is one

    Raises
    ------
    ScanError
        With ``code``: cifti_kind (no samples in space), not_cifti, no_voxels (cortex alone, no
        surface), surface_mismatch, constant, non_finite, too_large, truncated, and those of
        reading a file.
    """
    name = f"{uri}::{member}" if member else uri
    kind, image = _load(fetch(uri, member), name)
    axis = image.header.get_axis(1)
    data, flags = _values(image, kind, name)
    surfaces = read_surfaces(surface_uri, axis, name) if surface_uri else {}
    layout = lay_out(axis, surfaces, name)
    found = Cifti(kind, content_id(data, layout.affine), {}, layout.covered, None, [], {
        "cifti_kind": kind, "cifti_grayordinates": data.shape[1],
        "cifti_cortex": layout.cortex, "cifti_painted_voxels": layout.painted}, flags)
    if layout.painted:
        found.notes.append(Note.SYNTHETIC_GRID)
    if kind == "dlabel":
        found.maps = _volumes(image, data, layout, name)
        return found
    groups = parcel_groups(axis, surfaces, _parcellation(parcellation_uri))
    if kind == "dtseries":
        data = _fluctuations(found, image, data, layout, name, processing, confounds, facts or {})
    else:
        found.maps = _volumes(image, data, layout, name)
    found.names = list(groups.rows)
    found.parcels = _parcels(data, groups)
    found.figures["cifti_parcels"] = groups.scheme
    return found


def _load(raw: bytes, name: str) -> tuple[str, Any]:
    """Kind and image; what the header claims is judged before voxels are decoded."""
    container, head = sniff(raw, name, ScanError)
    header = nib.Nifti2Header(head[:540], check=False) if container is Kind.NIFTI2 else None
    intent = int(header["intent_code"]) if header is not None else 0
    if header is None or intent not in CIFTI_INTENTS:
        raise ScanError("not_cifti", f"{name}: {container.value} with intent code {intent}, which "
                                     "is no CIFTI-2; read it as a volume")
    if intent in CONNECTOMES:  # they are large: told before their size is
        raise _no_samples(name, CONNECTOMES[intent])
    size = np.prod([float(n) for n in header["dim"][5:7]])
    needed = int(header["vox_offset"]) + size * header.get_data_dtype().itemsize
    if not 1 <= size <= MAX_SERIES_VOXELS or needed > MAX_UNPACKED_BYTES:
        raise ScanError("too_large", f"{name}: header claims {header['dim'][5:7].tolist()} values, "
                                     f"the limit is {MAX_SERIES_VOXELS} in all")
    content, _ = unpack(raw, int(needed) + 4096, name)
    if len(content) < needed:
        raise ScanError("truncated", f"{name}: {len(content)} bytes, the header promises "
                                     f"{needed:.0f}; fetch it again")
    try:
        image = nib.Cifti2Image.from_bytes(content)
        axes = [type(image.header.get_axis(k)).__name__.removesuffix("Axis") for k in (0, 1)]
        _check_millimetres(image)
    except Exception as error:  # nibabel raises many kinds on damaged XML
        raise ScanError("not_cifti", f"{name}: cannot be decoded ({error})") from error
    # Writers often leave the intent code at "unknown"; the axes say what the file is.
    kind = KINDS.get((axes[0], axes[1]), " by ".join(axes))
    if kind not in DENSE:
        raise _no_samples(name, kind)
    return kind, image


def _no_samples(name: str, kind: str) -> ScanError:
    return ScanError("cifti_kind", f"{name}: a {kind} file has no samples in space; give the dense "
                                   "file of the run (dtseries, dscalar, dlabel)")


def _check_millimetres(image: Any) -> None:
    axis = image.header.matrix.get_index_map(1)
    matrix = axis.volume and axis.volume.transformation_matrix_voxel_indices_ijk_to_xyz
    if matrix and matrix.meter_exponent != -3:
        raise ValueError(f"its grid is in units of 10^{matrix.meter_exponent} m, not mm")


def _values(image: Any, kind: str, name: str) -> tuple[np.ndarray, list[str]]:
    """float32 [maps or time, grayordinates], finite."""
    data = np.asarray(image.dataobj, np.float32)
    invalid = ~np.isfinite(data)
    if invalid.mean() > MAX_INVALID_SHARE:
        raise ScanError("non_finite", f"{name}: {invalid.mean():.1%} of the values are NaN or Inf "
                                      f"(limit {MAX_INVALID_SHARE:.0%})")
    if data.min() == data.max() and kind != "dlabel":
        raise ScanError("constant", f"{name}: every value is {data.flat[0]:g}")
    if not invalid.any():
        return data, []
    return np.where(invalid, 0, data), [Flag.NON_FINITE_CLEANED]


def _volumes(image: Any, data: np.ndarray, layout: Layout, name: str) -> dict[str, Volume]:
    """Every map of a dscalar or dlabel under its own name, doubles numbered."""
    volumes: dict[str, Volume] = {}
    for number, (title, row) in enumerate(zip(image.header.get_axis(0).name, data, strict=True)):
        key = str(title) or f"map{number}"
        volumes[f"{key}#{number}" if key in volumes else key] = layout.volume(row, name)
    return volumes


def _fluctuations(found: Cifti, image: Any, data: np.ndarray, layout: Layout, name: str,
                  processing: str | None, confounds: bytes | None, facts: Mapping[str, object]
                  ) -> np.ndarray:
    """Fill in the maps of a series; returns its steady part [t, grayordinates]."""
    axis = image.header.get_axis(0)
    header_s = float(axis.step) if axis.unit == "SECOND" else None
    tr_s, flags = choose_time(header_s, [], facts)
    plan, motion = plan_for(name, data.mean(axis=1), tr_s=tr_s, processing=processing,
                            confounds=confounds)
    maps = temporal_maps(data.T, plan)
    kept = normalise(maps, np.ones(data.shape[1], bool), plan)
    found.maps = {key: layout.volume(values, name) for key, values in kept.items()}
    found.figures |= plan.figures | displacement_figures(
        motion, plan, source="table", reason="grayordinates came without a motion table")
    found.flags += flags + plan.flags
    found.notes += plan.notes
    return data[plan.first:]


def _parcels(data: np.ndarray, groups: Groups) -> np.ndarray:
    """Mean of every parcel, float32 [parcels, time or maps]."""
    return np.stack([data[:, rows].mean(axis=1) for rows in groups.rows.values()])


def _parcellation(uri: str | None) -> tuple[Any, np.ndarray, dict[int, str]] | None:
    """Brain model axis, codes and names of the first map of a dlabel file."""
    if uri is None:
        return None
    kind, image = _load(fetch(*split_member(uri)), uri)
    if kind != "dlabel":
        raise ScanError("cifti_kind", f"{uri}: a {kind} file is no parcellation; give a dlabel")
    names = {int(code): text for code, (text, _) in image.header.get_axis(0).label[0].items()}
    return image.header.get_axis(1), np.asarray(image.dataobj)[0].astype(int), names


# ---- on the archive grid -------------------------------------------------------------------------

def archive_maps(found: Cifti, modality: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Images in [0, 1] by modality, and the one mask of all, on ARCHIVE_GRID.

    Parameters
    ----------
    modality : of the scan; what the first map of a dscalar is (ALFF, fALFF, tSNR)

    Returns
    -------
    images : float32
    mask : uint8; the brain that the file does not hold is "not scanned"

    Raises
    ------
    ScanError
        cifti_maps: a dlabel, or a dscalar of something else.
    """
    maps = found.maps
    if found.kind != "dtseries":
        first = next(iter(maps.values()))
        if found.kind == "dlabel" or modality not in RANGES:
            raise ScanError("cifti_maps", f"{first.name}: a {found.kind} is read as {modality}; "
                                          f"only a dscalar of {', '.join(RANGES)} is an image")
        if modality == "ALFF":  # over its brain mean, as that of a series
            first = replace(first, data=first.data / first.data[found.covered].mean())
        maps = {modality: first}
    affine = next(iter(maps.values())).affine
    target, still = template(2), np.eye(4)
    brain = to_archive(found.covered, affine, still)
    head = to_archive(target.mask, target.affine, still)  # brain that has no grayordinates
    mask = mask_codes(brain, brain | ~head)
    # Voxels without a value must not dim their neighbours: they carry no weight.
    weight = on_grid(to_itk(found.covered.astype(np.float32), affine), still, ARCHIVE_GRID,
                     sitk.sitkLinear)
    images = {}
    for name, volume in maps.items():
        image = on_grid(to_itk(volume.data, affine), still, ARCHIVE_GRID, sitk.sitkLinear)
        images[name] = scale_map(name, image / np.maximum(weight, 1e-3), brain)
    return images, mask
