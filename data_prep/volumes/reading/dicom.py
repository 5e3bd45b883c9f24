"""A series of DICOM files -> one NIfTI, by dcm2niix, or a ScanError with a code.

    files of a folder, prefix or archive -> copies under fresh numbers in a private folder
    -> headers checked with pydicom -> dcm2niix -> exactly one image, with every frame in it

A converter makes something of almost any heap of files; what it makes of a heap that is not one
complete series is wrong in silence (a head with a gap closed up, two runs interleaved).  So the
headers are judged before it runs, and the number of frames after it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import nibabel as nib
import numpy as np

from data_prep.filenames import is_hidden
from data_prep.members import read_members
from data_prep.scan import FACTS, ScanError
from data_prep.volumes.reading.packed import unpack, unpack_head
from neurojepa.errors import DataError
from neurojepa.storage import open_store, store_errors

MAX_SERIES_BYTES = 4 << 30  # a long multi-band series has about 1 GiB
MAX_FILES = 100_000  # one slice a file: 500 volumes of 72 slices have 36,000
MAX_SECONDS = 600.0
HEAD_BYTES = 1 << 16  # holds a scanner's name, which comes early
SAME_PLACE_MM = 0.05  # slices closer than this are the same slice at another time
STEP_TOLERANCE = 0.05  # of the slice distance
# Files that deliveries put beside a series (protocols, manifests; "cvs" is UK Biobank's spelling).
BESIDE = (".json", ".xml", ".txt", ".csv", ".cvs", ".bval", ".bvec")
# Values of ImageType that are no acquired intensities: DICOM PS3.3 C.8.13.3.1 and the vendors'
# own.  DERIVED alone says nothing: anonymisers and distortion correction write it too.
DERIVED = {"LOCALIZER", "MPR", "MIP", "MNIP", "PROJECTION IMAGE", "PHASE", "PHASE MAP", "P", "ADC",
           "FA", "TRACEW", "T1 MAP", "T2 MAP", "SUBTRACTION", "DIVISION", "STD_DEVIATION",
           "ANGIO", "PERFUSION"}
SCANNER = ("Manufacturer", "ManufacturersModelName", "MagneticFieldStrength")
_SCANNER = ("Manufacturer", "ManufacturerModelName", "MagneticFieldStrength")
_TAGS = ["SOPInstanceUID", "SeriesInstanceUID", "ImageType", "ImagePositionPatient",
         "ImageOrientationPatient", "NumberOfFrames", "NumberOfSlices", "NumberOfTimeSlices",
         "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "Units",
         "PatientWeight", "DiffusionBValue", "ContrastBolusAgent",
         "RadiopharmaceuticalInformationSequence"]
# Units (0054,1001) as BIDS writes them
_UNITS = {"BQML": "Bq/mL", "CNTS": "counts", "GML": "g/mL", "PROPCNTS": "counts"}


def to_nifti(uri: str, member: str | None = None) -> tuple[bytes, dict[str, object]]:
    """The one image of a DICOM series as NIfTI, and what its headers say.

    Parameters
    ----------
    uri : folder of the series (local or object store), ending in "/"; or an archive
    member : folder inside the archive, ending in "/"; "/" is the archive's own top

    Returns
    -------
    nifti : bytes of a .nii; 4D where the series has several volumes
    facts : the keys of FACTS and SCANNER that are known, as BIDS spells and scales them

    Raises
    ------
    ScanError
        With ``code``: missing, not_downloaded, too_large, not_dicom, mixed_series,
        incomplete_series, uneven_slices, derived_image, diffusion_series, truncated,
        conversion_failed; of an archive also those of ``read_member``.
    DataError
        The store itself cannot be read.
    """
    name = f"{uri}::{member}" if member else uri
    with tempfile.TemporaryDirectory(prefix="series-") as folder:
        source, target = os.path.join(folder, "in"), os.path.join(folder, "out")
        os.mkdir(source)
        os.mkdir(target)
        headers = _copy(_archived(uri, member) if member else _stored(uri), source, name)
        frames = _check(headers, name)
        _convert(source, target, name)
        image, sidecar = _outcome(target, frames, name)
    return image, _facts(sidecar, headers[0], name)


def scanner_of(uri: str) -> dict[str, str | float | None]:
    """``scanner`` and ``field_strength`` (tesla) of one DICOM file, of its first bytes.

    None where it does not say, or is no DICOM file: that is for ``to_nifti`` to refuse.
    """
    fs, path = open_store(uri)
    try:
        head = fs.cat_file(path, start=0, end=HEAD_BYTES)
    except store_errors() as error:
        raise DataError(f"{uri}: cannot be read ({error}); check the store") from error
    try:
        header = _parse(unpack_head(head, HEAD_BYTES, uri), _SCANNER, uri)
    except ScanError:
        return {"scanner": None, "field_strength": None}
    maker, model, strength = (header.get(tag) for tag in _SCANNER)
    return {"scanner": " ".join(str(part) for part in (maker, model) if part) or None,
            "field_strength": float(strength) if isinstance(strength, float) else None}


# ---- files ---------------------------------------------------------------------------------------

def _stored(uri: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file directly in a folder, by name."""
    fs, path = open_store(uri)
    try:
        entries = sorted((entry["name"], entry["size"] or 0)
                         for entry in fs.ls(path.rstrip("/"), detail=True)
                         if entry["type"] != "directory" and _belongs(entry["name"]))
        size = sum(size for _, size in entries)
        if len(entries) > MAX_FILES or size > MAX_SERIES_BYTES:
            raise ScanError("too_large", f"{uri}: a series of {len(entries)} files, {size} bytes; "
                                         f"the limits are {MAX_FILES} and {MAX_SERIES_BYTES}")
        for start in range(0, len(entries), 64):  # an object store answers many reads at once
            batch = [entry for entry, _ in entries[start:start + 64]]
            yield from zip(batch, fs.cat_ranges(batch, None, None, on_error="raise"), strict=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ScanError("missing", f"{uri}: not found; index the source again") from error
    except store_errors() as error:
        raise DataError(f"{uri}: cannot be read ({error}); check the store") from error


def _archived(uri: str, folder: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file directly in a folder of an archive, in one pass."""
    prefix = folder.strip("/")

    def inside(member: str) -> bool:
        return member.rpartition("/")[0] == prefix and _belongs(member)

    return read_members(uri, inside, MAX_SERIES_BYTES)


def _belongs(path: str) -> bool:
    name = path.rsplit("/", 1)[-1]
    return not is_hidden(name) and name != "DICOMDIR" and not name.lower().endswith(BESIDE)


def _copy(files: Iterator[tuple[str, bytes]], folder: str, name: str) -> list[Any]:
    """Write the files under fresh numbers, each instance once; returns their headers.

    Raises ScanError not_dicom, missing (no file at all), mixed_series (one instance, two contents).
    """
    headers: list[Any] = []
    digests: dict[str, str] = {}
    for path, packed in files:
        content, _ = unpack(packed, MAX_SERIES_BYTES, f"{name}{path.rsplit('/', 1)[-1]}")
        header = _header(content, f"{name}{path.rsplit('/', 1)[-1]}")
        instance, digest = str(header.SOPInstanceUID), hashlib.sha256(content).hexdigest()
        if digests.setdefault(instance, digest) != digest:
            raise ScanError("mixed_series", f"{name}: two files have the same SOPInstanceUID and "
                                            "different contents; fetch the series again")
        if len(digests) == len(headers):
            continue  # the same file delivered twice
        try:
            with open(os.path.join(folder, f"{len(headers):06d}.dcm"), "xb") as file:
                file.write(content)
        except OSError as error:
            raise DataError(f"{folder}: cannot hold a copy of a series ({error.strerror}); free "
                            "space there or set TMPDIR") from error
        headers.append(header)
    if not headers:
        raise ScanError("missing", f"{name}: no file of a series there; index the source again")
    return headers


def _header(content: bytes, name: str) -> Any:
    """The checked tags of one file."""
    if content.startswith(b"version https://git-lfs") or b"/annex/objects/" in content[:512]:
        raise ScanError("not_downloaded", f"{name}: a pointer of git-lfs or git-annex, not a slice;"
                                          " download its content first")
    header = _parse(content, _TAGS, name)
    if "SOPInstanceUID" not in header or "SeriesInstanceUID" not in header:
        raise ScanError("not_dicom", f"{name}: has no SOPInstanceUID and SeriesInstanceUID; it is "
                                     "no DICOM image")
    return header


def _parse(content: bytes, tags: Sequence[str], name: str) -> Any:
    """Some tags of one file, decoded; files without the DICOM preamble are read too."""
    import pydicom

    try:
        header = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True, force=True,
                                 specific_tags=list(tags))
        for tag in tags:
            header.get(tag)  # pydicom decodes a value when it is asked for
    except Exception as error:  # it raises many kinds on bytes that are no DICOM
        raise ScanError("not_dicom", f"{name}: cannot be parsed ({error}); fetch it "
                                     "again") from error
    return header


# ---- checks --------------------------------------------------------------------------------------

def _check(headers: list[Any], name: str) -> int | None:
    """Refuse what is not one complete series; returns its number of frames (None: a mosaic)."""
    series = {str(header.SeriesInstanceUID) for header in headers}
    if len(series) > 1:
        raise ScanError("mixed_series", f"{name}: files of {len(series)} series "
                                        "(SeriesInstanceUID); put each into its own folder")
    kinds = {str(value).upper() for header in headers for value in _values(header, "ImageType")}
    if no_intensity := sorted(kinds & DERIVED):
        raise ScanError("derived_image", f"{name}: ImageType has {', '.join(no_intensity)}; this is"
                                         " no acquired image of the head")
    # Philips writes a b-value of 0 into every series
    if "DIFFUSION" in kinds or any(header.get("DiffusionBValue") for header in headers):
        raise _diffusion(name)
    if "MOSAIC" in kinds:  # one file holds a whole volume; its slices are not in the headers
        return None
    places = [place for header in headers for place in _places(header, name)]
    if places and None not in places:
        _check_slices(np.array(places, np.float64), name)
    _check_promise(headers[0], len(places), name)
    return len(places)


def _diffusion(name: str) -> ScanError:
    return ScanError("diffusion_series", f"{name}: a diffusion-weighted series, which is none of "
                                         "the modalities taken; leave it out")


def _values(header: Any, tag: str) -> list[Any]:
    value = header.get(tag)
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _numbers(header: Any, tag: str, name: str) -> list[float]:
    """The numbers of a tag; pydicom hands on a text where it cannot read one."""
    values = _values(header, tag)
    try:
        return [float(value) for value in values]
    except ValueError as error:
        raise ScanError("not_dicom", f"{name}: {tag} is {', '.join(map(str, values))}, no number; "
                                     "export the series again") from error


def _number(header: Any, tag: str, name: str) -> float:
    """The number of a tag, or the first of several; 0 where it is not there."""
    return next(iter(_numbers(header, tag, name)), 0.0)


def _places(header: Any, name: str) -> list[tuple[float, ...] | None]:
    """Position and orientation (9 numbers, mm) of each frame; None where the file has none."""
    frames = header.get("PerFrameFunctionalGroupsSequence")
    if not frames:
        return [_place(header, header, name)] * int(_number(header, "NumberOfFrames", name) or 1)
    shared = (header.get("SharedFunctionalGroupsSequence") or [{}])[0]
    places: list[tuple[float, ...] | None] = []
    for frame in frames:
        position = frame.get("PlanePositionSequence") or shared.get("PlanePositionSequence")
        axes = frame.get("PlaneOrientationSequence") or shared.get("PlaneOrientationSequence")
        places.append(_place(position[0], axes[0], name) if position and axes else None)
    return places


def _place(position: Any, axes: Any, name: str) -> tuple[float, ...] | None:
    place = (*_numbers(position, "ImagePositionPatient", name),
             *_numbers(axes, "ImageOrientationPatient", name))
    return place if len(place) == 9 else None


def _check_slices(places: np.ndarray, name: str) -> None:
    """Parallel slices, evenly spaced, each as often as the others; ``places`` is [frames, 9]."""
    if np.abs(places[:, 3:] - places[0, 3:]).max() > 1e-3:
        raise ScanError("mixed_series", f"{name}: slices in several directions; a localiser, or "
                                        "several stacks")
    normal = np.cross(places[0, 3:6], places[0, 6:9])
    depth = np.sort(places[:, :3] @ normal)
    starts = np.flatnonzero(np.diff(depth, prepend=-np.inf) > SAME_PLACE_MM)
    counts = np.diff(starts, append=len(depth))
    steps = np.diff(depth[starts])
    if len(steps):
        usual = float(np.sort(steps)[(len(steps) - 1) // 2])  # a median that is one of the steps
        odd = steps[np.abs(steps - usual) > STEP_TOLERANCE * usual]
        multiple = np.abs(odd / usual - np.rint(odd / usual)) <= STEP_TOLERANCE
        if len(odd) and multiple.all() and odd.min() > usual:
            missing = int((np.rint(odd / usual) - 1).sum())
            raise ScanError("incomplete_series", f"{name}: {missing} slices are missing between "
                                                 f"others {usual:.2f} mm apart; fetch it again")
        if len(odd):
            raise ScanError("uneven_slices", f"{name}: slices are {steps.min():.2f} to "
                                             f"{steps.max():.2f} mm apart; no regular volume")
    if counts.min() != counts.max():
        raise ScanError("incomplete_series", f"{name}: some slices come {counts.min()} times, "
                                             f"others {counts.max()} times; fetch it again")


def _check_promise(header: Any, frames: int, name: str) -> None:
    """A PET header says how many slices and times the series has."""
    promised = (_number(header, "NumberOfSlices", name)
                * (_number(header, "NumberOfTimeSlices", name) or 1))
    if promised > frames:
        raise ScanError("incomplete_series", f"{name}: {frames} frames, the header promises "
                                             f"{promised:g}; fetch it again")


# ---- conversion ----------------------------------------------------------------------------------

def _convert(source: str, target: str, name: str) -> None:
    import dcm2niix

    # -g i: no settings of the user; -ba y: no dates or names in the sidecar; -d 0: this folder only
    command = [dcm2niix.bin, "-g", "i", "-b", "y", "-ba", "y", "-z", "n", "-d", "0", "-f", "image",
               "-o", target, source]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=MAX_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ScanError("conversion_failed", f"{name}: dcm2niix took over {MAX_SECONDS:.0f} s and "
                                             "was ended") from error
    if done.returncode:
        raise ScanError("conversion_failed", f"{name}: dcm2niix ended with status "
                                             f"{done.returncode}; run it by hand on the series")


def _outcome(target: str, frames: int | None, name: str) -> tuple[bytes, dict[str, Any]]:
    """The image and sidecar that dcm2niix wrote; anything but one image is refused."""
    made = sorted(file for file in os.listdir(target) if not file.endswith(".json"))
    if any(file.endswith((".bval", ".bvec")) for file in made):
        raise _diffusion(name)
    if made != ["image.nii"]:
        raise ScanError("conversion_failed" if len(made) < 2 else "mixed_series",
                        f"{name}: one image is expected, dcm2niix made {', '.join(made) or 'none'} "
                        "(several echoes, phases or stacks); split the series")
    with open(os.path.join(target, "image.nii"), "rb") as file:
        image = file.read()
    shape = nib.Nifti1Header(image[:348], check=False).get_data_shape()
    if frames is not None and frames != int(np.prod(shape[2:])):
        raise ScanError("incomplete_series", f"{name}: {frames} frames became an image of shape "
                                             f"{tuple(int(n) for n in shape)}")
    with open(os.path.join(target, "image.json"), "rb") as file:
        return image, json.load(file)


def _facts(sidecar: dict[str, Any], header: Any, name: str) -> dict[str, object]:
    """FACTS and SCANNER of dcm2niix's sidecar, and of the header what it does not write."""
    facts: dict[str, object] = {key: sidecar[key] for key in (*FACTS, *SCANNER)
                                if sidecar.get(key) is not None}
    if agent := header.get("ContrastBolusAgent"):
        facts["ContrastBolusIngredient"] = str(agent)
    if units := header.get("Units"):
        facts["Units"] = _UNITS.get(str(units), str(units))
    tracer = (header.get("RadiopharmaceuticalInformationSequence") or [{}])[0]
    if dose := _number(tracer, "RadionuclideTotalDose", name):
        facts["InjectedRadioactivity"] = dose / 1e6
        facts["InjectedRadioactivityUnits"] = "MBq"
    if half_life := _number(tracer, "RadionuclideHalfLife", name):
        facts["RadionuclideHalfLife"] = half_life
    if "Units" in facts and (weight := _number(header, "PatientWeight", name)):
        facts["BodyWeight"] = weight
    return facts
