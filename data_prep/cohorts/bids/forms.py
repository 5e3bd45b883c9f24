"""One acquisition that lies there in several forms: one is taken, the others are named.

1. Names that differ in the form of the file alone, a stale .nii beside a defaced .nii.gz: the
   order of filenames.IMAGES decides; a file in the folder that BIDS has for it comes before others.
2. Names that differ in rec-, or in a word of acq- that tells a form: the order of bids.yaml.
3. Structural scans of one session whose sidecars tell of one acquisition (equal SeriesInstanceUID;
   equal AcquisitionTime and EchoTime; or series of consecutive numbers whose ImageType differs in
   such a word alone): again the order of bids.yaml, by the words of ImageType.

The others stay in the manifest, with the reason ``other_form``, and are not read.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from data_prep.cohorts.bids.derived import UNUSABLE, Taken
from data_prep.cohorts.bids.names import ANATOMICAL, habits
from data_prep.cohorts.source import Found
from data_prep.filenames import IMAGES, image_ending, is_partner, partners

OTHER_FORM = "other_form"
_FOLDERS = ("anat", "func", "pet")


def join_pairs(files: Sequence[Found], notes: Counter[str]) -> list[Found]:
    """Each .hdr with its .img as one file of both sizes; a .img alone is counted."""
    voxels = {found.path: found for found in files if is_partner(found.name)}
    joined = []
    for found in files:
        if found.path in voxels or is_partner(found.name):
            continue
        if (image_ending(found.name) or "").startswith("hdr"):
            place = next((place for place in partners(found.path) if place in voxels), None)
            found = _joined(found, voxels.pop(place)) if place else found
        joined.append(found)
    if voxels:
        notes["not taken: .img without its .hdr"] += len(voxels)
    return joined


def _joined(header: Found, voxels: Found) -> Found:
    if header.size_bytes is None or voxels.size_bytes is None:
        return replace(header, size_bytes=None)
    return replace(header, size_bytes=header.size_bytes + voxels.size_bytes,
                   modified=max(header.modified or 0, voxels.modified or 0) or None)


def form_rank(found: Found) -> tuple[bool, int, str]:
    """Place in the order of rule 1."""
    ending = image_ending(found.name)
    return (found.folder.rpartition("/")[2] not in _FOLDERS,
            IMAGES.index(ending) if ending else len(IMAGES), found.path)


def rule_out_other_forms(taken: Iterable[Taken], notes: Counter[str]) -> None:
    """Give all but one form of each acquisition the reason ``other_form``, and count them."""
    left = [one for one in taken if one.processing is None]
    left = _best_of(left, lambda one: (one.image.name.suffix, one.image.name.without()), notes)
    left = _best_of(left, _reconstructed, notes)
    structural = [one for one in left if one.modality in ANATOMICAL]
    for told in (_series, _time, _number(structural)):
        structural = _best_of(structural, told, notes)


def _best_of(taken: list[Taken], key: Callable[[Taken], Hashable], notes: Counter[str]
             ) -> list[Taken]:
    """The best form of each group of equal keys; what has the key None stands alone."""
    groups: dict[Hashable, list[Taken]] = defaultdict(list)
    for one in taken:
        groups[id(one) if (value := key(one)) is None else value].append(one)
    for group in groups.values():
        group.sort(key=lambda one: (_words_rank(one), form_rank(one.image.found)))
        for other in group[1:]:
            if other.reason == UNUSABLE:  # another form of what the cohort rules out is no better
                group[0].reason = UNUSABLE
            other.reason = OTHER_FORM
            notes["not taken: another form of a scan that is taken (other_form)"] += 1
    return [group[0] for group in groups.values()]


# ---- what tells of one acquisition ---------------------------------------------------------------

def _reconstructed(one: Taken) -> Hashable:
    name = one.image.name
    acquired = _parted(name.entities.get("acq", ""))[0]
    return name.suffix, name.without("rec", "acq"), acquired


def _series(one: Taken) -> Hashable:
    uid = one.facts.get("SeriesInstanceUID")
    return uid and (one.session, one.modality, uid)


def _time(one: Taken) -> Hashable:
    time = one.facts.get("AcquisitionTime")
    return time and (one.session, one.modality, str(time), str(one.facts.get("EchoTime")))


def _number(taken: list[Taken]) -> Callable[[Taken], Hashable]:
    """Series n and n + 1 of a session whose ImageType differs in the words of forms alone."""
    pairs: dict[int, Hashable] = {}
    known = {(one.session, one.modality, one.facts.get("SeriesNumber")): one for one in taken}
    for (session, modality, number), one in known.items():
        after = known.get((session, modality, number + 1)) if isinstance(number, int) else None
        if after is None or id(one) in pairs:
            continue
        types, forms = (_types(one), _types(after)), {*habits()["forms"], "m"}
        if all(types) and types[0] != types[1] and types[0] - forms == types[1] - forms:
            pairs[id(one)] = pairs[id(after)] = (session, modality, number)
    return lambda one: pairs.get(id(one))


# ---- words that tell forms apart -----------------------------------------------------------------

def _parted(value: str) -> tuple[str, str]:
    """The value of acq- without a word that tells a form, and that word in lower case.

    >>> _parted("mprageNORM"), _parted("ND"), _parted("highres")
    (('mprage', 'norm'), ('', 'nd'), ('highres', ''))
    """
    words = [word for word in habits()["forms"] if word]
    if value.lower() in words:
        return "", value.lower()
    long = "|".join(word for word in words if len(word) > 3)
    match = re.fullmatch(rf"(.*?)((?i:{long})|(?<=[a-z0-9])ND)", value)
    return (match[1], match[2].lower()) if match else (value, "")


def _types(one: Taken) -> set[str]:
    value: Any = one.facts.get("ImageType")
    return {str(word).lower() for word in value} if isinstance(value, list) else set()


def _words_rank(one: Taken) -> list[int]:
    """Places in the order of bids.yaml of the words in a name and an ImageType, best first."""
    order: list[str] = habits()["forms"]
    entities = one.image.name.entities
    words = {entities.get("rec", "").lower(), _parted(entities.get("acq", ""))[1], *_types(one)}
    places = sorted(order.index(word) for word in words if word and word in order)
    if places:
        return places
    return [order.index("") if "rec" not in entities else len(order)]
