"""Three good scans of one synthetic head, and random damage to them, for fuzz.py."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from data_prep.volumes.reading.volume import Series, Volume, read_scan, read_series

TOLERANCE_MM = 2.0  # of the corners: what sform and qform may differ by without a flag
MIN_CORRELATION = 0.999  # of the voxels: MR has no unit, so scale and offset are free
_NUMBERS = (0, -1, 1, 2, 7, 255, -32768, 32767, 1e-30, 1e6, 1e30, -1e30, np.nan, np.inf, -np.inf)
FIELDS = [name for name in nib.nifti1.header_dtype.names  # those that say what the voxels are
          if name not in ("data_type", "db_name", "descrip", "aux_file", "intent_name")]


def head() -> tuple[np.ndarray, np.ndarray]:
    """A head of ellipsoids [36, 42, 38] at 5 mm, without any symmetry, and its affine."""
    shape, affine = (36, 42, 38), np.diag([5.0, 5.0, 5.0, 1.0])
    affine[:3, 3] = [-90.0, -122.0, -88.0]
    grid = np.stack(np.meshgrid(*(np.arange(size) * 5.0 + start for size, start in
                                  zip(shape, affine[:3, 3], strict=True)), indexing="ij"))

    def ball(centre: tuple[int, int, int], radii: tuple[int, int, int]) -> np.ndarray:
        offsets = (grid - np.reshape(centre, (3, 1, 1, 1))) / np.reshape(radii, (3, 1, 1, 1))
        return (offsets**2).sum(0) < 1

    data = np.random.default_rng(0).integers(0, 20, shape)
    for centre, radii, value in (((0, -17, 6), (76, 94, 84), 300), ((0, -17, 6), (64, 80, 70), 700),
                                 ((30, 5, 25), (16, 12, 14), 1200), ((-20, -60, -10), (9, 20, 9),
                                                                     500)):
        data[ball(centre, radii)] = value
    return data, affine


def _nifti(dtype: type, series: bool = False) -> bytes:
    data, affine = head()
    if series:
        data = np.stack([data, data + 1, data + 2], -1)
    image = nib.Nifti1Image(data.astype(dtype), affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    if series:
        image.header["pixdim"][4] = 2.0
    return image.to_bytes()


def _mgh() -> bytes:
    data, affine = head()
    return nib.MGHImage(data.astype(np.int16), affine).to_bytes()


GOOD: dict[str, tuple[str, bytes]] = {  # by ending: the name, the bytes before packing
    "T1w.nii": ("T1w.nii", _nifti(np.int16)),
    "T1w.nii.gz": ("T1w.nii.gz", _nifti(np.float32)),
    "T1w.mgz": ("T1w.mgz", _mgh()),
    "bold.nii.gz": ("bold.nii.gz", _nifti(np.int16, series=True)),
}


# ---- damage --------------------------------------------------------------------------------------

def damaged(rng: np.random.Generator, which: str) -> tuple[str, bytes]:
    """What was done to a good scan, and the file that came of it."""
    name, raw = GOOD[which]
    kinds: list[Callable[[Any, bytes], tuple[str, bytes]]] = [header_byte]
    if not name.endswith("mgz"):
        kinds += [field, field, field, codes]
    packed = name.endswith(("gz", "mgz"))
    if rng.random() < 0.7:
        told, raw = kinds[rng.integers(len(kinds))](rng, raw)
        return told, gzip.compress(raw, 1) if packed else raw
    whole = gzip.compress(raw, 1) if packed else raw
    return (file_byte if packed and rng.random() < 0.5 else length)(rng, whole)


def field(rng: np.random.Generator, raw: bytes) -> tuple[str, bytes]:
    """One value of one header field."""
    name = FIELDS[rng.integers(len(FIELDS))]
    header = np.frombuffer(raw[:348], nib.nifti1.header_dtype).copy()
    value = _NUMBERS[rng.integers(len(_NUMBERS))]
    place = header[name][0]
    with np.errstate(all="ignore"):
        if header.dtype[name].subdtype:
            index = rng.integers(place.size)
            place[index] = np.array(value, np.float64).astype(place.dtype)
        elif header.dtype[name].kind == "S":
            header[name] = rng.bytes(header.dtype[name].itemsize)
        else:
            header[name] = np.array(value, np.float64).astype(header.dtype[name])
    return f"field {name}", header.tobytes() + raw[348:]


def codes(rng: np.random.Generator, raw: bytes) -> tuple[str, bytes]:
    """sform_code and qform_code, in any combination."""
    header = np.frombuffer(raw[:348], nib.nifti1.header_dtype).copy()
    header["sform_code"], header["qform_code"] = rng.integers(-1, 5, 2)
    return "form codes", header.tobytes() + raw[348:]


def header_byte(rng: np.random.Generator, raw: bytes) -> tuple[str, bytes]:
    # An MGH header tells its geometry once, so that nothing contradicts a number that is changed
    # there: only what stands before it is.
    mgh = raw[:4] == b"\0\0\0\1"
    return _flipped(rng, raw, 30 if mgh else 348, "header byte")


def file_byte(rng: np.random.Generator, whole: bytes) -> tuple[str, bytes]:
    return _flipped(rng, whole, len(whole), "packed byte")


def _flipped(rng: np.random.Generator, data: bytes, end: int, told: str) -> tuple[str, bytes]:
    changed = bytearray(data)
    changed[rng.integers(end)] ^= int(rng.integers(1, 256))
    return told, bytes(changed)


def length(rng: np.random.Generator, whole: bytes) -> tuple[str, bytes]:
    """Cut, with something behind it, with a hole, twice in a row, or turned into text."""
    place = int(rng.integers(len(whole)))
    made = {"cut": whole[:place], "appended": whole + rng.bytes(int(rng.integers(1, 600))),
            "hole": whole[:place] + whole[place + int(rng.integers(1, 4000)):],
            "twice": whole + whole, "empty": b"", "text": b"<html>404</html>" + whole[:place],
            "packed again": gzip.compress(whole, 1)}
    kind = list(made)[rng.integers(len(made))]
    return kind, made[kind]


# ---- judgement -----------------------------------------------------------------------------------

def judge(path: Path, which: str) -> tuple[str, str]:
    """equal, flagged or silent, of a file that is read; what it raises is judged elsewhere."""
    if which.startswith("bold"):
        series = read_series(str(path), facts={"RepetitionTime": 2.0})
        return _compare(series, series.data.mean(3)) if series.tr_s == 2.0 else (
            "flagged" if series.flags else "silent", f"TR {series.tr_s}")
    volume = read_scan(str(path))
    return _compare(volume, volume.data)


def _compare(read: Volume | Series, data: np.ndarray) -> tuple[str, str]:
    if read.flags or read.notes:
        return "flagged", ";".join([*read.flags, *read.notes])
    good, affine = head()
    if data.shape != good.shape:
        return "silent", f"shape {data.shape}"
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in good.shape])).reshape(3, -1)
    change = read.affine - affine
    moved = np.linalg.norm(change[:3, :3] @ corners + change[:3, 3:], axis=0).max()
    alike = float(np.corrcoef(data.ravel().astype(np.float64), good.ravel())[0, 1])
    if moved > TOLERANCE_MM or not alike > MIN_CORRELATION:
        return "silent", f"corners {moved:.1f} mm off, correlation {alike:.4f}"
    return "equal", ""


def write(path: Path, content: bytes) -> None:
    with io.FileIO(path, "w") as file:
        file.write(content)
