"""The Scan record: one row of a manifest, and what later steps add to it.

``index`` writes manifests of Scans (no voxels are decoded); ``prepare`` adds status, scan_id and
figures and keeps every row, whatever became of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class Scan:
    """One scan as the cohort delivers it.  Unknown values are None, never 0."""

    uri: str  # file (or archive) that holds the voxels
    cohort: str
    participant: str  # keyed pseudonym
    family: str  # people that must share a split: family, or the person alone
    session: str  # "1" where the tree has no session level
    modality: str  # T1w, T2w, FLAIR, PET, BOLD
    split: str  # train, val, test: by family
    member: str | None = None  # path inside uri when uri is an archive
    age_at_scan: float | None = None  # years
    sex: str | None = None  # F, M
    site: str | None = None
    scanner: str | None = None
    field_strength: float | None = None  # tesla
    tracer: str | None = None
    mask_uri: str | None = None  # brain mask delivered with the scan
    label_uri: str | None = None  # label map delivered with the scan
    size_bytes: int | None = None
    modified: float | None = None  # seconds since the epoch


SCAN_SCHEMA = pa.schema([
    (name, pa.float64() if name in ("age_at_scan", "field_strength", "modified")
     else pa.int64() if name == "size_bytes" else pa.string())
    for name in Scan.__dataclass_fields__
])
