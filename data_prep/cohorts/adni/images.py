"""Where ADNI's images lie: in participants' folders, unpacked or inside the zips of a download.

Only names are looked at.  A NIfTI file is an image, and so is a folder of DICOM slices.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from data_prep.cohorts.adni.tables import PTID
from data_prep.cohorts.left_out import HIDDEN
from data_prep.cohorts.source import Found, Source
from data_prep.filenames import image_ending, is_hidden, other_file
from data_prep.members import list_members
from data_prep.scan import ScanError

_DICOM = (".dcm", ".ima", ".dcm.gz", ".ima.gz")
_NUMBERS = re.compile(r"(?:_S(\d+))?_I(\d+)\.[A-Za-z0-9.]+$")
_STAMP = re.compile(r"\d{4}-\d{2}-\d{2}_\d{2}_\d{2}_\d{2}")


@dataclass
class Place:
    """What lies where in a source."""

    people: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    tables: list[str] = field(default_factory=list)
    zips: list[Found] = field(default_factory=list)


def survey(source: Source, under: str, place: Place) -> None:
    """Participants' folders, tables and zips; several trees may lie beside each other."""
    files, folders = source.listing(under)
    for found in files:
        name = found.name.lower()
        if name.endswith((".csv", ".parquet")):
            place.tables.append(found.uri)
        elif name.endswith(".zip"):
            place.zips.append(found)
        elif _is_image(name):
            source.notes["not taken: image outside a participant's folder"] += 1
        else:
            source.notes[_other(name)] += 1
    for name in folders:
        path = f"{under}/{name}" if under else name
        if PTID.fullmatch(name):
            place.people[name].append(path)
        else:
            survey(source, path, place)


def _is_image(name: str) -> bool:
    return image_ending(name) is not None or name.lower().endswith(_DICOM)


def _other(name: str) -> str:
    return f"not taken: {other_file(name)}"


@dataclass
class Image:
    """A NIfTI file or a folder of DICOM files, by its names alone."""

    path: str  # of a DICOM series: its folder and "/"
    name: str  # of the (first) file
    size_bytes: int | None
    modified: float | None
    mixed: bool = False  # a folder with files of several images
    uri: str = ""
    member: str | None = None
    missing: bool = False  # content is not downloaded
    slice: Found | None = None  # one of a DICOM series outside a zip

    @property
    def numbers(self) -> tuple[str | None, str | None]:
        """Image and series number, of the file's name, else of its folders'."""
        match = _NUMBERS.search(self.name)
        folders = {name[0]: name[1:] for name in self.path.split("/")
                   if re.fullmatch(r"[IS]\d+", name)}
        image = match[2] if match else folders.get("I")
        series = (match and match[1]) or folders.get("S")
        return (None if self.mixed else image), series

    @property
    def parts(self) -> tuple[str, str, str]:
        """Participant, name of the series' folder, and time stamp of the path ("" for none)."""
        folders = self.path.split("/")[:-1]
        start = next(place for place, name in enumerate(folders) if PTID.fullmatch(name))
        stamp = next((name for name in folders[start:] if _STAMP.match(name)), "")
        return folders[start], folders[start + 1] if len(folders) > start + 1 else "", stamp


def _gather(files: Iterable[tuple[str, int | None, float | None]]
            ) -> tuple[list[Image], Counter[str]]:
    """Images below participants' folders, and what else lies there."""
    images: list[Image] = []
    series: dict[str, Image] = {}
    others: Counter[str] = Counter()
    for path, size, modified in files:
        folder, _, name = path.rpartition("/")
        people = [part for part in folder.split("/") if PTID.fullmatch(part)]
        named = re.match(r"ADNI_(\d{3}_S_\d{4,5})_", name)
        if is_hidden(path):
            others[HIDDEN] += 1
        elif not _is_image(name):
            others[_other(name)] += 1
        elif not people:
            others["not taken: image outside a participant's folder"] += 1
        elif named and named[1] != people[0]:
            others["not taken: file name and folder name different people"] += 1
        elif image_ending(name):
            images.append(Image(path, name, size, modified, missing=size is None))
        elif folder not in series:
            series[folder] = Image(f"{folder}/", name, size, modified, missing=size is None)
        else:
            known = series[folder]
            known.missing |= size is None
            known.size_bytes = (known.size_bytes or 0) + (size or 0)
            known.modified = max(filter(None, (known.modified, modified)), default=None)
            known.mixed |= _image_number(known.name) != _image_number(name)
    return images + list(series.values()), others


def _image_number(name: str) -> str | None:
    match = _NUMBERS.search(name)
    return match[2] if match else None


def unpacked(source: Source, folder: str) -> list[Image]:
    files = {found.path: found for found in source.walk(folder)}
    images, others = _gather((found.path, found.size_bytes, found.modified)
                             for found in files.values())
    source.notes.update(others)
    for image in images:
        if image.path in files:
            found = files[image.path]
            image.uri, image.missing = found.uri, source.not_downloaded(found)
        else:
            image.slice = files[image.path + image.name]
            image.uri = image.slice.uri.removesuffix(image.name)
    return images


def zipped(source: Source, zips: list[Found]) -> defaultdict[str, list[Image]]:
    """Images inside zips by participant, whose images may be spread over several."""
    people: defaultdict[str, list[Image]] = defaultdict(list)
    for found in zips:
        listing = source.opened(found, _listing)
        source.notes.update(listing["others"])
        for known in listing["images"]:
            image = Image(**{**known, "uri": found.uri, "member": known["path"],
                              "modified": found.modified})
            people[image.parts[0]].append(image)
    return people


def _listing(found: Found) -> dict[str, Any]:
    """What an index remembers of a zip."""
    try:
        images, others = _gather((member["name"], member["size"], None)
                                 for member in list_members(found.uri))
    except ScanError as error:
        return {"images": [], "others": {f"zip that cannot be read ({error.code}): not used": 1}}
    return {"images": [asdict(image) for image in images], "others": dict(others)}
