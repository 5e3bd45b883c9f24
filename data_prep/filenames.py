"""What a file's name tells: an image and in which form, or what an operating system left behind.

A name only says which files are looked at; what a file is, its first bytes decide (sniff.py).
"""

from __future__ import annotations

import re

# Forms in which one image may lie, best first: the first is what BIDS writes, and what defacing
# and conversion write beside an older .nii.
IMAGES = ("nii.gz", "nii", "nii.zst", "nii.bz2", "mgz", "mgh", "mgh.gz", "hdr", "hdr.gz")
PARTNERS = ("img", "img.gz")  # voxels of a .hdr
_IMAGE = re.compile(rf"\.({'|'.join(map(re.escape, sorted(IMAGES, key=len, reverse=True)))})$",
                    re.IGNORECASE)
_PARTNER = re.compile(r"\.(img|img\.gz)$", re.IGNORECASE)


def image_ending(name: str) -> str | None:
    """The form of an image by its name, in lower case ("nii.gz"); None for other files.

    >>> image_ending("sub-1_T1w.NII.GZ")
    'nii.gz'
    """
    match = _IMAGE.search(name)
    return match[1].lower() if match else None


def stem(name: str) -> str:
    """A name without the ending of an image, a .json or whatever follows its last dot.

    >>> stem("sub-1_acq-0.8_T1w.nii.gz"), stem("sub-1_acq-0.8_T1w.json")
    ('sub-1_acq-0.8_T1w', 'sub-1_acq-0.8_T1w')
    """
    match = _IMAGE.search(name) or _PARTNER.search(name)
    return name[:match.start()] if match else name.rpartition(".")[0] or name


def is_partner(name: str) -> bool:
    """Whether a name is that of the voxels of a .hdr."""
    return _PARTNER.search(name) is not None


def partners(path: str) -> list[str]:
    """Where the .img of a .hdr may lie, or the other way round, likeliest first.

    >>> partners("a/T1w.HDR")[:2]
    ['a/T1w.IMG', 'a/T1w.img']
    """
    folder, slash, name = path.rpartition("/")
    match = _PARTNER.search(name)
    ending = match[1] if match else name[len(stem(name)) + 1:]
    kind, _, packed = ending.partition(".")
    other = {"hdr": "img", "img": "hdr"}.get(kind.lower())
    if other is None:
        return []
    spelt = [other.upper(), other] if kind.isupper() else [other, other.upper()]
    packings = [f".{packed}", ""] if packed else ["", ".gz", ".GZ"]
    return [f"{folder}{slash}{stem(name)}.{spelling}{packing}"
            for packing in packings for spelling in spelt]


def other_file(name: str) -> str:
    """How a file that is not used is counted: by what follows its last dot, or the last two.

    >>> other_file("sub-1_dwi.bval"), other_file("x.Tar.GZ"), other_file("README")
    ('bval file', 'tar.gz file', 'file without an ending')
    """
    match = re.search(r"((?:\.[a-z0-9]{1,8})?)\.(?=[0-9]*[a-z])([a-z0-9~]{1,12})$", name.lower())
    if not match:
        return "file without an ending"
    packed = match[2] in ("gz", "bz2", "zst", "xz", "nii", "gii")
    return f"{(match[1] + '.' if packed else '').lstrip('.')}{match[2]} file"


def is_hidden(path: str) -> bool:
    """Whether a file, or a folder it lies in, is hidden or was left by macOS (._x, __MACOSX)."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))
