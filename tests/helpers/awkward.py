"""The awkward files that cohorts deliver, made from one small head.

``ok_*`` is the reference's content in another form, ``odd_*`` needs a decision, ``bad_*`` must be
refused.  The names and the peculiarities are those of the folder ``awkward`` of the real scans.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np

from tests.helpers.synthetic_head import brain, moved

SLOPE, INTER = 0.0125, -17.5


def write_awkward(folder: Path) -> Path:
    """Write all files below ``folder``, which is returned."""
    reference = _reference()
    voxels, affine = np.asarray(reference.dataobj), reference.affine
    whole = nib.Nifti1Image(voxels, affine, reference.header).to_bytes()

    def keep(name: str, image: nib.filebasedimages.FileBasedImage) -> None:
        nib.save(image, folder / name)

    keep("ok_reference.nii.gz", reference)
    keep("ok_ras.nii.gz", nib.as_closest_canonical(reference))
    keep("ok_las.nii.gz", _stored(reference, "LAS"))
    keep("ok_nifti2.nii.gz", nib.Nifti2Image(voxels, affine))
    keep("ok_pair.hdr", nib.Nifti1Pair(voxels, affine))
    keep("ok_freesurfer.mgz", nib.MGHImage(voxels.astype(np.float32), affine))
    keep("ok_bigendian_int16.nii", nib.Nifti1Image(
        voxels.astype(">i2"), affine, nib.Nifti1Header(endianness=">")))
    keep("ok_int16_slope_inter.nii.gz", _scaled(reference))
    keep("ok_4d_one_volume.nii.gz", nib.Nifti1Image(voxels[..., None], affine))
    keep("ok_oblique_20deg.nii.gz", nib.Nifti1Image(voxels, moved(affine, 20, (0, 0, 0))[0]))

    (folder / "odd_duplicate_of_reference.nii.gz").write_bytes(gzip.compress(whole, 1))
    keep("odd_4d_as_t1w.nii.gz", nib.Nifti1Image(np.stack(3 * [voxels], -1), affine))
    keep("odd_huge_fov_off_centre.nii.gz", nib.Nifti1Image(
        np.pad(voxels, [(0, 260), (0, 260), (0, 115)]), affine))
    keep("odd_no_qform_no_sform.nii.gz", _with_codes(reference, 0, 0))
    turned = _with_codes(reference, 1, 1)
    turned.set_qform(moved(affine, 30, (0, 0, 0))[0], 1)
    keep("odd_sform_qform_disagree.nii.gz", turned)
    keep("odd_thin_slab_4_slices.nii.gz", nib.Nifti1Image(voxels[:, :, 20:24], affine))

    keep("bad_all_zero.nii.gz", nib.Nifti1Image(np.zeros_like(voxels), affine))
    keep("bad_constant.nii.gz", nib.Nifti1Image(np.full_like(voxels, 100), affine))
    (folder / "bad_empty.nii.gz").write_bytes(b"")
    (folder / "bad_html_error_page.nii.gz").write_bytes(
        b"<html><head><title>404 Not Found</title></head><body>no such scan</body></html>\n")
    holes = np.where(voxels == 0, np.nan, voxels).astype(np.float32)
    holes[10, 10, 10] = np.inf
    keep("bad_nan_background_one_inf.nii.gz", nib.Nifti1Image(holes, affine))
    (folder / "bad_singular_affine.nii.gz").write_bytes(gzip.compress(_flattened(whole)))
    (folder / "bad_truncated.nii").write_bytes(whole[:len(whole) // 2])
    packed = gzip.compress(whole)
    (folder / "bad_truncated_gzip.nii.gz").write_bytes(packed[:len(packed) * 6 // 10])
    return folder


def _reference() -> nib.Nifti1Image:
    """The template's brain at 4 mm: 60 x 60 x 45 int16, stored PSR."""
    data, affine = brain()
    mean = data[:90, :108, :90].reshape(45, 2, 54, 2, 45, 2).mean((1, 3, 5))
    voxels = np.pad(mean, [(0, 0), (3, 3), (7, 8)]).round().astype(np.int16)
    coarse = affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    coarse[:3, 3] = (affine @ [0.5, 0.5 - 6, 0.5 - 14, 1])[:3]
    return _with_codes(_stored(nib.Nifti1Image(voxels, coarse), "PSR"), 1, 1)


def _stored(image: nib.Nifti1Image, axes: str) -> nib.Nifti1Image:
    return image.as_reoriented(nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes)))


def _with_codes(image: nib.Nifti1Image, sform: int, qform: int) -> nib.Nifti1Image:
    copy = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    copy.set_sform(image.affine, sform)
    copy.set_qform(image.affine, qform)
    return copy


def _scaled(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """Its values in another unit, from -18 slopes above the intercept upwards."""
    stored = np.rint(np.asarray(image.dataobj) * 0.137 - 18).astype(np.int16)
    scaled = nib.Nifti1Image(stored, image.affine)
    scaled.header.set_slope_inter(SLOPE, INTER)
    return scaled


def _flattened(whole: bytes) -> bytes:
    """A NIfTI file with a column of zeros in its sform, and no qform to fall back to."""
    header = nib.Nifti1Header(whole[:348])
    for row in "xyz":
        header[f"srow_{row}"][0] = 0
    header["qform_code"] = 0
    return header.binaryblock + whole[348:]
