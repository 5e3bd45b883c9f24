"""The Scan record, and manifests: tables of Scans, each with a table of labels beside it.

``index`` writes manifests (no voxels are decoded); ``prepare`` adds status, scan_id and figures to
each Scan and keeps every row, whatever became of it (rows.py).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pyarrow as pa

from data_prep.tables import read_table
from neurojepa.errors import ConfigError, DataError


class ScanError(DataError):
    """A scan that cannot be used; ``code`` names the reason in the quarantine table."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Scan:
    """One scan as the cohort delivers it.  Unknown values are None, never 0.

    A series of DICOM files is named by its folder: ``uri`` (or ``member``) ends in "/".  The
    ``*_uri`` fields name companions; one inside an archive is written ARCHIVE::MEMBER.
    """

    uri: str  # file, archive, or folder of a DICOM series
    cohort: str
    participant: str  # keyed pseudonym
    family: str  # people that must share a split: family, or the person alone
    session: str  # "1" where the tree has no session level
    modality: str  # T1w, T2w, FLAIR, PET, BOLD
    split: str  # train, val, test: by family
    member: str | None = None  # path inside uri when uri is an archive
    reason: str | None = None  # why the cohort rules the scan out: rejected without being read
    age_at_scan: float | None = None  # years
    sex: str | None = None  # F, M
    site: str | None = None
    scanner: str | None = None
    field_strength: float | None = None  # tesla
    tracer: str | None = None  # of a PET, as pet_table.py spells it
    processing: str | None = None  # before delivery: fmriprep, xcp_d, fix, a PET level; None: raw
    mask_uri: str | None = None  # brain mask delivered with the scan
    label_uri: str | None = None  # label map delivered with the scan
    transform_uri: str | None = None  # FLIRT matrix (text) of the scan to MNI152 at 1 mm
    confounds_uri: str | None = None  # motion of a BOLD series: fMRIPrep confounds, mcf.par, FD
    surface_uri: str | None = None  # midthickness of a CIFTI file: LEFT.surf.gii;RIGHT.surf.gii
    facts: str | None = None  # JSON: what preparation needs of the sidecar (FACTS below)
    size_bytes: int | None = None
    modified: float | None = None  # seconds since the epoch

    @property
    def turn(self) -> str | None:
        """What the user says of its axes (reading/turn.py); None: the header is put to the test."""
        return json.loads(self.facts).get(TURN) if self.facts else None


# Sidecar keys kept in ``facts``: BIDS names, whatever the cohort calls them.
FACTS = ("FrameTimesStart", "FrameDuration", "Units", "TimeZero", "InjectionStart",
         "RepetitionTime", "VolumeTiming", "EchoTime", "SliceThickness", "MRAcquisitionType",
         "ImageType", "ContrastBolusIngredient", "Defaced", "RadionuclideHalfLife",
         "InjectedRadioactivity", "InjectedRadioactivityUnits", "BodyWeight")

_MEMBER = re.compile(r"(.*?\.(?:zip|tgz|tar|tar\.gz))::(.*)", re.IGNORECASE | re.DOTALL)
TURN = "Turn"  # the key in ``facts`` that prepare --turn writes, and no sidecar

SCAN_SCHEMA = pa.schema([
    (name, pa.float64() if name in ("age_at_scan", "field_strength", "modified")
     else pa.int64() if name == "size_bytes" else pa.string())
    for name in Scan.__dataclass_fields__
])


def split_member(uri: str) -> tuple[str, str | None]:
    """ARCHIVE::MEMBER to its two parts; a plain URI, which may hold "::" too, has no member."""
    match = _MEMBER.fullmatch(uri)
    return (match[1], match[2]) if match else (uri, None)


def labels_path(manifest: str) -> str:
    """Where the labels of a manifest lie: X.labels.parquet beside X.parquet."""
    if not manifest.endswith(".parquet"):
        raise ConfigError(f"{manifest}: a manifest's name must end in .parquet")
    return manifest.removesuffix(".parquet") + ".labels.parquet"


def read_manifest(path: str) -> tuple[pa.Table, pa.Table]:
    """The scans of a manifest (SCAN_SCHEMA), and their people's labels.

    Raises
    ------
    DataError
        One of the two tables is missing, not Parquet, or lacks columns.
    """
    return (read_table(path, SCAN_SCHEMA.names).cast(SCAN_SCHEMA),
            read_table(labels_path(path)))
