"""What is said of a scan: flags, that something may be wrong with it, and notes, how it was made.

A flag sets the scan's status to flagged: look at it, or leave it out.  A note changes nothing; it
says where a map comes from.  Both reach the scan's row (rows.py), in columns of their own.

Beside these, qc.yaml raises ``low_<figure>`` and ``high_<figure>``, ``outlier:<figure>`` marks
scans far from their cohort, and what is odd about a mask or label map that came with a scan has its
name in front: ``mask:sform_qform_disagree``.  docs/reference/flags.md has the same tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

OUTLIER = "outlier:"
COMPANIONS = ("mask", "label")  # files whose flags carry their name


class _Code(StrEnum):
    """A code with its meaning and what to do about it."""

    meaning: str
    cure: str

    def __new__(cls, value: str, meaning: str, cure: str) -> _Code:
        member = str.__new__(cls, value)
        member._value_, member.meaning, member.cure = value, meaning, cure
        return member


class Flag(_Code):
    """Something may be wrong with a scan that is kept."""

    # the file and its header
    NON_FINITE_CLEANED = (
        "non_finite_cleaned", "voxels were NaN or Inf and are 0 now",
        "look at the slices; convert the scan again if they lie in the brain")
    SLOPE_NOT_FINITE = (
        "slope_not_finite", "scl_slope or scl_inter is NaN or Inf; values were taken as stored",
        "nothing for MR; convert PET again, whose unit hangs on it")
    VOXEL_OFFSET_MENDED = (
        "voxel_offset_mended", "vox_offset points into the header; the voxels behind it were read",
        "check the slices, and what wrote the file")
    SURPLUS_BYTES = (
        "surplus_bytes", "the file holds more than the voxels its header promises",
        "check dim and datatype in the header, and the slices")
    SPACE_UNIT_CONVERTED = (
        "space_unit_converted", "the header counts in metres or micrometres; turned into mm",
        "check the head's size in the report")
    SPACE_UNIT_IGNORED = (
        "space_unit_ignored", "the header's unit gives no head's size; mm were assumed",
        "check the head's size in the report")
    SFORM_QFORM_DISAGREE = (
        "sform_qform_disagree", "sform and qform put the head in different places; the sform was "
        "used", "find out which one your tools wrote and restore the header")
    SFORM_INVALID = (
        "sform_invalid",
        "the sform maps voxels onto a plane or holds NaN; the qform was used",
        "nothing, or restore the header")
    QFORM_INVALID = (
        "qform_invalid",
        "the qform cannot be (its quaternion, pixdim or offset); the sform was used",
        "nothing, or restore the header")
    SFORM_STRETCHES = (
        "sform_stretches",
        "the sform leads into a template and changes sizes; the qform, in true size, was "
        "used",
        "nothing, or check the head's size in the report")
    VOXEL_SIZE_SETTLED = (
        "voxel_size_settled",
        "sform and pixdim name different voxel sizes; the one that gives a head, or has "
        "the sidecar's slice thickness, was used",
        "check the head's size in the report, and correct the header")
    DIM_MENDED = (
        "dim_mended",
        "an axis beyond the third has 0 voxels in the header; it was taken as 1",
        "check that the whole series was delivered")
    HUGE_FIELD_OF_VIEW = (
        "huge_field_of_view", "the field of view is wider than 400 mm",
        "check the voxel size in the header")
    NEGATIVE_VALUES = (
        "negative_values", "more than 1 % of the voxels are negative",
        "check that it is a magnitude image, and how it was converted")
    # the time of a series
    TR_DISAGREES = (
        "tr_disagrees", "header and sidecar name different repetition times; the sidecar's was "
        "used", "correct the wrong one; ALFF and fALFF hang on it")
    TR_IMPLAUSIBLE = (
        "tr_implausible", "a repetition time outside 0.1 to 20 s was ignored",
        "write RepetitionTime in seconds into the sidecar")
    TR_UNIT_GUESSED = (
        "tr_unit_guessed", "the header does not say in which unit it counts time",
        "write RepetitionTime in seconds into the sidecar")
    VOLUME_TIMING = (
        "volume_timing", "the sidecar gives each volume a time of its own (VolumeTiming), so one "
        "repetition time does not hold and there are no ALFF and fALFF",
        "nothing for a sparse acquisition; else write RepetitionTime and remove VolumeTiming")
    NO_TR = (
        "no_tr", "no repetition time is known that holds for all volumes, so there are no ALFF and "
        "fALFF",
        "write RepetitionTime in seconds into the sidecar")
    SHORT_SERIES = (
        "short_series", "too few volumes or seconds for ALFF and fALFF",
        "check that the whole series was delivered")
    BAD_CONFOUNDS = (
        "bad_confounds", "the table of motion is missing or does not fit the series",
        "see confounds_reason in the row; deliver the right table")
    # PET
    FRAME_TIMES_MISSING = (
        "frame_times_missing", "the frames have no times; all of them were averaged",
        "add FrameTimesStart and FrameDuration to the sidecar")
    FRAMES_OUTSIDE_WINDOW = (
        "frames_outside_window", "the frames lie outside the tracer's late window; all were "
        "averaged", "check that the times count from the injection")
    EMPTY_FRAMES = (
        "empty_frames", "frames in the late window are empty and were left out",
        "fetch or reconstruct the series again")
    PET_CLIPPED = (
        "pet_clipped", "more than 1 % of the brain lies above the tracer's SUVR range",
        "check the reference region and the tracer")
    # the place in MNI152
    ORIENTATION_UNSURE = (
        "orientation_unsure", "the head fits the template about as well turned by right angles",
        "look at the slices: do front and top lie where they should?")
    NO_ANCHOR = (
        "no_anchor", "placed by its silhouette alone: the person has no usable T1w, T2w or FLAIR",
        "look at the slices; deliver a structural scan of the person")
    LOW_MASK_DICE = (
        "low_mask_dice", "brain mask and template overlap less than usual",
        "look at the slices: is the mask the brain, and does it lie upright?")
    LOW_NCC = (
        "low_ncc", "the T1w resembles the template less than usual",
        "look at the slices; a wrong contrast or a large lesion does this, too")
    BRAIN_CUT = (
        "brain_cut", "the field of view holds less than 99 % of the template's brain",
        "leave it out of what needs the whole brain; missing parts are coded as not scanned")
    COHORT_TRANSFORM_FAILED = (
        "cohort_transform_failed", "the transform that came with the scan does not bring it into "
        "MNI152; it was registered anew", "see cohort_transform_fault in the row")


class Note(_Code):
    """How a map was made.  Nothing is wrong with it."""

    TRAILING_BYTES = (
        "trailing_bytes", "other bytes follow the packed ones, which are whole by their checksum",
        "nothing")
    PADDING_REMOVED = (
        "padding_removed", "a constant outside the image's range was taken as not scanned",
        "nothing, or look at the slices where parts of the head are missing")
    RATIO_BACKGROUND_REMOVED = (
        "ratio_background_removed", "an MP2RAGE UNI image: the noise around the head was set to 0",
        "nothing, or look at the slices where parts of the head are missing")
    LEFT_RIGHT_FROM_HEADER = (
        "left_right_from_header", "left and right are as the header says; no other scan of the "
        "person confirms them, and a head and its mirror image fit the template alike",
        "nothing, or compare a few scans with their source where the side matters")
    MINIMAL = (
        "minimal", "the series was delivered without removal of motion, and none was removed here",
        "read its maps beside qc_fd_mean, or deliver fMRIPrep's confounds")
    CLEANED_HERE = (
        "cleaned_here", "motion was regressed here, with the confounds that came with the series",
        "nothing")
    DEMEANED = (
        "demeaned", "the series came without its mean, so there are no BOLD mean and tSNR",
        "nothing, or deliver the series before cleaning")
    SYNTHETIC_GRID = (
        "synthetic_grid", "cortex was painted from a surface of a CIFTI file",
        "prefer the volume of the same run, where there is one")
    ALREADY_SUVR = (
        "already_suvr", "the image came as a ratio; it was not divided again", "nothing")
    UNITS_MISSING = (
        "units_missing", "a processed PET names no unit; a linear one was assumed",
        "nothing, or name Units in the sidecar")
    REFERENCE_APPROXIMATE = (
        "reference_approximate", "the reference region comes from MNI152, not from labels of the "
        "person", "deliver a label map (aparc+aseg) beside the T1w for exact ratios")


def of_companion(name: str, flags: Iterable[str]) -> list[str]:
    """Flags of a file that came with a scan; ``name`` is one of COMPANIONS."""
    assert name in COMPANIONS
    return [f"{name}:{flag}" for flag in flags]


def joined(codes: Iterable[str]) -> str | None:
    """Codes as a row holds them: each once, in order; None where there are none."""
    return ";".join(dict.fromkeys(codes)) or None
